"""What a producer holds: tasks to call, and handles on what it has called."""

from .client import Client, open_client
from .handle import TaskHandle
from .options import CallOptions
from .state import TaskState
from .task import Task

__all__ = ["CallOptions", "Client", "Task", "TaskHandle", "TaskState", "open_client"]
