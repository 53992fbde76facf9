"""What PostgreSQL's plugin ``pgoutput`` sends, protocol version 1, read into tuples.

The formats: https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html. Values come as their
text, as the client would get it; how to read them is not known here.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

UNCHANGED = b"unchanged\0"
"""Stands for a value that is kept out of line (TOAST), was not changed, and so was not sent; compare by identity."""

Values = list[bytes | None]
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_BEGIN = struct.Struct("!QqI").unpack_from
_COMMIT = struct.Struct("!BQQq").unpack_from
_SIZE = struct.Struct("!I").unpack_from
_LOGICAL = struct.Struct("!BQ").unpack_from


class Begin(NamedTuple):
    """Changes follow, all of one transaction that was committed; ``lsn`` is where its commit stands."""

    lsn: int
    committed: datetime
    xid: int
    position: str
    """``lsn`` as PostgreSQL writes it."""
    transaction: str
    """``xid`` as text."""


class Commit(NamedTuple):
    """``end`` is the first place after the transaction."""

    end: int


class Column(NamedTuple):
    """A column of a table."""

    name: str
    type: int
    """The number (OID) of its type."""
    key: bool
    """Part of the replica identity."""


class Relation(NamedTuple):
    """A table as it was at the changes that follow."""

    oid: int
    name: str
    full: bool
    """Old rows are sent whole (REPLICA IDENTITY FULL)."""
    columns: list[Column]


class RowChange(NamedTuple):
    """``kind`` is I, U or D; ``old`` has values for the key alone unless ``whole``, the rest is None."""

    kind: str
    oid: int
    old: Values | None
    new: Values | None
    whole: bool


class Truncate(NamedTuple):
    """Tables that were emptied."""

    oids: tuple[int, ...]


class Logical(NamedTuple):
    """What ``pg_logical_emit_message`` wrote."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


Parsed = Begin | Commit | Relation | RowChange | Truncate | Logical | None


def parse(data: bytes) -> Parsed:
    """One message; None for those that say nothing of use here (types, origins). Raises ValueError for others."""
    kind = data[0]
    if kind == 73:  # I
        new, _ = _values(data, 6)
        return RowChange("I", int.from_bytes(data[1:5], "big"), None, new, False)
    if kind == 85:  # U
        oid, old, whole, at = int.from_bytes(data[1:5], "big"), None, False, 5
        if data[5] != 78:  # K or O before N
            whole = data[5] == 79
            old, at = _values(data, 6)
        new, _ = _values(data, at + 1)
        return RowChange("U", oid, old, new, whole)
    if kind == 68:  # D
        old, _ = _values(data, 6)
        return RowChange("D", int.from_bytes(data[1:5], "big"), old, None, data[5] == 79)
    if kind == 66:  # B
        lsn, micros, xid = _BEGIN(data, 1)
        return Begin(lsn, _EPOCH + timedelta(microseconds=micros), xid, lsn_text(lsn), str(xid))
    if kind == 67:  # C
        return Commit(_COMMIT(data, 1)[2])
    if kind == 82:  # R
        return _relation(data)
    if kind == 84:  # T
        count = int.from_bytes(data[1:5], "big")
        return Truncate(struct.unpack_from(f"!{count}I", data, 6))
    if kind == 77:  # M
        flags, lsn = _LOGICAL(data, 1)
        prefix, at = _text(data, 10)
        size = int.from_bytes(data[at : at + 4], "big")
        return Logical(bool(flags & 1), lsn, prefix, data[at + 4 : at + 4 + size])
    if kind in b"OY":
        return None
    raise ValueError(f"pgoutput sent an unknown message {data[:1]!r}")


def _values(data: bytes, at: int) -> tuple[Values, int]:
    count = int.from_bytes(data[at : at + 2], "big")
    at += 2
    found: Values = []
    for _ in range(count):
        kind = data[at]
        if kind == 116:  # t: text
            at += 5
            end = at + _SIZE(data, at - 4)[0]
            found.append(data[at:end])
            at = end
        else:  # n or u
            found.append(None if kind == 110 else UNCHANGED)
            at += 1
    return found, at


def _relation(data: bytes) -> Relation:
    oid = int.from_bytes(data[1:5], "big")
    schema, at = _text(data, 5)
    name, at = _text(data, at)
    full = data[at] == 102  # f
    count = int.from_bytes(data[at + 1 : at + 3], "big")
    at += 3
    columns = []
    for _ in range(count):
        column, end = _text(data, at + 1)
        columns.append(Column(column, int.from_bytes(data[end : end + 4], "big"), bool(data[at] & 1)))
        at = end + 8
    return Relation(oid, f"{schema or 'pg_catalog'}.{name}", full, columns)


def _text(data: bytes, at: int) -> tuple[str, int]:
    """A text that ends with a zero byte, and where the next thing begins."""
    end = data.index(0, at)
    return data[at:end].decode(), end + 1


def lsn_text(lsn: int) -> str:
    """A place in the write-ahead log as PostgreSQL writes it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def lsn_number(text: str) -> int:
    """The place that ``lsn_text`` wrote."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


class Snapshot:
    """Which transactions a snapshot sees, told by the text of ``pg_current_snapshot()``."""

    def __init__(self, text: str) -> None:
        low, high, running = text.split(":")
        self._low, self._high = int(low), int(high)
        self._running = {int(xid) for xid in running.split(",") if xid}

    def sees(self, xid: int) -> bool:
        """Whether a transaction that is known to be committed was so then; ``xid`` has lost its epoch."""
        whole = self._high + ((xid - self._high + 0x80000000) % 0x100000000 - 0x80000000)
        return whole < self._high and whole not in self._running
