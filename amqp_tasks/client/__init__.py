"""What a producer holds: tasks to call, and handles on what it has called."""

from .client import Client, open_client
from .events import TaskEvent, TaskEvents
from .handle import TaskHandle
from .options import CallOptions
from .remote import RemoteTaskGroup, open_remote_task_group
from .state import TaskState
from .task import Task

__all__ = [
    "CallOptions",
    "Client",
    "RemoteTaskGroup",
    "Task",
    "TaskEvent",
    "TaskEvents",
    "TaskHandle",
    "TaskState",
    "open_client",
    "open_remote_task_group",
]
