"""Changes of SQLite tables, by triggers in the same file."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from stentor import App
from stentor.errors import DefinitionError
from stentor.sources.cdc_sqlite import SqliteChanges, remove
from stentor.sources.change import Change, row_key
from stentor.testing import harness
from stentor.testing.harness import Harness
from tests.sources import changes
from tests.sources.changes import until


class Item(Struct):
    id: int
    name: str
    price: float | None = None
    picture: bytes | None = None
    sold: bool | None = None


class ItemChanged(Change[Item], topic="items", type="test.item"):
    pass


class Plain(Change[dict[str, Any]], topic="plain", type="test.plain", key="table"):
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


@pytest.fixture
def db(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = wal")  # else a reader makes writers wait
        connection.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, name, price REAL, picture BLOB, sold INT)")
        connection.execute("CREATE TABLE logs (line TEXT)")
        yield connection


def follow(path: Path, tables: dict[str, type[Change[Any]]] | None = None, **options: Any) -> App:
    app = App("follower")
    app.add(SqliteChanges(path, tables or {"items": ItemChanged}, **options))
    return app


async def events(t: Harness, count: int) -> list[ItemChanged]:
    await until(lambda: len(t.published(ItemChanged)) >= count)
    return t.published(ItemChanged)


async def test_rows_that_are_there_come_first_then_what_changes(path: Path, db: sqlite3.Connection) -> None:
    db.execute("INSERT INTO items VALUES (1, 'it''s', 0.1, x'00ff', 1)")
    async with harness(follow(path)) as t:
        await events(t, 1)
        db.execute("BEGIN")
        db.execute("INSERT INTO items VALUES (2, 55, 1e300, NULL, 0)")
        db.execute("UPDATE items SET price = 3 WHERE id = 1")
        db.execute("UPDATE items SET id = 20 WHERE id = 2")
        db.execute("ROLLBACK")
        db.execute("BEGIN")
        db.execute("INSERT INTO items VALUES (2, 55, 1e300, NULL, 0)")
        db.execute("UPDATE items SET price = 3 WHERE id = 1")
        db.execute("UPDATE items SET id = 20 WHERE id = 2")
        db.execute("COMMIT")
        db.execute("DELETE FROM items")
        read, insert, update, gone, come, first, second = await events(t, 7)
        assert (read.operation, read.after) == (
            "read",
            Item(id=1, name="it's", price=0.1, picture=b"\0\xff", sold=True),
        )
        assert (insert.operation, insert.after) == ("insert", Item(id=2, name="55", price=1e300, sold=False))
        assert (update.operation, update.before) == ("update", read.after)
        assert (gone.operation, gone.identity, come.operation, come.identity) == (
            "delete", {"id": 2}, "insert", {"id": 20},
        )  # fmt: skip
        assert {first.operation, second.operation} == {"delete"}
        assert [m.key for m in t.messages if m.topic == "items"] == ["1", "2", "1", "2", "20", "1", "20"]
        await until(lambda: db.execute("SELECT count(*) FROM stentor_change").fetchone() == (0,))


async def test_a_restart_goes_on_and_an_added_table_is_read(path: Path, db: sqlite3.Connection) -> None:
    db.execute("INSERT INTO items (id, name) VALUES (1, 'one')")
    db.execute("INSERT INTO logs VALUES ('a')")
    app = App("follower")
    tables: dict[str, type[Change[Any]]] = {"items": ItemChanged}

    class Growing:
        name = "growing"

        async def run(self, publish: Any) -> None:
            await SqliteChanges(path, tables).run(publish)

    app.add(Growing())
    async with harness(app) as t:
        await events(t, 1)
        await t.stop()
        db.execute("UPDATE items SET name = 'two'")
        db.execute("INSERT INTO logs VALUES ('b')")
        tables["logs"] = Plain
        await t.start()
        assert [change.operation for change in await events(t, 2)] == ["read", "update"]
        await until(lambda: len(t.published(Plain)) == 2)
        db.execute("INSERT INTO logs VALUES ('c')")
        await until(lambda: len(t.published(Plain)) == 3)
        assert [(change.operation, change.after) for change in t.published(Plain)] == [
            ("read", {"line": "a"}), ("read", {"line": "b"}), ("insert", {"line": "c"}),
        ]  # fmt: skip
        assert [change.identity for change in t.published(Plain)] == [{"rowid": 1}, {"rowid": 2}, {"rowid": 3}]


async def test_a_column_is_added_while_the_source_runs(path: Path, db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE free (a INTEGER PRIMARY KEY)")
    async with harness(follow(path, {"free": Plain})) as t:
        await until(lambda: db.execute("SELECT 1 FROM sqlite_master WHERE name = 'stentor_free_update'").fetchone())
        db.execute("ALTER TABLE free ADD b TEXT")
        await until(
            lambda: (
                '"b"' in db.execute("SELECT sql FROM sqlite_master WHERE name = 'stentor_free_update'").fetchone()[0]
            )
        )
        db.execute("INSERT INTO free VALUES (1, 'x')")
        await until(lambda: t.published(Plain))
        assert t.published(Plain)[0].after == {"a": 1, "b": "x"}


async def test_changes_that_are_gone(path: Path, db: sqlite3.Connection, caplog: Any) -> None:
    """Removed by somebody else: one clear line; then, if that is wished, the tables are read again."""
    broker = f"sqlite:///{path.parent}/events.db"
    db.execute("INSERT INTO items (id, name) VALUES (1, 'one')")

    async def run(on_lost: str) -> None:
        app = App("follower", broker=broker)
        app.add(SqliteChanges(path, {"items": ItemChanged}, on_lost=on_lost))  # type: ignore[arg-type]
        seen: list[ItemChanged] = []

        @app.on(ItemChanged)
        async def handle(change: ItemChanged) -> None:
            seen.append(change)

        async with app:
            await until(lambda: seen or "so changes are lost" in caplog.text)

    await run("stop")
    db.execute("UPDATE items SET name = 'two'")
    db.execute("DELETE FROM stentor_change")
    await run("stop")
    assert "changes up to 1 were removed, 0 was the last that was read" in caplog.text
    caplog.clear()
    await run("snapshot")
    assert "all tables are read again" in caplog.text
    remove(path)
    assert db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'stentor%'").fetchall() == []
    await run("stop")
    assert "the triggers were removed in between" in caplog.text


async def test_what_cannot_work_is_told_at_the_start(path: Path, db: sqlite3.Connection, caplog: Any) -> None:
    async with harness(follow(path, {"nothing": ItemChanged})):
        await until(lambda: "there is no table nothing" in caplog.text)
    async with harness(follow(path, {"logs": ItemChanged})):
        await until(lambda: "table logs has no column id, name, which the rows of ItemChanged need" in caplog.text)
    async with harness(follow(path.parent / "none.db")):
        await until(lambda: "the file is not there" in caplog.text)


def test_what_is_no_change_event_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"int is no change event; write it as: class int\(Change\[Row\]"):
        SqliteChanges("x.db", {"t": int})  # type: ignore[dict-item]
    with pytest.raises(DefinitionError, match="needs tables"):
        SqliteChanges("x.db", {})


def test_the_key_of_a_row() -> None:
    assert row_key({"id": 5}) == "5"
    assert row_key({"a": "x", "b": "y:z"}) != row_key({"a": "x:y", "b": "z"})
    assert len(row_key({"a": "x" * 5000})) == 32


async def test_the_file_is_not_closed_under_a_call_that_was_cancelled(
    path: Path, db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()
    said: list[BaseException | str] = []
    trim = SqliteChanges._trim

    def slow(self: SqliteChanges, file: sqlite3.Connection, upto: int) -> None:
        begun.set()
        go.wait(20)
        try:
            trim(self, file, upto)
            said.append("trimmed")
        except BaseException as error:
            said.append(error)
        ended.set()

    monkeypatch.setattr(SqliteChanges, "_trim", slow)
    async with harness(follow(path)) as t:
        for number in (1, 2):  # the first one may be there before the triggers
            db.execute("INSERT INTO items VALUES (?, 'bolt', 1, NULL, 0)", (number,))
            await events(t, number)
        await until(begun.is_set)
    go.set()
    await until(ended.is_set)
    assert said == ["trimmed"]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_nothing_is_lost_or_doubled_by_kills(path: Path, tmp_path: Path) -> None:
    """SIGKILL of the source while it reads the tables and while it follows."""

    def connection() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=30)

    with closing(connection()) as db:
        db.execute("PRAGMA journal_mode = wal")
        for statement in changes.CREATE:
            db.execute(statement)
        db.execute("CREATE TABLE one AS SELECT 1")
        db.executemany("INSERT INTO accounts VALUES (?, 'first', 1)", [(n,) for n in range(100_000, 104_000)])
        db.executemany("INSERT INTO entries VALUES (?, 1, 'first')", [(n,) for n in range(100_000, 104_000)])
        db.commit()
    await changes.outlives_kills("sqlite", str(path), connection, tmp_path, mark="?")
