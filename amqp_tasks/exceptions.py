"""Every error that this package raises on purpose, one class each.

All derive from `AmqpTasksError`, so ``except AmqpTasksError`` catches what the
framework has to say and nothing else. Each message names the value that was
wrong and what would be right. `LoopBlocked` alone is of another kind: it is no
answer to a call, but stops the task that it hits.
"""

from __future__ import annotations

__all__ = [
    "AmqpTasksError",
    "AppNotFound",
    "ArgumentsError",
    "BrokerError",
    "BrokerRefused",
    "BrokerUnavailable",
    "DecodeError",
    "DefinitionError",
    "DuplicateTask",
    "IllegalTransition",
    "LoopBlocked",
    "NoRetry",
    "NotConnected",
    "PublishFailed",
    "QueueMismatch",
    "RemoteTaskError",
    "ResultTimeout",
    "SettingsError",
    "StateStoreError",
    "StateStoreRefused",
    "StateStoreUnavailable",
    "TaskCanceled",
    "TaskNotFound",
    "UnknownTask",
]


class AmqpTasksError(Exception):
    """Base of all errors of this package."""


class SettingsError(AmqpTasksError):
    """Raised when a setting has a value that it cannot have."""


class DefinitionError(AmqpTasksError):
    """Raised when a function cannot become a task."""


class DuplicateTask(DefinitionError):
    """Raised when a second task is registered under a name that is taken."""


class ArgumentsError(AmqpTasksError, TypeError):
    """Raised when arguments do not fit a task's signature or its annotations."""


class UnknownTask(AmqpTasksError):
    """Raised when a name is not that of a task which this app serves."""


class AppNotFound(AmqpTasksError):
    """Raised when ``module:attribute`` does not lead to a `TaskApp`."""


class NoRetry(AmqpTasksError):
    """Raised in a task, by its author, to fail for good, whatever its retry policy says.

    Raise it, or a class of your own that derives from it, where trying again is futile.
    """


class NotConnected(AmqpTasksError):
    """Raised when an app is used outside of `TaskApp.connect` or `TaskApp.worker`."""


class DecodeError(AmqpTasksError):
    """Raised when a message is not one of ours.

    `task_id` holds the id if at least that much of the message could be read.
    """

    def __init__(self, message: str, *, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class IllegalTransition(AmqpTasksError):
    """Raised when an event cannot happen to a task in its present state."""


class BrokerError(AmqpTasksError):
    """Base of what can go wrong with the message broker."""


class BrokerUnavailable(BrokerError):
    """Raised when the broker cannot be reached, or the connection to it was lost."""


class BrokerRefused(BrokerError):
    """Raised when the broker answers and says no: login, virtual host, permission."""


class QueueMismatch(BrokerError):
    """Raised when a queue exists already, with other arguments than ours."""


class PublishFailed(BrokerError):
    """Raised when a message was not confirmed by the broker.

    `maybe` is True when the message may be in the queue all the same (the
    connection went away, or the time was up, before the answer came), and False
    when it certainly is not.
    """

    def __init__(self, message: str, *, maybe: bool) -> None:
        super().__init__(message)
        self.maybe = maybe


class StateStoreError(AmqpTasksError):
    """Base of what can go wrong with the state store."""


class StateStoreUnavailable(StateStoreError):
    """Raised when the state store cannot be reached or does not answer in time."""


class StateStoreRefused(StateStoreError):
    """Raised when the state store answers and says no: login, permission, read-only."""


class StateCorrupt(StateStoreError):
    """Raised when what is stored under a task's id is not a task's state."""


class TaskNotFound(AmqpTasksError):
    """Raised when no state is known for a task id: never queued, or expired since."""


class TaskCanceled(AmqpTasksError):
    """Raised when the result of a canceled task is asked for."""


class ResultTimeout(AmqpTasksError, TimeoutError):
    """Raised when a task has not ended within the time its caller waits for it."""


class RemoteTaskError(AmqpTasksError):
    """Raised when the result of an errored task is asked for.

    `type` is the dotted name of the exception's class on the worker, `message`
    its text, `traceback` the formatted traceback and `reason` a word from
    `amqp_tasks.core.outcome.Reason` when there is more to say than "it raised".
    """

    def __init__(
        self,
        task_id: str,
        *,
        type: str,
        message: str,
        traceback: str,
        reason: str | None = None,
    ) -> None:
        super().__init__(task_id, type, message, traceback, reason)
        self.task_id = task_id
        self.type = type
        self.message = message
        self.traceback = traceback
        self.reason = reason

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"task {self.task_id!r} failed{why}: {self.type}: {self.message}"


class LoopBlocked(BaseException):
    """Raised in a task that captures the event loop, wherever it is at that moment.

    Like a cancellation it is no `Exception`: code that catches those to try again, or to
    log them and go on, is the very code that captures loops. Catch it to clean up, if
    need be, and raise it again.
    """
