"""CloudEvents 1.0.2 on the wire: binary and structured JSON, single and batched.

Sources: the core specification, the JSON event format and the HTTP protocol binding of
https://github.com/cloudevents/spec at v1.0.2. Stentor adds the documented extensions partitioning, sequence,
distributed tracing, correlation and recorded time; the version of an event's shape travels as ``schemaversion``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import msgspec

from stentor.clock import parse_iso
from stentor.errors import InvalidEvent
from stentor.message import Attribute, Delivery, Message

STRUCTURED = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

_NAME = re.compile(r"[a-z0-9]+")
_NAME_LIMIT = 64
_CORE = frozenset({"specversion", "id", "source", "type", "time", "subject", "datacontenttype", "dataschema"})
_RESERVED = _CORE | {"data", "data_base64", "partitionkey", "schemaversion", "sequence"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_NOT_IN_URI = frozenset(' "<>\\^`{|}')
_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def check_extension(name: str, value: Any) -> Attribute:
    """``value`` if it may stand in an extension called ``name``; raises InvalidEvent naming what is wrong."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _NAME_LIMIT:
        raise InvalidEvent(f"header {name!r}: a CloudEvents extension name has only a-z and 0-9, at most {_NAME_LIMIT}")
    if name in _RESERVED:
        raise InvalidEvent(f"header {name!r} is set by Stentor or has a parameter of its own")
    return check_value(name, value)


def check_value(name: str, value: Any) -> Attribute:
    """``value`` if an attribute may have it; raises InvalidEvent."""
    if type(value) is str and value.isascii() and value.isprintable():
        return value
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**31) <= value < 2**31:
        raise InvalidEvent(f"attribute {name!r}: {value} is outside the 32 bits of a CloudEvents Integer")
    if isinstance(value, str) and _CONTROL.search(value):
        raise InvalidEvent(f"attribute {name!r}: {value!r} holds a character that CloudEvents forbids")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if not isinstance(value, (str, int, bool)):
        raise InvalidEvent(f"attribute {name!r}: {value!r} must be a str, int, bool or bytes")
    return value


def check_uri_reference(value: Any, name: str) -> str:
    """``value`` if it can be a URI-reference: non-empty text without spaces or control characters."""
    if not isinstance(value, str) or not value or _CONTROL.search(value) or not _NOT_IN_URI.isdisjoint(value):
        raise InvalidEvent(f"attribute {name!r}: {value!r} is no URI-reference")
    return value


def attributes(message: Message, delivery: Delivery | None = None) -> dict[str, Attribute]:
    """All attributes of a message as others see them.

    What follows from the rest is not stored but made here: ``recordedtime`` (the time, unless it was set),
    ``correlationid`` and ``traceparent`` of an event that nothing caused (from its own id), ``sequence`` (the place in
    the broker's order, as text that sorts).
    """
    found = message.attributes()
    if message.time is not None:
        found.setdefault("recordedtime", message.time)
    found.setdefault("correlationid", message.id)
    found.setdefault("traceparent", traceparent(message))
    if delivery is not None:
        found["sequence"] = f"{delivery.offset:020d}"
    return found


def traceparent(message: Message) -> str:
    """The W3C trace context of a message: its own, or one made of its source and id."""
    given = message.extensions.get("traceparent")
    if isinstance(given, str):
        return given
    digest = hashlib.blake2b(f"{message.source}\0{message.id}".encode(), digest_size=24).hexdigest()
    return f"00-{digest[:32]}-{digest[32:]}-00"


def child_trace(parent: str, id: str) -> str:
    """The trace context of an event that the holder of ``parent`` causes: same trace, a span of its own."""
    span = hashlib.blake2b(id.encode(), digest_size=8).hexdigest()
    parts = parent.split("-")
    return f"00-{parts[1]}-{span}-{parts[3]}" if len(parts) >= 4 else parent


def _schema_version(value: Attribute) -> int:
    try:
        number = int(value)
    except ValueError:
        raise InvalidEvent(f"attribute 'schemaversion': {value!r} is no whole number") from None
    if not 1 <= number < 2**31:  # upcasts go up one by one: a large negative version would take hours
        raise InvalidEvent(f"attribute 'schemaversion': {value!r} is no version; they count from 1")
    return number


def from_attributes(found: Mapping[str, Any], data: bytes, topic: str = "") -> Message:
    """The message of parsed attributes.

    Raises:
        InvalidEvent: an attribute is missing or wrong; its name is in the text.
    """
    version = found.get("specversion")
    if version is None:
        raise InvalidEvent("attribute 'specversion' is missing")
    if version != "1.0":
        raise InvalidEvent(f"attribute 'specversion': {version!r} is not supported; expected '1.0'")
    for name in ("id", "source", "type"):
        value = found.get(name)
        if value is None:
            raise InvalidEvent(f"attribute {name!r} is missing")
        if not isinstance(value, str) or not value:
            raise InvalidEvent(f"attribute {name!r} must be a non-empty string, not {value!r}")
        check_value(name, value)
    check_uri_reference(found["source"], "source")
    for name in ("time", "subject", "datacontenttype", "dataschema", "partitionkey"):
        value = found.get(name)
        if value is not None and (not isinstance(value, str) or not value):
            raise InvalidEvent(f"attribute {name!r} must be a non-empty string, not {value!r}")
        check_value(name, "" if value is None else value)
    if found.get("time") is not None:
        try:
            parse_iso(found["time"])
        except ValueError:
            raise InvalidEvent(f"attribute 'time': {found['time']!r} is no RFC 3339 time") from None
    content = found.get("datacontenttype")
    if content is not None and "/" not in content:
        raise InvalidEvent(f"attribute 'datacontenttype': {content!r} is no media type")
    extensions: dict[str, Attribute] = {}
    for name, value in found.items():
        if name in _CORE or name == "partitionkey" or value is None:
            continue
        if not _NAME.fullmatch(name):
            raise InvalidEvent(f"attribute {name!r}: a name has only the letters a-z and digits")
        extensions[name] = check_value(name, value)
    if "schemaversion" in extensions:
        extensions["schemaversion"] = _schema_version(extensions["schemaversion"])
    return Message(
        id=found["id"], source=found["source"], type=found["type"], topic=topic, data=data,
        key=found.get("partitionkey"), time=found.get("time"), subject=found.get("subject"), datacontenttype=content,
        dataschema=found.get("dataschema"), extensions=extensions,
    )  # fmt: skip


# ---- structured mode: the JSON event format -------------------------------------------------------------------------


def _is_json(content: str | None) -> bool:
    media = (content or "application/json").partition(";")[0].strip().lower()
    return media.endswith(("/json", "+json"))


def _holds_json(data: bytes) -> bool:
    """False for bytes that only claim to be JSON; as Base64 they travel as they are."""
    try:
        msgspec.json.decode(data.decode())
    except ValueError:
        return False
    return True


def _as_object(message: Message, delivery: Delivery | None) -> dict[str, Any]:
    body: dict[str, Any] = dict(attributes(message, delivery))
    if _is_json(message.datacontenttype) and _holds_json(message.data):
        body["data"] = msgspec.Raw(message.data)
    elif message.data:
        body["data_base64"] = base64.b64encode(message.data).decode()
    return body


def to_structured(message: Message, delivery: Delivery | None = None) -> bytes:
    """A message as one JSON object (``application/cloudevents+json``)."""
    return msgspec.json.encode(_as_object(message, delivery))


def to_batch(messages: Iterable[Message]) -> bytes:
    """Messages as a JSON array (``application/cloudevents-batch+json``)."""
    return msgspec.json.encode([_as_object(message, None) for message in messages])


# Foreign bytes: msgspec raises DecodeError, UnicodeDecodeError (a ValueError) or, nested too deep, RecursionError.
_BAD: tuple[type[Exception], ...] = (msgspec.DecodeError, ValueError, RecursionError)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_array = msgspec.json.Decoder(list[msgspec.Raw])


def from_structured(body: bytes, topic: str = "") -> Message:
    """The message in a structured JSON body; raises InvalidEvent."""
    try:
        raw = _object.decode(body)
        found = {name: msgspec.json.decode(value) for name, value in raw.items() if name not in ("data", "data_base64")}
    except _BAD as error:
        raise InvalidEvent(f"the body is no JSON object of a CloudEvent: {error}") from None
    if "data" in raw and "data_base64" in raw:
        raise InvalidEvent("attributes 'data' and 'data_base64' exclude each other")
    data = b""
    if "data_base64" in raw:
        try:
            data = base64.b64decode(msgspec.json.decode(raw["data_base64"], type=str), validate=True)
        except _BAD:
            raise InvalidEvent("attribute 'data_base64' is no Base64 text") from None
    elif "data" in raw:
        data = bytes(raw["data"])
        if not _is_json(_text(found.get("datacontenttype"))):
            # A JSON string carries the text of another content type.
            try:
                value = msgspec.json.decode(data)
            except _BAD as error:
                raise InvalidEvent(f"attribute 'data' is no JSON: {error}") from None
            data = value.encode() if isinstance(value, str) else data
    return from_attributes(found, data, topic)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def from_batch(body: bytes, topic: str = "") -> list[Message]:
    """The messages in a batched JSON body; raises InvalidEvent naming the index of the bad one."""
    try:
        items = _array.decode(body)
    except _BAD as error:
        raise InvalidEvent(f"the body is no JSON array of CloudEvents: {error}") from None
    found = []
    for index, item in enumerate(items):
        try:
            found.append(from_structured(bytes(item), topic))
        except InvalidEvent as error:
            raise InvalidEvent(f"event {index} of the batch: {error}") from None
    return found


# ---- binary mode: HTTP headers --------------------------------------------------------------------------------------


def to_headers(message: Message, delivery: Delivery | None = None) -> dict[str, str]:
    """The HTTP headers of a message in binary mode; the body is ``message.data``."""
    headers: dict[str, str] = {}
    for name, value in attributes(message, delivery).items():
        if name == "datacontenttype":
            headers["content-type"] = str(value)
        else:
            headers[f"ce-{name}"] = _header(value)
    return headers


def _header(value: Attribute) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # HTTP binding 3.1.3.2: percent-encode what is not printable ASCII, and space, quote and percent.
    return quote(str(value), safe="!#$&'()*+,-./:;<=>?@[\\]^_`{|}~")


def from_headers(headers: Mapping[str, str], body: bytes, topic: str = "") -> Message:
    """The message of an HTTP request in binary mode (header names in lower case); raises InvalidEvent."""
    found: dict[str, Any] = {}
    for name, value in headers.items():
        if name.startswith("ce-"):
            raw = value.encode("latin-1", "replace")
            try:
                if _ESCAPE.search(raw):
                    raise ValueError("percent sign without two hex digits")
                text = unquote_to_bytes(raw).decode()
            except ValueError:
                raise InvalidEvent(f"attribute {name[3:]!r}: {value!r} is not percent-encoded UTF-8") from None
            if name in ("ce-datacontenttype", "ce-data"):
                raise InvalidEvent(f"header {name!r} is not allowed; the Content-Type header carries it")
            found[name[3:]] = text
        elif name == "content-type":
            found["datacontenttype"] = value
    return from_attributes(found, body, topic)
