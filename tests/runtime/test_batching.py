"""Questions to the state store that are asked together travel together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from amqp_tasks import StateStoreUnavailable
from amqp_tasks.core.operations import IsAlive, Operation
from amqp_tasks.drivers.memory import MemoryStore
from amqp_tasks.runtime.batching import MAX_BATCH, StateClient

from .harness import now

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


class SlowStore(MemoryStore):
    """A store of which each round trip takes a second."""

    def __init__(self) -> None:
        super().__init__(now)
        self.batches: list[list[str]] = []
        self.is_down = False

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        self.batches.append([one.owner for one in operations if isinstance(one, IsAlive)])
        await anyio.sleep(1)
        if self.is_down:
            raise StateStoreUnavailable("nobody answers")
        return await super().apply(operations)


def questions(count: int) -> list[IsAlive]:
    return [IsAlive(owner=str(number)) for number in range(count)]


async def test_what_is_asked_during_a_round_trip_leaves_together_in_the_next() -> None:
    store = SlowStore()
    state = StateClient(store)
    async with state.open(), anyio.create_task_group() as tasks:
        tasks.start_soon(state.ask, IsAlive(owner="first"))
        await anyio.sleep(0.5)
        for question in questions(5):
            tasks.start_soon(state.ask, question)
    first, second = store.batches
    assert (first, sorted(second)) == (["first"], ["0", "1", "2", "3", "4"])


async def test_a_question_leaves_at_once_when_nothing_is_under_way() -> None:
    state = StateClient(SlowStore())
    async with state.open():
        for _ in range(3):
            began = now()
            assert await state.ask(IsAlive(owner="x")) is False
            assert now() - began == pytest.approx(1)


async def test_a_batch_has_a_largest_size() -> None:
    store = SlowStore()
    state = StateClient(store)
    async with state.open():
        assert await state.ask_all(questions(MAX_BATCH + 3)) == [False] * (MAX_BATCH + 3)
    assert [len(batch) for batch in store.batches] == [MAX_BATCH, 3]


async def test_each_gets_the_error_of_a_round_trip_that_failed_and_the_next_goes_well() -> None:
    store = SlowStore()
    state = StateClient(store)
    async with state.open():
        store.is_down = True
        answers = await state.ask_all(questions(3))
        assert [type(answer) for answer in answers] == [StateStoreUnavailable] * 3
        with pytest.raises(StateStoreUnavailable, match="nobody answers"):
            await state.ask(IsAlive(owner="x"))
        store.is_down = False
        assert await state.ask(IsAlive(owner="x")) is False


async def test_a_caller_that_is_cancelled_takes_nothing_back_and_others_get_their_answers() -> None:
    store = SlowStore()
    state = StateClient(store)
    async with state.open():
        with anyio.move_on_after(0.5):
            await state.ask(IsAlive(owner="cancelled"))
        assert await state.ask(IsAlive(owner="next")) is False
    assert store.batches == [["cancelled"], ["next"]]


async def test_whoever_is_cancelled_within_the_block_can_still_ask() -> None:
    state = StateClient(SlowStore())
    answers = []
    with anyio.move_on_after(5):
        async with state.open():
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    answers.append(await state.ask(IsAlive(owner="x")))
    assert answers == [False]


async def test_closing_answers_all_that_wait() -> None:
    store = SlowStore()
    state = StateClient(store)
    errors: list[StateStoreUnavailable] = []

    async def ask(owner: str) -> None:
        try:
            await state.ask(IsAlive(owner=owner))
        except StateStoreUnavailable as error:
            errors.append(error)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks, state.open():
            tasks.start_soon(ask, "under way")
            await anyio.sleep(0.5)
            for number in range(3):
                tasks.start_soon(ask, str(number))
            await anyio.sleep(0.1)
    assert len(errors) == 3
    assert "the connection to the state store is closed" in str(errors[0])


async def test_a_question_before_and_after_the_block_is_answered_with_an_error() -> None:
    state = StateClient(MemoryStore(now))
    for _ in range(2):
        with pytest.raises(StateStoreUnavailable, match="closed"):
            await state.ask(IsAlive(owner="x"))
        assert [type(one) for one in await state.ask_all(questions(2))] == [
            StateStoreUnavailable
        ] * 2
        async with state.open():
            assert await state.ask(IsAlive(owner="x")) is False
