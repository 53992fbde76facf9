"""Changes of PostgreSQL tables, by logical replication: what is there first, then every committed change.

The replication connection is libpq's own, by psycopg: the server pushes, no thread is needed, and the broker
``postgresql`` has the library too; see docs/decisions/0012. What the server sends is read in ``pgoutput``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec
import psycopg
from msgspec import Struct
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.generators import execute

from stentor.brokers.postgresql_client import failure
from stentor.errors import ConfigError, DefinitionError, InvalidEvent, PositionLost, StentorError, Unavailable
from stentor.event import EventLike, EventSpec, Outgoing, spec_of
from stentor.source import Publish
from stentor.sources.cdc_postgresql_stream import BEAT, Reader, Stream
from stentor.sources.change import Change, Mapped, digest, mapped, until_one_ends
from stentor.sources.pgoutput import (
    Begin,
    Commit,
    Logical,
    Relation,
    RowChange,
    Snapshot,
    Truncate,
    lsn_number,
    lsn_text,
    parse,
)  # fmt: skip

log = logging.getLogger("stentor.source")
Session = psycopg.AsyncConnection[tuple[Any, ...]]

PREFIX = "stentor"
MARK = "stentor.mark"
MANY = 500
"""Events of one publish, at most."""
LOOK = 30.0
"""Seconds between two looks at what the slot holds back."""
HELD = 1 << 30
"""Bytes of the log held back for the slot, from which on that is worth a warning."""
_SETTINGS = "-c TimeZone=UTC -c DateStyle=ISO -c IntervalStyle=postgres -c bytea_output=hex -c statement_timeout=0"
_ACTIVE, _NO_SLOT = "55006", "42704"
_LOST = ("can no longer get changes", "has already been removed", "has been invalidated")


class Met(Struct):
    """A table that the source has read, or begun to: its number, where the log stood at the beginning."""

    oid: int
    since: int
    read: bool = False


class Place(Struct):
    """How far the source has come: all transactions that end at ``lsn`` or before, and a part of one more.

    ``seen`` is a snapshot: what it sees needs no event any more, being in the rows that were read, or told already.
    """

    lsn: int
    commit: int = 0
    index: int = 0
    tables: dict[str, Met] = {}
    seen: str = ""
    seen_at: int = 0


class Letter(Struct):
    """An event in a logical message, see ``emit``."""

    type: str
    data: msgspec.Raw
    id: str | None = None
    key: str | None = None
    subject: str | None = None


def emit(event: EventLike, *, id: str | None = None, key: str | None = None) -> tuple[str, list[str]]:
    """A SQL statement and its parameter: run in a transaction, it publishes ``event`` if that is committed.

    It takes no table, and a source with ``messages=[...]`` to read it. Raises InvalidEvent.
    """
    spec = spec_of(type(event))
    if spec is None:
        raise InvalidEvent(f"{type(event).__qualname__} is no event")
    data = spec.encode(event)
    try:
        spec.decode(data)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise InvalidEvent(f"{spec.cls.__qualname__}: {error}") from None
    letter = Letter(type=spec.type, data=msgspec.Raw(data), id=id, key=key)
    return f"SELECT pg_logical_emit_message(true, '{PREFIX}', %s)", [msgspec.json.encode(letter).decode()]


class PostgresChanges:
    """A source of the changes of tables, and of events that SQL transactions wrote with ``emit``.

    Args:
        url: a libpq URL of PostgreSQL 14 or newer with ``wal_level = logical``; the role has REPLICATION and may read
            the tables. The password may be in ``?passfile=``.
        tables: the event class of each table, which may be named with its schema.
        slot: the replication slot, made where it is missing: one for each source. It keeps the server's log until the
            events are durable here, also while the source does not run.
        messages: event classes that ``emit`` writes.
        publication: made, and kept up to date, by the role if it owns the tables; named like the slot by default.
        on_lost: when the slot is gone and changes with it, "stop" with PositionLost, or "snapshot": read the tables
            again, without the deletes that were missed.

    Raises:
        DefinitionError: a table, class or setting cannot work; the server is asked when the source starts.
        PositionLost: the slot is gone, see ``on_lost``.
        Unavailable: the server cannot be reached, or another process still reads the slot.
    """

    def __init__(
        self,
        url: str,
        tables: Mapping[str, type[Change[Any]]],
        *,
        slot: str,
        messages: Sequence[type[Any]] = (),
        publication: str | None = None,
        on_lost: Literal["stop", "snapshot"] = "stop",
    ) -> None:
        if not slot or len(slot) > 63 or not set(slot) <= set("abcdefghijklmnopqrstuvwxyz0123456789_"):
            raise DefinitionError(f"slot {slot!r}: use 1 to 63 of a-z, 0-9 and _")
        if on_lost not in ("stop", "snapshot"):
            raise DefinitionError(f'on_lost must be "stop" or "snapshot", not {on_lost!r}')
        try:
            given = conninfo_to_dict(url)
        except psycopg.Error as error:
            raise ConfigError(f"source {slot}: the URL is no PostgreSQL URL: {str(error).strip()}") from None
        options = f"{given.pop('options', None) or ''} {_SETTINGS}".strip()
        self._arguments: dict[str, Any] = {"connect_timeout": 10, **given, "options": options}
        self.name = slot
        self._tables = mapped(tables) if tables or not messages else {}
        self._publication = publication or slot
        self._on_lost = on_lost
        self._messages = {name: spec for cls in messages for spec in [_event_spec(cls)] for name in spec.names}
        self._by_oid: dict[int, Mapped] = {}
        self.ids = ""
        """What the ids of its events begin with: the slot, and the number of the database cluster."""

    def __str__(self) -> str:
        place = self._arguments.get("host", "local"), self._arguments.get("dbname", "")
        return f"slot {self.name} of {place[0]}/{place[1]}"

    async def run(self, publish: Publish) -> None:
        """Read what is there, then follow; returns when the program stops."""
        try:
            async with await self._session() as session:
                place = await self._prepare(session, publish.position)
                await until_one_ends(self._look(session, publish), self._read(session, publish, place))
        except (psycopg.Error, OSError) as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> StentorError:
        text = str(error).strip()
        state = getattr(error, "sqlstate", None)
        if state == _ACTIVE and "active" in text:
            return Unavailable(f"{self}: another process still reads it ({text.splitlines()[0]})")
        if any(part in text for part in _LOST):
            return self._gone("the server gave its log up (max_slot_wal_keep_size)")
        return failure(error, self)

    def _gone(self, why: str) -> PositionLost:
        return PositionLost(
            f'{self}: {why}, so changes are lost. To go on, give the source on_lost="snapshot": the tables are read '
            "again, and each row comes as operation 'read'; deletes that were missed do not come, so rebuild what "
            "was derived from the tables"
        )

    async def _session(self, **more: Any) -> Session:
        return await psycopg.AsyncConnection.connect(**self._arguments, **more, autocommit=True)

    # ---- before the first change ------------------------------------------------------------------------------------

    async def _prepare(self, session: Session, position: Any) -> Place:
        """Check server and tables, make publication and slot where they are missing; where to go on."""
        version, level, system = await _one(
            session,
            "SELECT current_setting('server_version_num')::int, current_setting('wal_level'), system_identifier "
            "FROM pg_control_system()",
        )
        if version < 140000 or level != "logical":
            raise DefinitionError(
                f"{self}: needs PostgreSQL 14 or newer with wal_level = logical; it is {version // 10000} with "
                f"{level}. Set it (ALTER SYSTEM SET wal_level = logical) and restart the server"
            )
        self.ids = f"{self.name}/{system:x}"
        self._by_oid = {await self._check(session, table): table for table in self._tables.values()}
        await self._publish_tables(session)
        return await self._slot(session, None if position is None else msgspec.convert(position, Place))

    async def _check(self, session: Session, table: Mapped) -> int:
        """The table's number. Raises DefinitionError when it is missing, lacks a column, or does not tell enough."""
        found = await (
            await session.execute(
                "SELECT c.oid, format('%%s.%%s', n.nspname, c.relname), c.relreplident, c.relkind, "
                "EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary) FROM pg_class c "
                "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)",
                (table.table,),
            )
        ).fetchone()
        if found is None or found[3] not in "rp":
            raise DefinitionError(f"{self}: there is no table {table.table}")
        oid, table.table, identity, _, primary = found
        if identity == "n" or (identity == "d" and not primary):
            raise DefinitionError(
                f"table {table.table} has nothing that tells its rows apart, and PostgreSQL would refuse updates once "
                f"it is published: give it a primary key, or ALTER TABLE {table.table} REPLICA IDENTITY FULL"
            )
        columns = await (
            await session.execute(
                "SELECT attname, attstorage IN ('x', 'e') AND NOT EXISTS (SELECT FROM pg_index i WHERE "
                "i.indrelid = attrelid AND (i.indisprimary OR i.indisreplident) AND attnum = ANY(i.indkey)) "
                "FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped AND attgenerated = ''",
                (oid,),
            )
        ).fetchall()
        table.check([name for name, _ in columns])
        silent = sorted(
            name for name, large in columns
            if large and identity != "f" and table.fields and name in table.fields and table.fields[name].required
        )  # fmt: skip
        if silent:
            raise DefinitionError(
                f"table {table.table}: an update does not repeat large values of {', '.join(silent)} that it leaves "
                f"alone. ALTER TABLE {table.table} REPLICA IDENTITY FULL, which gives whole old rows too, or give "
                f"the fields of {table.name} a default: str | msgspec.UnsetType = msgspec.UNSET"
            )
        return int(oid)

    async def _publish_tables(self, session: Session) -> None:
        """Make the publication, or add to it the tables that it lacks."""
        name = sql.Identifier(self._publication)
        exists = await (
            await session.execute("SELECT FROM pg_publication WHERE pubname = %s", (self._publication,))
        ).fetchone()
        if exists is None:
            tables = [_quoted(table.table) for table in self._tables.values()]
            of = sql.SQL(" FOR TABLE {}").format(sql.SQL(", ").join(tables)) if tables else sql.SQL("")
            await session.execute(
                sql.SQL("CREATE PUBLICATION {}{} WITH (publish_via_partition_root = true)").format(name, of)
            )
            return
        listed = await (
            await session.execute(
                "SELECT format('%%s.%%s', schemaname, tablename) FROM pg_publication_tables WHERE pubname = %s",
                (self._publication,),
            )
        ).fetchall()
        for table in sorted({table.table for table in self._tables.values()} - {row[0] for row in listed}):
            async with session.transaction():
                # What a transaction changed before the table was published is not sent: wait until none is open.
                await session.execute(sql.SQL("LOCK TABLE {} IN SHARE MODE").format(_quoted(table)))
                await session.execute(sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(name, _quoted(table)))

    async def _slot(self, session: Session, place: Place | None) -> Place:
        """Make the slot where it is missing; raises PositionLost when it does not reach back to ``place``."""
        row = await (
            await session.execute(
                "SELECT confirmed_flush_lsn::text, wal_status, plugin, database = current_database() "
                "FROM pg_replication_slots WHERE slot_name = %s",
                (self.name,),
            )
        ).fetchone()
        lost = ""
        if row is None:
            lost = "the slot is gone" if place is not None else ""
        elif row[2] != "pgoutput" or not row[3]:
            raise DefinitionError(f"{self}: the slot belongs to something else (plugin {row[2]}); choose another name")
        elif row[1] == "lost":
            lost = "the server gave its log up (max_slot_wal_keep_size)"
        elif place is not None and lsn_number(row[0]) > place.lsn:
            lost = f"the slot is ahead, at {row[0]}; {lsn_text(place.lsn)} was the last that was stored"
        if lost and self._on_lost == "stop":
            raise self._gone(lost)
        if lost:
            log.warning("%s: %s; all tables are read again", self, lost)
            place = None
            if row is not None:
                await session.execute("SELECT pg_drop_replication_slot(%s)", (self.name,))
                row = None
        if row is None:
            row = await _one(
                session, "SELECT lsn::text FROM pg_create_logical_replication_slot(%s, 'pgoutput')", self.name
            )
        return place or Place(lsn_number(row[0]))

    # ---- what is there ----------------------------------------------------------------------------------------------

    async def _read(self, session: Session, publish: Publish, place: Place) -> None:
        known = {table.table: oid for oid, table in self._by_oid.items()}
        met = place.tables.items()
        place.tables = {name: table for name, table in met if known.get(name) == table.oid}
        if any(name not in place.tables or not place.tables[name].read for name in known):
            await self._snapshot(session, publish, place)
        if not publish.stopping.is_set():
            await self._follow(session, publish, place)

    async def _snapshot(self, session: Session, publish: Publish, place: Place) -> None:
        """Read the tables that are new here, or were not read to their end, as one moment saw them.

        What earlier tables have to tell up to that moment comes first; so the rows of a table whose reading was cut off
        are followed by their changes, then read again.
        """
        async with await self._session() as reading:
            await reading.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
            async with reading.transaction():
                [text] = await _one(reading, "SELECT pg_current_snapshot()::text")
                # A transaction of ours that comes after all that the snapshot sees: where it stands, they are all told.
                [mark] = await _one(session, "SELECT pg_logical_emit_message(true, %s, '')::text", MARK)
                if place.tables:
                    await self._follow(session, publish, place, _Until(Snapshot(text), lsn_number(mark)))
                    if publish.stopping.is_set():
                        return
                place.seen, place.seen_at = text, lsn_number(mark)
                for oid, table in self._by_oid.items():
                    met = place.tables.setdefault(table.table, Met(oid, place.seen_at))
                    if not met.read:
                        await self._rows(reading, publish, place, table, met)

    async def _rows(self, reading: Session, publish: Publish, place: Place, table: Mapped, met: Met) -> None:
        looked = await reading.execute(sql.SQL("SELECT * FROM {} LIMIT 0").format(_quoted(table.table)))
        described = looked.description or []
        table.check([column.name for column in described])
        primary = await self._primary(reading, met.oid)
        names = [column.name for column in described if table.wants(column.name) or column.name in primary]
        columns = [sql.SQL("{}::text" if name in table.texts else "{}").format(sql.Identifier(name)) for name in names]
        position, count = lsn_text(place.seen_at), 0
        select = sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(columns), _quoted(table.table))
        await reading.execute(sql.SQL("DECLARE stentor CURSOR FOR {}").format(select))
        while not met.read:
            rows = await (await reading.execute(f"FETCH {MANY} FROM stentor")).fetchall()
            if publish.stopping.is_set():
                return
            met.read = len(rows) < MANY  # told with the last rows, so that a stop behind them reads nothing again
            events = []
            for values in rows:
                row = dict(zip(names, values, strict=True))
                # The same for a row that is read again as it was; a row that was changed since is another event.
                id = f"{self.ids}/{met.since:X}/{digest(table.table, values)}"
                identity = {name: row[name] for name in primary}
                events.append(table.event("read", position, id=id, identity=identity, after=row))
            count += len(rows)
            await publish(events, position=msgspec.to_builtins(place))
        await reading.execute("CLOSE stentor")
        log.info("%s: read %d rows of %s", self, count, table.table)

    async def _primary(self, session: Session, oid: int) -> list[str]:
        """The columns of the primary key, in its order."""
        rows = await (
            await session.execute(
                "SELECT a.attname FROM pg_index i CROSS JOIN unnest(i.indkey) WITH ORDINALITY k (number, place) "
                "JOIN pg_attribute a ON a.attnum = k.number AND a.attrelid = i.indrelid "
                "WHERE i.indrelid = %s AND i.indisprimary "
                "ORDER BY k.place",
                (oid,),
            )
        ).fetchall()
        return [row[0] for row in rows]

    # ---- what changes -----------------------------------------------------------------------------------------------

    async def _follow(self, session: Session, publish: Publish, place: Place, until: _Until | None = None) -> None:
        """Publish committed changes as they come.

        With ``until``, only what that snapshot sees, back when all of it is told; ``place`` stays as it is then.
        """
        async with self._stream(place.lsn) as stream:
            flow = _Flow(self, publish, stream, place, until)
            while not publish.stopping.is_set():
                data = stream.get()
                if data is None:
                    await flow.rest()
                    continue
                parsed = parse(data)
                if isinstance(parsed, Relation):
                    flow.tables[parsed.oid] = await self._reader(session, parsed, stream.connection)
                elif isinstance(parsed, Begin):
                    if until is not None and parsed.lsn >= until.at:
                        break
                    flow.begin(parsed)
                elif isinstance(parsed, Commit):
                    flow.commit(parsed)
                elif parsed is not None and flow.take(parsed):
                    await flow.store()
            if flow.events:
                await flow.store()

    async def _reader(self, session: Session, relation: Relation, context: Any) -> Reader | None:
        table = self._by_oid.get(relation.oid)
        if table is None:
            return None
        return Reader(table, relation, await self._primary(session, relation.oid), context)

    def letter(self, message: Logical, id: str) -> Outgoing:
        """The event in a logical message. Raises StentorError when it cannot be read."""
        where = f"{self}: the message at {lsn_text(message.lsn)}"
        try:
            letter = msgspec.json.decode(message.content, type=Letter)
            spec = self._messages.get(letter.type)
            if spec is None:
                known = ", ".join(self._messages) or "none"
                raise StentorError(f"{where} is of type {letter.type!r}; give its class in messages= (now: {known})")
            event = spec.decode(bytes(letter.data))
        except (msgspec.MsgspecError, ValueError, TypeError) as error:
            raise StentorError(f"{where} cannot be read: {error}; write it with emit(event)") from None
        return Outgoing(event, id=letter.id or id, key=letter.key, subject=letter.subject)

    # ---- the connection ---------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _stream(self, lsn: int) -> AsyncIterator[Stream]:
        """The replication connection, reading from ``lsn`` on."""
        publication = self._publication.replace('"', '""').replace("'", "''")
        command = (
            f"START_REPLICATION SLOT {self.name} LOGICAL {lsn_text(lsn)} (proto_version '1', "
            f"publication_names '\"{publication}\"', messages 'true')"
        )

        connection = await self._session(replication="database")
        try:
            connection.pgconn.send_query(command.encode())
            [result] = await connection.wait(execute(connection.pgconn))
            if result.status != pq.ExecStatus.COPY_BOTH:
                raise psycopg.errors.lookup(_state(result))(result.error_message.decode(errors="replace"))
            stream = Stream(connection, lsn)
            beating = asyncio.create_task(stream.beat())
            try:
                yield stream
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
                with contextlib.suppress(psycopg.Error):
                    stream.tell()
        finally:
            await connection.close()

    async def _look(self, session: Session, publish: Publish) -> None:
        """Keep an eye on what the slot holds back (the lag, in bytes), and on tables: one made anew is not followed."""
        warned = -math.inf
        while True:
            row = await (
                await session.execute(
                    "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint, wal_status "
                    "FROM pg_replication_slots WHERE slot_name = %s",
                    (self.name,),
                )
            ).fetchone()
            if row is None:
                raise self._gone("the slot was dropped")
            held = row[0] or 0
            publish.counts.lag = held
            if (held > HELD or row[1] not in ("reserved", "extended")) and time.monotonic() - warned > 600:
                warned = time.monotonic()
                log.warning("%s: the server keeps %d MiB of its log for it (%s)", self, held >> 20, row[1])
            for oid, table in self._by_oid.items():
                [now] = await _one(session, "SELECT to_regclass(%s)::oid", table.table)
                if now != oid:
                    raise StentorError(f"{self}: the table {table.table} was dropped, renamed or made anew")
            await asyncio.sleep(LOOK)


class _Until(NamedTuple):
    """A snapshot, and where in the log all that it sees is told."""

    sees: Snapshot
    at: int


class _Flow:
    """What comes of the log: the transaction under way, and the events of it that are not stored yet."""

    def __init__(
        self, source: PostgresChanges, publish: Publish, stream: Stream, place: Place, until: _Until | None
    ) -> None:
        self._source = source
        self._publish = publish
        self._stream = stream
        self._stored = place
        self._place = msgspec.structs.replace(place) if until else place  # with `until` it is gone through again later
        self._until = until
        self._seen = Snapshot(place.seen) if place.seen else None
        self._time = time.monotonic()
        self._begun = Begin(0, datetime.now(UTC), 0, "", "")
        self._ids = ""
        self._index = self._skip = 0
        self._wanted = self._inside = False
        self.tables: dict[int, Reader | None] = {}
        self.events: list[Outgoing] = []

    def begin(self, begun: Begin) -> None:
        if self._seen is not None and begun.lsn >= self._place.seen_at:
            self._seen, self._place.seen, self._place.seen_at = None, "", 0
        self._begun, self._index, self._inside = begun, 0, True
        self._ids = f"{self._source.ids}/{begun.lsn:X}/"
        self._skip = self._place.index if self._place.commit == begun.lsn else 0
        told = self._seen is not None and self._seen.sees(begun.xid)
        self._wanted = not told and (self._until is None or self._until.sees.sees(begun.xid))

    def commit(self, end: Commit) -> None:
        self._place.lsn, self._place.commit, self._place.index, self._inside = end.end, 0, 0, False

    def take(self, parsed: RowChange | Truncate | Logical) -> bool:
        """Make events of it; whether there are enough to be stored."""
        if isinstance(parsed, Logical) and not parsed.transactional:
            if parsed.prefix == PREFIX and self._until is None:
                self.events.append(self._source.letter(parsed, f"{self._source.ids}/{parsed.lsn:X}"))
            return False
        self._index += 1
        if not self._wanted or self._index <= self._skip:
            return False
        id = f"{self._ids}{self._index}"
        if isinstance(parsed, RowChange):
            reader = self.tables.get(parsed.oid)
            if reader is not None:
                self.events += reader.events(parsed, id, self._begun)
        elif isinstance(parsed, Logical):
            if parsed.prefix == PREFIX:
                self.events.append(self._source.letter(parsed, id))
        else:
            readers = [reader for oid in parsed.oids if (reader := self.tables.get(oid)) is not None]
            self.events += [reader.truncated(f"{id}/{reader.table.table}", self._begun) for reader in readers]
        if len(self.events) < MANY:
            return False
        self._place.commit, self._place.index = self._begun.lsn, self._index
        return True

    async def rest(self) -> None:
        """Nothing more has come: store what there is, then wait."""
        if self.events:
            if self._inside:
                self._place.commit, self._place.index = self._begun.lsn, self._index
            await self.store()
            return
        if not self._inside and self._until is None:
            # What the server has told of since was not for us. Stored now and then, or it would keep that for ever.
            self._place.lsn = max(self._place.lsn, self._stream.end)
            if self._place.lsn > self._stream.flushed and time.monotonic() - self._time > BEAT:
                await self.store()
        self._stream.tell()
        await self._stream.wait(self._publish.stopping)

    async def store(self) -> None:
        """Publish the events with the place; only then may the server forget them."""
        await self._publish(self.events, position=msgspec.to_builtins(self._stored))
        self.events = []
        self._stream.flushed, self._time = self._stored.lsn, time.monotonic()


def _event_spec(cls: type[Any]) -> EventSpec:
    spec = spec_of(cls)
    if spec is None:
        raise DefinitionError(f"messages=: {getattr(cls, '__qualname__', cls)!r} is no event class")
    return spec


def _quoted(table: str) -> sql.Identifier:
    return sql.Identifier(*table.split(".", 1))


def _state(result: Any) -> str:
    state = result.error_field(pq.DiagnosticField.SQLSTATE)
    return state.decode() if state else "XX000"


async def _one(session: Session, query: Any, *parameters: Any) -> tuple[Any, ...]:
    row = await (await session.execute(query, parameters)).fetchone()
    assert row is not None
    return row
