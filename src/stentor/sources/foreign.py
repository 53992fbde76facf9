"""Messages of brokers that others run, in the form that those gave them: what such sources share.

Forms: JSON, Avro (a schema file, or a schema registry and its framing), Protobuf, and CloudEvents in both bindings.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import struct
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
from msgspec import Struct

from stentor.clock import parse_iso
from stentor.cloudevents import STRUCTURED, from_attributes, from_structured
from stentor.errors import ConfigError, InvalidEvent, Unavailable
from stentor.event import EventLike, Outgoing, check_name
from stentor.message import Message
from stentor.source import Publish, Row
from stentor.sources.rows import Reader, To, text_of

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message as ProtobufMessage

    from stentor.app import App

PATIENCE = 10.0
"""Seconds that a schema registry has for an answer."""
_STENTORS = ("schemaversion", "sequence", "recordedtime")
"""Extensions that are made anew."""


class Record(Struct, frozen=True):
    """A message as it was found: what ``decode=`` and a function in ``to=`` get.

    ``place`` is the topic or queue, ``where`` the message's place in it; ``time``: seconds since the epoch.
    """

    place: str
    where: str
    data: bytes
    key: str | None = None
    headers: Mapping[str, str] = {}
    content_type: str | None = None
    time: float | None = None

    def json(self) -> Any:
        """The payload as JSON. Raises msgspec.DecodeError."""
        return msgspec.json.decode(self.data)

    def row(self, id: str) -> Row:
        """What a source hands on: plain data, so that a refused message can be a dead letter."""
        value = {
            "payload": text_of(self.data), "key": self.key, "headers": dict(self.headers),
            "content_type": self.content_type, "time": self.time,
        }  # fmt: skip
        return Row(f"{self.place}\0{id}", f"{self.place} {self.where}", value)


Decode = Callable[[Record], Any]
"""Makes of a message what an event class is filled from."""


class Foreign:
    """A source of records: ``to`` is an event class, for which ``decode`` reads the payload, or takes a ``Record``."""

    def __init__(self, name: str, place: str, to: To, decode: Decode | None) -> None:
        self.name = check_name(name, "source")
        self._place = place
        self._decode = (decode or Record.json) if isinstance(to, type) else None
        self._reader = Reader(to, f"source {name}")

    async def take(self, publish: Publish, records: Sequence[tuple[str, Record]], position: Any = None) -> None:
        """Publish records, each under an id. Raises Unavailable while what reads them cannot be had: none is lost."""
        decode = self._decode
        if isinstance(decode, _Registry):
            await asyncio.to_thread(decode.prepare, [record for _, record in records])
        await publish.rows([record.row(id) for id, record in records], position=position)

    def read(self, row: Row) -> Sequence[EventLike]:
        """The events of a message."""
        found = row.value
        payload = found["payload"]
        record = Record(
            self._place, row.where.removeprefix(f"{self._place} "),
            payload.encode() if isinstance(payload, str) else base64.b64decode(payload["base64"]),
            found["key"], found["headers"], found["content_type"], found["time"],
        )  # fmt: skip
        return self._reader(Row(row.id, row.where, record if self._decode is None else self._decode(record)))


def header_text(value: object) -> str:
    """A header's value as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)


# ---- forms ----------------------------------------------------------------------------------------------------------


def avro(schema: str | Path | None = None, *, registry: str | None = None) -> Decode:
    """Avro for ``decode=``: by a schema file (``.avsc``), or by the id that precedes each payload in a registry's
    framing (a zero byte and four of the id), asked once of ``registry`` (``http://[user:password@]host:8081``).

    Raises:
        ConfigError: fastavro is not installed, the file is no schema, or neither or both are named.
    """
    try:
        from fastavro import schemaless_reader
        from fastavro.repository.base import SchemaRepositoryError
        from fastavro.schema import SchemaParseException, load_schema
    except ImportError:
        raise ConfigError("Avro needs fastavro: pip install 'stentor[avro]'") from None
    if (schema is None) == (registry is None):
        raise ConfigError("avro(): name a schema file or a registry")
    if registry is not None:
        if not registry.startswith(("http://", "https://")):
            raise ConfigError(f"avro(): {registry!r} is no HTTP URL")
        return _Registry(registry)
    try:
        fixed = load_schema(str(schema))
    except (OSError, ValueError, SchemaParseException, SchemaRepositoryError) as error:
        raise ConfigError(f"avro(): {schema} is no schema: {error}") from None

    def decode(record: Record) -> Any:
        return schemaless_reader(io.BytesIO(record.data), fixed, None)

    return decode


class _Registry:
    """Avro in the framing of a schema registry."""

    def __init__(self, url: str) -> None:
        head, at, host = url.rpartition("@")
        scheme, _, login = head.rpartition("://")
        self._url = f"{scheme}://{host}" if at else url
        self._headers = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()} if at else {}
        self._known: dict[int, Any] = {}

    def __call__(self, record: Record) -> Any:
        from fastavro import schemaless_reader

        number, data = _framed(record.data)
        if number not in self._known:
            self._learn(number)
        return schemaless_reader(io.BytesIO(data), self._known[number], None)

    def prepare(self, records: Sequence[Record]) -> None:
        """Have the schemas of messages at hand, as far as there are any. Blocks. Raises Unavailable."""
        for record in records:
            with contextlib.suppress(InvalidEvent):  # the message is a dead letter in a moment
                number, _ = _framed(record.data)
                if number not in self._known:
                    self._learn(number)

    def _learn(self, number: int) -> None:
        from fastavro import parse_schema

        request = Request(f"{self._url}/schemas/ids/{number}", headers=self._headers)  # noqa: S310  HTTP
        try:
            with urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
                found = msgspec.json.decode(msgspec.json.decode(answer.read())["schema"])
            self._known[number] = parse_schema(found)
        except HTTPError as error:
            if error.code == 404:
                raise InvalidEvent(f"{self._url} knows no schema {number}") from None
            raise Unavailable(f"{self._url}: {error}") from None
        except (OSError, KeyError, ValueError) as error:
            raise Unavailable(f"{self._url} does not tell schema {number}: {error}") from None


def protobuf(schema: type[ProtobufMessage] | Path | str, message: str = "", *, framed: bool = False) -> Decode:
    """Protobuf for ``decode=``: the fields of a message by their names, enumerations as their names.

    ``schema``: a generated class, or the file that ``protoc --include_imports --descriptor_set_out=FILE`` makes, of
    whose messages ``message`` names one, as ``shop.Order``. ``framed``: a schema registry's framing precedes each
    payload; the first message of the schema is read. Raises ConfigError.
    """
    cls = schema if isinstance(schema, type) else _described(Path(schema), message)

    def decode(record: Record) -> Any:
        data = record.data
        if framed:
            data = _framed(data)[1]
            if data[:1] != b"\0":
                raise InvalidEvent("it holds another message than the first of its schema")
            data = data[1:]
        return _fields(cls.FromString(data))

    return decode


def _described(path: Path, message: str) -> type[ProtobufMessage]:
    """The class of a message in a file of descriptors."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.message import DecodeError

    pool = descriptor_pool.DescriptorPool()
    try:
        files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
        for file in files:
            pool.Add(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (DecodeError, TypeError):
        raise ConfigError(
            f"{path} is no whole set of descriptors, as protoc --include_imports --descriptor_set_out={path.name} makes"
        ) from None
    try:
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(message))  # type: ignore[no-any-return]
    except KeyError:
        prefixes = ((f"{file.package}." if file.package else "", file.message_type) for file in files)
        known = ", ".join(prefix + one.name for prefix, types in prefixes for one in types)
        raise ConfigError(f"{path} has no message {message!r}; it has {known or 'none'}") from None


def _fields(message: ProtobufMessage) -> Any:
    """The fields that are set, or have no notion of being unset."""
    if message.DESCRIPTOR.full_name == "google.protobuf.Timestamp":
        return message.ToDatetime(UTC)
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, Mapping):
            kind = field.message_type.fields_by_name["value"]
            found[field.name] = {name: _field(kind, each) for name, each in value.items()}
        elif hasattr(value, "append"):
            found[field.name] = [_field(field, each) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = _field(field, value)
    return found


def _field(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return _fields(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def _framed(data: bytes) -> tuple[int, bytes]:
    """Schema id and payload (docs.confluent.io, "wire format"). Raises InvalidEvent."""
    if len(data) < 5 or data[0]:
        raise InvalidEvent("it does not begin with the zero byte and the id of a schema registry's framing")
    return struct.unpack_from(">I", data, 1)[0], data[5:]


def cloudevents(app: App) -> Callable[[Record], Outgoing]:
    """For ``to=``: reads CloudEvents of types that the app knows, in binary and structured mode.

    Attributes are headers with the prefix of the Kafka binding (``ce_``) or of the AMQP one (``cloudEvents:`` or
    ``cloudEvents_``).
    """

    def read(record: Record) -> Outgoing:
        media = (record.content_type or "").partition(";")[0].strip().lower()
        if media == STRUCTURED:
            return outgoing(app, from_structured(record.data), record.key)
        attributes: dict[str, Any] = {}
        for name, value in record.headers.items():
            for prefix in ("ce_", "cloudEvents:", "cloudEvents_"):
                if name.startswith(prefix):
                    attributes[name.removeprefix(prefix)] = value
        if not attributes:
            raise InvalidEvent(f"{record.where} is no CloudEvent: neither its content type nor a header says so")
        if record.content_type:
            attributes["datacontenttype"] = record.content_type
        return outgoing(app, from_attributes(attributes, record.data), record.key)

    return read


def outgoing(app: App, message: Message, key: str | None = None) -> Outgoing:
    """A CloudEvent of somebody else on its way into the app, with its id, source and time. Raises InvalidEvent."""
    spec = app.catalog.find(message.type)
    if spec is None:
        raise InvalidEvent(f"{app.name} does not know {message.type!r}")
    extensions = {name: value for name, value in message.extensions.items() if name not in _STENTORS}
    return Outgoing(
        app.catalog.read(spec, message), id=message.id, source=message.source,
        key=key if message.key is None else message.key, subject=message.subject,
        time=None if message.time is None else datetime.fromtimestamp(parse_iso(message.time), UTC),
        headers=extensions,
    )  # fmt: skip
