"""The errors of the bridge: guillotina_amqp's by their names, and the bridge's own.

All derive from `amqp_tasks.AmqpTasksError`.
"""

from __future__ import annotations

from amqp_tasks import AmqpTasksError, NoRetry, NotConnected, TaskNotFound

__all__ = [
    "AMQPConfigurationNotFoundError",
    "ContainerNotFound",
    "ObjectNotFoundException",
    "TaskAccessUnauthorized",
    "TaskAlreadyAcquired",
    "TaskMaxRetriesReached",
    "TaskNotFinishedException",
    "TaskNotFoundException",
]


class AMQPConfigurationNotFoundError(NotConnected):
    """Raised when tasks are used and the bridge does not run: no application of it, or no start."""


class ContainerNotFound(NoRetry):
    """Raised when a task's container, or its database, is not there any more.

    The task fails for good: who deletes a container deletes what was to be done in it.
    """


class ObjectNotFoundException(AmqpTasksError):
    """Raised in an object task whose object is not there any more.

    The task finishes, without a result: there is nothing left to do.
    """


class TaskNotFoundException(TaskNotFound):
    """Raised when no state is known for a task id: never scheduled, or expired since."""


class TaskNotFinishedException(AmqpTasksError):
    """Raised when the result of a task is asked for that has not ended."""


class TaskAccessUnauthorized(AmqpTasksError):
    """Raised when a task is asked for by somebody whom it is no business of."""


class TaskAlreadyAcquired(AmqpTasksError):
    """Never raised; a task that runs elsewhere is none of its workers' users' business.

    The name is there for code that catches it.
    """


class TaskMaxRetriesReached(AmqpTasksError):
    """Never raised; a task without retries left is errored.

    The name is there for code that catches it.
    """
