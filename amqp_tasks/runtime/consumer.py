"""From delivery to verdict, on the I/O loop: claim, attempt, settle.

Whatever happens in between, a delivery gets its verdict last. If the worker dies before,
the broker delivers the message again, and the claim finds out what is left to do.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import anyio

from ..core.lifecycle import Event
from ..core.message import FilterExtra, Message, decode
from ..core.operations import (
    STALE,
    Claim,
    ClaimAnswer,
    Duplicate,
    Ended,
    Granted,
    Held,
    Owing,
)
from ..core.outcome import (
    Canceled,
    CancelReason,
    Failed,
    Failure,
    GivenBack,
    LeaseLost,
    Outcome,
    Reason,
    Succeeded,
)
from ..core.record import Owed
from ..core.retry import RetryPolicy
from ..core.settlement import (
    Effect,
    Lease,
    MarkPublished,
    Publish,
    Rules,
    Verdict,
    WriteState,
    dead_letter,
    park,
    postpone,
    publish_retry,
    settle,
    unreadable,
    unrecorded,
    wait_for,
)
from ..exceptions import DecodeError, StateCorrupt, StateStoreError, UnknownTask
from ..registry import TaskDefinition, TaskRegistry
from ..settings import Settings
from .executor import Executor, Job
from .failures import describe, failure_from_text
from .guards import Guards
from .io_loop import IoLoop
from .link import Link, pauses
from .presence import Census
from .quarantine import Quarantine
from .running import Running, RunningSlot
from .ticket import Ticket

__all__ = ["Consumer"]

log = logging.getLogger(__name__)

EARLY: Final = 0.005
"""Seconds before its time at which a message counts as due; clocks are not finer."""


class Consumer:
    """Sees a delivery to its verdict: `handle`.

    Args:
        owner: this worker's incarnation.
        clock: seconds since the epoch.
        filter_extra: see `decode`.
    """

    def __init__(
        self,
        io: IoLoop,
        link: Link,
        executor: Executor,
        registry: TaskRegistry,
        settings: Settings,
        *,
        owner: str,
        census: Census,
        clock: Callable[[], float],
        filter_extra: FilterExtra | None = None,
    ) -> None:
        self.running: dict[str, Running] = {}
        """Attempts, by task id."""
        self.guards = Guards(link, self.running, settings.guard_after)
        self._at_work: dict[tuple[str, int], Ticket] = {}
        """Deliveries that are being dealt with, by task id and attempt: one of each."""
        self._quarantine = Quarantine(settings.max_crashes)
        self._io = io
        self._link = link
        self._executor = executor
        self._registry = registry
        self._settings = settings
        self._owner = owner
        self._census = census
        self._clock = clock
        self._filter_extra = filter_extra
        self._numbers = itertools.count(1)
        self._stopping = anyio.Event()
        delay = settings.delayed_ttl_ms / 1000
        self._default_retry = RetryPolicy(
            max_retries=settings.max_task_retries, delay=delay, backoff=1, max_delay=delay, jitter=0
        )

    def stop(self) -> None:
        """Start no more attempts: what is not running yet is given back."""
        self._stopping.set()

    async def handle(self, delivery: Ticket) -> None:
        """Claim, run and settle one delivery."""
        try:
            message = decode(delivery.body, delivery.headers, self._filter_extra)
        except DecodeError as error:
            await self._refuse_unreadable(delivery, error)
            return
        if message.due is not None and message.due > self._clock() + EARLY:
            await self._wait_on(message, delivery)
            return
        key = message.task_id, message.attempt
        original = self._at_work.get(key)
        if original is not None:
            # Known without asking; and the store, were it emptied, would not know.
            original.has_copy = True
            await self._park(message, delivery)
        elif self._quarantine.shall_wait(message.task_id):
            await self._park(message, delivery)
        else:
            self._at_work[key] = delivery
            try:
                await self._deal_with(message, delivery)
            finally:
                del self._at_work[key]

    async def _deal_with(self, message: Message, delivery: Ticket) -> None:
        lease_id = f"{self._owner}/{next(self._numbers)}"
        try:
            answer = await self._claim(message, lease_id)
        except StateCorrupt as error:
            log.error("task %s goes to the error queue: %s", message.task_id, error)
            failure = describe(error, Reason.CORRUPT_STATE)
            topology, now = self._link.topology, self._clock()
            letter = unrecorded(message, failure, self._owner, topology, now=now)
            await self._carry_out(letter, delivery)
            return
        match answer:
            case None:
                delivery.requeue()
            case Granted(fence, crashes):
                lease = Lease(id=lease_id, fence=fence, worker=self._owner)
                with self._quarantine.place(message.task_id, crashes, delivery) as may_start:
                    if may_start:
                        await self._run_and_settle(message, lease, crashes, delivery)
                    else:
                        rules, now = self._rules(self._find(message.func)), self._clock()
                        effects = postpone(message, lease, rules, now=now)
                        await self._carry_out(effects, delivery)
            case Ended() | Duplicate():
                log.debug("task %s: nothing left to do (%s)", message.task_id, answer)
                delivery.ack()
            case Held():
                log.debug("task %s runs on %s: its copy waits", message.task_id, answer.owner)
                await self._park(message, delivery)
            case Owing():
                await self._carry_out(self._pay(message, answer), delivery)

    async def _park(self, message: Message, delivery: Ticket) -> None:
        await self._link.publish_persistently(park(message, self._link.topology))
        delivery.ack()

    async def _wait_on(self, message: Message, delivery: Ticket) -> None:
        publication = wait_for(message, self._link.topology, now=self._clock())
        await self._link.publish_persistently(publication)
        delivery.ack()

    async def _claim(self, message: Message, lease_id: str) -> ClaimAnswer | None:
        """Claim, again and again until there is an answer or the worker stops."""
        claim = Claim(
            task_id=message.task_id,
            name=message.func,
            job=message.body.decode(),
            attempt=message.attempt,
            lease=lease_id,
            now=self._clock(),
            ttl=self._settings.state_ttl,
            deadline=message.deadline,
            timeout=message.timeout,
            parent=message.parent,
        )
        pause = pauses()
        while not self._stopping.is_set():
            try:
                return await self._claim_once(claim)
            except StateCorrupt:
                raise
            except StateStoreError as error:
                log.warning("the state store does not serve, so nothing starts: %s", error)
                with anyio.move_on_after(pause()):
                    await self._stopping.wait()
        return None

    async def _claim_once(self, claim: Claim) -> ClaimAnswer:
        state = self._link.state
        answer = await state.ask(claim)
        if not isinstance(answer, Held | Owing):
            return answer
        # Whether its owner lives is another key, in another slot of a cluster: so it is
        # asked in a second step, and the claim repeated with what was seen. A lease of
        # this worker's own, for a task that it has nothing to do with, is left over from
        # a claim that was given up and carried out all the same.
        own = answer.owner == self._owner
        if self._is_busy_with(claim) if own else not await self._census.is_gone(answer.owner):
            return Held(answer.lease)
        if isinstance(answer, Owing):
            return answer
        if not own:
            log.warning("task %s: its worker %s is gone", claim.task_id, answer.owner)
        return await state.ask(replace(claim, lost_lease=answer.lease, now=self._clock()))

    def _is_busy_with(self, claim: Claim) -> bool:
        """Tell whether this worker deals with another attempt of the same task."""
        return any(
            task_id == claim.task_id and attempt != claim.attempt
            for task_id, attempt in self._at_work
        )

    async def _run_and_settle(
        self, message: Message, lease: Lease, crashes: int, delivery: Ticket
    ) -> None:
        definition = self._find(message.func)
        if isinstance(definition, Failure):
            outcome: Outcome = Failed(definition, may_retry=False)
        else:
            outcome = await self._obstacle(message, crashes) or await self._run(
                message, lease, definition, delivery
            )
        rules, spread = self._rules(definition), random.uniform(-1, 1)  # noqa: S311
        if delivery.has_copy:
            rules = replace(rules, state_ttl=None)
        effects = settle(outcome, message, lease, rules, now=self._clock(), spread=spread)
        _log_outcome(message, outcome, effects)
        await self._carry_out(effects, delivery)

    async def _run(
        self, message: Message, lease: Lease, definition: TaskDefinition, ticket: Ticket
    ) -> Outcome:
        running = Running(message, lease, ticket, self._cancel)
        job = Job(
            definition=definition,
            message=message,
            lease=lease,
            retry=definition.retry or self._default_retry,
            report=running.report,
            slot=RunningSlot(self.guards, running),
        )
        self.running[message.task_id] = running
        try:
            self._io.post_back(self._executor.submit, job)
            await running.ended.wait()
        finally:
            if self.running.get(message.task_id) is running:
                del self.running[message.task_id]
        assert running.outcome is not None
        return running.outcome

    def _cancel(self, lease: str, reason: CancelReason) -> None:
        self._io.post_back(self._executor.cancel, lease, reason)

    async def _obstacle(self, message: Message, crashes: int) -> Outcome | None:
        """Return why the attempt is not started, if so."""
        if await self._is_orphan(message):
            return Canceled(CancelReason.PARENT)
        if self._stopping.is_set():
            return GivenBack()
        if crashes >= self._settings.max_crashes:
            text = (
                f"{crashes} workers died while they ran it (max_crashes="
                f"{self._settings.max_crashes}); what it did before that is not known"
            )
            failure = Failure(type="WorkerCrashed", message=text, reason=Reason.CRASHED_WORKER)
            return Failed(failure, may_retry=False)
        if message.deadline is not None and message.deadline <= self._clock():
            late = self._clock() - message.deadline
            text = f"its deadline had passed {late:.1f} s before it could start"
            failure = Failure(type="TimeoutError", message=text, reason=Reason.DEADLINE)
            return Failed(failure, may_retry=False)
        return None

    async def _is_orphan(self, message: Message) -> bool:
        owner, pause = message.parent_owner, pauses()
        while owner is not None:
            try:
                return await self._census.is_gone(owner)
            except StateStoreError as error:
                log.warning("cannot look whether a parent lives: %s", error)
                await anyio.sleep(pause())
        return False

    def _find(self, name: str) -> TaskDefinition | Failure:
        try:
            return self._registry.find(name)
        except UnknownTask as error:
            # Not the error itself, whose traceback holds the message until there is a
            # garbage collection.
            return describe(error, Reason.UNKNOWN_TASK)

    def _rules(self, definition: TaskDefinition | Failure) -> Rules:
        own = definition.retry if isinstance(definition, TaskDefinition) else None
        return Rules(
            topology=self._link.topology,
            retry=own or self._default_retry,
            state_ttl=self._settings.state_ttl,
        )

    def _pay(self, message: Message, debt: Owing) -> tuple[Effect, ...]:
        """Return the effects of a settlement that was interrupted, from where it was."""
        rules, now = self._rules(self._find(message.func)), self._clock()
        if debt.owed is Owed.ERROR:
            failure = failure_from_text(debt.error)
            return dead_letter(message, failure, self._owner, rules, now=now)
        return publish_retry(message, debt.attempt, debt.due, rules, now=now)

    async def _refuse_unreadable(self, delivery: Ticket, error: DecodeError) -> None:
        log.error("a message cannot be read and goes to the error queue: %s", error)
        failure = describe(error, Reason.UNDECODABLE)
        await self._carry_out(
            unreadable(
                delivery.body,
                delivery.headers,
                failure,
                self._owner,
                self._link.topology,
                now=self._clock(),
            ),
            delivery,
        )

    async def _carry_out(self, effects: tuple[Effect, ...], delivery: Ticket) -> None:
        for effect in effects:
            match effect:
                case WriteState(operation):
                    if await self._link.ask_persistently(operation) == STALE:
                        log.warning(
                            "task %s was taken over by another worker, or canceled as it ended: "
                            "what it did here (%s) is not recorded",
                            operation.task_id,
                            operation.event,
                        )
                        delivery.requeue()
                        return
                case Publish(publication):
                    await self._link.publish_persistently(publication)
                case MarkPublished(operation):
                    await self._link.ask_persistently(operation)
                case Verdict.ACK:
                    delivery.ack()
                case Verdict.REQUEUE:
                    delivery.requeue()


def _log_outcome(message: Message, outcome: Outcome, effects: tuple[Effect, ...]) -> None:
    name = f"task {message.task_id} ({message.func}), attempt {message.attempt}"
    match outcome:
        case Failed(failure):
            state = effects[0]
            assert isinstance(state, WriteState)
            log.warning(
                "%s: %s: %s; %s%s",
                name,
                failure.type,
                failure.message,
                "it is tried again" if state.operation.event is Event.RETRY else "it is errored",
                f"\n{failure.traceback}" if failure.traceback else "",
            )
        case Canceled(reason):
            log.info("%s: canceled (%s)", name, reason)
        case GivenBack():
            log.info("%s: given back, uncounted: the worker stops", name)
        case LeaseLost():
            log.warning("%s: another worker has taken it over", name)
        case Succeeded():
            log.debug("%s: finished", name)
