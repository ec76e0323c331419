"""A state store on Redis."""

from .store import RedisStore

__all__ = ["RedisStore"]
