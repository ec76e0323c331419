"""A task framework for asyncio and Trio, over RabbitMQ and Redis.

::

    from amqp_tasks import TaskApp

    app = TaskApp(queue="shop")

    @app.task
    async def add(a: int, b: int) -> int:
        return a + b

    async with app.connect():
        handle = await add(1, 2)
        assert await handle.result(timeout=10) == 3

and, elsewhere, ``python -m amqp_tasks worker --app shop.tasks:app``.
"""

from .app import TaskApp
from .client import RemoteTaskGroup, Task, TaskEvent, TaskHandle, TaskState
from .client.errors import ErrorLetter, ErrorQueue
from .core.lifecycle import TaskStatus
from .core.outcome import CancelReason
from .core.retry import RetryPolicy
from .exceptions import (
    AmqpTasksError,
    AppNotFound,
    ArgumentsError,
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    DecodeError,
    DefinitionError,
    DuplicateTask,
    LoopBlocked,
    NoRetry,
    NotConnected,
    PublishFailed,
    QueueMismatch,
    RemoteTaskError,
    ResultTimeout,
    SettingsError,
    StateCorrupt,
    StateStoreError,
    StateStoreRefused,
    StateStoreUnavailable,
    TaskCanceled,
    TaskNotFound,
    UnknownTask,
)
from .runtime.attempt import Attempt, MessageType, current_attempt
from .runtime.errors import Replayed
from .runtime.executor import Middleware
from .runtime.worker import Worker
from .settings import Settings

__all__ = [
    "AmqpTasksError",
    "AppNotFound",
    "ArgumentsError",
    "Attempt",
    "BrokerError",
    "BrokerRefused",
    "BrokerUnavailable",
    "CancelReason",
    "DecodeError",
    "DefinitionError",
    "DuplicateTask",
    "ErrorLetter",
    "ErrorQueue",
    "LoopBlocked",
    "MessageType",
    "Middleware",
    "NoRetry",
    "NotConnected",
    "PublishFailed",
    "QueueMismatch",
    "RemoteTaskError",
    "RemoteTaskGroup",
    "Replayed",
    "ResultTimeout",
    "RetryPolicy",
    "Settings",
    "SettingsError",
    "StateCorrupt",
    "StateStoreError",
    "StateStoreRefused",
    "StateStoreUnavailable",
    "Task",
    "TaskApp",
    "TaskCanceled",
    "TaskEvent",
    "TaskHandle",
    "TaskNotFound",
    "TaskState",
    "TaskStatus",
    "UnknownTask",
    "Worker",
    "add_task",
    "current_attempt",
    "default_app",
    "task",
]

default_app = TaskApp()
"""An app configured by ``AMQP_TASKS_*`` variables alone."""

task = default_app.task
"""`TaskApp.task` of the default app."""

add_task = default_app.add_task
"""`TaskApp.add_task` of the default app."""
