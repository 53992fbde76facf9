"""How messages and places lie in the rows of an SQL broker."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from stentor.broker import Start
from stentor.message import Attribute, Message

SLOTS = 64
"""Partitions of every topic."""
PAGE = 256
"""Events read at once, in the event loop: some 0.3 ms."""


class _Head(msgspec.Struct, array_like=True, gc=False):
    """The attributes of a message that have no column."""

    source: str
    time: str | None
    subject: str | None
    datacontenttype: str | None
    dataschema: str | None
    extensions: dict[str, Attribute]


_encode = msgspec.msgpack.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(_Head).decode
_decode_done = msgspec.msgpack.Decoder(list[int]).decode


def encode_head(message: Message) -> bytes:
    """The attributes that have no column."""
    return _encode(
        (
            message.source, message.time, message.subject, message.datacontenttype, message.dataschema,
            message.extensions,
        )
    )  # fmt: skip


def make_message(topic: str, id: str, key: str | None, type: str, head: bytes, body: bytes) -> Message:
    """The message of a row."""
    found = _decode_head(head)
    return Message(
        id=id, source=found.source, type=type, topic=topic, data=body, key=key, time=found.time, subject=found.subject,
        datacontenttype=found.datacontenttype, dataschema=found.dataschema, extensions=found.extensions,
    )  # fmt: skip


def encode_done(done: set[int]) -> bytes:
    """The offsets settled above the prefix."""
    return _encode(sorted(done)) if done else b""


def decode_done(done: bytes) -> list[int]:
    """The offsets settled above the prefix."""
    return _decode_done(done) if done else []


def offset(db: Any, topic: int, start: Start) -> int:
    """The sequence number at which reading a topic begins."""
    if start == "earliest":
        return 1
    if start == "latest":
        (last,) = db.execute("SELECT coalesce(max(seq), 0) FROM stentor_event").fetchone()
        (given,) = db.execute(
            "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'stentor_event'"
        ).fetchone()
        return int(max(last, given)) + 1
    if isinstance(start, datetime):
        found = db.execute(
            "SELECT min(seq) FROM stentor_event WHERE topic = ? AND ts >= ?", (topic, start.timestamp())
        ).fetchone()
        return int(found[0]) if found[0] is not None else offset(db, topic, "latest")
    return max(1, int(start))
