"""The test harness: apps on one memory broker, in virtual time, with faults on demand."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar, cast, overload

import msgspec

from stentor.app import App
from stentor.catalog import Catalog
from stentor.clock import Duration, seconds
from stentor.connect import BrokerUrl
from stentor.context import Context, Dead, Progress, RetryLater, Runtime
from stentor.errors import DefinitionError, InvalidEvent, Undecodable
from stentor.event import EventLike, Outgoing, Topic, spec_of
from stentor.group import Group
from stentor.message import DeadLetter, Delivery, Message, Partition, Receipt, dead_topic, decode_dead_letter
from stentor.plan import Route
from stentor.priority import rank
from stentor.program import Program
from stentor.testing.clock import VirtualClock
from stentor.testing.crash import POINTS, Crash, Faults, FaultyBroker, Point, crash_point, kill
from stentor.worker import Worker

E = TypeVar("E")
HandlerLike = Callable[..., Any] | Group | str
"""A handler's function, or a group by itself or by its full name."""
ENDLESS = 10.0
"""Seconds of the real clock after which work that never settles is an error."""


class Run(msgspec.Struct, frozen=True):
    """One call of a handler: its event (a list for a batch), the attempt, and the error that ended it."""

    event: Any
    attempt: int
    error: BaseException | None

    def __repr__(self) -> str:
        return f"#{self.attempt} {_short(self.event)}: {_error(self.error)}"


class Attempts(int):
    """How often a handler was called; ``runs`` tells each call, and so does its repr."""

    runs: list[Run]

    def __new__(cls, runs: list[Run]) -> Self:
        made = super().__new__(cls, len(runs))
        made.runs = runs
        return made

    def __repr__(self) -> str:
        return f"{int(self)} ({'; '.join(map(repr, self.runs))})" if self.runs else "0"


class DeadEvent(DeadLetter, frozen=True, kw_only=True):
    """A dead letter with its event decoded (the Message itself where that cannot be)."""

    event: Any

    def __repr__(self) -> str:
        last = f"{self.errors[-1].type}: {self.errors[-1].text}" if self.errors else self.reason
        return f"<dead in {self.group} after {self.attempts} attempts ({self.reason}): {_short(self.event)}: {last}>"


def _short(event: Any) -> str:
    text = repr(event)
    return text if len(text) <= 120 else text[:119] + "…"


def _error(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, asyncio.CancelledError):
        return "cut off"
    if isinstance(error, RetryLater):
        return "ctx.retry"
    if isinstance(error, Dead):
        return f"ctx.dead({error.reason!r})"
    return f"{type(error).__name__}: {error}"


class _Threads(ThreadPoolExecutor):
    """The loop's executor, which knows what it still runs."""

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="stentor-test")
        self.pending: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # The loop hears of the end from a callback of the outer future, before that is taken off the pending ones.
        outer: Future[Any] = Future()
        self.pending.add(outer)

        def done(inner: Future[Any]) -> None:
            if outer.set_running_or_notify_cancel():
                error = inner.exception()
                if error is None:
                    outer.set_result(inner.result())
                else:
                    outer.set_exception(error)
            self.pending.discard(outer)

        super().submit(fn, *args, **kwargs).add_done_callback(done)
        return outer


class Harness:
    """What ``async with harness(...) as t`` gives; the module ``stentor.testing`` shows its use."""

    def __init__(
        self, apps: tuple[App, ...], overrides: dict[Any, Any], start: datetime | None, patience: Duration
    ) -> None:
        if not apps:
            raise DefinitionError("harness(...) needs an app")
        self.apps = apps
        self.clock = VirtualClock(start)
        self.broker = FaultyBroker(BrokerUrl("memory://"), self.clock)
        # It stands in for whatever broker the apps demand.
        self.broker.features = msgspec.structs.replace(FaultyBroker.features, durable="replica")
        self.broker.stored = []
        self.broker.faults = self._faults = Faults(self._kill)
        self._overrides = overrides
        self._patience = seconds(patience, "patience")
        self._programs: list[Program] = []
        self._running: AsyncExitStack | None = None
        self._threads = _Threads()
        self._runs: dict[Any, list[Run]] = {}
        self._calls: list[tuple[Any, str, Any]] = []
        self._failures: dict[Any, list[BaseException | type[BaseException]]] = {}
        self._crashes: list[Crash] = []
        self._restarts: set[asyncio.Task[None]] = set()
        self._fatal: BaseException | None = None
        self._sockets = 0

    # ---- life -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(self._threads)
        self._sockets = _sockets(loop)
        await self.broker.open()
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        await self.broker.close()
        if error is not None:
            error.add_note(f"In the harness:\n{self!r}")
            return
        self._check()
        left = [crash for crash in self._crashes if not crash.hit]
        if left:
            raise AssertionError(f"crash at {left[0].at!r} in {left[0].group} never happened: no delivery came so far")

    async def start(self, *, only: Collection[str] = ()) -> None:
        """Start the apps (again); the harness has started them when the test begins."""
        stack = AsyncExitStack()
        self._programs = []
        try:
            for app in self.apps:
                running = app.running(
                    broker=self.broker, overrides=self._overrides, clock=self.clock, adapt=self._adapt, only=only,
                    threads=self._threads,
                    on_fatal=self._fail, grace="0s",
                )  # fmt: skip
                self._programs.append(await stack.enter_async_context(running))
        except BaseException:
            await stack.aclose()
            raise
        self._running = stack

    async def stop(self) -> None:
        """Stop the apps in order, as a deploy does; handlers that still run are cut off at no attempt."""
        await asyncio.gather(*self._restarts)
        running, self._running = self._running, None
        if running is not None:
            await running.aclose()

    def _fail(self, error: BaseException) -> None:
        self._fatal = self._fatal or error

    def _check(self) -> None:
        if self._fatal is not None:
            raise RuntimeError("a worker failed") from self._fatal

    def __repr__(self) -> str:
        lines = [f"Harness at {self.now:%Y-%m-%d %H:%M:%S.%f}"]
        for worker in self._workers():
            counts = worker.counts
            lines.append(
                f"  {worker.plan.name}: {counts.handled} handled, {counts.retried} retried, {counts.dead} dead, "
                f"{counts.skipped} skipped, {worker.running} running"
            )
        lines += [f"  running: {name} {_short(event)}" for _, name, event in self._calls]
        lines += [f"  {dead!r}" for dead in self._letters(None)]
        return "\n".join(lines)

    def _workers(self) -> list[Worker]:
        return [worker for program in self._programs for worker in program.workers]

    # ---- time -----------------------------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        """The virtual time."""
        return datetime.fromtimestamp(self.clock.now(), UTC)

    async def settled(self) -> None:
        """Let work go on until nothing is runnable now: retries, delays and timers that are not due stay.

        What a handler does outside the event loop (threads, sockets, sleeps of its own) is waited for up to the
        harness's ``patience``, in real time.

        Raises:
            AssertionError: work goes on without end. RuntimeError: a worker failed.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        self.clock.end_pauses()
        quiet = 0
        while quiet < 3:
            await asyncio.sleep(0)
            # None on a loop that does not show what is ready; there only the workers tell.
            ready = getattr(loop, "_ready", None)
            quiet = quiet + 1 if not ready else 0
            if loop.time() - began > max(ENDLESS, 2 * self._patience):
                raise AssertionError(f"work goes on without end\n{self!r}")
            outside = self._calls or any(worker.busy for worker in self._workers())
            if quiet == 3 and outside and loop.time() - began < self._patience and self._waits(loop):
                quiet = 0
                await asyncio.sleep(0.0005)
        self._check()

    def _waits(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether anything outside the event loop can still make something runnable."""
        scheduled = getattr(loop, "_scheduled", None)
        if scheduled is None:
            return True
        horizon = loop.time() + self._patience
        soon = any(not timer.cancelled() and timer.when() < horizon for timer in scheduled)
        return bool(self._threads.pending or self._restarts or soon or _sockets(loop) > self._sockets)

    async def advance(self, duration: Duration) -> None:
        """Move time on: what falls due on the way happens at its time, in order, and settles before time goes on."""
        target = self.clock.now() + seconds(duration, "advance")
        await self.settled()
        while (due := self.clock.next) is not None and due <= target:
            self.clock.move(due)
            await self.settled()
        self.clock.move(target)
        await self.settled()

    # ---- publishing -----------------------------------------------------------------------------------------------

    @overload
    async def publish(self, event: EventLike, /, **options: Any) -> Receipt: ...
    @overload
    async def publish(self, event: Sequence[EventLike], /) -> list[Receipt]: ...
    async def publish(self, event: Any, /, **options: Any) -> Any:
        """Publish an event, or a list, as another program would; options as for ``App.publish``."""
        many = isinstance(event, (list, tuple))
        if many and options:
            raise InvalidEvent("options apply to one event; wrap the members of a list in Outgoing(event, ...)")
        messages = []
        for item in event if many else (event,):
            # A catalog for each: two programs, of which the test knows both, may have a class each for one type.
            catalog = Catalog("/test", self.clock)
            messages.append(catalog.encode(Outgoing(item, **options) if options else item, catalog.stamp()))
            await self.broker.declare([catalog.topics().get(messages[-1].topic, Topic(messages[-1].topic))], [])
        receipts = await self.broker.publish(messages)
        return list(receipts) if many else receipts[0]

    async def duplicate(self, event: Any) -> None:
        """Deliver an event again under its id; one that was not published yet is published twice."""
        message = next((m for m in reversed(self.broker.stored) if self._is(m, event)), None)
        if message is None:
            await self.publish(event)
            message = self.broker.stored[-1]
        self.broker.again(msgspec.structs.replace(message, fresh=True))

    def _is(self, message: Message, event: Any) -> bool:
        spec = spec_of(type(event))
        if spec is None:
            raise InvalidEvent(f"{type(event).__qualname__} is no event")
        kinds = {""} if spec.wire == "json" else set(spec.names)
        return message.topic == spec.topic.name and message.type in kinds and message.data == spec.encode(event)

    def published(self, cls: type[E]) -> list[E]:
        """The events of a class that were published so far, by whomever, in order; delayed ones once they are due."""
        catalog = Catalog("/test", self.clock)
        spec = catalog.add(cls)
        kinds = {""} if spec.wire == "json" else set(spec.names)
        messages = [m for m in self.broker.stored if m.type in kinds and m.topic == spec.topic.name]
        return [catalog.read(spec, message) for message in messages]

    @property
    def messages(self) -> list[Message]:
        """Every message that was stored, dead letters and firings included, in order."""
        return list(self.broker.stored)

    # ---- what became of it ----------------------------------------------------------------------------------------

    def dead(self, handler: HandlerLike) -> list[DeadEvent]:
        """The dead letters of a handler's group, in order."""
        return self._letters({name for _, name in self._places(handler)})

    def _letters(self, groups: set[str] | None) -> list[DeadEvent]:
        found = []
        for message in self.broker.stored:
            if message.type != "stentor.dead":
                continue
            letter = decode_dead_letter(message.data)
            if (groups is None or letter.group in groups) and message.topic == dead_topic(letter.group):
                fields = {name: getattr(letter, name) for name in DeadLetter.__struct_fields__}
                found.append(DeadEvent(**fields, event=self._event(letter.message)))
        return found

    def _event(self, message: Message) -> Any:
        for app in self.apps:
            spec = app.catalog.find(message.type) or app.catalog.foreign(message.topic)
            if spec is not None:
                try:
                    return app.catalog.read(spec, message)
                except Undecodable:
                    return message
        return message

    def attempts(self, handler: Callable[..., Any]) -> Attempts:
        """How often a handler was called so far: an int that also has ``runs``, with each call's event and error."""
        self._places(handler)
        return Attempts(list(self._runs.get(handler, ())))

    def _places(self, handler: HandlerLike) -> list[tuple[Program, str]]:
        """The groups of a handler, with their programs."""
        found = []
        for program in self._programs:
            for name, group in program.groups.items():
                functions = [h.function for h in group.handlers] + [h.function for _, h in group.timers]
                if handler is group or handler == name or handler in functions:
                    found.append((program, name))
        if not found:
            known = sorted({name for program in self._programs for name in program.groups})
            raise DefinitionError(f"{handler!r} is no handler and no group of these apps; they have {', '.join(known)}")
        return found

    # ---- faults ---------------------------------------------------------------------------------------------------

    def fail(self, handler: Callable[..., Any], error: BaseException | type[BaseException], *, times: int = 1) -> None:
        """Make the next ``times`` calls of a handler raise ``error`` instead of running."""
        self._places(handler)
        self._failures.setdefault(handler, []).extend([error] * times)

    async def crash(self, handler: HandlerLike, *, at: Point) -> None:
        """Kill the process of a handler's group, and start it anew, when its next delivery reaches a point.

        "received": fetched, not begun. "started": before the handler's first line; a handler that runs now is killed
        now. "before_settle": the handler has ended, nothing is stored. "after_settle": everything is.
        """
        if at not in POINTS:
            raise DefinitionError(f"crash: at must be one of {', '.join(POINTS)}, not {at!r}")
        places = self._places(handler)
        if len(places) > 1:
            raise DefinitionError(f"{handler!r} is in {len(places)} groups; name one of {[name for _, name in places]}")
        program, name = places[0]
        group = program.groups[name]
        handlers = [h for h in group.handlers if h.function == handler] or group.handlers
        crash = Crash(name, frozenset(n for h in handlers for n in h.names), at)
        self._crashes.append(crash)
        if at == "started" and any(running == name for _, running, _ in self._calls):
            crash.hit = True
            self._kill(name)
            await asyncio.gather(*self._restarts)
        else:
            self._faults.armed.append(crash)

    def _kill(self, group: str) -> None:
        task = asyncio.create_task(self._restart(group))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _restart(self, group: str) -> None:
        program = next(p for p in self._programs if group in p.groups)
        index = next(i for i, worker in enumerate(program.workers) if worker.plan.name == group)
        old = program.workers[index]
        await kill(old)
        plan = program.plan(group, program.groups[group], old.plan.subscription)
        program.workers[index] = Worker(plan, self.broker, program.catalog, self.clock, program.runtime)
        rank(program.workers)
        await program.workers[index].start()

    def _adapt(self, route: Route) -> None:
        """Called for each route before it runs: no jitter, and calls are noted and may fail."""
        handler, invoke = route.handler, route.invoke
        function = handler.function
        route.handler = copy.copy(handler)
        route.handler.retry = dataclasses.replace(handler.retry, jitter=0)

        async def noted(event: Any, context: Context) -> Any:
            call = (function, context.group, event)
            self._calls.append(call)
            error: BaseException | None = None
            try:
                await crash_point(self._faults, route, context.group, context._delivery, ended=False)
                failures = self._failures.get(function)
                if failures:
                    raise failures.pop(0)
                return await invoke(event, context)
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._calls.remove(call)
                self._runs.setdefault(function, []).append(Run(event, context.attempt, error))
                await crash_point(self._faults, route, context.group, context._delivery, ended=True)

        route.invoke = noted


def _sockets(loop: asyncio.AbstractEventLoop) -> int:
    selector = getattr(loop, "_selector", None)
    known = selector.get_map() if selector is not None else None
    return len(known) if known is not None else 0


def harness(
    *apps: App,
    overrides: dict[Any, Any] | None = None,
    start: datetime | None = None,
    patience: Duration = "1s",
) -> Harness:
    """Apps on one memory broker, in virtual time.

    Use it as ``async with harness(app) as t:``. ``overrides`` replaces functions (dependencies, handlers) by fakes;
    ``start`` is the first moment, by default now; ``patience`` is how long, in real time, work outside the event loop
    is waited for. Retries have no jitter here.
    """
    return Harness(apps, overrides or {}, start, patience)


# ---- direct calls ---------------------------------------------------------------------------------------------------


class HandlerContext(Context):
    """A Context for calling a handler directly; it keeps what the handler does with it.

    ``published`` are the events it published, ``progressed`` the progress it recorded, ``held`` why it paused its
    group. Set ``stopping`` to try a stop.
    """

    __slots__ = ("held", "progressed", "published")

    def __init__(self, runtime: Runtime, group: str, delivery: Delivery, attempt: int, state: bytes | None) -> None:
        super().__init__(_Host(group, runtime), delivery, attempt, state)
        self.published: list[Any] = []
        self.progressed: list[Progress] = []
        self.held: list[str] = []

    def hold(self, time: Duration, reason: str) -> None:
        seconds(time, "ctx.hold: time")
        self.held.append(reason)

    def add(self, events: Any) -> None:
        super().add(events)
        many = events if isinstance(events, (list, tuple)) else [events]
        self.published += [event.event if isinstance(event, Outgoing) else event for event in many]

    async def progress(self, done: float, text: str = "", *, state: bytes | None = None) -> None:
        self.progress_sync(done, text, state=state)

    def progress_sync(self, done: float, text: str = "", *, state: bytes | None = None) -> None:
        if not 0 <= done <= 1:
            raise ValueError(f"progress is a number from 0 to 1, not {done!r}")
        if state is not None:
            self.state = state
        self.progressed.append(Progress(done, text, self.state))


class _Host:
    def __init__(self, group: str, runtime: Runtime) -> None:
        self.group = group
        self.runtime = runtime
        self.hold = None

    async def progress(self, delivery: Delivery, progress: Progress) -> None:
        """Never called: a HandlerContext keeps its progress itself."""


def context(
    event: Any = None,
    *,
    attempt: int = 1,
    state: bytes | None = None,
    group: str = "test",
    app: App | None = None,
    replay: str = "",
) -> HandlerContext:
    """What a handler takes that a test calls directly.

    Use it as ``await charge(order, context(order, attempt=2))``. ``event`` is the event that is handled, an
    ``Outgoing`` of it (to set id, key or headers), a Message, or None.
    """
    owner = app or App("test")
    time = owner.catalog.stamp()

    def encode(events: Any) -> list[Message]:
        many = events if isinstance(events, (list, tuple)) else [events]
        return [owner.catalog.encode(item, time) for item in many]

    if isinstance(event, Message):
        message = event
    elif event is None:
        message = Message(id="test", source="/test", type="test", topic="test", data=b"")
    else:
        [message] = encode(event)
    # Only a context's progress_sync uses the loop, and this one has its own.
    runtime = Runtime(owner, encode, _raise, _nothing, cast(asyncio.AbstractEventLoop, None))
    delivery = Delivery(message, Partition(message.topic, 0, 1), 0, False, replay)
    return HandlerContext(runtime, group, delivery, attempt, state)


def _raise(error: BaseException) -> None:
    raise error


async def _nothing() -> None:
    pass
