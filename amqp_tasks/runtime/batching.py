"""Group commit: what is asked while a round trip is under way leaves in the next one.

A round trip to the state store costs many times what one more operation in it costs, so
operations that are issued together travel together. There is no timer: when nothing is
under way an operation leaves at once, and the busier the worker, the larger the batches.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, TypeVar, cast

import anyio

from ..abc import StateStore
from ..core.operations import Operation
from ..exceptions import StateStoreError, StateStoreUnavailable
from .io_loop import Inbox

__all__ = ["StateClient"]

R = TypeVar("R")

MAX_BATCH: Final = 500
"""Operations in one round trip. More gain nothing and make the first ones wait."""

SLOW: Final = 1.0
"""Seconds after which an answer tells that the store was away."""


class _Question:
    __slots__ = ("answer", "answered", "operation")

    def __init__(self, operation: Operation[Any]) -> None:
        self.operation = operation
        self.answer: Any = None
        self.answered = anyio.Event()

    def reply(self, answer: Any) -> None:
        self.answer = answer
        self.answered.set()


class StateClient:
    """Asks a state store, many callers in one round trip."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._inbox: Inbox[_Question] = Inbox()
        self._is_running = False
        self._answers_since = math.inf

    async def ask(self, operation: Operation[R]) -> R:
        """Return the store's answer.

        Cancelling the caller does not take the operation back.

        Raises:
            StateStoreUnavailable: it may or may not have been carried out; ask again.
            StateStoreError: the store refuses it.
        """
        question = self._put(operation)
        await question.answered.wait()
        if isinstance(question.answer, BaseException):
            raise question.answer
        return cast("R", question.answer)

    async def ask_all(self, operations: Sequence[Operation[R]]) -> list[R | StateStoreError]:
        """Return the answers to many, each an answer or an error, in few round trips."""
        questions = [self._put(operation) for operation in operations]
        for question in questions:
            await question.answered.wait()
        return [question.answer for question in questions]

    @property
    def answers_for(self) -> float:
        """Seconds for which the store has answered whatever was asked."""
        return anyio.current_time() - self._answers_since

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Connect to the store, and answer questions for as long as the block."""
        # Whoever is cancelled within the block may have a last word to say, and gets it
        # through: the block's end alone ends this.
        serving = anyio.CancelScope(shield=True)
        async with self._store.open(), anyio.create_task_group() as tasks:
            with self._running():
                tasks.start_soon(self._run, serving)
                try:
                    yield
                finally:
                    serving.cancel()

    async def _run(self, serving: anyio.CancelScope) -> None:
        with serving:
            while True:
                questions = await self._inbox.take()
                for start in range(0, len(questions), MAX_BATCH):
                    await self._carry(questions[start : start + MAX_BATCH])

    async def _carry(self, questions: Sequence[_Question]) -> None:
        # The store's own timeouts bound this; a client library is not to be interrupted.
        answers: Sequence[Any] = ()
        with anyio.CancelScope(shield=True):
            try:
                asked_at = anyio.current_time()
                answers = await self._store.apply([question.operation for question in questions])
                answered_at = anyio.current_time()
                if answered_at - asked_at > SLOW:
                    self._answers_since = answered_at
                self._answers_since = min(self._answers_since, answered_at)
            except StateStoreError as error:
                answers = [error] * len(questions)
                self._answers_since = math.inf
        for question, answer in zip(questions, answers, strict=True):
            question.reply(answer)

    def _put(self, operation: Operation[Any]) -> _Question:
        question = _Question(operation)
        if self._is_running:
            self._inbox.put(question)
        else:
            question.reply(_closed())
        return question

    @contextmanager
    def _running(self) -> Generator[None, None, None]:
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            for question in self._inbox.take_nowait():
                question.reply(_closed())


def _closed() -> StateStoreUnavailable:
    return StateStoreUnavailable("the connection to the state store is closed")
