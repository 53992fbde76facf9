"""Typed events: the ``Event`` base, ``@event`` for other classes, topics, versions and upcasting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar
from uuid import UUID

import msgspec
from msgspec import Struct, StructMeta, field

from stentor.clock import Duration, seconds
from stentor.cloudevents import check_value
from stentor.errors import DefinitionError, InvalidEvent
from stentor.message import Attribute

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform

KeyOf = str | tuple[str, ...] | Callable[[Any], Any]
Newer = Literal["read", "wait", "dead"]
E = TypeVar("E")
C = TypeVar("C", bound=type)

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
KEY_LIMIT = 1024
PARTITIONS = 12
"""Of a topic that names no number."""


def check_name(name: str, what: str) -> str:
    """``name`` if every broker takes it: letters, digits, dot, dash, underscore, at most 200 characters."""
    if not isinstance(name, str) or not name or len(name) > 200 or not _NAME.issuperset(name) or name[0] in ".-":
        raise DefinitionError(
            f"{what} {name!r}: use 1 to 200 letters, digits, '.', '-' or '_', not starting with '.' or '-'"
        )
    return name


class Topic(Struct, frozen=True):
    """A topic and its settings: partitions (where the broker wants a number) and how long events are kept."""

    name: str
    partitions: int = PARTITIONS
    retention: Duration | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "topic")
        if not 1 <= self.partitions <= 1024:
            raise DefinitionError(f"topic {self.name}: partitions must be 1 to 1024, not {self.partitions}")
        if self.retention is not None:
            seconds(self.retention, f"topic {self.name}: retention")


class EventSpec:
    """What Stentor knows of one event class; found at ``cls.__event__``.

    ``encode`` gives the JSON bytes of an event, ``decode`` reads and checks them, ``convert`` makes an event of
    plain data; all three raise ``msgspec.ValidationError``, ``ValueError`` or ``TypeError`` on bad input.
    """

    __slots__ = (
        "also", "cls", "convert", "decode", "encode", "key", "key_of", "newer", "tells_none", "topic", "type",
        "upcasts", "version", "wire",
    )  # fmt: skip

    def __init__(
        self,
        cls: type,
        *,
        topic: Topic,
        key: KeyOf | None,
        type: str | None,
        version: int,
        newer: Newer,
        also: tuple[str, ...],
        wire: Literal["cloudevents", "json"],
    ) -> None:
        name = cls.__qualname__
        if not isinstance(version, int) or version < 1:
            raise DefinitionError(f"{name}: version must be a whole number from 1, not {version!r}")
        if newer not in ("read", "wait", "dead"):
            raise DefinitionError(f'{name}: newer must be "read", "wait" or "dead", not {newer!r}')
        if wire not in ("cloudevents", "json"):
            raise DefinitionError(f'{name}: wire must be "cloudevents" or "json", not {wire!r}')
        if type is not None and (not isinstance(type, str) or not type.strip()):
            raise DefinitionError(f"{name}: type must be a non-empty string, not {type!r}")
        self.cls = cls
        self.topic = topic
        self.key = key
        self.type = type if type is not None else cls.__name__
        self.version = version
        self.newer = newer
        self.also = (also,) if isinstance(also, str) else tuple(also)
        self.wire = wire
        self.upcasts: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self.key_of = _compile_key(cls, key)
        self.encode, self.decode, self.convert = _codec(cls)
        self.tells_none = issubclass(cls, Struct) and not cls.__struct_config__.omit_defaults
        """Whether every field that is None is in the bytes, as a null."""

    def check_finite(self, event: Any, data: bytes) -> None:
        """Refuse NaN and infinities, which JSON cannot carry: ``data``, the event's bytes, has them as null.

        Raises:
            InvalidEvent: there is one, and where.
        """
        nulls = data.count(b"null")
        if nulls and not (self.tells_none and nulls == msgspec.structs.astuple(event).count(None)):
            check_finite(event, self.cls.__qualname__)

    @property
    def names(self) -> tuple[str, ...]:
        """The type and the former types that this class reads."""
        return (self.type, *self.also)

    def schema(self) -> dict[str, Any]:
        """JSON Schema (2020-12) of the event's data."""
        if hasattr(self.cls, "model_json_schema"):
            return dict(self.cls.model_json_schema())
        return msgspec.json.schema(self.cls)


def _codec(cls: type) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any], Callable[[Any], Any]]:
    if hasattr(cls, "model_validate_json"):  # pydantic validates and dumps itself

        def encode(event: Any) -> bytes:
            return bytes(event.model_dump_json(warnings=False).encode())

        return encode, cls.model_validate_json, cls.model_validate  # type: ignore[attr-defined]
    decoder: list[msgspec.json.Decoder[Any]] = []

    def first_decode(data: bytes) -> Any:
        # Made at first use: a class may name types that are defined after it.
        decoder.append(msgspec.json.Decoder(cls))
        return decoder[0].decode(data)

    def decode(data: bytes) -> Any:
        return decoder[0].decode(data) if decoder else first_decode(data)

    return msgspec.json.Encoder().encode, decode, lambda data: msgspec.convert(data, cls)


def _compile_key(cls: type, key: KeyOf | None) -> Callable[[Any], str | None]:
    if key is None:
        return lambda event: None
    name = cls.__qualname__
    if isinstance(key, str):
        _check_fields(cls, (key,))

        def of_field(event: Any, field: str = key) -> str:
            return key_text(getattr(event, field), name, field)

        return of_field
    if isinstance(key, tuple) and key and all(isinstance(part, str) for part in key):
        _check_fields(cls, key)

        def of_fields(event: Any) -> str:
            # Lengths before the parts keep ("a", "b:c") and ("a:b", "c") apart.
            parts = [key_text(getattr(event, part), name, part) for part in key]
            return key_text("|".join(f"{len(part)}:{part}" for part in parts), name, "+".join(key))

        return of_fields
    if callable(key):
        return lambda event: key_text(key(event), name, "key function")
    raise DefinitionError(f"{name}: key must be a field name, a tuple of field names, a callable or None, not {key!r}")


def _check_fields(cls: type, names: tuple[str, ...]) -> None:
    known = field_names(cls)
    for name in names:
        if name not in known and not hasattr(cls, name):
            raise DefinitionError(
                f"{cls.__qualname__}: key names the field {name!r}, which it does not have; "
                f"its fields are {', '.join(sorted(known)) or 'none'}"
            )


def field_names(cls: type) -> list[str]:
    """The fields of an event class of any kind, in order."""
    for attribute in ("__struct_fields__", "model_fields", "__dataclass_fields__"):
        if hasattr(cls, attribute):
            return list(getattr(cls, attribute))
    return [item.name for item in getattr(cls, "__attrs_attrs__", ())]


def key_text(value: Any, name: str, field: str) -> str:
    """The text of a key value; raises InvalidEvent for None, an empty or overlong text and for other types."""
    if type(value) is str and 0 < len(value) <= KEY_LIMIT and value.isprintable():
        return value
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (int, UUID)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        hint = "; declare key=None for events without an order" if value is None else ""
        raise InvalidEvent(
            f"{name}: the key ({field}) is {value!r}; a key must be a str, int, UUID or an Enum of these{hint}"
        )
    if not 0 < len(value) <= KEY_LIMIT:
        raise InvalidEvent(f"{name}: the key ({field}) has {len(value)} characters; a key has 1 to {KEY_LIMIT}")
    return str(check_value("partitionkey", value))


class _Abstract:
    """Class keywords that an abstract event hands down to its subclasses."""

    __slots__ = ("key", "topic")

    def __init__(self, topic: Topic | None, key: KeyOf | None) -> None:
        self.topic = topic
        self.key = key


_UNSET: Any = object()


def _as_topic(topic: str | Topic, what: str) -> Topic:
    if isinstance(topic, Topic):
        return topic
    if isinstance(topic, str):
        return Topic(topic)
    raise DefinitionError(f"{what}: topic must be a name or a Topic, not {topic!r}")


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
    class Event:
        """Base class of typed events; see below."""

        def __init_subclass__(
            cls,
            *,
            topic: str | Topic | None = None,
            key: KeyOf | None = None,
            type: str | None = None,
            version: int = 1,
            newer: Newer = "read",
            also: tuple[str, ...] = (),
            wire: Literal["cloudevents", "json"] = "cloudevents",
            rename: Literal["lower", "upper", "camel", "pascal", "kebab"] | None = None,
        ) -> None: ...

else:

    class _EventMeta(StructMeta):
        def __new__(
            mcls,
            name,
            bases,
            namespace,
            *,
            topic=_UNSET,
            key=_UNSET,
            type=None,
            version=1,
            newer="read",
            also=(),
            wire="cloudevents",
            rename=None,
        ):
            cls = super().__new__(mcls, name, bases, namespace, frozen=True, kw_only=True, rename=rename)
            inherited = next((base.__inherit__ for base in bases if hasattr(base, "__inherit__")), None)
            if topic is _UNSET:
                topic = inherited.topic if inherited else None
            elif topic is not None:
                topic = _as_topic(topic, name)
            if key is _UNSET:
                key = inherited.key if inherited else None
            cls.__inherit__ = _Abstract(topic, key)
            cls.__event__ = (
                None
                if topic is None
                else EventSpec(cls, topic=topic, key=key, type=type, version=version, newer=newer, also=also, wire=wire)
            )
            return cls

    class Event(Struct, metaclass=_EventMeta):
        """Base class of typed events: a frozen, keyword-only msgspec Struct.

        Class keywords: ``topic`` (a name or a Topic; without one the class is abstract), ``key`` (a field name, a
        tuple of names or a callable; None means no order), ``type`` (default: the class name), ``version`` (from 1),
        ``newer`` (what to do with a newer version than this: "read", "wait" or "dead"), ``also`` (former types),
        ``wire`` ("cloudevents", or "json" for a foreign topic of plain JSON), ``rename`` (field names on the wire).
        Subclasses inherit ``topic`` and ``key``, never ``type`` or ``version``.

        Raises:
            DefinitionError: a keyword is wrong.
        """


def event(
    *,
    topic: str | Topic,
    key: KeyOf | None = None,
    type: str | None = None,
    version: int = 1,
    newer: Newer = "read",
    also: tuple[str, ...] = (),
    wire: Literal["cloudevents", "json"] = "cloudevents",
) -> Callable[[C], C]:
    """Make an event of a dataclass, attrs class, pydantic model or msgspec Struct; keywords as for ``Event``.

    Raises:
        DefinitionError: the class is none of these, or a keyword is wrong.
    """

    def decorate(cls: C) -> C:
        known = (
            dataclasses.is_dataclass(cls)
            or hasattr(cls, "__attrs_attrs__")
            or hasattr(cls, "model_validate_json")
            or (isinstance(cls, StructMeta))
        )
        if not known:
            raise DefinitionError(
                f"@event on {getattr(cls, '__qualname__', cls)!r}: expected a dataclass, an attrs class, "
                "a pydantic model or a msgspec Struct (put @event above @dataclass)"
            )
        spec = EventSpec(
            cls, topic=_as_topic(topic, cls.__qualname__), key=key, type=type, version=version, newer=newer,
            also=also, wire=wire,
        )  # fmt: skip
        cls.__event__ = spec  # type: ignore[attr-defined]
        return cls

    return decorate


def spec_of(cls: Any) -> EventSpec | None:
    """The EventSpec of an event class, or None for a class that is no (concrete) event."""
    spec = getattr(cls, "__event__", None)
    return spec if isinstance(spec, EventSpec) and spec.cls is cls else None


Upcast = Callable[[dict[str, Any]], dict[str, Any]]


def upcast(cls: type[Any], *, from_version: int) -> Callable[[Upcast], Upcast]:
    """Register a step that turns the data of ``from_version`` of an event into that of the next version.

    Steps are chained up to the version of the class. The function gets and returns the decoded JSON object.

    Raises:
        DefinitionError: the class is no event, the version is not below its own, or the step is there already.
    """
    spec = spec_of(cls)
    if spec is None:
        raise DefinitionError(f"@upcast: {cls!r} is no event")
    if not 1 <= from_version < spec.version:
        raise DefinitionError(
            f"@upcast({cls.__qualname__}, from_version={from_version}): the class has version {spec.version}; "
            f"from_version must be below it"
        )
    if from_version in spec.upcasts:
        raise DefinitionError(f"@upcast({cls.__qualname__}, from_version={from_version}) is defined twice")

    def decorate(function: Upcast) -> Upcast:
        spec.upcasts[from_version] = function
        return function

    return decorate


def replace(event: E, /, **changes: Any) -> E:
    """A copy of an event with some fields changed."""
    if isinstance(event, Struct):
        return msgspec.structs.replace(event, **changes)
    if hasattr(event, "model_copy"):
        return event.model_copy(update=changes)  # type: ignore[no-any-return]
    if dataclasses.is_dataclass(event) and not isinstance(event, type):
        return dataclasses.replace(event, **changes)
    return _evolve(event, changes)


def _evolve(event: E, changes: dict[str, Any]) -> E:
    fields = {name: getattr(event, name) for name in field_names(type(event))}
    return event.__class__(**(fields | changes))


class Named(Struct, frozen=True, kw_only=True):
    """An event known only by name, made by ``app.event(type, data)``."""

    type: str
    topic: str
    data: Any
    version: int = 1
    key: str | None = None


class Outgoing(Struct, frozen=True):
    """An event with publish options of its own, for lists and for what a handler returns.

    ``delay`` and ``at`` exclude each other; ``headers`` are CloudEvents extensions.
    """

    event: Any
    key: str | None = None
    delay: Duration | None = None
    at: datetime | None = None
    id: str | None = None
    time: datetime | None = None
    source: str | None = None
    subject: str | None = None
    headers: Mapping[str, Attribute] | None = None


_PLAIN = frozenset({str, int, bool, bytes, type(None), datetime, UUID})


def check_finite(value: Any, where: str) -> None:
    """Refuse NaN and infinities, which JSON cannot carry, anywhere inside an event or plain data."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidEvent(f"{where}: {value!r} cannot be carried by JSON")
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            if type(item) not in _PLAIN:  # most are, and every event with a null pays for the calls
                check_finite(item, f"{where}[{index}]")
    elif isinstance(value, (dict, Mapping)):
        for name, item in value.items():
            if type(item) not in _PLAIN:
                check_finite(item, f"{where}.{name}")
    else:
        for name in getattr(value, "__struct_fields__", None) or field_names(type(value)):
            if type(item := getattr(value, name)) not in _PLAIN:
                check_finite(item, f"{where}.{name}")


class DataclassLike(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class AttrsLike(Protocol):
    """An instance of an attrs class."""

    @property
    def __attrs_attrs__(self) -> Any: ...


class PydanticLike(Protocol):
    """An instance of a pydantic model."""

    @property
    def __pydantic_fields_set__(self) -> set[str]: ...


EventLike = Event | DataclassLike | PydanticLike | AttrsLike | Outgoing
"""What ``publish`` takes: an Event, an instance of an @event class, an ``app.event(...)``, or an Outgoing."""
