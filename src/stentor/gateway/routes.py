"""The neutral model of a gateway: which service takes which events, where it listens, and who may publish what.

It is taken from the apps (what they handle, publish and key by) and from one TOML file (what only the deployment
knows: addresses, identities, limits). Patterns of types, sources and subjects are exact, or end in ``*``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import msgspec
from msgspec import Struct

from stentor.app import App
from stentor.errors import ConfigError, DuplicateType
from stentor.event import EventSpec
from stentor.handler import Handler

Grade = Literal["mirror", "acked", "relay"]
PATH = "/events"
RELAY = "gateway"
"""The service that broadcasts, and by default takes the dead letters: see ``relay.py``."""
UNKNOWN = "gateway.unknown"
"""Its topic of what no service takes, whose events are dead letters of the group of that name."""
TARGET = "x-stentor-target"
"""The header by which an event that came ``inside`` names its service."""
MAX_BYTES = 8 * 1024 * 1024
Scalar = str | int | float | bool

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FIELD = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_RATE = re.compile(r"([1-9]\d{0,8})/(s|m|h)")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


class _Setting(Struct, forbid_unknown_fields=True):
    """A table of the TOML file."""


class Service(_Setting, kw_only=True):
    """Where a service listens (``HOST:PORT``), and the path that says whether it is ready; "" asks nothing."""

    at: tuple[str, ...]
    health: str = "/readyz"


class TypeSettings(_Setting, kw_only=True):
    """What is set for the types of a pattern: the grade of broadcast, and a rate such as ``100/s``."""

    broadcast: Grade | None = None
    limit: str | None = None


class RouteSettings(_Setting, kw_only=True):
    """A route beside those of the apps, and before them: all conditions hold; ``data`` has fields by dotted name."""

    to: tuple[str, ...]
    type: str = "*"
    source: str = "*"
    data: dict[str, Scalar] = {}


class Jwt(_Setting, kw_only=True):
    """Bearer tokens: who issues them, for which audience, and the file of the keys: JWKS, for APISIX a public key."""

    issuer: str
    audience: str
    jwks: str
    public_key: str | None = None


class Tls(_Setting, kw_only=True):
    """The gateway's certificate and key, and the authority whose certificates identify publishers (mutual TLS)."""

    cert: str
    key: str
    client_ca: str | None = None


class Settings(_Setting, kw_only=True):
    """The TOML file of a gateway."""

    listen: str = "127.0.0.1:8080"
    inside: str = "127.0.0.1:8081"
    """Where the relay hands events to services: an address that only the relay can reach."""
    admin: str = "127.0.0.1:9901"
    """Of Envoy: where it says what it runs."""
    broadcast: Grade = "relay"
    dead_letter: str = RELAY
    max_bytes: int = MAX_BYTES
    services: dict[str, tuple[str, ...] | Service] = {}
    routes: tuple[RouteSettings, ...] = ()
    types: dict[str, TypeSettings] = {}
    jwt: Jwt | None = None
    tls: Tls | None = None
    keys: dict[str, str] = {}
    """For APISIX: subjects, and the names of the environment variables that hold their API keys."""
    publishers: dict[str, tuple[str, ...]] = {}


class Rate(Struct, frozen=True):
    """So many events in so many seconds."""

    events: int
    seconds: int


class Route(Struct, frozen=True, kw_only=True):
    """Events of a type (from a source, with such data) go to one service, or to several by a grade of broadcast."""

    type: str
    to: tuple[str, ...]
    grade: Grade = "relay"
    source: str = "*"
    data: dict[str, Scalar] = {}
    limit: Rate | None = None
    topic: str | None = None
    key: str | None = None

    def __str__(self) -> str:
        conditions = [f"source {self.source}"] if self.source != "*" else []
        conditions += [f"{name} = {value!r}" for name, value in self.data.items()]
        return self.type + (f" ({', '.join(conditions)})" if conditions else "")


class Model(Struct, frozen=True, kw_only=True):
    """What a gateway does: the services by name, and the routes, the first that matches counts."""

    settings: Settings
    services: dict[str, Service]
    routes: tuple[Route, ...]
    publishers: dict[str, tuple[str, ...]]
    """The types that a subject may publish; they bind when ``identified``."""
    notes: tuple[str, ...] = ()
    """What the apps do that a gateway has no part in."""

    @property
    def identified(self) -> bool:
        """Whether publishers say who they are."""
        settings = self.settings
        return (
            settings.jwt is not None
            or bool(settings.keys)
            or (settings.tls is not None and bool(settings.tls.client_ca))
        )

    @property
    def targets(self) -> list[str]:
        """The services that routes lead to."""
        return sorted({name for route in self.routes for name in route.to})

    @property
    def used(self) -> list[str]:
        """The targets, with the services of the gateway's own."""
        relays = {RELAY} if self.broadcasts("relay") else set()
        return sorted({*self.targets, self.settings.dead_letter, *relays})

    def broadcasts(self, grade: Grade) -> list[Route]:
        """The routes with several targets of this grade."""
        return [route for route in self.routes if len(route.to) > 1 and route.grade == grade]


def matches(pattern: str, value: str) -> bool:
    """Whether a value is the pattern, or begins with what stands before its ``*``."""
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def overlap(one: str, two: str) -> bool:
    """Whether a value can match both patterns."""
    return matches(one, two.rstrip("*")) or matches(two, one.rstrip("*"))


def read_settings(text: str, name: str) -> Settings:
    """The settings in a TOML text. Raises ConfigError, which says the place."""
    try:
        return msgspec.toml.decode(text, type=Settings)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"{name}: {error}") from None


def quoted(text: str) -> str:
    """A text as it stands in a header: percent-encoded as in 3.1.3.2 of the HTTP binding of CloudEvents."""
    return quote(text, safe="!#$&'()*+,-./:;<=>?@[\\]^_`{|}~")


def address(text: str, what: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{what}: {text!r} is no HOST:PORT, such as 127.0.0.1:8001 or [::1]:8001")
    return host, int(port)


def host_names(service: Service) -> bool:
    """Whether a service's hosts are names for DNS, not addresses."""
    try:
        for place in service.at:
            ip_address(address(place, "")[0])
    except ValueError:
        return True
    return False


def load(apps: Sequence[App], config: Path) -> Model:
    """The model of a gateway in front of these apps, by the file of its settings. Raises what ``make`` raises."""
    try:
        text = config.read_text("utf-8")
    except OSError as error:
        raise ConfigError(
            f"{config}: {error.strerror}; it says at least where each service listens: [services] with a line "
            "such as shop = ['127.0.0.1:8001']"
        ) from None
    return make(apps, read_settings(text, str(config)))


def specs_of(apps: Sequence[App]) -> dict[str, EventSpec]:
    """The event classes that these apps handle or own, by type. Raises DuplicateType."""
    return _read(apps)[0]


def make(apps: Sequence[App], settings: Settings) -> Model:
    """The model of a gateway in front of these apps.

    Raises:
        DuplicateType: two apps claim one type, or disagree about its key.
        ConfigError: a route leads to nothing, a service has no address, or a setting is wrong.
    """
    names = [app.name for app in apps]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two apps are called {name!r}; each service has a name of its own")
        if name == RELAY:
            raise ConfigError(f"an app is called {RELAY!r}, which is the relay's name; give it another")
    specs, handled, owners, notes = _read(apps)
    services = {
        name: value if isinstance(value, Service) else Service(at=value) for name, value in settings.services.items()
    }
    for name, service in services.items():
        _check_service(name, service)
    routes = [*_own_routes(settings), *_app_routes(specs, handled, settings)]
    for type, by in owners.items():
        if not any(matches(route.type, type) for route in routes):
            raise ConfigError(f"{by} publishes {type!r}, which no app here handles: add the app that does with --app")
    model = Model(
        settings=settings, services=services, routes=tuple(routes), notes=tuple(notes),
        publishers=_publishers(apps, settings, routes),
    )  # fmt: skip
    _check(model, names)
    return model


def _read(
    apps: Sequence[App],
) -> tuple[dict[str, EventSpec], dict[str, list[str]], dict[str, str], list[str]]:
    """Specs by type, the apps that handle each type, the owner of each type that has one, and notes."""
    specs: dict[str, EventSpec] = {}
    who: dict[str, str] = {}
    handled: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    notes: list[str] = []

    def learn(app: App, spec: EventSpec) -> None:
        for type in spec.names:
            other = specs.setdefault(type, spec)
            if key_name(other) != key_name(spec):
                raise DuplicateType(
                    f"{who[type]} keys {type!r} by {key_name(other)}, {app.name} by {key_name(spec)}: events that "
                    "belong in order would be parted; agree on one key"
                )
            who.setdefault(type, app.name)

    for app in apps:
        handlers = [handler for group in app.groups().values() for handler in group.handlers]
        for handler in handlers:
            if _delivers(handler):
                continue
            if handler.topic is not None:
                notes.append(f"{app.name}: {handler.name} takes the whole topic {handler.topic}, which has no route")
            for cls in handler.types:
                spec = app.catalog.add(cls, f"{handler.place}: ")
                if spec.wire == "json":
                    notes.append(f"{app.name}: {handler.name} takes plain JSON, which is no CloudEvent to route")
                    continue
                learn(app, spec)
                for type in spec.names:
                    if app.name not in handled.setdefault(type, []):
                        handled[type].append(app.name)
        _own(app, owners)
        for spec in app.catalog:
            if spec.type in owners and owners[spec.type] == app.name:
                learn(app, spec)
    return specs, handled, owners, notes


def _own(app: App, owners: dict[str, str]) -> None:
    for type in sorted(app.catalog.published or ()):
        other = owners.setdefault(type, app.name)
        if other != app.name:
            raise DuplicateType(f"{other} and {app.name} both claim to publish {type!r}; one service owns a type")


def _delivers(handler: Handler) -> bool:
    """Whether it is made by ``app.deliver``: what it takes leaves the app, most likely for this very gateway."""
    return hasattr(handler.function, "target")


def key_name(spec: EventSpec) -> str | None:
    """The field or fields that are a type's key, in words; None without one."""
    key = spec.key
    if key is None or isinstance(key, str):
        return key
    return " and ".join(map(str, key)) if isinstance(key, tuple) else "a function"


def _own_routes(settings: Settings) -> list[Route]:
    routes = []
    for number, route in enumerate(settings.routes, 1):
        where = f"route {number} ({route.type})"
        if not route.to:
            raise ConfigError(f"{where} leads to no service; name one in `to`")
        for name in route.data:
            if not _FIELD.fullmatch(name):
                raise ConfigError(f"{where}: {name!r} is no field of the data; write for example address.country")
        grade, limit = _set_for(route.type, settings)
        if grade == "relay" and len(route.to) > 1:
            raise ConfigError(
                f"{where} leads to several services by the relay, which knows the types of apps alone: set broadcast = "
                f"'acked' or 'mirror' in [types.'{route.type}']"
            )
        routes.append(
            Route(type=route.type, to=route.to, source=route.source, data=route.data, grade=grade, limit=limit)
        )
    return routes


def _app_routes(specs: Mapping[str, EventSpec], handled: Mapping[str, list[str]], settings: Settings) -> list[Route]:
    routes = []
    for type, services in handled.items():
        grade, limit = _set_for(type, settings)
        spec = specs[type]
        topic, key = spec.topic.name, key_name(spec)
        routes.append(Route(type=type, to=tuple(services), grade=grade, limit=limit, topic=topic, key=key))
    for pattern in settings.types:
        types = [*(route.type for route in settings.routes), *handled]
        if not any(overlap(pattern, type) for type in types):
            raise ConfigError(f"types.{pattern!r} is set, but no app here handles such a type, and no route names it")
    return routes


def _set_for(type: str, settings: Settings) -> tuple[Grade, Rate | None]:
    """Grade and limit of a type: each from the closest pattern that sets it."""
    grade, limit = settings.broadcast, None
    for pattern in sorted(settings.types, key=lambda pattern: (not pattern.endswith("*"), len(pattern))):
        if matches(pattern, type):
            found = settings.types[pattern]
            grade = found.broadcast or grade
            limit = _rate(found.limit, f"types.{pattern!r}.limit") if found.limit is not None else limit
    return grade, limit


def _rate(text: str, what: str) -> Rate:
    found = _RATE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{what}: {text!r} is no rate; write for example 100/s, 5/m or 1000/h")
    return Rate(int(found[1]), _SECONDS[found[2]])


def _publishers(apps: Sequence[App], settings: Settings, routes: Sequence[Route]) -> dict[str, tuple[str, ...]]:
    """Each service as a subject of its name with what it publishes, and those of the settings."""
    found: dict[str, tuple[str, ...]] = {}
    for app in apps:
        types = set(app.catalog.published or ())
        if app.catalog.published is None:
            handlers = [one for group in app.groups().values() for one in group.handlers]
            found_in = [cls for one in handlers for cls in (one.types if _delivers(one) else one.returns)]
            types = {app.catalog.add(cls).type for cls in found_in}
        routed = tuple(sorted(type for type in types if any(matches(route.type, type) for route in routes)))
        if routed:
            found[app.name] = routed
    for subject, patterns in settings.publishers.items():
        for pattern in patterns:
            if not any(overlap(pattern, route.type) for route in routes):
                raise ConfigError(f"publisher {subject!r} may publish {pattern!r}, which no service takes")
        found[subject] = (*found.get(subject, ()), *(one for one in patterns if one not in found.get(subject, ())))
    return found


def _check_service(name: str, service: Service) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"services.{name!r}: a name has letters, digits, '.', '-' and '_'")
    if not service.at:
        raise ConfigError(f"services.{name} has no address; write for example {name} = ['127.0.0.1:8001']")
    for place in service.at:
        address(place, f"services.{name}")
    if len(set(service.at)) < len(service.at):
        raise ConfigError(f"services.{name} names an address twice: {', '.join(service.at)}")


def _check(model: Model, apps: Sequence[str]) -> None:
    settings, services = model.settings, model.services
    if not model.routes:
        raise ConfigError("there is nothing to route: no app here handles an event")
    for what in ("listen", "inside", "admin"):
        address(getattr(settings, what), what)
    for route in model.routes:
        for name in route.to:
            if name not in services:
                known = f"; services has {', '.join(services)}" if services else ""
                raise ConfigError(
                    f"{route} goes to {name}, which has no address: write {name} = ['HOST:PORT'] under [services]"
                    + known
                )
    used = {name for route in model.routes for name in route.to} | {settings.dead_letter, *apps}
    if model.broadcasts("relay"):
        used.add(RELAY)
        if RELAY not in services:
            raise ConfigError(
                f"{model.broadcasts('relay')[0]} goes to several services through the relay, which has no address: "
                f"write {RELAY} = ['HOST:PORT'] under [services] and run the relay there, or set broadcast = "
                "'acked' or 'mirror'"
            )
    if settings.dead_letter not in services:
        raise ConfigError(
            f"unknown types go to {settings.dead_letter}, which has no address: write {settings.dead_letter} = "
            "['HOST:PORT'] under [services], or name another service in dead_letter"
        )
    for name in services:
        if name not in used:
            raise ConfigError(f"services.{name} is no app here, and no route leads there: add --app, or remove it")
    if settings.publishers and not model.identified:
        raise ConfigError("publishers are named, but nothing tells who they are: add [jwt], or client_ca to [tls]")
    if model.identified and not model.publishers:
        raise ConfigError("nobody may publish: name subjects and their types under [publishers]")
