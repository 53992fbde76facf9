"""Groups: handlers that share one place in their topics, and the decorators that fill them."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload
from zoneinfo import ZoneInfo

from stentor.breaker import Breaker
from stentor.clock import Duration, per_second
from stentor.context import FIRING, Firing
from stentor.errors import DefinitionError, DuplicateType
from stentor.event import EventSpec, Topic, check_name, spec_of
from stentor.handler import Batch, Handler, local_names
from stentor.limiter import MOST
from stentor.message import Message
from stentor.retry import Retry
from stentor.schedule import Cron, Every, Missed, Timer
from stentor.source import Publish, Source, SourceFunction, check_source
from stentor.subscription import Ordering, Start

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
G = TypeVar("G", bound=Callable[[Publish], Awaitable[None]] | Source)
Where = Callable[[Any], bool] | str | None


class On(Protocol[A]):
    """A decorator for functions, or methods, whose first parameter takes ``A``."""

    @overload
    def __call__(self, function: Callable[Concatenate[A, P], R], /) -> Callable[Concatenate[A, P], R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[S, A, P], R], /) -> Callable[Concatenate[S, A, P], R]: ...


class Group:
    """Handlers that share one place in their topics: order holds across their types.

    ``name``: default ``<app>.<function or class>``. ``ordering="key"`` runs the events of a key one at a time, in
    order; ``"none"`` as they come. ``concurrency``: handlers running at once, per process; ``"auto"`` finds by their
    own times how many are worth it. ``rate`` and ``key_rate``: events that begin in a time (``"100/s"``, ``"5/m"``), of
    all processes together and of each key. ``breaker``: waits for what the handlers call, at no attempt, while it is
    away. ``priority``: while the process has more to do than it can, its groups with a higher one begin first, and
    the others run one handler at a time, for a tenth of the time at most. ``start``: where a new group begins.
    ``on_dead="park"`` holds a key whose event died until it is redriven or dropped. ``broadcast``: every running
    instance sees every event. ``single``: one process at a time runs it, one event at a time. ``was``: earlier names of
    this group, which it takes over.

    Raises:
        DefinitionError: a setting makes no sense.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        ordering: Ordering = "key",
        concurrency: int | Literal["auto"] = 64,
        rate: str | None = None,
        key_rate: str | None = None,
        breaker: Breaker | None = None,
        priority: int = 0,
        start: Start = "earliest",
        on_dead: Literal["continue", "park"] = "continue",
        broadcast: bool = False,
        single: bool = False,
        was: Sequence[str] = (),
    ) -> None:
        label = f"group {name}" if name else "group"
        if name is not None:
            check_name(name, "group")
        if ordering not in ("key", "none"):
            raise DefinitionError(f'{label}: ordering must be "key" or "none", not {ordering!r}')
        if concurrency != "auto" and (type(concurrency) is not int or concurrency < 1):
            raise DefinitionError(f'{label}: concurrency must be a whole number from 1 or "auto", not {concurrency!r}')
        if key_rate is not None and ordering == "none":
            raise DefinitionError(f'{label}: key_rate needs ordering="key"')
        if breaker is not None and not isinstance(breaker, Breaker):
            raise DefinitionError(f"{label}: breaker must be a Breaker, not {breaker!r}")
        if type(priority) is not int:
            raise DefinitionError(f"{label}: priority must be a whole number, not {priority!r}")
        if start not in ("earliest", "latest"):
            raise DefinitionError(f'{label}: start must be "earliest" or "latest", not {start!r}')
        if on_dead not in ("continue", "park"):
            raise DefinitionError(f'{label}: on_dead must be "continue" or "park", not {on_dead!r}')
        if on_dead == "park" and (ordering == "none" or broadcast):
            raise DefinitionError(f'{label}: on_dead="park" needs ordering="key" and no broadcast')
        if broadcast and single:
            raise DefinitionError(f"{label}: broadcast and single exclude each other")
        self.name = name
        self.ordering: Ordering = ordering
        self.concurrency: int | Literal["auto"] = 1 if single else concurrency
        self.rate = 0.0 if rate is None else per_second(rate, f"{label}: rate")
        self.key_rate = 0.0 if key_rate is None else per_second(key_rate, f"{label}: key_rate")
        self.breaker = breaker
        self.priority = priority
        self.start: Start = "latest" if broadcast else start
        self.on_dead = on_dead
        self.broadcast = broadcast
        self.single = single
        self.was = (was,) if isinstance(was, str) else tuple(was)
        self.handlers: list[Handler] = []
        self.timers: list[tuple[Timer, Handler]] = []
        self.sources: list[SourceFunction] = []

    @property
    def most(self) -> int:
        """Handlers that may run at once at the most."""
        return MOST if self.concurrency == "auto" else self.concurrency

    @overload
    def on(
        self, a: type[A], /, *, retry: Retry | None = None, timeout: Duration | None = None,
        where: Callable[[A], bool] | str | None = None, batch: None = None,
    ) -> On[A]: ...  # fmt: skip
    @overload
    def on(
        self, a: type[A], b: type[B], /, *, retry: Retry | None = None, timeout: Duration | None = None,
        where: Callable[[A | B], bool] | str | None = None, batch: None = None,
    ) -> On[A | B]: ...  # fmt: skip
    @overload
    def on(
        self, a: type[A], /, *, retry: Retry | None = None, timeout: Duration | None = None,
        where: Callable[[A], bool] | str | None = None, batch: Batch,
    ) -> On[list[A]]: ...  # fmt: skip
    @overload
    def on(
        self, a: type[Any], b: type[Any], c: type[Any], /, *more: type[Any], retry: Retry | None = None,
        timeout: Duration | None = None, where: Where = None, batch: Batch | None = None,
    ) -> On[Any]: ...  # fmt: skip
    @overload
    def on(
        self, /, *, topic: str | Topic, retry: Retry | None = None, timeout: Duration | None = None,
        where: Callable[[Message], bool] | str | None = None, batch: None = None,
    ) -> On[Message]: ...  # fmt: skip
    def on(
        self,
        *types: type[Any],
        topic: str | Topic | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        where: Where = None,
        batch: Batch | None = None,
    ) -> Any:
        """Register a handler for event types, or with ``topic=`` for every message of a topic.

        ``where`` filters by a predicate on the event or a CloudEvents SQL text on its attributes; ``batch`` makes it
        take lists. Raises DefinitionError or DuplicateType.
        """

        def decorate(function: F) -> F:
            self.add_handler(
                Handler(
                    function, types=types, topic=topic.name if isinstance(topic, Topic) else topic, retry=retry,
                    timeout=timeout, where=where, batch=batch,
                )
            )  # fmt: skip
            return function

        return decorate

    def add_handler(self, handler: Handler) -> None:
        """Add a handler; raises DefinitionError for what is no event, DuplicateType for a type taken already."""
        if not handler.types and handler.topic is None:
            raise DefinitionError(f"{handler.place}: on() needs event types or topic=")
        if handler.types and handler.topic is not None:
            raise DefinitionError(f"{handler.place}: on() takes event types or topic=, not both")
        if handler.topic is not None:
            check_name(handler.topic, "topic")
        taken = {name: other for other in self.handlers for name in other.names}
        for cls in handler.types:
            if spec_of(cls) is None:
                what = getattr(cls, "__qualname__", repr(cls))
                hint = "it has no topic=" if hasattr(cls, "__inherit__") else "derive it from Event or use @event"
                raise DefinitionError(f"{handler.place}: {what} is no event; {hint}")
        for name in handler.names:
            if name in taken:
                raise DuplicateType(
                    f"group {self.name or handler.name}: {taken[name].place} and {handler.place} both handle {name!r}; "
                    "handlers of one group have disjoint types"
                )
        self.handlers.append(handler)

    def every(
        self, period: Duration, *, missed: Missed = "once", retry: Retry | None = None, timeout: Duration | None = None
    ) -> Callable[[F], F]:
        """Run a function every ``period``, at multiples of it since the epoch; see ``cron`` for ``missed``."""
        return self._timer(Every(period), missed, retry, timeout)

    def cron(
        self,
        expression: str,
        *,
        tz: str | ZoneInfo = "UTC",
        missed: Missed = "once",
        retry: Retry | None = None,
        timeout: Duration | None = None,
    ) -> Callable[[F], F]:
        """Run a function by a cron expression in a time zone, in one process at a time.

        ``missed``: firings that fell while nothing ran come as one (with their number in ``Firing.missed``), not at
        all ("skip"), or each ("all"). Raises DefinitionError for a bad expression or zone.
        """
        return self._timer(Cron(expression, tz), missed, retry, timeout)

    def _timer(
        self, timer: Every | Cron, missed: Missed, retry: Retry | None, timeout: Duration | None
    ) -> Callable[[F], F]:
        def decorate(function: F) -> F:
            handler = Handler(function, retry=retry, timeout=timeout)
            if any(other.name == handler.name for _, other in self.timers):
                raise DefinitionError(f"group {self.name or handler.name}: two timers are called {handler.name!r}")
            self.timers.append((Timer(handler.name, timer, missed), handler))
            return function

        return decorate

    def source(self, *, instances: Literal["one", "each"] = "one") -> Callable[[G], G]:
        """Register a ``Source``, or an async function that takes a ``Publish`` and makes events until it returns.

        ``instances="one"``: one process runs it at a time, and its position survives; ``"each"``: every process.
        """

        def decorate(source: G) -> G:
            self.sources.append(check_source(source, instances))
            return source

        return decorate

    def timer_spec(self, timer: Timer, topic: str) -> EventSpec:
        """How firings of a timer travel: an event type of its own on the group's timer topic."""
        return EventSpec(
            Firing, topic=Topic(topic), key=None, type=f"{FIRING}.{timer.name}", version=1, newer="read", also=(),
            wire="cloudevents",
        )  # fmt: skip

    @property
    def default_name(self) -> str:
        """The name after ``<app>.`` of a group that was given none."""
        for handler in self.handlers:
            return handler.name
        for timer, _ in self.timers:
            return timer.name
        for source in self.sources:
            return source.name
        raise DefinitionError("a group without a name takes that of its first handler, and has none yet")


def on(
    *types: type[Any],
    topic: str | None = None,
    retry: Retry | None = None,
    timeout: Duration | None = None,
    where: Where = None,
    batch: Batch | None = None,
) -> Callable[[F], F]:
    """Mark a method of a component as a handler; ``app.add(Component(...))`` registers it. Options as ``Group.on``."""

    def decorate(function: F) -> F:
        options = {"types": types, "topic": topic, "retry": retry, "timeout": timeout, "where": where, "batch": batch}
        function.__dict__.setdefault("__stentor_on__", []).append((options, local_names()))
        return function

    return decorate


def component_group(component: Any) -> Group:
    """The group of a component (its methods that carry ``@stentor.on``) or of a source (an object with ``run``).

    Raises:
        DefinitionError: it is neither.
    """
    cls = type(component)
    group = Group()
    for name, member in inspect.getmembers(cls, callable):
        for options, local in getattr(member, "__stentor_on__", ()):
            handler = Handler(getattr(component, name), **options)
            handler.local = local
            group.add_handler(handler)
    if not group.handlers and hasattr(component, "run"):
        group.source(instances=getattr(component, "instances", "one"))(component)
    elif not group.handlers:
        raise DefinitionError(
            f"{cls.__qualname__} is no Group, no source (async def run(self, publish)), and no method of it carries "
            "@stentor.on(...)"
        )
    return group
