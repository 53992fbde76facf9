"""The binary log of MySQL and MariaDB: read in a thread, and what its events say of some tables."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Address
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import pymysql
from pymysqlreplication import BinLogStreamReader
from pymysqlreplication.constants import FIELD_TYPE
from pymysqlreplication.event import (
    BeginLoadQueryEvent,
    ExecuteLoadQueryEvent,
    GtidEvent,
    MariadbGtidEvent,
    NotImplementedEvent,
    QueryEvent,
    XAPrepareEvent,
    XidEvent,
)
from pymysqlreplication.row_event import (
    DeleteRowsEvent,
    PartialUpdateRowsEvent,
    RowsEvent,
    TableMapEvent,
    UpdateRowsEvent,
    WriteRowsEvent,
)

from stentor.errors import StentorError, Unavailable
from stentor.sources.apart import Apart
from stentor.sources.change import Mapped

logging.getLogger("pymysqlreplication").setLevel(
    logging.ERROR
)  # it warns of connecting again, which it may not do here

AHEAD = 8 << 20
"""Bytes of the log that the thread reads ahead, about."""
BEAT = 10.0
"""Seconds after which a server that has nothing to tell says so."""
_EVENTS = (
    BeginLoadQueryEvent, ExecuteLoadQueryEvent, GtidEvent, MariadbGtidEvent, NotImplementedEvent, QueryEvent,
    XAPrepareEvent, XidEvent, DeleteRowsEvent, PartialUpdateRowsEvent, TableMapEvent, UpdateRowsEvent, WriteRowsEvent,
)  # fmt: skip
_HARMLESS = {36, 37, 41}
"""Types of events that say nothing of rows: group replication's own, a heartbeat."""
_IGNORABLE = 0x80
_STANDALONE, _PREPARED = 1, 64


class Gone(Exception):
    """The log does not tell what happened; the text says why."""


# ---- where the log stands -------------------------------------------------------------------------------------------


class MariaGtids:
    """What MariaDB calls a position: of each domain the last transaction, as in ``0-1-270,1-5-7``."""

    def __init__(self, text: str) -> None:
        self._last: dict[str, str] = {}
        for gtid in text.split(","):
            if gtid.strip():
                self.add(gtid.strip())

    def add(self, gtid: str) -> None:
        self._last[gtid.partition("-")[0]] = gtid

    def __contains__(self, gtid: str) -> bool:
        return _sequence(gtid) <= _sequence(self._last.get(gtid.partition("-")[0], "0"))

    def count(self, beyond: MariaGtids) -> int:
        """How many transactions are here and not in ``beyond``."""
        return sum(
            max(0, _sequence(gtid) - _sequence(beyond._last.get(domain, "0"))) for domain, gtid in self._last.items()
        )

    def __str__(self) -> str:
        return ",".join(self._last.values())


class MysqlGtids:
    """What MySQL calls a GTID set: of each server some intervals, as in ``3e11fa47-…:1-5:8``."""

    def __init__(self, text: str) -> None:
        self._all: dict[str, list[tuple[int, int]]] = {}
        for part in "".join(text.split()).lower().split(","):
            server, *intervals = part.split(":")
            for interval in intervals:
                first, _, last = interval.partition("-")
                self._all.setdefault(server, []).append((int(first), int(last or first)))

    def add(self, gtid: str) -> None:
        server, _, text = gtid.lower().partition(":")
        number, known = int(text), self._all.setdefault(server, [])
        if known and known[-1][1] + 1 == number:
            known[-1] = (known[-1][0], number)
        elif gtid not in self:
            merged: list[tuple[int, int]] = []
            for first, last in sorted([*known, (number, number)]):
                if merged and merged[-1][1] + 1 == first:
                    merged[-1] = (merged[-1][0], last)
                else:
                    merged.append((first, last))
            self._all[server] = merged

    def __contains__(self, gtid: str) -> bool:
        server, _, number = gtid.lower().partition(":")
        return any(first <= int(number) <= last for first, last in self._all.get(server, ()))

    def count(self, beyond: MysqlGtids) -> int:
        """How many transactions are here and not in ``beyond``."""
        found = 0
        for server, intervals in self._all.items():
            for first, last in intervals:
                known = beyond._all.get(server, ())
                found += last - first + 1 - sum(max(0, min(last, to) - max(first, at) + 1) for at, to in known)
        return found

    def __str__(self) -> str:
        return ",".join(
            ":".join([server, *(f"{a}-{b}" if b > a else str(a) for a, b in intervals)])
            for server, intervals in self._all.items()
        )


Gtids = Any  # MariaGtids | MysqlGtids, which are never mixed


def _sequence(gtid: str) -> int:
    return int(gtid.rpartition("-")[2])


# ---- values ---------------------------------------------------------------------------------------------------------

_CODECS = {
    "utf8": "utf-8", "utf8mb3": "utf-8", "utf8mb4": "utf-8", "latin1": "cp1252", "ucs2": "utf-16-be",
    "utf16": "utf-16-be", "utf16le": "utf-16-le", "utf32": "utf-32-be", "koi8r": "koi8_r", "koi8u": "koi8_u",
}  # fmt: skip
"""What Python calls a character set, where it has another name for it."""


def single(value: float) -> float:
    """The shortest number that is this one in single precision: 0.1, not 0.10000000149011612."""
    packed = struct.pack("<f", value)
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        with contextlib.suppress(OverflowError):
            if struct.pack("<f", short) == packed:
                return short
    return value


def as_text(value: Any) -> Any:
    """A value for a field that wants text."""
    match value:
        case None | str():
            return value
        case bool() | int() | float():
            return str(value)
        case Decimal():
            return format(value, "f")
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value.hex()
        case datetime():
            return value.isoformat(" ")
        case timedelta():
            whole, minus = (-value, "-") if value < timedelta(0) else (value, "")
            seconds, micros = divmod(whole // timedelta(microseconds=1), 1_000_000)
            return f"{minus}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}" + (
                f".{micros:06}" if micros else ""
            )
        case dict() | list():
            return msgspec.json.encode(value).decode()
        case _:
            return str(value)


def selected(kind: str, mysql: bool) -> Callable[[Any], Any] | None:
    """What makes the same of a value that was selected as the log has it; ``kind`` is the column's DATA_TYPE."""
    if kind == "float":
        return single
    if kind == "bit":
        return lambda value: int.from_bytes(value, "big")
    if kind == "timestamp":
        return lambda value: value.replace(tzinfo=UTC) if isinstance(value, datetime) else None
    if kind in ("datetime", "date"):
        return lambda value: None if isinstance(value, str) else value
    if kind == "json" and mysql:
        return msgspec.json.decode
    return _SHORT.get(kind)


_SHORT: dict[str, Callable[[Any], Any]] = {
    "uuid": lambda value: str(UUID(bytes=value) if isinstance(value, bytes) else UUID(value)),
    "inet4": lambda value: str(IPv4Address(value)),
    "inet6": lambda value: str(IPv6Address(value)),
}
"""Types of MariaDB that are bytes in the log, and text elsewhere."""


def _logged(column: Any, declared: str | None) -> Callable[[Any], Any] | None:
    """What makes the value of what the log has; ``column`` is changed, so that it is read as whole as it is there.

    ``declared`` is its DATA_TYPE, where that is known.
    """
    kind = column.type
    if declared in _SHORT:
        short, string = _SHORT[declared], _string(column)
        return lambda value: short(string(value))
    if kind in (FIELD_TYPE.VARCHAR, FIELD_TYPE.STRING, FIELD_TYPE.BLOB):
        return _string(column)
    if kind == FIELD_TYPE.FLOAT:
        return single
    if kind == FIELD_TYPE.BIT:
        return lambda bits: int(bits, 2)
    if kind == FIELD_TYPE.JSON:
        return _plain
    if kind in (FIELD_TYPE.ENUM, FIELD_TYPE.SET):
        texts, size = (column.enum_values if kind == FIELD_TYPE.ENUM else column.set_values), column.size
        if "" in texts[kind == FIELD_TYPE.ENUM :] or not all(text.isascii() or _unicode(column) for text in texts):
            raise StentorError(
                f"column {column.name}: values of an enum or set that are not ASCII are read in UTF-8 only; "
                "ALTER TABLE ... CONVERT TO CHARACTER SET utf8mb4"
            )
        _as_bits(column, size)
        if kind == FIELD_TYPE.ENUM:
            return lambda bits: texts[_swapped(bits, size)]
        return lambda bits: ",".join(text for at, text in enumerate(texts) if _swapped(bits, size) >> at & 1)
    if kind == FIELD_TYPE.YEAR:
        _as_bits(column, 1)
        return lambda bits: int(bits, 2) and int(bits, 2) + 1900
    if kind in (FIELD_TYPE.TIME2, FIELD_TYPE.TIMESTAMP2):
        size = (column.fsp + 1) // 2
        unit = 10 ** (6 - 2 * size) if size else 1
        if kind == FIELD_TYPE.TIME2:
            _as_bits(column, 3 + size)
            return lambda bits: _time(int(bits, 2) - (1 << (23 + 8 * size)), size, unit)
        _as_bits(column, 4 + size)
        return lambda bits: _timestamp(int(bits, 2), size, unit)
    if kind in (FIELD_TYPE.TIME, FIELD_TYPE.DATETIME, FIELD_TYPE.TIMESTAMP):
        raise StentorError(f"column {column.name}: a time in the format before MySQL 5.6; ALTER TABLE ... FORCE")
    return None


def _unicode(column: Any) -> bool:
    return str(column.collation_name).startswith("utf8")


def _as_bits(column: Any, size: int) -> None:
    """Have it read as bits, which loses nothing, where the library's own reading does."""
    column.type, column.bytes, column.bits = FIELD_TYPE.BIT, size, 8 * size


def _swapped(bits: str, size: int) -> int:
    return int.from_bytes(int(bits, 2).to_bytes(size, "big"), "little")


def _time(value: int, size: int, unit: int) -> timedelta:
    whole, fraction = divmod(abs(value), 1 << (8 * size))
    found = timedelta(
        hours=whole >> 12 & 0x3FF, minutes=whole >> 6 & 0x3F, seconds=whole & 0x3F, microseconds=fraction * unit
    )
    return -found if value < 0 else found


def _timestamp(value: int, size: int, unit: int) -> datetime | None:
    seconds, fraction = divmod(value, 1 << (8 * size))
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=fraction * unit) if seconds or fraction else None


def _string(column: Any) -> Callable[[Any], Any]:
    charset = str(column.collation_name or "utf8").partition("_")[0]
    column.character_set_name = "binary"  # bytes, whatever they are
    if charset == "binary":
        width = column.max_length if column.type == FIELD_TYPE.STRING else 0  # BINARY(n) is logged without its zeros
        return lambda value: (value or b"").ljust(width, b"\0")
    codec = _CODECS.get(charset, charset)
    try:
        b"".decode(codec), "".encode(codec)
    except LookupError:
        raise StentorError(f"column {column.name}: there is no codec for its character set {charset}") from None
    return lambda value: value.decode(codec) if value else ""


def _plain(value: Any) -> Any:
    """JSON of MySQL's log, whose texts come as bytes."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


class Shape:
    """The columns of a table, as an event of the log describes them."""

    def __init__(self, table: Mapped, columns: Sequence[Any], keys: Sequence[str], kinds: Mapping[str, str]) -> None:
        names = [column.name for column in columns]
        table.check(names)
        primary = [column.name for column in columns if column.is_primary]
        self.table = table
        self.primary = primary or [name for name in keys if name in names]
        self.at = [at for at, name in enumerate(names) if table.wants(name) or name in self.primary]
        self._columns: list[tuple[str, Callable[[Any], Any] | None, bool]] = []
        for at in self.at:
            reading = _logged(columns[at], kinds.get(names[at]))
            self._columns.append((names[at], reading, names[at] in table.texts))

    def row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, reading, text in self._columns:
            value = values[name]
            if value is not None:
                value = reading(value) if reading is not None else value
                value = as_text(value) if text else value
            found[name] = value
        return found


# ---- statements -----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""/\*(?!M?!).*?\*/|(?:--\s|\#)[^\n]*|/\*M?!\d*|\*/|'(?:[^'\\]|\\.|'')*'"""
    r"""|`(?P<quoted>(?:[^`]|``)*)`|"(?P<double>(?:[^"\\]|\\.|"")*)"|(?P<word>[\w$]+)|(?P<dot>\.)""",
    re.DOTALL,
)
_WRITES = {"INSERT", "UPDATE", "DELETE", "REPLACE", "LOAD", "WITH"}


class Statement:
    """A statement in the log: its words, and the tables that they may name; what it does to their rows."""

    def __init__(self, text: str, schema: str) -> None:
        words: list[str] = []
        names: list[tuple[str, ...]] = []
        dot = False
        for token in _TOKEN.finditer(text):
            name = next((token[kind] for kind in ("quoted", "double", "word") if token[kind] is not None), None)
            if name is None:
                dot = dot or token["dot"] is not None
                continue
            name = name.replace("``", "`")
            before = (names.pop()[-1], words.pop())[0] if dot and names else schema
            names.append((before, name))
            words.append(name.upper() if token["word"] else "")
            dot = False
        self.words = words
        self.verb = words[0] if words else ""
        made = self.starts("CREATE") and self._about("TABLE")
        replaced = made and self.starts("CREATE", "OR", "REPLACE")
        if made:  # the others that it names are only read
            names = names[words.index("TABLE") + 1 :][: 1 if replaced else 4]  # after IF NOT EXISTS
        self.tables = {".".join(name) for name in names}
        self.names = {name[-1] for name in names}
        self.empties = replaced or self.verb == "TRUNCATE" or (self.verb == "DROP" and self._about("TABLE"))
        self.replaces = self._replaces()
        """The tables may have other rows now, without an event for each."""
        self.alters = made or self.replaces or (self.verb == "ALTER" and self._about("TABLE"))

    def starts(self, *words: str) -> bool:
        return tuple(self.words[: len(words)]) == words

    def _about(self, what: str) -> bool:
        return what in self.words[1:5] and "TEMPORARY" not in self.words[1:5]

    def _replaces(self) -> bool:
        if self.verb == "ALTER" and self._about("TABLE"):
            pairs = set(zip(self.words, self.words[1:], strict=False))
            renamed = any(a == "RENAME" and b not in ("COLUMN", "INDEX", "KEY") for a, b in pairs)
            cut = {(a, "PARTITION") for a in ("DROP", "TRUNCATE", "EXCHANGE", "CONVERT")}
            return renamed or bool(pairs & {*cut, ("DISCARD", "TABLESPACE"), ("IMPORT", "TABLESPACE")})
        return self.starts("RENAME", "TABLE")


# ---- the thread -----------------------------------------------------------------------------------------------------


class Begin(NamedTuple):
    """A transaction begins; ``committed`` is to the second."""

    gtid: str
    committed: datetime


class Rows(NamedTuple):
    """Old and new rows of an event; ``position`` is where it ends."""

    shape: Shape
    operation: str
    rows: list[tuple[dict[str, Any] | None, dict[str, Any] | None]]
    position: str


class Altered(NamedTuple):
    """A statement about the whole table: it has no rows now, other columns, or rows that only reading it tells."""

    table: Mapped
    empty: bool
    columns: bool
    read: bool
    position: str


class Commit(NamedTuple):
    """All of the transaction has come."""

    gtid: str


Item = Begin | Rows | Altered | Commit


class Log:
    """Reads the binary log from ``gtids`` on, in a thread, no further ahead than ``AHEAD``.

    ``connect`` makes a connection; ``keys`` and ``kinds`` are the primary key and the DATA_TYPEs of each table now.
    """

    def __init__(
        self,
        connect: Callable[..., Any],
        tables: Iterable[Mapped],
        keys: Mapping[str, Sequence[str]],
        kinds: Mapping[str, Mapping[str, str]],
        gtids: Gtids,
        server_id: int,
    ) -> None:
        self._connect = connect
        self._tables = {table.table: table for table in tables}
        self._keys = keys
        self._kinds = kinds
        self._maria = isinstance(gtids, MariaGtids)
        self._reader = BinLogStreamReader(
            {"charset": "utf8mb4", "read_timeout": 120}, server_id=server_id, blocking=True, only_events=_EVENTS,
            only_schemas={name.partition(".")[0] for name in self._tables},
            only_tables={name.partition(".")[2] for name in self._tables},
            auto_position=str(gtids), is_mariadb=self._maria, slave_heartbeat=BEAT, pymysql_wrapper=self._connection,
            enable_logging=False, filter_non_implemented_events=False,
            freeze_schema=True,  # a table that is altered gets another number
        )  # fmt: skip
        self._shapes: dict[int, Shape] = {}
        self._gtid = ""
        self._open = self._ours = self._xa = False
        self._strangers: set[str] = set()
        """XA transactions that are prepared and changed none of the tables."""
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        self._room = threading.Condition()
        self._items: list[Item | Exception] = []
        self._held = 0
        self._connections: list[Any] = []
        self._closed = False
        self._apart = Apart("stentor binlog", self._end)
        self._reading = asyncio.ensure_future(self._apart.call(self._read))

    # in the event loop

    def take(self) -> list[Item | Exception]:
        """What has come; an error is the last of it."""
        with self._room:
            items, self._items, self._held = self._items, [], 0
            self._came.clear()
            self._room.notify_all()
        return items

    async def wait(self, stopping: asyncio.Event) -> None:
        """Until something came, the program stops, or a second is over."""
        waiting = [asyncio.create_task(event.wait()) for event in (self._came, stopping)]
        try:
            await asyncio.wait(waiting, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    def close(self) -> None:
        """Let the thread end; it closes its connections itself."""
        with self._room:
            self._closed = True
            self._room.notify_all()
            for connection in self._connections:
                with contextlib.suppress(OSError, AttributeError):
                    connection._sock.shutdown(socket.SHUT_RDWR)
        self._apart.close()

    # in the thread

    def _connection(self, **settings: Any) -> Any:
        """The library's two connections; a third one would be it going on where it was cut, unseen by the source."""
        if len(self._connections) == 2:
            raise pymysql.OperationalError(2013, "the connection was lost")
        made = self._connect(**settings)
        with self._room:
            self._connections.append(made)
            if self._closed:
                raise Unavailable("closed")
        return made

    def _end(self) -> None:
        for connection in self._connections:
            connection._force_close()

    def _read(self) -> None:
        try:
            while (event := self._reader.fetchone()) is not None:
                for item in self._parse(event):
                    self._put(item, event.event_size)
            raise Unavailable("the server ended the stream")
        except (Gone, StentorError, pymysql.Error, OSError) as error:
            self._put(error, 0)
        except Exception as error:  # whatever the library raises for bytes that it does not understand
            self._put(StentorError(f"the binary log cannot be read: {type(error).__name__}: {error}"), 0)

    def _put(self, item: Item | Exception, size: int) -> None:
        with self._room:
            while self._held > AHEAD and not self._closed:
                self._room.wait()
            self._items.append(item)
            self._held += size
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._came.set)

    def _parse(self, event: Any) -> Iterator[Item]:
        match event:
            case TableMapEvent():
                self._shape(event)
            case RowsEvent():
                yield from self._rows(event)
            case GtidEvent() | MariadbGtidEvent():
                yield from self._commit()
                self._gtid, self._ours = event.gtid, False
                self._open = self._maria and not event.flags & _STANDALONE
                self._xa = self._maria and bool(event.flags & _PREPARED)
                yield Begin(event.gtid, datetime.fromtimestamp(event.timestamp, UTC))
            case XidEvent():
                yield from self._commit()
            case QueryEvent():
                yield from self._query(event)
            case XAPrepareEvent():
                self._strangers.add(f"x'{event.xid_gtrid.hex()}',x'{event.xid_bqual.hex()}',{event.xid_format_id}")
                yield from self._commit()
            case BeginLoadQueryEvent() | ExecuteLoadQueryEvent():
                raise Gone("a file was loaded by a statement (binlog_format)")
            case _ if event.event_type not in _HARMLESS and not event.packet.flags & _IGNORABLE:
                raise Gone(
                    f"the log has an event of type {event.event_type}, which cannot be read here (a compressed one?)"
                )

    def _commit(self) -> Iterator[Item]:
        if self._gtid:
            yield Commit(self._gtid)
        self._gtid, self._open = "", False

    def _shape(self, event: Any) -> None:
        table = self._tables.get(f"{event.schema}.{event.table}")
        self._shapes.pop(event.table_id, None)
        if table is None:
            return
        if not all(column.name for column in event.columns):
            raise Gone(f"changes of {table.table} were logged while binlog_row_metadata was not FULL")
        self._shapes[event.table_id] = Shape(
            table, event.columns, self._keys.get(table.table, ()), self._kinds.get(table.table, {})
        )

    def _rows(self, event: Any) -> Iterator[Item]:
        shape = self._shapes.get(event.table_id)
        if shape is None:
            return
        table = shape.table.table
        if self._xa:
            raise Gone(f"an XA transaction changed {table}; whether it is committed shows later")
        if isinstance(event, PartialUpdateRowsEvent):
            raise Gone(f"updates of {table} were logged in part (binlog_row_value_options)")
        bitmaps = [event.columns_present_bitmap, getattr(event, "columns_present_bitmap2", None)]
        if any(bitmap is not None and not bitmap[at // 8] >> at % 8 & 1 for bitmap in bitmaps for at in shape.at):
            raise Gone(f"changes of {table} were logged without all columns (binlog_row_image)")
        self._ours = True
        try:
            operation, rows = _images(event, shape)
        except (ValueError, LookupError, NotImplementedError, ArithmeticError, struct.error) as error:
            raise StentorError(f"{table}: a row at {self._position(event)} cannot be read: {error}") from None
        yield Rows(shape, operation, rows, self._position(event))

    def _query(self, event: Any) -> Iterator[Item]:
        schema = event.schema.decode(errors="replace")
        said = Statement(event.query, schema)
        ours = [table for name, table in self._tables.items() if name in said.tables]
        if said.verb in ("BEGIN", "SAVEPOINT") or (said.verb == "XA" and said.words[1:2] == ["START"]):
            self._open, self._xa = True, said.verb == "XA"
            return
        if said.verb == "ROLLBACK" and self._ours:
            raise Gone("a transaction was rolled back in part after it was logged")
        if said.verb in _WRITES and ours:
            raise Gone(f"a change of {ours[0].table} was logged as a statement (binlog_format)")
        if said.starts("XA", "COMMIT") and not any(xid in event.query.lower() for xid in self._strangers):
            raise Gone("an XA transaction was committed, whose rows were told before it was")
        if said.verb == "DROP" and said.words[1:2] in (["DATABASE"], ["SCHEMA"]):
            ours = [table for name, table in self._tables.items() if name.partition(".")[0] in said.names]
            yield from (Altered(table, True, False, False, self._position(event)) for table in ours)
        elif said.alters or said.empties:
            what = (said.empties or said.replaces, said.alters, said.replaces)
            yield from (Altered(table, *what, self._position(event)) for table in ours)
        if not self._open or said.verb in ("COMMIT", "ROLLBACK"):
            yield from self._commit()

    def _position(self, event: Any) -> str:
        return f"{self._reader.log_file}:{event.packet.log_pos}"


def _images(event: Any, shape: Shape) -> tuple[str, list[tuple[Any, Any]]]:
    if isinstance(event, UpdateRowsEvent):
        found = [(shape.row(row["before_values"]), shape.row(row["after_values"])) for row in event.rows]
        return "update", found
    rows = [shape.row(row["values"]) for row in event.rows]
    if isinstance(event, WriteRowsEvent):
        return "insert", [(None, row) for row in rows]
    return "delete", [(row, None) for row in rows]
