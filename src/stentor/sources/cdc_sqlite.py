"""Changes of SQLite tables, by triggers that write each change into a table beside them, in the same transaction."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from stentor.errors import DefinitionError, PositionLost, Unavailable
from stentor.event import Outgoing, check_name
from stentor.source import Publish
from stentor.sources.apart import Apart
from stentor.sources.change import Change, Mapped, digest, mapped

log = logging.getLogger("stentor.source")

MANY = 500
"""Events of one publish, at most."""
POLL = 0.05
"""Seconds between two looks at whether the file was changed."""
_NOW = "(julianday('now') - 2440587.5) * 86400.0"


class Met(Struct):
    """A table that the source has read, or begun to; ``since`` is where the changes stood then."""

    since: int
    read: bool = False


class Place(Struct):
    """How far the source has come in the changes of the feed with this id."""

    feed: str
    seq: int
    tables: dict[str, Met] = {}


class SqliteChanges:
    """A source of the changes of tables in a SQLite file, made by whatever program writes to it.

    Args:
        path: the file, which is there already.
        tables: the event class of each table.
        name: names the source, the table ``<name>_change`` and the triggers that are made in the file. Each source of
            a file has its own. ``remove(path, name)`` drops them.
        on_lost: when changes were removed before they were read, or the file is another one: "stop" with PositionLost,
            or "snapshot": read the tables again, without the deletes that were missed.

    Raises:
        DefinitionError: a table, class or name cannot work; the file is looked at when the source starts.
        PositionLost: see ``on_lost``.
        Unavailable: the file is locked, or is not there.
    """

    def __init__(
        self,
        path: str | Path,
        tables: Mapping[str, type[Change[Any]]],
        *,
        name: str = "stentor",
        on_lost: Literal["stop", "snapshot"] = "stop",
    ) -> None:
        if on_lost not in ("stop", "snapshot"):
            raise DefinitionError(f'on_lost must be "stop" or "snapshot", not {on_lost!r}')
        self.name = check_name(name, "source")
        self._path = Path(path)
        self._tables = mapped(tables, lax=True)
        self._on_lost = on_lost
        self._keys: dict[str, list[str]] = {}
        self._schema = -1
        """The file's schema that the triggers were made for."""

    def __str__(self) -> str:
        return f"source {self.name} of {self._path}"

    async def run(self, publish: Publish) -> None:
        """Read what is there, then follow; returns when the program stops."""
        try:
            with contextlib.closing(self._open()) as file:
                feed = await file.call(self._install, file.db)
                place = self._place(file.db, feed, publish.position)
                if any(not place.tables.get(table, Met(0)).read for table in self._tables):
                    with contextlib.closing(self._open()) as reading:
                        await self._snapshot(reading, publish, place)
                await self._follow(file, publish, place)
        except sqlite3.OperationalError as error:
            raise Unavailable(f"{self}: {error}") from None

    def _open(self) -> _File:
        if not self._path.exists():
            raise DefinitionError(f"{self}: the file is not there; the program that writes to it makes it")
        return _File(self._path)

    # ---- what is made in the file -----------------------------------------------------------------------------------

    def _install(self, db: sqlite3.Connection) -> str:
        """Make the table and triggers, or those that do not fit the columns any more; the id of the feed."""
        with _writing(db):
            changes, feed = _quoted(f"{self.name}_change"), _quoted(f"{self.name}_feed")
            db.execute(
                f"CREATE TABLE IF NOT EXISTS {changes} (seq INTEGER PRIMARY KEY AUTOINCREMENT, tab TEXT NOT NULL, "
                "operation TEXT NOT NULL, was TEXT, now TEXT, at REAL NOT NULL)"
            )
            db.execute(f"CREATE TABLE IF NOT EXISTS {feed} (id TEXT NOT NULL)")
            known = dict(db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall())
            for table in self._tables.values():
                columns = self._columns(db, table)
                for name, statement in _triggers(self.name, table.table, columns, self._keys[table.table]):
                    if known.get(name) != statement:
                        db.execute(f"DROP TRIGGER IF EXISTS {_quoted(name)}")
                        db.execute(statement)
            row = db.execute(f"SELECT id FROM {feed}").fetchone()
            if row is None:
                row = (secrets.token_hex(8),)
                db.execute(f"INSERT INTO {feed} VALUES (?)", row)
            [self._schema] = db.execute("PRAGMA schema_version").fetchone()
            return str(row[0])

    def _columns(self, db: sqlite3.Connection, table: Mapped) -> list[str]:
        rows = db.execute(f"PRAGMA table_info({_quoted(table.table)})").fetchall()
        if not rows:
            raise DefinitionError(f"{self}: there is no table {table.table}")
        columns = [row[1] for row in rows]
        table.check(columns)
        keys = sorted((row[5], row[1]) for row in rows if row[5])
        self._keys[table.table] = [name for _, name in keys] or ["rowid"]
        return columns

    def _place(self, db: sqlite3.Connection, feed: str, position: Any) -> Place:
        """Where to go on. Raises PositionLost when what comes next was removed."""
        last = self._last(db)
        if position is None:
            return Place(feed, last)
        place = msgspec.convert(position, Place)
        [first] = db.execute(f"SELECT min(seq) FROM {_quoted(f'{self.name}_change')}").fetchone()
        lost = ""
        if place.feed != feed:
            lost = "the triggers were removed in between, or the file is another one"
        elif last > place.seq and first != place.seq + 1 and (first is None or first > place.seq):
            lost = f"changes up to {(first or last + 1) - 1} were removed, {place.seq} was the last that was read"
        if not lost:
            place.tables = {name: met for name, met in place.tables.items() if name in self._tables}
            return place
        if self._on_lost == "stop":
            raise PositionLost(
                f'{self}: {lost}, so changes are lost. To go on, give the source on_lost="snapshot": the tables are '
                "read again, and each row comes as operation 'read'; deletes that were missed do not come"
            )
        log.warning("%s: %s; all tables are read again", self, lost)
        return Place(feed, last)

    def _last(self, db: sqlite3.Connection) -> int:
        row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (f"{self.name}_change",)).fetchone()
        return row[0] if row is not None else 0

    # ---- reading ----------------------------------------------------------------------------------------------------

    async def _snapshot(self, file: _File, publish: Publish, place: Place) -> None:
        """Read the tables that are new here, or were not read to their end, as one moment saw them.

        What the others have to tell up to that moment comes first.
        """
        file.db.execute("BEGIN")
        upto = self._last(file.db)
        while place.seq < upto and not publish.stopping.is_set():
            rows = await file.call(self._changes, file.db, place.seq, upto)
            place.seq = rows[-1][0] if rows else upto
            met = [row for row in rows if row[1] in place.tables]
            await publish(self._events(place.feed, met), position=msgspec.to_builtins(place))
        for table in self._tables.values():
            met_table = place.tables.setdefault(table.table, Met(upto))
            if not met_table.read:
                await self._rows(file, publish, place, table, met_table)
        file.db.execute("COMMIT")

    async def _rows(self, file: _File, publish: Publish, place: Place, table: Mapped, met: Met) -> None:
        keys = self._keys[table.table]
        extra = ", rowid" if keys == ["rowid"] else ""
        cursor = file.db.execute(f"SELECT *{extra} FROM {_quoted(table.table)}")
        names = [column[0] for column in cursor.description]
        while not met.read:
            rows = await file.call(cursor.fetchmany, MANY)
            if publish.stopping.is_set():
                return
            met.read = len(rows) < MANY  # told with the last rows, so that a stop behind them reads nothing again
            events = []
            for values in rows:
                row = dict(zip(names, values, strict=True))
                id = f"{self.name}/{place.feed}/{met.since}/{digest(table.table, values)}"
                identity = {name: row[name] for name in keys}
                events.append(
                    table.event("read", str(place.seq), id=id, identity=identity, after=self._fit(table, row))
                )
            await publish(events, position=msgspec.to_builtins(place))

    async def _follow(self, file: _File, publish: Publish, place: Place) -> None:
        version = None
        while not publish.stopping.is_set():
            found = file.db.execute("PRAGMA data_version").fetchone()
            if found == version:
                await asyncio.sleep(POLL)
                continue
            if file.db.execute("PRAGMA schema_version").fetchone() != (self._schema,):
                await file.call(self._install, file.db)  # a column may have come
            while rows := await file.call(self._changes, file.db, place.seq):
                place.seq = rows[-1][0]
                await publish(self._events(place.feed, rows), position=msgspec.to_builtins(place))
                publish.counts.lag = self._last(file.db) - place.seq
                with contextlib.suppress(sqlite3.OperationalError):  # locked now: the next time, then
                    await file.call(self._trim, file.db, place.seq)
            version = found

    def _changes(self, db: sqlite3.Connection, after: int, upto: int = 2**62) -> list[tuple[Any, ...]]:
        return db.execute(
            f"SELECT seq, tab, operation, was, now, at FROM {_quoted(f'{self.name}_change')} "
            "WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?",
            (after, upto, MANY),
        ).fetchall()

    def _trim(self, db: sqlite3.Connection, upto: int) -> None:
        """Remove what is durable in the broker."""
        db.execute(f"DELETE FROM {_quoted(f'{self.name}_change')} WHERE seq <= ?", (upto,))

    def _events(self, feed: str, rows: Sequence[tuple[Any, ...]]) -> list[Outgoing]:
        events: list[Outgoing] = []
        for seq, name, operation, was, now, at in rows:
            table = self._tables.get(name)
            if table is None:
                continue
            keys, position, id = self._keys[name], str(seq), f"{self.name}/{feed}/{seq}"
            old, new = _values(was), _values(now)
            before, after = old and self._fit(table, old), new and self._fit(table, new)
            gone, come = (row and {key: row.get(key) for key in keys} for row in (old, new))
            same = {"committed": datetime.fromtimestamp(at, UTC)}
            if operation == "update" and gone != come:
                events += table.moved(position, id=id, before=before, after=after, was=gone, now=come, **same)
            else:
                events.append(
                    table.event(operation, position, id=id, identity=come or gone, before=before, after=after, **same)
                )
        return events

    def _fit(self, table: Mapped, row: dict[str, Any]) -> dict[str, Any]:
        """The columns that the rows want; numbers as text where they want text: SQLite stores what it is given."""
        hidden = self._keys[table.table] == ["rowid"]
        return {
            name: str(value) if name in table.texts and isinstance(value, int | float) else value
            for name, value in row.items()
            if table.wants(name) and not (hidden and name == "rowid")
        }


class _File(Apart):
    """A connection to the file."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
        super().__init__("stentor changes", self.db.close)


def remove(path: str | Path, name: str = "stentor") -> None:
    """Drop what a source of this name made in the file; a source that comes back reads its tables again."""
    with contextlib.closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as db, _writing(db):
        made = f"%INSERT INTO {_quoted(f'{name}_change')} (tab,%"
        for (trigger,) in db.execute(
            "SELECT name FROM sqlite_master WHERE type = 'trigger' AND sql LIKE ?", (made,)
        ).fetchall():
            db.execute(f"DROP TRIGGER {_quoted(trigger)}")
        for table in ("change", "feed"):
            db.execute(f"DROP TABLE IF EXISTS {_quoted(f'{name}_{table}')}")


def _triggers(name: str, table: str, columns: list[str], keys: list[str]) -> Iterator[tuple[str, str]]:
    """Name and statement of each trigger. A value is written as SQL writes it, which loses nothing, as JSON would."""

    def row(which: str) -> str:
        pairs = ", ".join(f"{_text(c)}, quote({which}.{_quoted(c)})" for c in dict.fromkeys([*columns, *keys]))
        return f"json_object({pairs})"

    for operation in ("insert", "update", "delete"):
        was = "NULL" if operation == "insert" else row("OLD")
        now = "NULL" if operation == "delete" else row("NEW")
        trigger = f"{name}_{table}_{operation}"
        yield (
            trigger,
            (
                f"CREATE TRIGGER {_quoted(trigger)} AFTER {operation.upper()} ON {_quoted(table)} BEGIN "
                f"INSERT INTO {_quoted(f'{name}_change')} (tab, operation, was, now, at) "
                f"VALUES ({_text(table)}, '{operation}', {was}, {now}, {_NOW}); END"
            ),
        )


def _values(row: str | None) -> dict[str, Any] | None:
    return None if row is None else {name: _literal(text) for name, text in msgspec.json.decode(row).items()}


def _literal(text: str) -> Any:
    """The value that ``quote()`` wrote."""
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    if text[0] == "X":
        return bytes.fromhex(text[2:-1])
    if text == "NULL":
        return None
    return float(text) if "." in text or "e" in text else int(text)


@contextlib.contextmanager
def _writing(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
