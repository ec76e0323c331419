"""RabbitMQ, by way of aiormq. Needs asyncio (or uvloop), and knows no runtime.

One session is one connection. On it live a channel for publishing, one for each consumer,
and short-lived ones for declarations, because a declaration that fails costs its channel,
and with the channel its deliveries and confirms.

Every call that has an answer runs in a task of the session's, and the caller waits for that
task. So a cancelled caller never interrupts aiormq between a question and its answer (that
closes the channel), and a `CancelledError` of aiormq's own making (that is how it reports a
lost connection) ends that task and is translated there. Publishing alone runs in the
caller's task, for speed: aiormq keeps its numbering right when it is cancelled.
"""

from .broker import RabbitBroker

__all__ = ["RabbitBroker"]
