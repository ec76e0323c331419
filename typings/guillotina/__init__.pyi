# Any: see the section of mypy in pyproject.toml.

from typing import Any

def __getattr__(name: str) -> Any: ...
