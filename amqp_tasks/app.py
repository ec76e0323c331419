"""The app: where settings, tasks, runtime and drivers come together."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property, partial
from inspect import signature
from typing import Any, ParamSpec, Protocol, TypeVar, overload

import anyio
import anyio.lowlevel
from pydantic_core import from_json

from .abc import Broker, StateStore
from .client import (
    CallOptions,
    Client,
    RemoteTaskGroup,
    Task,
    TaskHandle,
    TaskState,
    open_client,
    open_remote_task_group,
)
from .client.errors import ErrorQueue, open_error_queue
from .client.state import state_from
from .core.checks import check_count
from .core.lifecycle import TaskStatus
from .core.message import FilterExtra, check_task_id
from .core.retry import RetryPolicy
from .core.topology import Topology
from .drivers.memory import MemoryBroker, MemoryStore
from .drivers.rabbitmq import RabbitBroker
from .drivers.redis import RedisStore
from .exceptions import ArgumentsError, NotConnected
from .registry import TaskDefinition, TaskRegistry
from .runtime.attempt import attempt_or_none
from .runtime.executor import Middleware
from .runtime.io_loop import IoLoop, SameLoop, open_io_thread
from .runtime.link import Servers
from .runtime.worker import Worker, open_worker
from .settings import Settings, load_settings

__all__ = ["TaskApp"]

P = ParamSpec("P")
R = TypeVar("R")


class TaskDecorator(Protocol):
    """Makes a task of a function."""

    @overload
    def __call__(self, func: Callable[P, AsyncIterator[Any]], /) -> Task[P, list[Any]]: ...
    @overload
    def __call__(self, func: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, func: Callable[P, R], /) -> Task[P, R]: ...


class TaskApp:
    """A set of tasks, the queue they wait in and the store of their states.

    Args:
        clock: returns seconds since the epoch; for tests under a virtual clock.
        find: returns the function, or task, that a message calls by a name which is not
            registered here; None if there is none. Called in any thread; it decides what
            messages may run, so it must refuse whatever it was not told to serve.
        middleware: runs around each attempt, the outermost first; see `Middleware`.
        filter_extra: says what is kept of the members beside the call, `extra`, of a message
            that is queued here or received from others: it is given them, changes nothing in
            them, and returns what the task, its state and its later messages have. Called on
            the I/O loop as well; a received message goes to the error queue if it raises.
        settings: any field of `Settings`. The environment (``AMQP_TASKS_<NAME>``) wins
            over what is given here.

    Raises:
        SettingsError: a setting is wrong; names it.
        ArgumentsError: what has to be a function is none.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        find: Callable[[str], Callable[..., Any] | None] | None = None,
        middleware: Sequence[Middleware] = (),
        filter_extra: FilterExtra | None = None,
        **settings: Any,
    ) -> None:
        self.tasks = TaskRegistry(find)
        self._middleware = _functions(middleware, "middleware")
        if filter_extra is not None:
            _functions([filter_extra], "filter_extra")
        self._filter_extra = filter_extra
        self._clock = clock
        self._keywords = settings
        self._flags: dict[str, Any] = {}
        self._clients: list[tuple[object, Client]] = []
        if settings:
            # Mistakes show where they are made. Without any, reading can wait: the default
            # app exists before anybody has had a chance to set the environment.
            self._read_settings()

    @property
    def settings(self) -> Settings:
        """The settings in force. They are read when they are needed first."""
        return self._settings

    def configure(self, **flags: Any) -> None:
        """Override settings, above the environment. Not while connected.

        Raises:
            SettingsError: a setting is wrong; names it.
        """
        new = {**self._flags, **flags}
        self._settings = load_settings(self._keywords, new)
        self._flags = new  # only now: what was wrong is forgotten

    # ----------------------------------------------------------------- defining

    @overload
    def task(self, func: Callable[P, AsyncIterator[Any]], /) -> Task[P, list[Any]]: ...
    @overload
    def task(self, func: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def task(self, func: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        process: bool = False,
    ) -> TaskDecorator: ...

    def task(
        self,
        func: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        process: bool = False,
    ) -> Any:
        """Make a task of a function of a module: ``@app.task`` or ``@app.task(...)``.

        The function may be a coroutine function; an async generator, which yields pairs
        of a `MessageType` and a value; or synchronous, and then runs in a thread.

        Args:
            name: the name that messages call it by; by default the dotted name by which
                a worker can import it.
            retry: what happens when it fails; by default `max_task_retries` retries
                through the delay queue.
            timeout: seconds that one attempt may take.
            process: run it, a synchronous function, in a process of its own: it may burn
                a core there without hurting its neighbours, and is killed when it is
                cancelled. Arguments and result must be picklable; as many run at the
                same time as there are cores.

        Raises:
            DefinitionError: the function cannot be a task, and why.
            DuplicateTask: another task has that name.
        """

        def define(func: Callable[..., Any]) -> Task[Any, Any]:
            task: Task[Any, Any] = Task(
                func, self, name=name, retry=retry, timeout=timeout, process=process
            )
            self.tasks.add(task)
            return task

        return define if func is None else define(func)

    # ---------------------------------------------------------------- producing

    @asynccontextmanager
    async def connect(
        self, *, may_start_without_broker: bool = False, may_lose_broker: bool = False
    ) -> AsyncGenerator[TaskApp, None]:
        """Connect to the broker and the state store for as long as the block.

        Within it tasks can be called and handles be used, anywhere on this event loop. While
        the broker is away, handles work, and calls raise `PublishFailed` after
        `publish_timeout`.

        Args:
            may_start_without_broker: begin the block although the broker cannot be used
                yet: for a program that has other things to do as well.
            may_lose_broker: go on however long the broker is away, instead of ending the
                block with an error after `reconnect_timeout`.

        Raises:
            BrokerError, StateStoreError: a server cannot be used, and why.
        """
        async with (
            self._io_loop("amqp_tasks client") as io,
            open_client(
                io,
                self._servers("amqp_tasks producer"),
                self.settings,
                clock=self._clock,
                may_start_without_broker=may_start_without_broker,
                may_lose_broker=may_lose_broker,
                filter_extra=self._filter_extra,
            ) as client,
        ):
            with self._using(client):
                yield self

    async def add_task(
        self,
        task: Callable[..., Any],
        /,
        *args: Any,
        task_id: str | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> TaskHandle[Any]:
        """Queue a call of a task, or of a function that workers serve.

        Args:
            task: a task, or a function of a module in the workers' setting `serve`.
            task_id: None for a new random one. If the id is known, no second task is made
                and the handle is that of the first.
            timeout: seconds that one attempt may take.

        Raises:
            ArgumentsError, NotConnected, PublishFailed, StateStoreError: see `Task`.
            DefinitionError: the function cannot be found by a worker.
        """
        definition = task if isinstance(task, TaskDefinition) else TaskDefinition(task)
        for option in ("task_id", "timeout"):
            if option in signature(definition.func).parameters:
                raise ArgumentsError(
                    f"task {definition.name!r} has a parameter called {option}, as add_task has; "
                    f"say which one is meant: task.options({option}=...)(...)"
                )
        options = CallOptions(task_id=task_id, timeout=timeout)
        return await self.schedule(definition, options, args, kwargs)

    async def schedule(
        self,
        task: TaskDefinition,
        options: CallOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> TaskHandle[Any]:
        """Queue a call; what `Task` and `add_task` come down to."""
        return await self._schedule(task, options, args, kwargs)

    async def _schedule(
        self,
        task: TaskDefinition,
        options: CallOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        parent_owner: str | None = None,
    ) -> TaskHandle[Any]:
        client, attempt = self._client(), attempt_or_none()
        message = options.message(
            task,
            args,
            kwargs,
            now=self._clock(),
            parent=None if attempt is None else attempt.task_id,
            parent_owner=parent_owner,
            filter_extra=self._filter_extra,
        )
        await client.enqueue(message, options.keep_unqueued)
        return TaskHandle(message.task_id, self._client, task.signature.decode_result)

    @asynccontextmanager
    async def remote_task_group(self) -> AsyncGenerator[RemoteTaskGroup, None]:
        """A task group whose children run on any worker: ``await group.start(task, ...)``.

        Leaving the block waits until all children have ended. When one fails, or the
        block does, or is cancelled, the others are cancelled and waited for. Children
        whose parent's process has died are cancelled by their workers. A task that waits
        here for its children gives its slot of `max_running_tasks` away meanwhile.

        Raises:
            ExceptionGroup: of the children's `RemoteTaskError` (or `TaskCanceled`, when
                somebody else canceled one) and of what the block itself raised.
            NotConnected: outside of `connect` and of a worker.
        """
        async with open_remote_task_group(
            self._client(), self._queue_child, grace=self.settings.cancel_grace
        ) as group:
            yield group

    async def _queue_child(
        self,
        task: Task[Any, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        task_id: str,
        parent_owner: str,
    ) -> TaskHandle[Any]:
        options = task.call_options.updated(task_id=task_id)
        return await self._schedule(task, options, args, kwargs, parent_owner=parent_owner)

    def handle(self, task_id: str) -> TaskHandle[Any]:
        """Return a handle for a known id; asks no server.

        Raises:
            ArgumentsError: that can be no task's id.
        """
        return TaskHandle(check_task_id(task_id), self._client, _as_it_is)

    async def list_tasks(
        self,
        *,
        prefix: str = "",
        status: TaskStatus | str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> Sequence[TaskState]:
        """Return the states of all tasks, of all workers, in the order of their ids.

        Args:
            prefix: only ids that begin with it.
            status: only tasks in that status.
            after: only ids behind this one; the last of one page gives the next.
            limit: how many at most.

        Raises:
            ArgumentsError: there is no such status; or `limit` is no positive integer.
        """
        check_count(limit, "limit")
        records = await self._client().list(prefix, _status(status), after, limit)
        return [state_from(record, (), _as_it_is) for record in records]

    @asynccontextmanager
    async def error_queue(self) -> AsyncGenerator[ErrorQueue, None]:
        """Look at the error queue, and replay or drop what is in it. Needs no worker.

        ::

            async with app.error_queue() as letters:
                async for letter in letters:
                    if letter.name == "shop.add":
                        await letters.replay(letter)

        Raises:
            BrokerError, StateStoreError: a server cannot be used, or was lost; or there is
                no error queue.
        """
        async with (
            self._io_loop("amqp_tasks errors") as io,
            open_error_queue(
                io,
                self._servers("amqp_tasks errors"),
                self.settings,
                clock=self._clock,
                filter_extra=self._filter_extra,
            ) as queue,
        ):
            yield queue

    # ------------------------------------------------------------------ working

    @asynccontextmanager
    async def worker(self) -> AsyncGenerator[Worker, None]:
        """Run a worker for as long as the block; leaving it drains the worker.

        Within it tasks can be called and handles be used. That goes by the worker's own
        connection, or by one of `connect` if there is one, whichever was opened first.

        Tasks that still run after `shutdown_grace` seconds are cancelled and given back to
        the queue. When the block is cancelled, or ends with an error, there is no grace.

        Raises:
            BrokerError, StateStoreError: a server cannot be used, or was lost for longer
                than `reconnect_timeout`.
        """
        self.tasks.served = self.settings.serve
        async with (
            self._io_loop("amqp_tasks worker") as io,
            open_worker(
                io,
                self._servers("amqp_tasks worker"),
                self.tasks,
                self.settings,
                middleware=self._middleware,
                clock=self._clock,
                filter_extra=self._filter_extra,
            ) as worker,
        ):
            with self._using(Client(io, worker.producer), in_need=True):
                yield worker

    async def run_worker(self) -> None:
        """Run a worker until cancelled.

        Raises:
            BrokerError, StateStoreError: see `worker`.
        """
        async with self.worker():
            await anyio.sleep_forever()

    # ------------------------------------------------------------------ composing

    @cached_property
    def _settings(self) -> Settings:
        return load_settings(self._keywords, self._flags)

    def _read_settings(self) -> None:
        self._settings  # noqa: B018  a cached property reads them

    @cached_property
    def _memory(self) -> tuple[MemoryBroker, MemoryStore]:
        """What is in memory belongs to the app: its worker and its producers share it."""
        return MemoryBroker(self._clock), MemoryStore(self._clock)

    def _servers(self, name: str) -> Servers:
        settings = self.settings
        return Servers(
            make_broker=partial(self._broker, name),
            make_store=self._store,
            topology=Topology(
                exchange=settings.exchange,
                queue=settings.queue,
                queue_type=settings.queue_type,
                delayed_ttl_ms=settings.delayed_ttl_ms,
                errored_ttl_ms=settings.errored_ttl_ms,
            ),
        )

    def _broker(self, name: str) -> Broker:
        settings = self.settings
        if settings.in_memory:
            return self._memory[0]
        return RabbitBroker(
            settings.broker_url,
            heartbeat=settings.heartbeat,
            connect_timeout=settings.connect_timeout,
            name=name,
        )

    def _store(self) -> StateStore:
        settings = self.settings
        if settings.in_memory:
            return self._memory[1]
        return RedisStore(
            settings.state_url,
            prefix=settings.state_prefix,
            timeout=settings.state_timeout,
            connect_timeout=settings.connect_timeout,
        )

    @asynccontextmanager
    async def _io_loop(self, name: str) -> AsyncGenerator[IoLoop, None]:
        if self.settings.in_memory:
            yield SameLoop()
            return
        async with open_io_thread(name) as io:
            yield io

    @contextmanager
    def _using(self, client: Client, *, in_need: bool = False) -> Generator[None, None, None]:
        """Let calls use a client for as long as the block; or only if there is no other."""
        entry = (anyio.lowlevel.current_token(), client)
        self._clients.insert(0 if in_need else len(self._clients), entry)
        try:
            yield
        finally:
            self._clients.remove(entry)

    def _client(self) -> Client:
        """Return the client of the caller's event loop: a connection's, or else a worker's."""
        token = anyio.lowlevel.current_token()
        for loop, client in reversed(self._clients):
            if loop == token:
                return client
        raise NotConnected(
            "this needs a connection, and there is none on this event loop: put it within "
            "`async with app.connect():` (or run it in a worker)"
        )


def _functions(values: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise ArgumentsError(f"{name}={values!r:.200}: must be a list of functions")
    for value in values:
        if not callable(value):
            raise ArgumentsError(f"{name}: {value!r:.200} must be a function")
    return tuple(values)


def _status(value: TaskStatus | str | None) -> TaskStatus | None:
    try:
        return None if value is None else TaskStatus(value)
    except ValueError:
        raise ArgumentsError(f"status={value!r}: must be one of {', '.join(TaskStatus)}") from None


def _as_it_is(text: str) -> Any:
    return from_json(text)
