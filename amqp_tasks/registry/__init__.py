"""What can be run: functions with a name, and how their arguments travel as JSON."""

from .definition import FunctionKind, TaskDefinition
from .naming import importable_name
from .registry import TaskRegistry
from .signature import CallSignature

__all__ = ["CallSignature", "FunctionKind", "TaskDefinition", "TaskRegistry", "importable_name"]
