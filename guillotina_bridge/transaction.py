"""A task's transaction: begun, and then committed or aborted to the end, whoever is cancelled.

guillotina's own commit and abort run in tasks of their own, which go on when their caller is
cancelled. A task that was reported as canceled would then be stored all the same.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Coroutine
from contextvars import copy_context
from typing import Any, Final

from guillotina import task_vars
from guillotina.db.interfaces import IPostgresStorage, ITransaction
from guillotina.db.transaction import Status
from guillotina.db.transaction_manager import TransactionManager
from guillotina.interfaces import IDatabase

from amqp_tasks import current_attempt

from .aio import always, current_task, finish, run_in
from .connections import limit_connections, take_connection

__all__ = ["abort", "begin", "commit", "drop_futures", "run_futures"]

log = logging.getLogger(__name__)

PATIENCE: Final = 30.0
"""Seconds that a commit, or a future, may go on after its task was cancelled, and an abort
may take at all. Then the connection to the database is closed, or the future cancelled; and a
commit that goes on all the same for as long again is cancelled, in the hook that it waits in."""


async def begin(db: IDatabase) -> ITransaction:
    """Begin a transaction, and make it and its database the current ones."""
    limit_connections(db)
    tm = db.get_transaction_manager()
    task_vars.db.set(db)
    task_vars.tm.set(tm)
    return await tm.begin()


async def commit(txn: ITransaction) -> None:
    """Commit a transaction.

    When this raises, nothing is stored. What fails after that, and a cancellation that came
    too late, do not count: what is stored has happened.
    """
    await take_connection(txn)
    ended = await finish(_committing(txn), impatient=_is_cancelled, patience=PATIENCE)
    if not ended.task.done():
        await _disconnect(txn)
        # It fails now; and if it should not, it may not be stored behind our back.
        ended = ended.then(await finish(ended.task, impatient=always, patience=PATIENCE))
    is_stored = False
    if not ended.task.done():
        # It waits for no database, then: in a hook before the commit, in one after it, or for
        # the cache, which comes between COMMIT and the status that tells of it.
        is_stored = txn.status == Status.COMMITTING
        if not is_stored:
            _forbid(txn)
        ended.task.cancel()
        ended = ended.then(await finish(ended.task, impatient=always, patience=PATIENCE))
    error = _error(ended.task)
    if is_stored or txn.status == Status.COMMITTED:
        ended.overtake()
        if error is not None:
            log.error("a transaction was committed, and what came then failed", exc_info=error)
    elif ended.native_cancels:
        raise asyncio.CancelledError from error
    elif error is not None:
        raise error


def _committing(txn: ITransaction) -> Coroutine[Any, Any, None]:
    """Return what commits a transaction, and ends when it is cancelled.

    guillotina's own `commit` only lets go of what it does in a task that nobody else has.
    """
    manager = txn.manager
    if type(manager).commit is TransactionManager.commit:
        return manager._commit(txn=txn)  # type: ignore[no-any-return]
    return manager.commit(txn=txn)  # type: ignore[no-any-return]


def _forbid(txn: ITransaction) -> None:
    """See to it that a transaction which is not in its commit yet never stores anything.

    The hook that it is in may not heed a cancellation, and return much later.
    """

    async def refuse() -> None:
        raise RuntimeError("the transaction was given up, because a hook before it did not end")

    txn.tpc_commit = txn.tpc_finish = refuse


async def abort(txn: ITransaction) -> None:
    """Abort what is left of a transaction, and give its connection back to the pool.

    Raises nothing: whoever aborts has an error to tell of already.
    """
    if txn.status == Status.COMMITTED and not txn.connection_reserved:
        return  # as most are; a search after a commit takes a connection again
    ended = await finish(txn.manager.abort(txn=txn), impatient=always, patience=PATIENCE)
    if not ended.task.done():
        await _disconnect(txn)
        ended = ended.then(await finish(ended.task, impatient=always, patience=1))
        ended.task.cancel()
    ended.overtake()
    error = _error(ended.task)
    if error is not None:
        log.error("a transaction could not be aborted", exc_info=error)


async def _disconnect(txn: ITransaction) -> None:
    log.error("a transaction has not ended within %g s; its connection is closed", PATIENCE)
    if txn.connection_reserved and IPostgresStorage.providedBy(txn.storage):
        await txn.storage.terminate(await txn.get_connection())


def _error(task: asyncio.Task[None]) -> BaseException | None:
    if not task.done():
        task.add_done_callback(_ended_late)
        return TimeoutError("it goes on and on")
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def _ended_late(task: asyncio.Task[None]) -> None:
    # Nobody waits any more: asyncio would complain that its exception was never retrieved.
    error = None if task.cancelled() else task.exception()
    log.error("what a transaction could not wait for has ended at last", exc_info=error)


def _is_cancelled() -> bool:
    return current_attempt().cancel_reason is not None


# ------------------------------------------------------------------------ futures

Futures = dict[str, dict[str, Any]]
"""As `guillotina.utils.execute` keeps them: by name the members fut, args and kwargs."""


async def run_futures() -> None:
    """Run what is to be done after the request, one after the other.

    Each has a context of its own, without a transaction, as after a request. What fails is
    logged, because the task has been committed; a cancellation ends what then goes on for
    too long.
    """
    futures = _take_futures()
    if not futures:
        return
    ended = await finish(_run_all(futures), impatient=_is_cancelled, patience=PATIENCE)
    ended.overtake()
    if not ended.task.done():
        ended.task.cancel()
        again = await finish(ended.task, impatient=always, patience=1)
        again.overtake()


async def _run_all(futures: Futures) -> None:
    try:
        while futures:
            name = next(iter(futures))
            futures.update(await run_in(copy_context(), _run_future(name, **futures.pop(name))))
    finally:
        _close(futures)


async def _run_future(name: str, fut: Any, args: Any = None, kwargs: Any = None) -> Futures:
    """Run a future, and return those that it has added."""
    task_vars.txn.set(None)
    try:
        result = fut if inspect.isawaitable(fut) else fut(*args or (), **kwargs or {})
        if inspect.isawaitable(result):
            await result
        return _take_futures()
    except (Exception, asyncio.CancelledError) as error:  # noqa: ASYNC103  perhaps its own
        log.error("future %r, after its task was committed, has failed", name, exc_info=error)
        if current_task().cancelling():
            raise  # it was told to end, and so is the rest
        return {}
    finally:
        drop_futures()


def _take_futures() -> Futures:
    futures: Futures = task_vars.futures.get().pop("", {})
    return futures


def drop_futures() -> None:
    """Forget what was to be done after the request."""
    scopes = task_vars.futures.get()
    for futures in scopes.values():
        _close(futures)
    scopes.clear()


def _close(futures: Futures) -> None:
    for future in futures.values():
        if inspect.iscoroutine(future["fut"]):
            future["fut"].close()  # it complains if it is never awaited
