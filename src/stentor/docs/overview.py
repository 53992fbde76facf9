"""What several apps are, together: their events, and the parts of the picture with what flows between them.

What is declared is sure. What a function publishes without declaring it is read from its code: the event classes that
it names, and those that functions of its own package name which it calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal

from msgspec import Struct

from stentor.app import App
from stentor.clock import seconds
from stentor.connect import BrokerUrl
from stentor.errors import ConfigError, DuplicateType
from stentor.event import EventSpec, Topic, spec_of
from stentor.exchange import SOCKET
from stentor.gateway.routes import Model, address
from stentor.group import Group
from stentor.handler import Handler
from stentor.message import dead_topic
from stentor.observe.text import short_time, span
from stentor.schedule import Cron, Timer
from stentor.sinks.http import shown

Kind = Literal["source", "topic", "handler", "target", "gateway"]
CALLS = 3
"""How many calls deep the code of a function is read."""


class Part(Struct, frozen=True, kw_only=True):
    """A box of the picture: ``service`` is the app whose it is ("" for what is everybody's)."""

    id: str
    kind: Kind
    name: str
    service: str = ""
    note: str = ""
    facts: tuple[tuple[str, str], ...] = ()


class Link(Struct, frozen=True):
    """Events of these types go from one part to another; ``sure`` unless it was read from code."""

    start: str
    end: str
    types: tuple[str, ...]
    sure: bool = True


class Operation(Struct, frozen=True, kw_only=True):
    """What an app does with a topic: send events of these types, or handle them in a group."""

    id: str
    service: str
    action: Literal["send", "receive"]
    topic: str
    types: tuple[str, ...]
    """() for every event of the topic."""
    summary: str = ""
    facts: dict[str, Any] = {}
    """Of a handler: its group, order, retry, dead letters and limits. Times are in seconds."""


class Overview(Struct, frozen=True, kw_only=True):
    """Apps as a whole; ``broker`` is None where each has its own behind a gateway."""

    services: tuple[str, ...]
    broker: BrokerUrl | None
    events: dict[str, EventSpec]
    """By type."""
    owners: dict[str, tuple[str, ...]]
    """By type: the apps that send it."""
    parts: dict[str, Part]
    links: tuple[Link, ...]
    operations: tuple[Operation, ...]
    gateway: Model | None = None


def overview(apps: Sequence[App], broker: BrokerUrl | None, gateway: Model | None = None) -> Overview:
    """The apps together, on one broker, or with one each and a gateway between them.

    Raises:
        ConfigError: two apps have one name.
        DuplicateType: two apps have one event type, and differ about its key or topic.
    """
    return _Reading(broker, gateway).read(apps)


def _kept(topic: Topic) -> str:
    return "for ever" if topic.retention is None else span(seconds(topic.retention, "retention"))


class _Reading:
    """The making of an Overview."""

    def __init__(self, broker: BrokerUrl | None, gateway: Model | None) -> None:
        self._broker = broker
        self._gateway = gateway
        self._events: dict[str, EventSpec] = {}
        self._owners: dict[str, list[str]] = {}
        self._parts: dict[str, Part] = {}
        self._links: dict[tuple[str, str, bool], list[str]] = {}
        self._operations: list[Operation] = []

    def read(self, apps: Sequence[App]) -> Overview:
        names = [app.name for app in apps]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two apps are called {name!r}; each service has a name of its own")
        if self._gateway is not None:
            listen = self._gateway.settings.listen
            self._add(Part(id="gateway", kind="gateway", name="gateway", note=listen))
        for app in apps:
            self._app(app)
        if self._gateway is not None:
            self._routes(self._gateway, names)
        links = [Link(start, end, tuple(sorted(types)), sure) for (start, end, sure), types in self._links.items()]
        return Overview(
            services=tuple(names), broker=self._broker, events=dict(sorted(self._events.items())),
            owners={type: tuple(owners) for type, owners in self._owners.items()}, parts=self._parts,
            links=tuple(links), operations=tuple(self._operations), gateway=self._gateway,
        )  # fmt: skip

    # ---- one app ----------------------------------------------------------------------------------------------------

    def _app(self, app: App) -> None:
        declared: set[str] = set(app.catalog.published or ())
        for name, group in app.groups().items():
            for source in group.sources:
                owner = getattr(source.function, "__self__", None)
                if getattr(source.function, "__module__", "").startswith("stentor.sinks."):
                    continue  # it works for the subscriptions, which are a target below
                kind = type(owner).__name__ if owner is not None else "source"
                made = _held(owner) if owner is not None else ()
                self._source(app, source.name, kind, _doc(source.function), made or _named(source.function), bool(made))
            for timer, handler in group.timers:
                self._timer(app, name, group, timer, handler)
            for handler in group.handlers:
                self._handler(app, name, group, handler)
        self._endpoints(app)
        for spec in list(app.catalog):
            self._event(app, spec)
            if spec.type in declared and app.name not in self._owners.get(spec.type, ()):
                start = self._add(Part(id=f"api/{app.name}", kind="source", name=app.name, service=app.name,
                                       note="its own code"))  # fmt: skip
                self._send(app, start, [spec], sure=True)

    def _event(self, app: App, spec: EventSpec) -> None:
        known = self._events.setdefault(spec.type, spec)
        for what in ("key", "topic"):
            mine, theirs = (getattr(one, what) for one in (spec, known))
            if mine != theirs:
                mine, theirs = (getattr(one, "name", one) for one in (mine, theirs))
                raise DuplicateType(
                    f"{app.name} has {spec.type!r} with another {what} ({mine}) than another app has ({theirs}): "
                    "agree on one"
                )

    def _source(
        self, app: App, name: str, kind: str, doc: str, made: Iterable[EventSpec], sure: bool, facts: Any = ()
    ) -> None:
        part = Part(id=f"source/{app.name}/{name}", kind="source", name=name, service=app.name, note=kind,
                    facts=(("does", doc), *facts) if doc else tuple(facts))  # fmt: skip
        self._send(app, self._add(part), made, sure=sure)

    def _send(self, app: App, start: str, specs: Iterable[EventSpec], *, sure: bool) -> None:
        for spec in specs:
            self._event(app, spec)
            owners = self._owners.setdefault(spec.type, [])
            if app.name not in owners:
                owners.append(app.name)
                self._operations.append(
                    Operation(
                        id=f"{app.name}.send.{spec.type}", service=app.name, action="send", topic=spec.topic.name,
                        types=(spec.type,), summary=f"{app.name} publishes {spec.type}",
                    )
                )  # fmt: skip
            self._link(start, self._topic(app, spec.topic.name, spec), (spec.type,), sure=sure)

    def _timer(self, app: App, name: str, group: Group, timer: Timer, handler: Handler) -> None:
        schedule = timer.schedule
        if isinstance(schedule, Cron):
            when = f"cron {schedule.expression} {schedule.zone.key}"
        else:
            when = f"every {short_time(schedule.period)}"
        clock = self._add(Part(id=f"timer/{name}/{timer.name}", kind="source", name=when, service=app.name,
                               note="time", facts=(("missed firings", timer.missed),)))  # fmt: skip
        self._link(clock, self._handles(app, name, group, handler), ())

    def _handler(self, app: App, name: str, group: Group, handler: Handler) -> None:
        specs = [app.catalog.add(cls, f"{handler.place}: ") for cls in handler.types]
        for spec in specs:
            self._event(app, spec)
        target = getattr(handler.function, "target", None)
        if target is None:
            end = self._handles(app, name, group, handler)
        else:
            end = self._remote(target.url, _facts(name, group, handler))
        by_topic: dict[str, list[EventSpec]] = {}
        for spec in specs:
            by_topic.setdefault(spec.topic.name, []).append(spec)
        if handler.topic is not None:
            by_topic[handler.topic] = []
        for topic, taken in by_topic.items():
            types = tuple(spec.type for spec in taken)
            self._link(self._topic(app, topic, taken[0] if taken else None), end, types)
            many = f".{topic}" if len(by_topic) > 1 else ""
            self._operations.append(
                Operation(
                    id=f"{name}.{handler.name}{many}", service=app.name, action="receive", topic=topic, types=types,
                    summary=_doc(handler.function), facts=_facts(name, group, handler),
                )
            )  # fmt: skip

    def _handles(self, app: App, name: str, group: Group, handler: Handler) -> str:
        """The part of a handler, with what it sends."""
        facts = _facts(name, group, handler)
        retry = facts["retry"]["attempts"]
        told = [("group", name), ("order", facts["order"]),
                ("retry", "without end" if retry is None else f"{retry} attempts")]  # fmt: skip
        told += [("dead letters", facts["deadLetter"]["topic"])]
        told += [(word, _told(word, facts[word])) for word in ("concurrency", "rate", "keyRate", "timeout", "batch")
                 if word in facts]  # fmt: skip
        doc = _doc(handler.function)
        part = Part(id=f"handler/{name}/{handler.name}", kind="handler", name=handler.name, service=app.name,
                    note=name, facts=(*((("does", doc),) if doc else ()), *told))  # fmt: skip
        self._add(part)
        sure = [app.catalog.add(cls) for cls in handler.returns]
        self._send(app, part.id, sure, sure=True)
        own = {spec_of(cls) for cls in handler.types} | set(sure)
        self._send(app, part.id, [spec for spec in _named(handler.function) if spec not in own], sure=False)
        return part.id

    def _remote(self, url: str, facts: dict[str, Any]) -> str:
        """Where ``app.deliver`` sends to: the gateway, if it is that."""
        text = shown(url)
        if self._gateway is not None:
            place = text.partition("://")[2].partition("/")[0]
            listens = address(self._gateway.settings.listen, "listen")
            if place.rpartition(":")[2] == str(listens[1]) and self._at_gateway(place.rpartition(":")[0], listens[0]):
                return "gateway"
        part = Part(id=f"target/{text}", kind="target", name=text, note="HTTP", facts=(("order", facts["order"]),))
        return self._add(part)

    @staticmethod
    def _at_gateway(host: str, listens: str) -> bool:
        local = ("localhost", "127.0.0.1", "0.0.0.0", "::", "::1")  # noqa: S104 - compared, not listened at
        host = host.strip("[]")
        return host == listens or (host in local and listens in local)

    def _endpoints(self, app: App) -> None:
        """What feature parts mounted on ``app.asgi``: webhooks, users, subscriptions."""
        for endpoint in app.endpoints:
            owner = getattr(endpoint.answer, "__self__", None)
            module = type(owner).__module__
            if module == "stentor.sources.webhook":
                self._source(app, endpoint.path, "webhook", "", _held(owner), sure=True)
            elif module == "stentor.sources.users" and SOCKET in endpoint.methods:
                specs = [spec for type in owner._types if (spec := app.catalog.find(type)) is not None]  # type: ignore[union-attr]
                self._source(app, f"users at {endpoint.path}", "browsers", "", specs, sure=False)
                self._watched(app, f"users/{app.name}", "browsers", specs)
            elif module == "stentor.sinks.subscriptions" and endpoint.path.endswith("/"):
                self._watched(app, f"subscribers/{app.name}", "subscribers", _held(owner))

    def _watched(self, app: App, id: str, name: str, specs: Iterable[EventSpec]) -> None:
        end = self._add(Part(id=f"target/{id}", kind="target", name=name, service=app.name, note=f"of {app.name}"))
        for spec in specs:
            self._event(app, spec)
            self._link(self._topic(app, spec.topic.name, spec), end, (spec.type,))

    # ---- between them -----------------------------------------------------------------------------------------------

    def _topic(self, app: App, name: str, spec: EventSpec | None) -> str:
        """The part of a topic: everybody's, or the app's own behind a gateway."""
        home = app.name if self._gateway is not None else ""
        facts = []
        if spec is not None:
            facts = [("partitions", str(spec.topic.partitions)), ("kept", _kept(spec.topic))]
        return self._add(Part(id=f"topic/{home}/{name}", kind="topic", name=name, service=home, facts=tuple(facts)))

    def _routes(self, model: Model, names: Sequence[str]) -> None:
        for route in model.routes:
            for service in route.to:
                if service in names and route.topic is not None:
                    self._link("gateway", f"topic/{service}/{route.topic}", (route.type,))
                else:
                    end = self._add(Part(id=f"target/{service}", kind="target", name=service, note="service"))
                    self._link("gateway", end, (route.type,))

    def _add(self, part: Part) -> str:
        self._parts.setdefault(part.id, part)
        return part.id

    def _link(self, start: str, end: str, types: Sequence[str], *, sure: bool = True) -> None:
        known = self._links.setdefault((start, end, sure), [])
        known += [type for type in types if type not in known]


def _facts(name: str, group: Group, handler: Handler) -> dict[str, Any]:
    """How a handler runs, in the words of ``x-stentor``."""
    retry = handler.retry
    facts: dict[str, Any] = {
        "group": name,
        "order": "key" if group.ordering == "key" else "none",
        "concurrency": group.concurrency,
        "start": group.start,
        "retry": {"attempts": retry.attempts, "first": retry._first, "factor": retry.factor, "longest": retry._longest},
        "deadLetter": {"topic": dead_topic(name), "then": group.on_dead},
    }
    if never := [error.__name__ for error in retry.never]:
        facts["retry"]["never"] = never
    if only := [error.__name__ for error in retry.only]:
        facts["retry"]["only"] = only
    facts |= {word: value for word, value in (("rate", group.rate), ("keyRate", group.key_rate)) if value}
    if handler.timeout is not None:
        facts["timeout"] = handler.timeout
    if handler.batch is not None:
        facts["batch"] = handler.batch.size
    if handler.where is not None or handler.where_sql is not None:
        facts["filtered"] = True
    for word in ("broadcast", "single"):
        if getattr(group, word):
            facts[word] = True
    return facts


def _told(word: str, value: Any) -> str:
    if word == "timeout":
        return short_time(value)
    return f"{value:g}/s" if word in ("rate", "keyRate") else str(value)


def _doc(function: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0].strip()


# ---- what code says -------------------------------------------------------------------------------------------------


def _held(owner: Any) -> list[EventSpec]:
    """The event classes that an object has in its attributes, or in containers there."""
    found: dict[EventSpec, None] = {}

    def look(value: Any, depth: int) -> None:
        spec = value if isinstance(value, EventSpec) else spec_of(value) if isinstance(value, type) else None
        if spec is not None:
            found[spec] = None
        elif depth and isinstance(value, dict):
            for item in value.values():
                look(item, depth - 1)
        elif depth and isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                look(item, depth - 1)
        elif isinstance(value, (FunctionType, MethodType)):
            found.update(dict.fromkeys(_named(value)))

    slots = (name for cls in type(owner).__mro__ for name in getattr(cls, "__slots__", ()))
    for name in dict.fromkeys([*getattr(owner, "__dict__", {}), *slots]):
        look(getattr(owner, name, None), 2)
    return list(found)


def _named(function: Callable[..., Any]) -> list[EventSpec]:
    """The event classes that a function's code names, and that of its own package's functions which it calls."""
    function = inspect.unwrap(function)
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        return []
    home = _home(function)
    found: dict[EventSpec, None] = {}
    seen: set[FunctionType] = set()

    def read(one: FunctionType, depth: int) -> None:
        seen.add(one)
        for value in _values(one):
            spec = spec_of(value) if isinstance(value, type) else None
            if spec is not None:
                found[spec] = None
            elif depth and isinstance(value, FunctionType) and value not in seen and home and _home(value) == home:
                read(value, depth - 1)

    read(function, CALLS)
    return list(found)


def _home(function: FunctionType) -> str:
    """The package of a user's function."""
    name = function.__module__.partition(".")[0]
    return "" if name == "stentor" else name


def _values(function: FunctionType) -> Iterator[Any]:
    """What the names in a function's code stand for."""
    codes = [function.__code__]
    names: dict[str, None] = {}
    while codes:
        code = codes.pop()
        names |= dict.fromkeys(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    for name in names:
        value = function.__globals__.get(name)
        yield value
        if isinstance(value, ModuleType):
            yield from (getattr(value, other, None) for other in names)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
