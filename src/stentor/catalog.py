"""The catalog: which class stands for which event type and version; events to messages and back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec

from stentor.clock import Clock, iso, seconds
from stentor.cloudevents import check_extension, check_uri_reference, check_value
from stentor.errors import DefinitionError, DuplicateType, InvalidEvent, NewerVersion, Undecodable
from stentor.event import EventSpec, Named, Outgoing, Topic, check_finite, key_text, spec_of
from stentor.message import Message, new_id

JSON = "application/json"
_encode_json = msgspec.json.Encoder().encode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_BAD: tuple[type[Exception], ...] = (msgspec.ValidationError, msgspec.DecodeError, ValueError, TypeError)


class Catalog:
    """The event classes of one app, by type."""

    def __init__(self, source: str, clock: Clock) -> None:
        self.source = source
        self.clock = clock
        self._by_type: dict[str, EventSpec] = {}
        self._foreign: dict[str, EventSpec] = {}
        self.published: set[str] | None = None
        """The types that the app declared as its own with ``publishes``; None leaves all open."""
        self._stamp: tuple[int, str] = (0, "")

    def add(self, cls: Any, where: str = "") -> EventSpec:
        """Register an event class.

        Raises:
            DefinitionError: it is no event class.
            DuplicateType: another class has the type already.
        """
        spec = spec_of(cls)
        if spec is None:
            name = getattr(cls, "__qualname__", repr(cls))
            abstract = hasattr(cls, "__inherit__")
            hint = "it has no topic, so it is abstract" if abstract else "derive it from Event or use @event"
            raise DefinitionError(f"{where}{name} is no event: {hint}")
        for name in spec.names:
            other = self._by_type.setdefault(name, spec)
            if other is not spec:
                raise DuplicateType(
                    f"two classes claim the event type {name!r}: {_path(other.cls)} and {_path(spec.cls)}; "
                    "give one of them another type="
                )
        if spec.wire == "json":
            other = self._foreign.setdefault(spec.topic.name, spec)
            if other is not spec:
                raise DuplicateType(
                    f"topic {spec.topic.name!r} of plain JSON can have one class; "
                    f"it has {_path(other.cls)} and {_path(spec.cls)}"
                )
        return spec

    def __iter__(self) -> Iterator[EventSpec]:
        return iter(dict.fromkeys(self._by_type.values()))

    def find(self, type: str) -> EventSpec | None:
        """The class that reads messages of this type, if there is one."""
        return self._by_type.get(type)

    def topics(self) -> dict[str, Topic]:
        """The topics of all classes, by name. Raises DuplicateType when two classes differ about one."""
        found: dict[str, Topic] = {}
        for spec in self:
            topic = found.setdefault(spec.topic.name, spec.topic)
            if topic != spec.topic:
                raise DuplicateType(
                    f"topic {topic.name!r} is declared with different settings: {spec.topic} and {topic}"
                )
        return found

    def schemas(self) -> dict[str, dict[str, Any]]:
        """JSON Schema of every event's data, by type."""
        return {spec.type: spec.schema() for spec in self}

    def named(self, type: str, data: Any, version: int | None, topic: str | None, key: str | None) -> Any:
        """An event known by name: of its class where there is one, else a ``Named``."""
        spec = self._by_type.get(type)
        if spec is not None and version in (None, spec.version):
            try:
                return spec.convert(data)
            except _BAD as error:
                raise InvalidEvent(f"{type}: {error}") from None
        home = topic or (spec.topic.name if spec else type)
        return Named(type=type, topic=home, data=data, version=version or 1, key=key)

    def stamp(self) -> str:
        """Now as RFC 3339 text; one text a millisecond, as making it costs more than the rest of a publish."""
        now = self.clock.now()
        millisecond = int(now * 1000)
        if self._stamp[0] != millisecond:
            self._stamp = (millisecond, iso(millisecond / 1000))
        return self._stamp[1]

    def encode(self, event: Any, time: str) -> Message:
        """The message of an event, checked by decoding its own bytes.

        Raises:
            InvalidEvent: the event would not decode, its key is bad, or the app does not own its type.
            DuplicateType: the app knows another class of its type.
        """
        cls = type(event)
        if cls is Outgoing:
            return self._encode_outgoing(event, time)
        spec: EventSpec | None = getattr(cls, "__event__", None)
        if spec is None or spec.cls is not cls:
            return self._encode_other(event, time)
        if self._by_type.get(spec.type) is not spec:
            self.add(cls)
        try:
            data = spec.encode(event)
            spec.decode(data)
        except _BAD as error:
            raise InvalidEvent(f"{cls.__qualname__}: {error}; {_short(event)}") from None
        spec.check_finite(event, data)
        if self.published is not None and spec.type not in self.published:
            raise InvalidEvent(f"this app does not publish {spec.type!r}; declare it with app.publishes(...)")
        if spec.wire == "json":
            return Message(
                id=new_id(), source=self.source, type="", topic=spec.topic.name, key=spec.key_of(event), data=data,
                datacontenttype=JSON, fresh=True,
            )  # fmt: skip
        return Message(
            id=new_id(),
            source=self.source,
            type=spec.type,
            topic=spec.topic.name,
            key=spec.key_of(event),
            data=data,
            time=time,
            datacontenttype=JSON,
            extensions={} if spec.version == 1 else {"schemaversion": spec.version},
            fresh=True,
        )

    def _encode_other(self, event: Any, time: str) -> Message:
        if isinstance(event, Named):
            check_finite(event.data, event.type)
            try:
                data = _encode_json(event.data)
            except _BAD as error:
                raise InvalidEvent(f"{event.type}: {error}") from None
            if self.published is not None and event.type not in self.published:
                raise InvalidEvent(f"this app does not publish {event.type!r}; declare it with app.publishes(...)")
            return Message(
                id=new_id(), source=self.source, type=event.type, topic=event.topic, data=data, time=time,
                key=None if event.key is None else key_text(event.key, event.type, "key"), datacontenttype=JSON,
                extensions={} if event.version == 1 else {"schemaversion": event.version}, fresh=True,
            )  # fmt: skip
        if isinstance(event, type):
            raise InvalidEvent(f"{event.__qualname__} is a class; publish an instance of it")
        raise InvalidEvent(
            f"{type(event).__qualname__} is no event: publish an instance of an Event subclass or of an @event class"
        )

    def _encode_outgoing(self, out: Outgoing, time: str) -> Message:
        if isinstance(out.event, (Outgoing, list, tuple)):
            raise InvalidEvent(f"Outgoing holds one event, not {type(out.event).__qualname__}")
        message = self.encode(out.event, time)
        if out.delay is not None and out.at is not None:
            raise InvalidEvent("delay and at exclude each other")
        if out.key is not None:
            message.key = key_text(out.key, message.type, "key=")
        if out.id is not None:
            if not isinstance(out.id, str) or not 0 < len(out.id) <= 256:
                raise InvalidEvent(f"id must be a text of 1 to 256 characters, not {out.id!r}")
            check_value("id", out.id)
            message.id, message.fresh = out.id, False
        if out.delay is not None:
            message.due = self.clock.now() + _delay(out.delay)
        if out.at is not None:
            message.due = _aware(out.at, "at").timestamp()
        if message.due and message.due - self.clock.now() > 366 * 86400:
            raise InvalidEvent("a delayed event falls due within a year at the latest")
        if out.time is not None:
            message.extensions = message.extensions | {"recordedtime": time}
            message.time = iso(_aware(out.time, "time").timestamp())
        if out.source is not None:
            message.source = check_uri_reference(out.source, "source")
        if out.subject is not None:
            if not isinstance(out.subject, str) or not out.subject:
                raise InvalidEvent(f"subject must be a non-empty string, not {out.subject!r}")
            check_value("subject", out.subject)
            message.subject = out.subject
        if out.headers:
            message.extensions = message.extensions | {
                name: check_extension(name, value) for name, value in out.headers.items()
            }
        return message

    def read(self, spec: EventSpec, message: Message) -> Any:
        """The event in a message, brought up to the class's version.

        Raises:
            NewerVersion: the message is newer than the class and cannot, or must not, be read as it is.
            Undecodable: the bytes are not what the type says.
        """
        version = message.extensions.get("schemaversion", 1) if message.extensions else 1
        content = message.datacontenttype
        if content is not None and content != JSON and not _is_json(content):
            raise Undecodable(f"{message.type}: cannot read {content}; expected {JSON}")
        try:
            if version == spec.version:
                return spec.decode(message.data)
            number = int(version)
            if number > spec.version:
                if spec.newer != "read":
                    raise NewerVersion(spec.type, number, spec.version)
                try:
                    return spec.decode(message.data)
                except _BAD:
                    raise NewerVersion(spec.type, number, spec.version) from None
            if not spec.upcasts:
                return spec.decode(message.data)
            data = _decode_object(message.data)
            for step in range(number, spec.version):
                if step in spec.upcasts:
                    data = spec.upcasts[step](data)
            return spec.convert(data)
        except Undecodable:
            raise
        except Exception as error:  # an upcast is the user's code: whatever it raises, the bytes cannot be read
            raise Undecodable(f"{message.type or message.topic} version {version}: {error}") from error

    def foreign(self, topic: str) -> EventSpec | None:
        """The class of a topic of plain JSON."""
        return self._foreign.get(topic)


def _delay(delay: Any) -> float:
    try:
        return seconds(delay, "delay")
    except DefinitionError as error:
        raise InvalidEvent(str(error)) from None


def _aware(moment: datetime, what: str) -> datetime:
    if not isinstance(moment, datetime):
        raise InvalidEvent(f"{what} must be a datetime, not {moment!r}")
    if moment.tzinfo is None:
        raise InvalidEvent(f"{what}={moment!r} has no time zone; use datetime.now(UTC) or give it a tzinfo")
    return moment


def _is_json(content: str) -> bool:
    media = content.partition(";")[0].strip().lower()
    return media == JSON or media.endswith("+json")


def _short(event: Any) -> str:
    text = repr(event)
    return text if len(text) <= 200 else text[:200] + "…"


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
