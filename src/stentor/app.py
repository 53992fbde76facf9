"""The app: what the user builds. It knows the events, the groups and the broker, and routes between them."""

from __future__ import annotations

import asyncio
import atexit
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from datetime import datetime
from typing import Any, Literal, Protocol, Self, TypeVar, overload
from zoneinfo import ZoneInfo

from stentor.broker import Broker, Durable
from stentor.catalog import Catalog
from stentor.clock import Clock, Duration, SystemClock, seconds
from stentor.context import current
from stentor.errors import DefinitionError, InvalidEvent, NotConnected, Unsupported
from stentor.event import EventLike, Outgoing, Topic, check_name
from stentor.exchange import OWN, Endpoint, Verify
from stentor.group import G, Group, On, Where, component_group
from stentor.handler import Batch
from stentor.identity import Identify
from stentor.message import Attribute, Message, Receipt
from stentor.parts import Remote, part
from stentor.plan import Route
from stentor.program import Program
from stentor.retry import Retry
from stentor.schedule import Missed

A = TypeVar("A")
B = TypeVar("B")
F = TypeVar("F", bound=Callable[..., Any])
GRACE = 30.0
log = logging.getLogger("stentor")


class _Both(AbstractAsyncContextManager["App"], AbstractContextManager["App"], Protocol):
    """Usable with ``with`` and with ``async with``."""


class App:
    """An event-driven program: its events, groups and sources, on one broker.

    ``broker``: a URL; without one $STENTOR_BROKER, the file named by $STENTOR_BROKER_FILE, or
    ``sqlite:///stentor.db``. ``durable``: the least a confirmed event must survive ("process", "host", "replica");
    a weaker broker is refused. ``clock`` is for tests.
    """

    def __init__(
        self, name: str, *, broker: str | None = None, durable: Durable | None = None, clock: Clock | None = None
    ) -> None:
        self.name = check_name(name, "app")
        if durable not in (None, "process", "host", "replica"):
            raise DefinitionError(f'App: durable must be "process", "host" or "replica", not {durable!r}')
        self._url = broker
        self._durable = durable
        self._clock = clock or SystemClock()
        self.catalog = Catalog(f"/{name}", self._clock)
        self.endpoints: list[Endpoint] = []
        self._groups: list[Group] = []
        self._program: Program | None = None
        self._depth = 0
        self._portal: _Portal | None = None
        self._portal_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"App({self.name!r})"

    # ---- declaring ------------------------------------------------------------------------------------------------

    @overload
    def on(
        self, a: type[A], /, *, group: str | Group | None = None, retry: Retry | None = None,
        timeout: Duration | None = None, where: Callable[[A], bool] | str | None = None, batch: None = None,
    ) -> On[A]: ...  # fmt: skip
    @overload
    def on(
        self, a: type[A], b: type[B], /, *, group: str | Group | None = None, retry: Retry | None = None,
        timeout: Duration | None = None, where: Callable[[A | B], bool] | str | None = None, batch: None = None,
    ) -> On[A | B]: ...  # fmt: skip
    @overload
    def on(
        self, a: type[A], /, *, group: str | Group | None = None, retry: Retry | None = None,
        timeout: Duration | None = None, where: Callable[[A], bool] | str | None = None, batch: Batch,
    ) -> On[list[A]]: ...  # fmt: skip
    @overload
    def on(
        self, a: type[Any], b: type[Any], c: type[Any], /, *more: type[Any], group: str | Group | None = None,
        retry: Retry | None = None, timeout: Duration | None = None, where: Where = None, batch: Batch | None = None,
    ) -> On[Any]: ...  # fmt: skip
    @overload
    def on(
        self, /, *, topic: str | Topic, group: str | Group | None = None, retry: Retry | None = None,
        timeout: Duration | None = None, where: Callable[[Message], bool] | str | None = None, batch: None = None,
    ) -> On[Message]: ...  # fmt: skip
    def on(self, *types: type[Any], group: str | Group | None = None, **options: Any) -> Any:
        """Register a handler, in a group of its own (``<app>.<function>``) or in ``group``; options as ``Group.on``."""

        def decorate(function: F) -> F:
            target = self._target(group)
            target.on(*types, **options)(function)
            self._keep(target)
            return function

        return decorate

    def _target(self, group: str | Group | None) -> Group:
        if isinstance(group, Group):
            return group
        if group is None:
            return Group()
        found = next((known for known in self._groups if known.name == group), None)
        return found or Group(group)

    def _keep(self, group: Group) -> None:
        if group not in self._groups:
            self._groups.append(group)
            self.groups()  # two groups of one name show here, at the second definition

    @overload
    def deliver(
        self, a: type[A], /, *, to: str | Remote, secret: str | None = None, group: str | Group | None = None,
        retry: Retry | None = None, timeout: Duration = "30s", where: Callable[[A], bool] | str | None = None,
        batch: Batch | None = None,
    ) -> None: ...  # fmt: skip
    @overload
    def deliver(
        self, a: type[A], b: type[B], /, *, to: str | Remote, secret: str | None = None,
        group: str | Group | None = None, retry: Retry | None = None, timeout: Duration = "30s",
        where: Callable[[A | B], bool] | str | None = None, batch: Batch | None = None,
    ) -> None: ...  # fmt: skip
    @overload
    def deliver(
        self, a: type[Any], b: type[Any], c: type[Any], /, *more: type[Any], to: str | Remote,
        secret: str | None = None, group: str | Group | None = None, retry: Retry | None = None,
        timeout: Duration = "30s", where: Where = None, batch: Batch | None = None,
    ) -> None: ...  # fmt: skip
    @overload
    def deliver(
        self, /, *, topic: str | Topic, to: str | Remote, secret: str | None = None,
        group: str | Group | None = None, retry: Retry | None = None, timeout: Duration = "30s",
        where: Callable[[Message], bool] | str | None = None, batch: None = None,
    ) -> None: ...  # fmt: skip
    def deliver(self, *types: type[Any], **options: Any) -> None:
        """Make a remote HTTP service the handler: events are sent to it as CloudEvents, and a 2xx answer is the ack.

        ``to`` is a URL, or a ``stentor.sinks.http.Target`` with more settings; ``secret`` (``whsec_...``) signs by
        Standard Webhooks. The group is ``<app>.<host>`` unless ``group`` is given. ``timeout`` bounds one request;
        ``batch`` sends many events in one, for which there is one answer. Other options as ``Group.on``. Raises
        DefinitionError, or ConfigError for a wrong URL or key, and without ``stentor[deliver]``.
        """
        part("deliver")(self, *types, **options)

    def subscriptions(
        self,
        *types: type[Any],
        allow: str | Callable[[Mapping[str, str]], str | None] | None = None,
        origin: str | None = None,
        secret: str | None = None,
        inside: Sequence[str] = (),
        rate: int | None = None,
        callback: str | None = None,
    ) -> None:
        """Let other services subscribe to events of these types by themselves, at ``/subscriptions`` of ``asgi``.

        ``allow``: a token that they show as ``Authorization: Bearer ...``, or a function of the request's headers that
        returns who it is, or None to refuse; everybody sees only their own. ``origin``: the DNS name under which this
        service asks theirs for permission (the app's name). ``secret``: of it each subscription gets a secret of its
        own to check signatures with. ``inside``: networks such as ``10.0.0.0/8`` that may be sent to, by http too;
        others only when public, and by https. ``rate``: how many requests a minute services are asked to allow.
        ``callback``: the public URL of ``asgi``, by which they may consent later than at once; it needs ``secret``.
        Raises DefinitionError, or ConfigError for a wrong URL or network, or without ``stentor[deliver]``.
        """
        part("subscriptions")(
            self, *types, allow=allow, origin=origin, secret=secret, inside=inside, rate=rate, callback=callback
        )

    def every(self, period: Duration, *, group: str | Group | None = None, **options: Any) -> Callable[[F], F]:
        """Run a function every ``period``; options as ``Group.every``."""

        def decorate(function: F) -> F:
            target = self._target(group)
            target.every(period, **options)(function)
            self._keep(target)
            return function

        return decorate

    def cron(
        self,
        expression: str,
        *,
        tz: str | ZoneInfo = "UTC",
        missed: Missed = "once",
        group: str | Group | None = None,
        **options: Any,
    ) -> Callable[[F], F]:
        """Run a function by a cron expression; options as ``Group.cron``."""

        def decorate(function: F) -> F:
            target = self._target(group)
            target.cron(expression, tz=tz, missed=missed, **options)(function)
            self._keep(target)
            return function

        return decorate

    def source(
        self, *, instances: Literal["one", "each"] = "one", group: str | Group | None = None
    ) -> Callable[[G], G]:
        """Register a source; see ``Group.source``."""

        def decorate(source: G) -> G:
            target = self._target(group)
            target.source(instances=instances)(source)
            self._keep(target)
            return source

        return decorate

    def add(self, part: object) -> None:
        """Add a Group, a component (an object whose methods carry ``@stentor.on(...)``) or a ``Source``."""
        group = part if isinstance(part, Group) else component_group(part)
        if group is not part and not group.sources:
            group.name = f"{self.name}.{type(part).__name__}"
        self._keep(group)

    def publishes(self, *types: type[Any]) -> None:
        """Declare the event types that this app owns; publishing any other is refused from then on."""
        if self.catalog.published is None:
            self.catalog.published = set()
        for cls in types:
            self.catalog.published.add(self.catalog.add(cls).type)

    def event(
        self, type: str, data: Any, version: int | None = None, *, topic: str | None = None, key: str | None = None
    ) -> Any:
        """An event known only by name: of its class if this app knows one, else as given, on ``topic`` (the type)."""
        return self.catalog.named(type, data, version, topic, key)

    def webhook(
        self,
        path: str,
        *,
        verify: Verify,
        to: type[Any] | Callable[..., Any] | Mapping[str, type[Any] | Callable[..., Any]],
    ) -> None:
        """Take what a third party posts to a path of ``asgi``, once ``verify`` knows it to be theirs.

        ``verify``: ``github(secret)``, or another of ``stentor.sources.webhook``. ``to``: the event class that the JSON
        is read as (unknown fields are ignored), a function of payload and headers that gives an event, a list or None,
        or a dict of these by the name of what happened; names that it lacks are accepted and dropped. The id of a
        delivery becomes the event's. Raises DefinitionError.
        """
        part("webhook")(self, path, verify, to)

    def users(
        self, *types: type[Any], identify: Identify, origins: Sequence[str] = (), stream: str = "/stream",
        socket: str = "/ws",
    ) -> None:  # fmt: skip
        """Let browsers subscribe to events of these types, and publish them, by Server-Sent Events and WebSocket.

        ``identify``: a function of a ``Visit`` (headers, cookies, query) that gives the ``Identity`` behind it, with
        what it may publish and subscribe to, or None. ``origins``: the sites, such as ``https://shop.example``, whose
        pages may connect beside those of the same host. Raises DefinitionError.
        """
        part("users")(self, types, identify, tuple(origins), stream, socket)

    def mount(self, endpoint: Endpoint) -> None:
        """Have ``asgi`` answer at a further path. Raises DefinitionError where something answers already."""
        if not endpoint.path.startswith("/"):
            raise DefinitionError(f"a path of {self.name} begins with /, unlike {endpoint.path!r}")
        for method in endpoint.methods:
            taken = method in OWN.get(endpoint.path, ())
            if taken or any(endpoint.path == other.path and method in other.methods for other in self.endpoints):
                raise DefinitionError(f"two parts of {self.name} answer to {method} {endpoint.path}")
        self.endpoints.append(endpoint)

    def groups(self) -> dict[str, Group]:
        """The groups by full name. Raises DefinitionError when two have one name, or one has no handler."""
        named: dict[str, Group] = {}
        for group in self._groups:
            name = group.name or f"{self.name}.{group.default_name}"
            if named.setdefault(name, group) is not group:
                raise DefinitionError(
                    f"two groups are called {name!r}; give one of them group=Group({group.default_name + '2'!r}), or "
                    f"both the same group="
                )
        return named

    # ---- publishing -----------------------------------------------------------------------------------------------

    @overload
    async def publish(
        self, event: EventLike, /, *, key: str | None = None, delay: Duration | None = None,
        at: datetime | None = None, id: str | None = None, time: datetime | None = None, source: str | None = None,
        subject: str | None = None, headers: dict[str, Attribute] | None = None,
    ) -> Receipt: ...  # fmt: skip
    @overload
    async def publish(self, event: Sequence[EventLike], /) -> list[Receipt]: ...
    async def publish(self, event: Any, /, **options: Any) -> Any:
        """Publish an event, or a list or tuple of events; back when the broker has it durably.

        ``key`` overrides the event's own; ``delay`` or ``at`` (a datetime with a time zone) holds it back; ``id`` makes
        a repetition recognisable; ``time``, ``source`` and ``subject`` are CloudEvents attributes; ``headers`` are
        extensions. A list takes these per event, in an ``Outgoing``; it is stored as a whole or not at all. Inside a
        handler the event gets causation, correlation and an id derived from the handled one.

        Raises:
            InvalidEvent: the event is refused; TooLarge: … for its size.
            NotConnected: the app is not running or connected.
            PublishUnknown: no confirmation; publish again with the same ids. BrokerError: it is not stored.
        """
        program = self._program
        if program is None:
            raise NotConnected("this app is not running; use `async with app:` or `async with app.connected():`")
        many = isinstance(event, (list, tuple))
        if options:
            if many:
                raise InvalidEvent("options apply to one event; wrap the members of a list in Outgoing(event, ...)")
            event = Outgoing(event, **options)
        messages = program.encode(event)
        if not messages:
            return []
        context = current.get()
        if context is not None:
            context.caused(messages)
        if program.runtime.undeclared:
            await program.declare_new()
        receipts = await program.broker.publish(messages)
        return list(receipts) if many else receipts[0]

    @overload
    def publish_sync(
        self, event: EventLike, /, *, key: str | None = None, delay: Duration | None = None,
        at: datetime | None = None, id: str | None = None, time: datetime | None = None, source: str | None = None,
        subject: str | None = None, headers: dict[str, Attribute] | None = None,
    ) -> Receipt: ...  # fmt: skip
    @overload
    def publish_sync(self, event: Sequence[EventLike], /) -> list[Receipt]: ...
    def publish_sync(self, event: Any, /, **options: Any) -> Any:
        """``publish`` for threads, Django views and scripts: blocks until the event is durable.

        Where the app neither runs nor is connected, it connects in a thread of its own and stays so until exit.
        Raises what ``publish`` raises, and NotConnected inside the event loop's own thread.
        """
        return self._call(self._publish_in(current.get(), event, options))

    async def _publish_in(self, context: Any, event: Any, options: dict[str, Any]) -> Any:
        token = current.set(context)
        try:
            return await self.publish(event, **options)
        finally:
            current.reset(token)

    async def cancel(self, id: str) -> bool:
        """Drop a delayed event that has not fallen due; False if there is none. Raises Unsupported, NotConnected."""
        broker = self.broker
        if not broker.features.cancel:
            raise Unsupported("cancel", broker.features.name, "let the handler decide whether the event still counts")
        return await broker.admin.cancel(id)

    @property
    def broker(self) -> Broker:
        """The open broker. Raises NotConnected."""
        if self._program is None:
            raise NotConnected("this app is not connected; use `async with app.connected():`")
        return self._program.broker

    @property
    def program(self) -> Program | None:
        """The running program, for health and metrics; None when the app is not running or connected."""
        return self._program

    # ---- running --------------------------------------------------------------------------------------------------

    def _make(self, **options: Any) -> Program:
        if self._program is not None:
            raise DefinitionError(f"app {self.name!r} is running or connected already")
        groups = self.groups()
        for name, group in groups.items():
            if not (group.handlers or group.timers or group.sources):
                raise DefinitionError(f"group {name} has no handler")
            for handler in group.handlers:
                for cls in handler.types:
                    self.catalog.add(cls, f"{handler.place}: ")
        url = options.pop("url", None) or self._url
        return Program(self.name, self.catalog, groups, app=self, url=url, durable=self._durable, **options)

    @asynccontextmanager
    async def running(
        self,
        *,
        url: str | None = None,
        only: Collection[str] = (),
        skip: Collection[str] = (),
        grace: Duration = "30s",
        new_groups: bool = False,
        on_fatal: Callable[[BaseException], None] | None = None,
        broker: Broker | None = None,
        overrides: dict[Any, Any] | None = None,
        connect_only: bool = False,
        clock: Clock | None = None,
        adapt: Callable[[Route], None] | None = None,
        threads: Executor | None = None,
    ) -> AsyncIterator[Program]:
        """Run (or with ``connect_only`` connect) inside a program; a failing worker cancels the body.

        ``broker``, ``overrides``, ``clock`` and ``adapt`` (called with each route before it runs) and ``threads`` (for
        sync handlers) are for tests.
        """
        task = asyncio.current_task()
        cut = False

        def fatal(error: BaseException) -> None:
            nonlocal cut
            if on_fatal is not None:
                on_fatal(error)
            elif task is not None:
                cut = True
                task.cancel()

        program = self._make(
            url=url, broker=broker, overrides=overrides, clock=clock or self._clock, adapt=adapt, threads=threads
        )
        await program.open(on_fatal=fatal, new_groups=new_groups)
        self._program = program
        try:
            if not connect_only:
                await program.start(only, skip)
            yield program
        except asyncio.CancelledError:
            if cut and program.failure is not None and task is not None:
                task.uncancel()
                raise program.failure from None
            raise
        finally:
            try:
                await program.stop(seconds(grace, "grace"))
            finally:
                self._program = None

    async def __aenter__(self) -> Self:
        running = self.running()
        await running.__aenter__()
        self._running = running
        return self

    async def __aexit__(self, *error: object) -> bool | None:
        return await self._running.__aexit__(*error)  # type: ignore[arg-type]

    def connected(self) -> _Both:
        """Connect without handling, to publish or browse; for ``async with`` and, in scripts, for ``with``."""
        return _Connected(self)

    @asynccontextmanager
    async def lifespan(self, _: Any = None) -> AsyncIterator[None]:
        """A lifespan for FastAPI or Starlette: ``FastAPI(lifespan=app.lifespan)``."""
        async with self.running():
            yield

    @property
    def asgi(self) -> Any:
        """An ASGI app with event ingress, health and metrics, to mount or to serve."""
        from stentor.asgi import Ingress

        return Ingress(self)

    def run(
        self,
        only: Collection[str] = (),
        *,
        skip: Collection[str] = (),
        broker: str | None = None,
        grace: Duration = "30s",
        new_groups: bool = False,
        started: Callable[[Program], Any] | None = None,
    ) -> None:
        """Run until SIGINT or SIGTERM, then stop in order; a second signal exits at once.

        ``started`` is called with the running program. Raises DefinitionError, ConfigError or BrokerError at start.
        """
        asyncio.run(self._main(only, skip, broker, grace, new_groups, started))

    async def _main(
        self,
        only: Collection[str],
        skip: Collection[str],
        broker: str | None,
        grace: Duration,
        new_groups: bool,
        started: Callable[[Program], Any] | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        failure: list[BaseException] = []

        def asked() -> None:
            if stop.is_set():
                raise SystemExit(130)
            stop.set()

        def fatal(error: BaseException) -> None:
            failure.append(error)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked)
        async with self.running(
            url=broker, only=only, skip=skip, grace=grace, new_groups=new_groups, on_fatal=fatal
        ) as program:
            result = started(program) if started is not None else self._announce(program)
            if asyncio.iscoroutine(result):
                await result
            await stop.wait()
        if failure:
            raise failure[0]

    @staticmethod
    def _announce(program: Program) -> None:
        log.info("%s runs on %s", program.name, program.broker)
        for note in program.notes:
            log.info("  %s", note)

    # ---- the synchronous side ---------------------------------------------------------------------------------------

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine where the app lives, from another thread."""
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not None:
            coroutine.close()
            raise NotConnected("publish_sync blocks: inside an event loop use `await app.publish(...)`")
        program = self._program
        if program is None:
            with self._portal_lock:
                if self._portal is None:
                    self._portal = _Portal(self)
                    atexit.register(self._portal.close)
            program = self._program
        assert program is not None
        return asyncio.run_coroutine_threadsafe(coroutine, program.runtime.loop).result()


class _Portal:
    """An event loop in a thread, in which an app is connected; for programs that have no loop of their own."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stentor", daemon=True)
        self._thread.start()
        self._running = app.running(connect_only=True)
        try:
            self._run(self._running.__aenter__())
        except BaseException:
            self._end()
            raise

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        atexit.unregister(self.close)
        self._run(self._running.__aexit__(None, None, None))
        self._end()
        self._app._portal = None

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Connected:
    def __init__(self, app: App) -> None:
        self._app = app

    async def __aenter__(self) -> App:
        self._running = self._app.running(connect_only=True)
        await self._running.__aenter__()
        return self._app

    async def __aexit__(self, *error: object) -> bool | None:
        return await self._running.__aexit__(*error)  # type: ignore[arg-type]

    def __enter__(self) -> App:
        self._app._portal = _Portal(self._app)
        return self._app

    def __exit__(self, *error: object) -> None:
        if self._app._portal is not None:
            self._app._portal.close()
