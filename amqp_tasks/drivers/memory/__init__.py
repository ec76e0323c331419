"""A broker and a state store in the memory of one process.

They behave as RabbitMQ and Redis do, as far as the runtime can see (one conformance
suite says so for all), and they run on whichever event loop they are called from: with
them a whole worker runs on one loop, under a virtual clock if need be. Nothing survives
the process.
"""

from .broker import MemoryBroker
from .store import MemoryStore

__all__ = ["MemoryBroker", "MemoryStore"]
