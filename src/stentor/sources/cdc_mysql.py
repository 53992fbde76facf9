"""Changes of MySQL and MariaDB tables, by the binary log: what is there first, then every committed change.

The protocol of a replica is mysql-replication's, which reads in a thread; see docs/decisions/0012.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import zlib
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import pymysql
from msgspec import Struct
from pymysql.connections import Connection
from pymysql.cursors import SSCursor

from stentor.brokers.trust import refused, refuses_certificate, trust
from stentor.connect import BrokerUrl
from stentor.errors import (
    AuthenticationFailed,
    BrokerError,
    ConfigError,
    DefinitionError,
    PositionLost,
    StorageUnusable,
    Unavailable,
)
from stentor.event import Outgoing, check_name
from stentor.source import Publish
from stentor.sources.apart import Apart
from stentor.sources.cdc_mysql_log import (
    BEAT,
    Altered,
    Begin,
    Commit,
    Gone,
    Gtids,
    Item,
    Log,
    MariaGtids,
    MysqlGtids,
    Rows,
    Shape,
    as_text,
    selected,
)
from stentor.sources.change import Change, Mapped, digest, mapped, until_one_ends

log = logging.getLogger("stentor.source")

MANY = 500
"""Events of one publish, at most."""
LOOK = 5.0
"""Seconds between two looks at how many transactions are still to come."""
_SETTINGS = {"log_bin": "ON", "binlog_format": "ROW", "binlog_row_image": "FULL", "binlog_row_metadata": "FULL"}
_MARIA = {"log_bin_compress": "OFF"}
_MYSQL = {"gtid_mode": "ON", "binlog_transaction_compression": "OFF", "binlog_row_value_options": ""}
_ENGINES = {"INNODB", "ROCKSDB"}
_LOGIN = {1045, 1698, 1251, 3118}
_RIGHTS = {1044, 1142, 1143, 1227}
_MASTER_ERROR = 1236
_TAKEN = ("same server",)


class Met(Struct):
    """A table that the source has read, or begun to; ``since`` is where the log stood at the beginning."""

    since: str
    read: bool = False


class Place(Struct):
    """How far the source has come: all transactions in ``gtids``, and ``part`` (rows of each table) of one more.

    ``feed`` stands for the history that it reads, as the server begins to count anew when its log is reset.
    """

    feed: str
    gtids: str
    transaction: str = ""
    part: dict[str, int] = {}
    tables: dict[str, Met] = {}


class MysqlChanges:
    """A source of the changes of tables in MariaDB or MySQL.

    Args:
        url: ``mysql://user:password@host:port/database`` of MariaDB 10.5, MySQL 8.0.14, or newer, with a binary log in
            rows (see the guide), and the options ``tls=1``, ``ca``, ``cert``, ``key`` and ``password_file``. The user
            has REPLICATION SLAVE and may read the tables; on MySQL REPLICATION CLIENT and RELOAD too.
        tables: the event class of each table, which may be named with its database.
        name: names the source. Each source of a server has its own.
        server_id: its number among the server's replicas, 1 to 4294967295; made of the name by default.
        on_lost: when the log is gone before it was read, or does not tell a change, "stop" with PositionLost, or
            "snapshot": read the tables again, without the deletes that were missed.

    Raises:
        DefinitionError: a table, class or setting cannot work; the server is asked when the source starts.
        ConfigError: the URL is wrong.
        PositionLost: see ``on_lost``.
        AuthenticationFailed: the server refuses the user, password or certificate.
        Unavailable: the server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        tables: Mapping[str, type[Change[Any]]],
        *,
        name: str,
        server_id: int | None = None,
        on_lost: Literal["stop", "snapshot"] = "stop",
    ) -> None:
        if on_lost not in ("stop", "snapshot"):
            raise DefinitionError(f'on_lost must be "stop" or "snapshot", not {on_lost!r}')
        if server_id is not None and not 0 < server_id < 1 << 32:
            raise DefinitionError(f"server_id must be 1 to 4294967295, not {server_id!r}")
        self.name = check_name(name, "source")
        # Above the numbers that people give their servers.
        self._server_id = server_id or zlib.crc32(f"stentor/{name}".encode()) | 1 << 31
        self._on_lost = on_lost
        self._arguments, self._place, self._database = _parsed(url)
        self._tables = mapped(tables, lax=True)
        self._keys: dict[str, list[str]] = {}
        self._kinds: dict[str, dict[str, str]] = {}
        """By table: the DATA_TYPE of each column."""
        self._mysql = False

    def __str__(self) -> str:
        return f"source {self.name} of {self._place}"

    async def run(self, publish: Publish) -> None:
        """Read what is there, then follow; returns when the program stops."""
        place = None if publish.position is None else msgspec.convert(publish.position, Place)
        while not publish.stopping.is_set():
            try:
                await self._run(publish, place)
            except Gone as why:
                if self._on_lost == "stop":
                    raise PositionLost(
                        f'{self}: {why}, so changes are lost. To go on, give the source on_lost="snapshot": the tables '
                        "are read again, and each row comes as operation 'read'; deletes that were missed do not "
                        "come, so rebuild what was derived from the tables"
                    ) from None
                log.warning("%s: %s; all tables are read again", self, why)
                place = None

    async def _run(self, publish: Publish, place: Place | None) -> None:
        try:
            async with self._session() as session:
                await self._check_server(session)
                if place is None:
                    place = Place(secrets.token_hex(4), "")
                await until_one_ends(self._look(session, publish, place), self._read(session, publish, place))
        except (pymysql.Error, OSError) as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> Exception:
        code = error.args[0] if isinstance(error, pymysql.Error) and error.args else 0
        text = str(error.args[-1] if error.args else error)
        if code in _LOGIN:
            return AuthenticationFailed(f"{self} refuses the user or password: {text}")
        if refuses_certificate(text):
            return refused(self, text)
        if code in _RIGHTS:
            return StorageUnusable(f"{self}: the user lacks a right: {text}")
        if code == _MASTER_ERROR and not any(part in text for part in _TAKEN):
            return Gone(f"the server's log does not reach back to what was read last ({text})")
        if isinstance(error, pymysql.OperationalError | pymysql.InterfaceError | OSError):
            return Unavailable(f"{self} cannot be reached: {text}")
        return BrokerError(f"{self}: {text}")

    # ---- connections ------------------------------------------------------------------------------------------------

    def _connect(self, **settings: Any) -> Connection[Any]:
        start = "SET time_zone = '+00:00', net_write_timeout = 3600, sql_mode = ''"
        given = {"read_timeout": 120, **self._arguments, **settings, "init_command": start}
        try:
            return pymysql.connect(**given)
        except RuntimeError as error:  # a way to log in that asks for a package
            raise ConfigError(f"{self}: {error}; or use TLS") from None

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[_Session]:
        session = _Session()
        try:
            session.db = await session.call(self._connect)
            yield session
        finally:
            session.close()

    def _gtids(self, text: str) -> Gtids:
        return MysqlGtids(text) if self._mysql else MariaGtids(text)

    # ---- before the first change ------------------------------------------------------------------------------------

    async def _check_server(self, session: _Session) -> None:
        """Raises DefinitionError when the log of the server does not tell enough."""
        names = ", ".join(f"'{name}'" for name in ("version", *_SETTINGS, *_MARIA, *_MYSQL))
        found = dict(await session.rows(f"SHOW GLOBAL VARIABLES WHERE Variable_name IN ({names})"))
        version = str(found["version"])
        self._mysql = "mariadb" not in version.lower()
        if "binlog_row_metadata" not in found:
            raise DefinitionError(f"{self}: needs MariaDB 10.5, MySQL 8.0.14 or newer; it is {version}")
        wanted = _SETTINGS | (_MYSQL if self._mysql else _MARIA)
        if wrong := [name for name, value in wanted.items() if found.get(name, value).upper() != value]:
            now = ", ".join(f"{name} = {found[name] or repr('')}" for name in wrong)
            need = ", ".join(f"{name} = {wanted[name] or repr('')}" for name in wrong)
            how = "and restart the server" if "log_bin" in wrong else "or with SET GLOBAL; sessions keep what they have"
            raise DefinitionError(
                f"{self}: the binary log does not tell enough ({now}). Set {need} in the server's configuration, {how}"
            )

    async def _check_table(self, session: _Session, table: Mapped) -> None:
        """Look at the table. Raises DefinitionError when it is missing, lacks a column, or does not tell enough."""
        schema, _, name = table.table.rpartition(".")
        where = (schema or self._database, name)
        found = await session.rows(
            "SELECT table_schema, table_name, table_type, engine FROM information_schema.tables "
            "WHERE table_schema = %s AND table_name = %s", *where,
        )  # fmt: skip
        if not found or found[0][2] != "BASE TABLE":
            instead = f", but a {found[0][2]}" if found else ""
            raise DefinitionError(f"{self}: there is no table {'.'.join(where)}{instead}")
        schema, name, _, engine = found[0]
        table.table = f"{schema}.{name}"
        if engine.upper() not in _ENGINES:
            raise DefinitionError(
                f"table {table.table} has the engine {engine}, whose rows cannot be read as one moment saw them: "
                f"ALTER TABLE {table.table} ENGINE = InnoDB"
            )
        columns = await session.rows(
            "SELECT column_name, data_type, column_key FROM information_schema.columns "
            "WHERE table_schema = %s AND table_name = %s ORDER BY ordinal_position", schema, name,
        )  # fmt: skip
        table.check([column for column, _, _ in columns])
        self._kinds[table.table] = {column: kind for column, kind, _ in columns}
        self._keys[table.table] = [column for column, _, key in columns if key == "PRI"]
        silent = await session.rows(
            "SELECT constraint_name FROM information_schema.referential_constraints WHERE constraint_schema = %s AND "
            "table_name = %s AND (delete_rule IN ('CASCADE', 'SET NULL') OR update_rule IN ('CASCADE', 'SET NULL'))",
            schema, name,
        )  # fmt: skip
        if silent:
            raise DefinitionError(
                f"table {table.table}: what its foreign key {silent[0][0]} does to rows by CASCADE or SET NULL is not "
                "in the binary log. Make it ON DELETE RESTRICT ON UPDATE RESTRICT, and change the rows by statements"
            )

    # ---- what is there ----------------------------------------------------------------------------------------------

    async def _read(self, session: _Session, publish: Publish, place: Place) -> None:
        while not publish.stopping.is_set():
            for table in self._tables.values():
                await self._check_table(session, table)
            place.tables = {name: met for name, met in place.tables.items() if name in self._keys}
            if any(name not in place.tables or not place.tables[name].read for name in self._keys):
                await self._snapshot(publish, place)
            if not publish.stopping.is_set():
                await self._follow(publish, place)

    async def _snapshot(self, publish: Publish, place: Place) -> None:
        """Read the tables that are new here, or were not read to their end, as one moment saw them.

        What earlier tables have to tell up to that moment comes first; so the rows of a table whose reading was cut off
        are followed by their changes, then read again.
        """
        async with self._session() as session:
            position, gtids = await self._begin(session)
            if place.tables:
                await self._follow(publish, place, until=self._gtids(gtids))
                if publish.stopping.is_set():
                    return
            place.gtids, place.transaction, place.part = gtids, "", {}
            for name in self._keys:
                place.tables.setdefault(name, Met(f"{gtids}/{secrets.token_hex(4)}"))
            await publish(
                [], position=msgspec.to_builtins(place)
            )  # so that the same rows get the same ids from here on
            for table in self._tables.values():
                met = place.tables[table.table]
                if not met.read:
                    await self._rows(session, publish, place, table, met, position)

    async def _begin(self, session: _Session) -> tuple[str, str]:
        """Begin a transaction that sees one moment; where the log stood then, and its GTIDs."""
        await session.rows("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        begin = "START TRANSACTION WITH CONSISTENT SNAPSHOT"
        if self._mysql:
            await session.rows("SET SESSION lock_wait_timeout = 10")
            await session.rows("FLUSH TABLES WITH READ LOCK")  # no commit between the two, for a moment
            await session.rows(begin)
            [[gtids]] = await session.rows("SELECT @@global.gtid_executed")
            try:
                [[file, at, *_]] = await session.rows("SHOW BINARY LOG STATUS")
            except pymysql.ProgrammingError:  # before 8.2
                [[file, at, *_]] = await session.rows("SHOW MASTER STATUS")
            await session.rows("UNLOCK TABLES")
        else:
            await session.rows(begin)
            status = dict(await session.rows("SHOW STATUS LIKE 'binlog_snapshot_%%'"))
            file, at = status["Binlog_snapshot_file"], status["Binlog_snapshot_position"]
            [[gtids]] = await session.rows("SELECT BINLOG_GTID_POS(%s, %s)", file, int(at))
        if gtids is None or (self._mysql and not gtids):
            raise Unavailable(f"{self}: the server has no GTID for {file}:{at} yet")
        return f"{file}:{at}", "".join(gtids.split())

    async def _rows(
        self, session: _Session, publish: Publish, place: Place, table: Mapped, met: Met, position: str
    ) -> None:
        keys, count = self._keys[table.table], 0
        kinds = {name: kind for name, kind in self._kinds[table.table].items() if table.wants(name) or name in keys}
        # As text a float has six digits.
        columns = [f"CAST({_quoted(n)} AS DOUBLE)" if kind == "float" else _quoted(n) for n, kind in kinds.items()]
        readers = [(name, selected(kind, self._mysql), name in table.texts) for name, kind in kinds.items()]
        await session.select(f"SELECT {', '.join(columns)} FROM {_quoted(*table.table.split('.', 1))}")
        while not met.read:
            rows = await session.next(MANY)
            if publish.stopping.is_set():
                return
            met.read = len(rows) < MANY  # told with the last rows, so that a stop behind them reads nothing again
            events = []
            for values in rows:
                row = {}
                for (name, reading, text), value in zip(readers, values, strict=True):
                    found = reading(value) if reading is not None and value is not None else value
                    row[name] = as_text(found) if text else found
                # The same for a row that is read again as it was; a row that was changed since is another event.
                id = f"{self.name}/{place.feed}/{digest(met.since, table.table, *values)}"
                identity = {name: row[name] for name in keys}
                events.append(table.event("read", position, id=id, identity=identity, after=row))
            count += len(rows)
            await publish(events, position=msgspec.to_builtins(place))
        log.info("%s: read %d rows of %s", self, count, table.table)

    # ---- what changes -----------------------------------------------------------------------------------------------

    async def _follow(self, publish: Publish, place: Place, until: Gtids | None = None) -> None:
        """Publish committed changes as they come; back when a table was altered, or must be read again.

        With ``until``, back when all transactions in it are told, and none that is not.
        """
        flow = _Flow(self.name, publish, place, self._gtids(place.gtids), until)
        if flow.done:
            return
        stream = Log(self._connect, self._tables.values(), self._keys, self._kinds, flow.gtids, self._server_id)
        try:
            while not publish.stopping.is_set():
                for item in stream.take():
                    if isinstance(item, Exception):
                        await flow.store()
                        raise item
                    await flow.take(item)
                    if flow.done:
                        await flow.store()
                        return
                if flow.events or flow.late:
                    await flow.store()
                await stream.wait(publish.stopping)
        finally:
            stream.close()

    async def _look(self, session: _Session, publish: Publish, place: Place) -> None:
        """Keep an eye on the lag: transactions in the server's log that are not told yet."""
        variable = "gtid_executed" if self._mysql else "gtid_binlog_pos"
        while True:
            [[now]] = await session.rows(f"SELECT @@global.{variable}")
            publish.counts.lag = self._gtids(now).count(self._gtids(place.gtids)) if place.gtids else None
            await asyncio.sleep(LOOK)


class _Flow:
    """What comes of the log: the transaction under way, and the events of it that are not stored yet."""

    def __init__(self, name: str, publish: Publish, place: Place, gtids: Gtids, until: Gtids | None) -> None:
        self._name = name
        self._publish = publish
        self._place = place
        self._until = until
        self._time = time.monotonic()
        self._begun = Begin("", datetime.now(UTC))
        self._wanted = False
        self._counts: dict[str, int] = {}
        self._skip: dict[str, int] = {}
        self._again: set[str] = set()
        self._altered = False
        self.gtids = gtids
        self.events: list[Outgoing] = []
        self.done = until is not None and not until.count(gtids)

    @property
    def late(self) -> bool:
        """Others' transactions passed, and nothing was stored for a while: the server removes its old logs some day."""
        return time.monotonic() - self._time > BEAT and str(self.gtids) != self._place.gtids

    async def take(self, item: Item) -> None:
        match item:
            case Begin(gtid):
                self._begun, self._counts = item, {}
                self._skip = self._place.part if self._place.transaction == gtid else {}
                self._wanted = self._until is None or gtid in self._until
            case Rows(shape, operation, rows, position) if self._told(shape.table):
                for before, after in rows:
                    if (id := self._next(shape.table)) is not None:
                        self.events += self._changed(shape, operation, before, after, id, position)
                    if len(self.events) >= MANY:
                        await self.store()
            case Altered(table, empty, columns, read, position) if self._told(table):
                if empty and (id := self._next(table)) is not None:
                    self.events.append(table.event("truncate", position, id=id, **self._same()))
                self._altered |= columns
                if read:
                    self._again.add(table.table)
            case Commit(gtid) if self._wanted:
                self._commit(gtid)

    def _commit(self, gtid: str) -> None:
        self.gtids.add(gtid)
        self._wanted = False
        if self._place.transaction in ("", gtid):
            self._place.transaction, self._place.part = "", {}
        for table in self._again:
            self._place.tables.pop(table, None)
        self.done = not self._until.count(self.gtids) if self._until is not None else self._altered

    def _told(self, table: Mapped) -> bool:
        return self._wanted and table.table in self._place.tables

    def _next(self, table: Mapped) -> str | None:
        """The id of the table's next event in the transaction, or None where it was published before."""
        count = self._counts[table.table] = self._counts.get(table.table, 0) + 1
        if count <= self._skip.get(table.table, 0):
            return None
        return f"{self._name}/{self._place.feed}/{self._begun.gtid}/{table.table}/{count}"

    def _same(self) -> dict[str, Any]:
        return {"transaction": self._begun.gtid, "committed": self._begun.committed}

    def _changed(self, shape: Shape, operation: Any, before: Any, after: Any, id: str, position: str) -> list[Outgoing]:
        """One event; two when an update changed the primary key."""
        was, now = (row and {name: row[name] for name in shape.primary} for row in (before, after))
        if operation == "update" and was != now:
            return shape.table.moved(position, id=id, before=before, after=after, was=was, now=now, **self._same())
        return [
            shape.table.event(
                operation, position, id=id, identity=now if now is not None else was, before=before, after=after,
                **self._same(),
            )
        ]  # fmt: skip

    async def store(self) -> None:
        """Publish the events with the place."""
        place, self._time = self._place, time.monotonic()
        place.gtids = str(self.gtids)
        if self._wanted and self._counts:
            place.transaction = self._begun.gtid
            place.part = self._skip | {
                table: max(count, self._skip.get(table, 0)) for table, count in self._counts.items()
            }
        events, self.events = self.events, []
        await self._publish(events, position=msgspec.to_builtins(place))


class _Session(Apart):
    """A connection, and its thread."""

    def __init__(self) -> None:
        self.db: Any = None
        self._cursor: Any = None
        super().__init__("stentor mysql", self._end)

    async def rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return await self.call(self._rows, statement, values)

    def _rows(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with self.db.cursor() as cursor:
            cursor.execute(statement, values)
            return list(cursor.fetchall())

    async def select(self, statement: str) -> None:
        """Begin to read rows one by one, as they come."""
        self._cursor = SSCursor(self.db)
        await self.call(self._cursor.execute, statement)

    async def next(self, count: int) -> list[tuple[Any, ...]]:
        return list(await self.call(self._cursor.fetchmany, count))

    def _end(self) -> None:
        if self.db is None:
            return
        if self.db._result is not None:  # else the client would read what is left of a table before it lets go of it
            self.db._result.unbuffered_active = False
        self.db._force_close()


def _parsed(url: str) -> tuple[dict[str, Any], str, str]:
    """The arguments of a connection, the server without credentials, and the database."""
    parsed = BrokerUrl(url)
    if parsed.scheme not in ("mysql", "mariadb"):
        raise ConfigError(f"{parsed}: write mysql://user@host:3306/database")
    tls = trust(parsed, 3306)
    parsed.finish()
    host, port = parsed.address(3306)
    database = parsed.path.strip("/")
    arguments: dict[str, Any] = {
        "host": host, "port": port, "user": parsed.user,
        "password": (parsed.password or "").encode(),  # the client would write text in Latin-1
        "database": database or None, "charset": "utf8mb4", "autocommit": True, "connect_timeout": 10,
    }  # fmt: skip
    return arguments | ({"ssl": tls.context} if tls is not None else {}), str(parsed), database


def _quoted(*names: str) -> str:
    return ".".join("`" + name.replace("`", "``") + "`" for name in names)
