"""Changes of PostgreSQL tables, on a real server."""

import asyncio
import random
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from msgspec import UNSET, Struct, UnsetType

from servers import Missing
from servers.postgresql import PostgreSQL
from stentor import App, Event
from stentor.errors import InvalidEvent, Unavailable
from stentor.serve import serve
from stentor.sources.cdc_postgresql import PostgresChanges, emit
from stentor.sources.change import Change
from stentor.sources.pgoutput import lsn_number
from stentor.testing import harness
from stentor.testing.harness import Harness
from tests.real import unavailable
from tests.sources import changes
from tests.sources.changes import COUNT, customers, until

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """A server of our own, since it is killed."""
    server = PostgreSQL(tmp_path_factory.mktemp("cdc"))
    try:
        server.install()
    except Missing as missing:
        unavailable(missing)
    with server:
        yield server


@pytest.fixture
def url(server: PostgreSQL) -> Iterator[str]:
    """As a superuser, in an empty schema."""
    found = server.url.replace("//stentor@", "//postgres@")
    clean(found)
    yield found
    clean(found)


def clean(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active_pid IS NOT NULL"
        )
        while connection.execute("SELECT 1 FROM pg_replication_slots WHERE active").fetchone():
            time.sleep(0.01)
        connection.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        for (name,) in connection.execute("SELECT pubname FROM pg_publication").fetchall():
            connection.execute(f"DROP PUBLICATION {name}")


@pytest.mark.timeout(600 + COUNT // 50)
async def test_nothing_is_lost_or_doubled_by_kills(server: PostgreSQL, url: str, tmp_path: Path) -> None:
    """SIGKILL of the source while it reads the tables and while it follows, a restart and a SIGKILL of the server."""

    def connection() -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(url)

    with connection() as db:
        for statement in changes.CREATE:
            db.execute(statement)
        db.execute("CREATE VIEW one AS SELECT 1")
        for table in changes.TABLES:
            db.execute(f"ALTER TABLE {table} REPLICA IDENTITY FULL")
        db.execute("INSERT INTO accounts SELECT n, 'first', n FROM generate_series(100000, 104000) n")
        db.execute("INSERT INTO entries SELECT n, 1, 'first' FROM generate_series(100000, 104000) n")
    await changes.outlives_kills("postgresql", url, connection, tmp_path, server=server)


# ---- one thing at a time --------------------------------------------------------------------------------------------


class Customer(Struct):
    id: int
    name: str
    notes: str | UnsetType | None = UNSET
    balance: Decimal | None = None
    since: datetime | None = None


class CustomerChanged(Change[Customer], topic="customers", type="test.customer"):
    pass


class Renamed(Struct):
    id: int
    name: str | None = None
    title: str | None = None


class RenamedChanged(Change[Renamed], topic="customers", type="test.customer"):
    pass


class Plain(Change[dict[str, Any]], topic="plain", type="test.plain", key="table"):
    pass


class OrderPlaced(Event, topic="orders", type="test.order", key="customer"):
    customer: str


CUSTOMERS = (
    "CREATE TABLE customers (id int PRIMARY KEY, name text, notes text, balance numeric, since timestamptz, other int)"
)


@pytest.fixture
def db(url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(CUSTOMERS)
        connection.execute("ALTER TABLE customers ALTER name SET STORAGE main")
        yield connection


def follow(
    url: str, tables: dict[str, type[Change[Any]]] | None = None, *, broker: str = "memory://", **options: Any
) -> App:
    app = App("follower", broker=broker)
    app.add(PostgresChanges(url, tables or {"customers": CustomerChanged}, slot="one", **options))
    return app


async def streaming(db: Any) -> None:
    """The source has read what was there, and follows."""
    await until(lambda: db.execute("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'").fetchone())


async def free(db: Any) -> None:
    """The server has seen that the source is gone, which it may do a moment later."""
    await until(lambda: not db.execute("SELECT 1 FROM pg_replication_slots WHERE active").fetchone())


def operations(t: Harness) -> list[str]:
    return [change.operation for change in t.published(CustomerChanged)]


async def test_rows_that_are_there_come_first_then_what_changes(url: str, db: Any) -> None:
    db.execute(
        "INSERT INTO customers VALUES (1, 'ada', NULL, 1.50, '2026-01-02 03:04:05+00'), (2, 'ben', NULL, NULL, NULL)"
    )
    async with harness(follow(url)) as t:
        await streaming(db)
        with db.transaction():
            db.execute("INSERT INTO customers VALUES (3, 'cy')")
            db.execute("UPDATE customers SET balance = 7 WHERE id = 1")
            db.execute("UPDATE customers SET id = 20 WHERE id = 2")
            db.execute("DELETE FROM customers WHERE id = 3")
        db.execute("TRUNCATE customers")
        await until(lambda: len(operations(t)) == 8)
        first, _, insert, update, gone, come, delete, truncate = t.published(CustomerChanged)
        since = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        assert first.after == Customer(id=1, name="ada", notes=None, balance=Decimal("1.50"), since=since)
        assert (first.operation, first.identity, first.table) == ("read", {"id": 1}, "public.customers")
        assert (insert.operation, insert.after and insert.after.name) == ("insert", "cy")
        assert (update.operation, update.after and update.after.balance) == ("update", Decimal(7))
        assert (gone.operation, gone.identity, come.operation, come.identity) == (
            "delete", {"id": 2}, "insert", {"id": 20},
        )  # fmt: skip
        assert (delete.operation, delete.identity, delete.before, delete.after) == ("delete", {"id": 3}, None, None)
        assert truncate.operation == "truncate"
        assert insert.transaction == update.transaction == delete.transaction != truncate.transaction
        assert insert.committed is not None
        assert abs(datetime.now(UTC) - insert.committed) < timedelta(minutes=1)
        messages = [message for message in t.messages if message.topic == "customers"]
        assert [message.key for message in messages] == ["1", "2", "3", "1", "2", "20", "3", "public.customers"]
        assert len({message.id for message in messages}) == 8


async def test_large_values_that_were_left_alone(url: str, db: Any) -> None:
    """Without the whole old row they are left out and named; with it they are there."""
    large = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=20_000))
    db.execute("INSERT INTO customers VALUES (1, 'ada', %s)", (large,))
    async with harness(follow(url)) as t:
        await until(lambda: operations(t))
        db.execute("UPDATE customers SET name = 'eve'")
        await until(lambda: len(operations(t)) == 2)
        db.execute("ALTER TABLE customers REPLICA IDENTITY FULL")
        db.execute("UPDATE customers SET name = 'fay'")
        await until(lambda: len(operations(t)) == 3)
        read, silent, full = t.published(CustomerChanged)
        assert read.after is not None
        assert read.after.notes == large
        assert silent.after == Customer(id=1, name="eve")
        assert silent.unchanged == ["notes"]
        assert silent.before is None
        assert full.after == Customer(id=1, name="fay", notes=large)
        assert full.before == Customer(id=1, name="eve", notes=large)
        assert full.unchanged == []


async def test_columns_come_and_go_in_the_middle_of_the_stream(url: str, db: Any) -> None:
    db.execute("CREATE TABLE free (a int PRIMARY KEY, b bytea, c int[])")
    async with harness(follow(url, {"customers": CustomerChanged, "free": Plain})) as t:
        await streaming(db)
        db.execute("INSERT INTO customers VALUES (1, 'ada')")
        db.execute("ALTER TABLE customers DROP other")
        db.execute("ALTER TABLE customers ADD more int DEFAULT 5")
        db.execute("ALTER TABLE customers RENAME balance TO money")
        db.execute("INSERT INTO customers VALUES (2, 'ben')")
        db.execute("INSERT INTO free VALUES (1, '\\x00ff', '{1,2}')")
        db.execute("ALTER TABLE free RENAME c TO d")
        db.execute("UPDATE free SET d = '{3}'")
        await until(lambda: len(operations(t)) + len(t.published(Plain)) == 4)
        assert [change.after and change.after.name for change in t.published(CustomerChanged)] == ["ada", "ben"]
        assert [change.after for change in t.published(Plain)] == [
            {"a": 1, "b": "AP8=", "c": [1, 2]}, {"a": 1, "b": "AP8=", "d": [3]},
        ]  # fmt: skip


async def test_a_column_that_the_rows_need_is_renamed(url: str, db: Any, tmp_path: Path, caplog: Any) -> None:
    """The source waits, with one clear line, for a program whose rows are as the table was and is; then it goes on."""
    broker = f"sqlite:///{tmp_path}/events.db"
    async with follow(url, broker=broker):
        await streaming(db)
        db.execute("INSERT INTO customers VALUES (1, 'ada')")
        db.execute("ALTER TABLE customers RENAME name TO title")
        db.execute("INSERT INTO customers VALUES (2, 'ben')")
        await until(lambda: "has no column name, which the rows of CustomerChanged need" in caplog.text)
    caplog.clear()
    async with follow(url, {"customers": RenamedChanged}, broker=broker):
        await streaming(db)
        db.execute("INSERT INTO customers VALUES (3, 'cy')")
        found = await customers(broker, 3)
    assert found == ["insert ada", "insert ben", "insert cy"]


async def test_events_written_by_a_transaction(url: str, db: Any) -> None:
    """``emit`` is an outbox without a table: the event is published if, and only if, the transaction commits."""
    app = App("follower")
    app.add(PostgresChanges(url, {}, slot="one", messages=[OrderPlaced]))
    async with harness(app) as t:
        await streaming(db)
        with pytest.raises(psycopg.errors.DivisionByZero), db.transaction():
            db.execute(*emit(OrderPlaced(customer="nobody")))
            db.execute("SELECT 1 / 0")
        with db.transaction():
            db.execute(*emit(OrderPlaced(customer="ada")))
            db.execute(*emit(OrderPlaced(customer="ben"), id="given"))
        await until(lambda: len(t.published(OrderPlaced)) == 2)
        assert [order.customer for order in t.published(OrderPlaced)] == ["ada", "ben"]
        messages = [message for message in t.messages if message.topic == "orders"]
        assert [(message.key, message.id == "given") for message in messages] == [("ada", False), ("ben", True)]
    with pytest.raises(InvalidEvent, match="Expected `str`, got `int`"):
        emit(OrderPlaced(customer=5))  # type: ignore[arg-type]


async def test_a_message_that_cannot_be_read_is_told(url: str, db: Any, caplog: Any) -> None:
    async with harness(follow(url, messages=[OrderPlaced])):
        await streaming(db)
        db.execute("""SELECT pg_logical_emit_message(true, 'other', 'not ours')""")
        db.execute("""SELECT pg_logical_emit_message(true, 'stentor', '{"type": "x", "data": 1}')""")
        await until(lambda: "is of type 'x'; give its class in messages= (now: test.order)" in caplog.text)


async def test_a_large_transaction_is_published_in_parts_and_goes_on_in_its_middle(
    url: str, db: Any, tmp_path: Path
) -> None:
    broker = f"sqlite:///{tmp_path}/events.db"
    parts: list[int] = []

    class Dying(PostgresChanges):
        async def run(self, publish: Any) -> None:
            async def counted(events: Any, **options: Any) -> None:
                await publish(events, **options)
                parts.append(len(events))
                if len(parts) == 4:
                    raise Unavailable("cut")

            counted.position, counted.stopping, counted.counts = publish.position, publish.stopping, publish.counts  # type: ignore[attr-defined]
            await super().run(counted)  # type: ignore[arg-type]

    app = App("follower", broker=broker)
    app.add(Dying(url, {"customers": CustomerChanged}, slot="one"))
    async with app:
        await streaming(db)
        db.execute("INSERT INTO customers SELECT n, 'n' || n FROM generate_series(1, 3000) n")
        assert await customers(broker, 3000) == [f"insert n{n}" for n in range(1, 3001)]
    assert len([part for part in parts if part]) >= 6
    assert sum(parts) == 3000, "what was durable is not published again"


async def test_the_server_may_forget_only_what_is_durable(url: str, db: Any) -> None:
    gate = asyncio.Event()

    class Slow(PostgresChanges):
        async def run(self, publish: Any) -> None:
            async def gated(events: Any, **options: Any) -> None:
                if events:
                    await gate.wait()
                await publish(events, **options)

            gated.position, gated.stopping, gated.counts = publish.position, publish.stopping, publish.counts  # type: ignore[attr-defined]
            await super().run(gated)  # type: ignore[arg-type]

    def confirmed() -> int:
        [text] = db.execute("SELECT confirmed_flush_lsn::text FROM pg_replication_slots").fetchone()
        return lsn_number(text)

    app = App("follower")
    app.add(Slow(url, {"customers": CustomerChanged}, slot="one"))
    async with harness(app) as t:
        await streaming(db)
        db.execute("INSERT INTO customers VALUES (1, 'ada')")
        [after] = db.execute("SELECT pg_current_wal_lsn()::text").fetchone()
        await asyncio.sleep(0.3)  # time enough to say too much
        assert confirmed() < lsn_number(after)
        gate.set()
        await until(lambda: operations(t) and confirmed() >= lsn_number(after))


async def test_what_the_slot_holds_back_is_told_and_goes_away(
    url: str, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stentor.sources.cdc_postgresql.LOOK", 0.05)
    gate, stored = asyncio.Event(), 0

    class Slow(PostgresChanges):
        async def run(self, publish: Any) -> None:
            async def gated(events: Any, **options: Any) -> None:
                nonlocal stored
                if events:
                    await gate.wait()
                await publish(events, **options)
                stored += len(events)

            gated.position, gated.stopping, gated.counts = publish.position, publish.stopping, publish.counts  # type: ignore[attr-defined]
            await super().run(gated)  # type: ignore[arg-type]

    app = App("follower", broker="memory://")
    app.add(Slow(url, {"customers": CustomerChanged}, slot="one"))

    async def lag(client: httpx.AsyncClient) -> float:
        text = (await client.get("/metrics")).text
        found = re.search(r'^stentor_source_lag\{group="follower[^}]*source="one"\} (\S+)$', text, re.MULTILINE)
        return -1.0 if found is None else float(found[1])

    async with (
        app, serve(app, "127.0.0.1:0") as site, httpx.AsyncClient(base_url=site, trust_env=False) as client,
        asyncio.timeout(60),
    ):  # fmt: skip
        await streaming(db)
        while (before := await lag(client)) < 0:
            await asyncio.sleep(0.01)
        db.execute("INSERT INTO customers SELECT n, repeat('x', 1000) FROM generate_series(1, 3000) n")
        while await lag(client) < before + 3_000_000:
            await asyncio.sleep(0.01)
        gate.set()
        while await lag(client) > 1_000_000:
            # The server finds out at times of its own how far the slot may go; this is one of them.
            db.execute("CHECKPOINT")
            await asyncio.sleep(0.01)
        assert stored == 3000


async def test_a_table_that_is_added_later_is_read_first(url: str, db: Any, tmp_path: Path) -> None:
    db.execute("CREATE TABLE more (id int PRIMARY KEY, v int)")
    db.execute("INSERT INTO customers VALUES (1, 'ada')")
    db.execute("INSERT INTO more VALUES (1, 10)")
    broker = f"sqlite:///{tmp_path}/events.db"
    async with follow(url, broker=broker):
        await streaming(db)
    db.execute("INSERT INTO customers VALUES (2, 'ben')")
    seen: list[tuple[str, Any]] = []
    app = follow(url, {"customers": CustomerChanged, "more": Plain}, broker=broker)

    @app.on(Plain)
    async def handle(change: Plain) -> None:
        seen.append((change.operation, change.after))

    async with app.running(new_groups=True):
        assert await customers(broker, 2) == ["read ada", "insert ben"]
        await until(lambda: seen)
        db.execute("UPDATE more SET v = 11")
        await until(lambda: len(seen) == 2)
    assert seen == [("read", {"id": 1, "v": 10}), ("update", {"id": 1, "v": 11})]


async def test_a_slot_that_is_gone(url: str, db: Any, tmp_path: Path, caplog: Any) -> None:
    """Dropped, or given up by the server: one clear line; then, if that is wished, the tables are read again."""
    db.execute("INSERT INTO customers VALUES (1, 'ada')")
    broker = f"sqlite:///{tmp_path}/events.db"
    async with follow(url, broker=broker):
        await customers(broker, 1)
    await free(db)
    db.execute("SELECT pg_drop_replication_slot('one')")
    db.execute("INSERT INTO customers VALUES (2, 'ben')")
    async with follow(url, broker=broker):
        await until(lambda: 'the slot is gone, so changes are lost. To go on, give the source on_lost="' in caplog.text)
    async with follow(url, broker=broker, on_lost="snapshot"):
        assert sorted(await customers(broker, 3)) == ["read ada", "read ada", "read ben"]
    db.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    try:
        db.execute("SELECT pg_reload_conf()")
        for _ in range(3):
            db.execute("INSERT INTO customers VALUES (3, 'cy') ON CONFLICT (id) DO UPDATE SET name = 'dan'")
            db.execute("SELECT pg_switch_wal()")
        db.execute("CHECKPOINT")
        caplog.clear()
        async with follow(url, broker=broker):
            await until(lambda: "the server gave its log up (max_slot_wal_keep_size), so changes" in caplog.text)
        async with follow(url, broker=broker, on_lost="snapshot"):
            assert sorted(await customers(broker, 6)) == [*["read ada"] * 3, *["read ben"] * 2, "read dan"]
    finally:
        db.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
        db.execute("SELECT pg_reload_conf()")


async def test_a_slot_that_somebody_else_moved(url: str, db: Any, tmp_path: Path, caplog: Any) -> None:
    broker = f"sqlite:///{tmp_path}/events.db"
    db.execute("INSERT INTO customers VALUES (1, 'ada')")
    async with follow(url, broker=broker):
        await customers(broker, 1)
    db.execute("INSERT INTO customers VALUES (2, 'ben')")
    await free(db)
    db.execute("SELECT pg_replication_slot_advance('one', pg_current_wal_lsn())")
    async with follow(url, broker=broker):
        await until(lambda: "the slot is ahead, at" in caplog.text)


@pytest.mark.parametrize(
    ("setup", "complaint"),
    [
        ("DROP TABLE customers", "there is no table customers"),
        ("ALTER TABLE customers DROP CONSTRAINT customers_pkey", "nothing that tells its rows apart"),
        ("ALTER TABLE customers DROP name", "has no column name, which the rows of CustomerChanged need"),
        ("ALTER TABLE customers ALTER name SET STORAGE extended", "does not repeat large values of name"),
        ("SELECT pg_create_physical_replication_slot('one')", "the slot belongs to something else"),
    ],
)
async def test_what_cannot_work_is_told_at_the_start(
    url: str, db: Any, caplog: Any, setup: str, complaint: str
) -> None:
    db.execute(setup)
    async with harness(follow(url)):
        await until(lambda: complaint in caplog.text)


async def test_two_sources_of_one_slot(url: str, db: Any, caplog: Any) -> None:
    async with harness(follow(url)):
        await streaming(db)
        async with harness(follow(url)):
            await until(lambda: "another process still reads it" in caplog.text)
