"""From an HTTP request to stored events: what is taken, how each event is checked and routed, and every refusal.

A type that the app knows is checked by decoding and goes to its topic, under the attribute ``partitionkey`` or else the
key of its class. Any other type needs ``?topic=`` with a topic that the app declares. ``app.publishes(...)`` says what
the app makes itself, so it does not bound what others send it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from stentor.cloudevents import BATCH, STRUCTURED, from_batch, from_headers, from_structured
from stentor.errors import (
    BrokerError,
    InvalidEvent,
    NewerVersion,
    NotConnected,
    PublishUnknown,
    StorageFull,
    TooLarge,
    Undecodable,
)
from stentor.event import EventSpec, key_text
from stentor.exchange import JSON, PROBLEM, Refused
from stentor.message import Message, Receipt
from stentor.program import Program

HELD = 1.0
"""Seconds after which a publisher that the broker holds back is told to come again."""
ID_LIMIT = 256
"""Characters of an id, as for ``publish(id=...)``."""
_WHO = re.compile(r"^(?:event (\d+) of the batch: )?(?:attributes?|header) '([^']*)'")


def _wrong(attribute: str, text: object, status: int = 400) -> Refused:
    return Refused(status, f"attribute {attribute!r}: {text}", attribute=attribute)


def _invalid(error: Exception, status: int = 400, **extra: Any) -> Refused:
    """The refusal of an event; the texts of InvalidEvent begin with the attribute that is wrong."""
    found = _WHO.match(str(error))
    if found is not None:
        extra.setdefault("attribute", found[2].removeprefix("ce-"))
        if found[1] is not None:
            extra.setdefault("index", int(found[1]))
    return Refused(status, str(error), **extra)


def mode_of(headers: Mapping[str, str]) -> str:
    """How the events stand in the request: STRUCTURED, BATCH, or "" for binary. Raises Refused."""
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refused(415, "Content-Encoding is not taken; send the body as it is", attribute="content-encoding")
    media, _, parameters = headers.get("content-type", "").partition(";")
    media = media.strip().lower()
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters, re.IGNORECASE)
    if media.startswith("application/cloudevents"):
        if media not in (STRUCTURED, BATCH):
            raise Refused(415, f"{media[:100]} is not taken; send {STRUCTURED}, {BATCH}, or binary mode")
        if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
            raise Refused(415, f"charset {charset[1][:50]} is not taken; JSON is sent in UTF-8")
        return media
    if media not in ("", JSON) and not media.endswith("+json") and not any(name[:3] == "ce-" for name in headers):
        raise Refused(
            415, f"{media[:100]} without ce- headers is no CloudEvent; send {STRUCTURED}, {BATCH}, or headers"
        )
    return ""


def takes_json(accept: str) -> bool:
    """Whether an Accept header lets us answer with JSON."""
    wanted = [part.split(";") for part in accept.lower().split(",") if part.strip()]
    taken = {JSON, PROBLEM, "application/*", "*/*"}
    zero = re.compile(r"\s*q\s*=\s*0(\.0*)?\s*")
    return not wanted or any(
        name.strip() in taken and not any(zero.fullmatch(parameter) for parameter in parameters)
        for name, *parameters in wanted
    )


def declared_topic(program: Program, query: Mapping[str, list[str]]) -> str | None:
    """The topic that the query names; one that the app declares, as the others are none of its business."""
    given = query.get("topic")
    if given is None:
        return None
    declared = {spec.topic.name for spec in program.catalog}
    declared |= {handler.topic for group in program.groups.values() for handler in group.handlers if handler.topic}
    if len(given) != 1 or given[0] not in declared or given[0].startswith("stentor."):
        raise Refused(400, f"{program.name} declares no topic {' and '.join(given)!r}", parameter="topic")
    return given[0]


def read(program: Program, mode: str, headers: Mapping[str, str], body: bytes, topic: str | None) -> list[Message]:
    """The checked messages of a request, with topic and key; none is taken if one is wrong. Raises Refused."""
    try:
        if mode == BATCH:
            messages = from_batch(body)
        else:
            messages = [from_structured(body) if mode == STRUCTURED else from_headers(headers, body)]
    except InvalidEvent as error:
        raise _invalid(error) from None
    for index, message in enumerate(messages):
        place = {"index": index} if mode == BATCH else {}
        try:
            _route(program, message, topic, binary=mode == "")
        except Refused as refused:
            refused.extra |= place
            raise
        except InvalidEvent as error:
            raise _invalid(error, 413 if isinstance(error, TooLarge) else 400, **place) from None
    return messages


def _route(program: Program, message: Message, topic: str | None, *, binary: bool) -> None:
    """Check a message and give it its topic and key. Raises Refused or InvalidEvent."""
    spec = program.catalog.find(message.type)
    if spec is None and topic is None:
        raise _wrong(
            "type",
            f"{program.name} does not know {message.type!r}; to send it all the same, name a topic of the app: "
            "POST /events?topic=NAME",
        )
    if spec is not None and topic not in (None, spec.topic.name):
        raise Refused(
            400, f"{message.type} belongs to topic {spec.topic.name!r}, not {topic!r}; leave ?topic= out",
            parameter="topic",
        )  # fmt: skip
    message.topic = spec.topic.name if spec is not None else str(topic)
    if len(message.id) > ID_LIMIT:
        raise InvalidEvent(f"attribute 'id' has {len(message.id):,} characters; {ID_LIMIT} is the most")
    if message.key is not None:
        try:
            key_text(message.key, message.type, "partitionkey")
        except InvalidEvent as error:
            raise _wrong("partitionkey", error) from None
    size = len(message.data) + sum(len(name) + len(str(value)) for name, value in message.attributes().items())
    if size > program.limit:
        raise TooLarge(f"{size:,} bytes of attributes and data; {program.limit:,} is the most")
    spec = spec or program.catalog.foreign(message.topic)
    if spec is None:
        _check_unknown(message, binary=binary)
    else:
        _check_known(program, spec, message, binary=binary)


def _media(content: str | None) -> str:
    return JSON if content is None else content.partition(";")[0].strip().lower()


def _check_known(program: Program, spec: EventSpec, message: Message, *, binary: bool) -> None:
    """Read the event as its handlers will, and take its key."""
    media = _media(message.datacontenttype)
    if media != JSON and not media.endswith("+json"):
        raise _wrong("datacontenttype", f"{message.type} is read as {JSON}, not {media}", 415 if binary else 400)
    try:
        event = program.catalog.read(spec, message)
    except NewerVersion as error:  # its key is unknown here; stored without one it could overtake what it follows
        raise _wrong("schemaversion", error) from None
    except Undecodable as error:
        raise _wrong("data", error) from None
    if message.key is None:
        try:
            message.key = spec.key_of(event)
        except Exception as error:  # a key function is the user's code: it cannot make a key of this event
            raise _wrong("data", f"it gives no key: {error}") from None


def _check_unknown(message: Message, *, binary: bool) -> None:
    """What calls itself JSON is JSON, as it stands inside JSON later; other data is taken as it is."""
    content = message.datacontenttype
    if not message.data or not _media(content).endswith(("/json", "+json")):
        return
    try:
        msgspec.json.decode(message.data)
    except (ValueError, RecursionError) as error:
        if content is None and binary:
            message.datacontenttype = "application/octet-stream"
            return
        raise _wrong("data", f"no JSON: {error}") from None


async def publish(program: Program, messages: list[Message]) -> tuple[Receipt, ...]:
    """Store them all, or refuse them all; posting them again after any answer but 202 is safe, as ids stay."""
    try:
        async with program.clock.timeout(HELD):
            if program.runtime.undeclared:
                await program.declare_new()
            return tuple(await program.broker.publish(messages))
    except TimeoutError:
        raise Refused(429, f"the broker did not take it within {HELD:g} s; post it again as it is", retry=2) from None
    except StorageFull as error:
        raise Refused(429, f"{error}; post it again as it is", retry=10) from None
    except TooLarge as error:
        raise _invalid(error, 413) from None
    except InvalidEvent as error:
        raise _invalid(error) from None
    except PublishUnknown as error:
        raise Refused(503, str(error), retry=2, ids=error.ids) from None
    except (BrokerError, NotConnected) as error:
        raise Refused(503, f"{error}; post it again as it is", retry=2) from None
