"""Changes of MySQL tables, on a real server: MariaDB."""

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pymysql
import pytest
from msgspec import Struct

from servers import Missing
from servers.mariadb import ADMIN, MariaDB
from servers.tls import PASSWORD, USER
from stentor import App
from stentor.errors import ConfigError, DefinitionError, Unavailable
from stentor.sources import cdc_mysql
from stentor.sources.cdc_mysql import MysqlChanges
from stentor.sources.cdc_mysql_log import Log
from stentor.sources.change import Change, Mapped
from stentor.testing import harness
from stentor.testing.harness import Harness
from tests.real import unavailable
from tests.sources import changes
from tests.sources.changes import COUNT, PATIENCE, customers, until

pytestmark = [pytest.mark.server, pytest.mark.slow]
Db = Callable[..., tuple[tuple[Any, ...], ...]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """A server of our own, since it is killed."""
    server = MariaDB(tmp_path_factory.mktemp("cdc"))
    try:
        server.install()
    except Missing as missing:
        unavailable(missing)
    with server:
        yield server


def connection(server: MariaDB, **options: Any) -> "pymysql.Connection[Any]":
    return pymysql.connect(host="127.0.0.1", port=server.port, user=ADMIN, database=USER, charset="utf8mb4", **options)


def gone(db: Db) -> None:
    """The server has seen that a source is gone, which else it does when it next has something to tell it."""
    find = "SELECT id FROM information_schema.processlist WHERE command = 'Binlog Dump'"
    deadline = time.monotonic() + PATIENCE
    while found := db(find):
        assert time.monotonic() < deadline
        for (number,) in found:
            with contextlib.suppress(pymysql.OperationalError):  # it has ended by itself
                db(f"KILL {number}")


@pytest.fixture
def db(server: MariaDB) -> Iterator[Db]:
    """Runs statements in an empty database, and gives the rows."""
    with contextlib.closing(connection(server, autocommit=True)) as session, session.cursor() as cursor:

        def run(statement: str, *values: Any) -> tuple[tuple[Any, ...], ...]:
            cursor.execute(statement, values or None)
            return tuple(cursor.fetchall())

        gone(run)
        run(f"DROP DATABASE {USER}")
        run(f"CREATE DATABASE {USER} CHARACTER SET utf8mb4")
        run(f"USE {USER}")
        yield run


@pytest.mark.timeout(600 + COUNT // 50)
async def test_nothing_is_lost_or_doubled_by_kills(server: MariaDB, db: Db, tmp_path: Path) -> None:
    """SIGKILL of the source while it reads the tables and while it follows, a restart and a SIGKILL of the server."""
    for statement in changes.CREATE:
        db(statement)
    db("CREATE VIEW one AS SELECT 1")
    db("INSERT INTO accounts SELECT seq, 'first', seq FROM seq_100000_to_104000")
    db("INSERT INTO entries SELECT seq, 1, 'first' FROM seq_100000_to_104000")
    await changes.outlives_kills("mysql", server.url, lambda: connection(server), tmp_path, server=server)


# ---- one thing at a time --------------------------------------------------------------------------------------------


class Customer(Struct):
    id: int
    name: str
    notes: str | None = None
    balance: Decimal | None = None
    since: datetime | None = None
    active: bool | None = None


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


CUSTOMERS = (
    "CREATE TABLE customers (id int PRIMARY KEY, name varchar(50) NOT NULL, notes text, balance decimal(10,2), "
    "since timestamp(3) NULL, active bool, other int)"
)


@pytest.fixture
def url(server: MariaDB, db: Db) -> str:
    db(CUSTOMERS)
    return server.url


def follow(
    url: str, tables: dict[str, type[Change[Any]]] | None = None, *, broker: str = "memory://", **options: Any
) -> App:
    app = App("follower", broker=broker)
    app.add(MysqlChanges(url, tables or {"customers": CustomerChanged}, name="one", **options))
    return app


async def streaming(db: Db) -> None:
    """The source has read what was there, and follows."""
    await until(lambda: db("SELECT 1 FROM information_schema.processlist WHERE command = 'Binlog Dump'"))


def operations(t: Harness) -> list[str]:
    return [change.operation for change in t.published(CustomerChanged)]


async def test_rows_that_are_there_come_first_then_what_changes(url: str, db: Db) -> None:
    db("SET time_zone = '+05:00'")
    db("INSERT INTO customers VALUES (1, 'ada', NULL, 1.50, '2026-01-02 08:04:05.678', 1, 7)")
    db("INSERT INTO customers VALUES (2, 'bén', '日本', 0, 0, 0, 7)")
    async with harness(follow(url)) as t:
        await streaming(db)
        db("BEGIN")
        db("INSERT INTO customers (id, name) VALUES (3, 'cy')")
        db("UPDATE customers SET balance = 7 WHERE id = 1")
        db("UPDATE customers SET id = 20 WHERE id = 2")
        db("ROLLBACK")
        db("BEGIN")
        db("INSERT INTO customers (id, name) VALUES (3, 'cy')")
        db("UPDATE customers SET balance = 7 WHERE id = 1")
        db("UPDATE customers SET id = 20 WHERE id = 2")
        db("DELETE FROM customers WHERE id = 3")
        db("COMMIT")
        db("TRUNCATE customers")
        await until(lambda: len(operations(t)) == 8)
        first, second, insert, update, gone, come, delete, truncate = t.published(CustomerChanged)
        since = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
        ada = Customer(id=1, name="ada", balance=Decimal("1.50"), since=since, active=True)
        assert (first.operation, first.identity, first.table) == ("read", {"id": 1}, "stentor.customers")
        assert first.after == ada
        assert second.after == Customer(id=2, name="bén", notes="日本", balance=Decimal(0), active=False)
        assert (insert.operation, insert.before, insert.after) == ("insert", None, Customer(id=3, name="cy"))
        assert (update.operation, update.before) == ("update", ada)
        assert update.after == msgspec.structs.replace(ada, balance=Decimal(7))
        assert (gone.operation, gone.identity, come.operation, come.identity) == (
            "delete", {"id": 2}, "insert", {"id": 20},
        )  # fmt: skip
        assert gone.before == second.after
        assert (delete.operation, delete.identity, delete.after) == ("delete", {"id": 3}, None)
        assert delete.before == insert.after
        assert truncate.operation == "truncate"
        assert insert.transaction == update.transaction == delete.transaction != truncate.transaction
        assert insert.committed is not None
        assert abs(datetime.now(UTC) - insert.committed) < timedelta(minutes=1)
        messages = [message for message in t.messages if message.topic == "customers"]
        assert [message.key for message in messages] == ["1", "2", "3", "1", "2", "20", "3", "stentor.customers"]
        assert len({message.id for message in messages}) == 8


UUID = "f81d4fae-7dec-11d0-a765-00a0c91e6b00"
TYPES = {  # declaration, a value in SQL, and as it comes; and another value
    "ub": ("bigint unsigned", "18446744073709551615", 18446744073709551615, "0"),
    "i8": ("tinyint", "-5", -5, "0"),
    "u24": ("mediumint unsigned", "16777215", 16777215, "8388608"),
    "y": ("year", "2026", 2026, "0"),
    "ui": ("int unsigned", "4294967295", 4294967295, "0"),
    "d": ("decimal(20,5)", "-12345.00678", Decimal("-12345.00678"), "99999999999.5"),
    "d2": ("decimal(5,5)", "-0.00001", Decimal("-0.00001"), "0"),
    "f": ("float", "0.1", 0.1, "16777216"),
    "db": ("double", "1e300", 1e300, "0.1"),
    "b": ("bit(10)", "b'1000000101'", 0b1000000101, "0"),
    "e": ("enum('a','ü')", "'ü'", "ü", "''"),
    "e2": (f"enum({','.join(repr(f'v{n}') for n in range(300))})", "'v299'", "v299", "'v0'"),
    "s": ("set('x','y','z')", "'z,x'", "x,z", "''"),
    "s2": (f"set({','.join(repr(f'v{n}') for n in range(20))})", "'v19,v1'", "v1,v19", "'v8'"),
    "dt": ("datetime(3)", "'2026-01-02 03:04:05.678'", datetime.fromisoformat("2026-01-02T03:04:05.678"), "0"),
    "ts": ("timestamp(6) null", "'2026-01-02 03:04:05.000001'", datetime(2026, 1, 2, 3, 4, 5, 1, tzinfo=UTC), "0"),
    "ts0": ("timestamp null", "'2026-01-02'", datetime(2026, 1, 2, tzinfo=UTC), "'1970-01-01 00:00:01'"),
    "da": ("date", "'2026-02-03'", date(2026, 2, 3), "'2026-00-05'"),
    "ti": ("time(2)", "'-01:02:03.45'", -timedelta(hours=1, minutes=2, seconds=3.45), "'-00:00:59.99'"),
    "ti6": ("time(6)", "'-838:59:58.000001'", -timedelta(hours=838, minutes=59, seconds=58.000001), "'00:00:00.5'"),
    "ti0": ("time", "'-838:59:59'", -timedelta(hours=838, minutes=59, seconds=59), "'10:00:00'"),
    "ti3": ("time(3)", "'-00:00:00.5'", -timedelta(seconds=0.5), "'-00:00:01'"),
    "j": ("json", """'{"a": [1, null]}'""", '{"a": [1, null]}', "'1'"),
    "bl": ("blob", "x'00ff'", b"\0\xff", "''"),
    "lb": ("longblob", "repeat(x'00ff', 50000)", b"\0\xff" * 50_000, "''"),
    "bi": ("binary(4)", "x'0100'", b"\1\0\0\0", "x'00000000'"),
    "vb": ("varbinary(5)", "x'0100'", b"\1\0", "''"),
    "ch": ("char(5)", "'ab '", "ab", "''"),
    "l1": ("varchar(10) charset latin1", "'é€'", "é€", "''"),
    "u8": ("varchar(300)", "'日本😀'", "日本😀", "''"),
    "u16": ("varchar(5) charset utf16", "'ä😀'", "ä😀", "''"),
    "l2": ("char(5) charset latin2", "'ł'", "ł", "''"),
    "tx": ("text", "repeat('long', 1000)", "long" * 1000, "''"),
    "vi": ("int as (id + 1) virtual", "", 2, ""),
    "st": ("int as (id + 2) stored", "", 3, ""),
    "hi": ("int invisible", "5", 5, "6"),
    "uu": ("uuid", f"'{UUID}'", UUID, f"'{'00000000' + UUID[8:-1]}0'"),
    "i6": ("inet6", "'2001:db8::1'", "2001:db8::1", "'::'"),
    "po": ("point", "point(1, 2)", None, "point(3, 4)"),
}  # fmt: skip


async def test_values_of_all_types_are_read_and_followed_alike(url: str, db: Db) -> None:
    seen: dict[str, list[dict[str, Any]]] = {"read": [], "insert": []}

    class Looking(Mapped):
        def event(self, operation: Any, position: str, **details: Any) -> Any:
            if operation in seen:
                seen[operation].append(details["after"])
            return super().event(operation, position, **details)

    source = MysqlChanges(url, {"types": Plain}, name="types")
    source._tables = {"types": Looking("types", Plain, lax=True)}
    db("SET time_zone = '+00:00', sql_mode = ''")
    db(f"CREATE TABLE types (id int PRIMARY KEY, {', '.join(f'{name} {one[0]}' for name, one in TYPES.items())})")
    given = {name: one for name, one in TYPES.items() if one[1]}

    def fill() -> None:
        columns = f"INSERT INTO types (id, {', '.join(given)}) VALUES"
        db(f"{columns} (1, {', '.join(one[1] for one in given.values())})")
        db(f"{columns} (2, {', '.join(one[3] for one in given.values())})")
        db("INSERT INTO types (id) VALUES (3)")

    fill()
    app = App("follower")
    app.add(source)
    async with harness(app) as t:
        await until(lambda: len(t.published(Plain)) == 3)
        db("DELETE FROM types")
        fill()
        await until(lambda: len(t.published(Plain)) == 9)
    for read, logged in zip(seen["read"], seen["insert"], strict=True):
        assert logged == read
    expected = {name: one[2] for name, one in TYPES.items() if name != "po"}
    assert {name: value for name, value in seen["read"][0].items() if name in expected} == expected
    other = seen["read"][1]
    assert [other[name] for name in ("y", "e", "s", "dt", "ts", "da", "f", "bi")] == [
        0, "", "", None, None, None, 16777216.0, b"\0\0\0\0",
    ]  # fmt: skip
    assert {value for name, value in seen["read"][2].items() if name not in ("id", "vi", "st")} == {None}


class Texts(Struct):
    id: int
    d: str
    dt: str
    ts: str
    ti: str
    b: str
    bl: str


class TextsChanged(Change[Texts], topic="texts", type="test.texts"):
    pass


async def test_a_field_of_text_takes_a_column_of_any_type(url: str, db: Db) -> None:
    db(
        "CREATE TABLE texts (id int PRIMARY KEY, d decimal(20,2), dt datetime(2), ts timestamp, ti time(3), b bit(3), "
        "bl varbinary(20))"
    )
    values = "(%s, 1e3, '2026-01-02 03:04:05.67', '2026-01-02 03:04:05', '-100:00:00.5', 5, 'ab')"
    db("SET time_zone = '+00:00'")
    db(f"INSERT INTO texts VALUES {values}", 1)
    async with harness(follow(url, {"texts": TextsChanged})) as t:
        await streaming(db)
        db(f"INSERT INTO texts VALUES {values}", 2)
        await until(lambda: len(t.published(TextsChanged)) == 2)
        for change in t.published(TextsChanged):
            assert change.after is not None
            assert msgspec.structs.astuple(change.after)[1:] == (
                "1000.00", "2026-01-02 03:04:05.670000", "2026-01-02 03:04:05+00:00", "-100:00:00.500000", "5", "ab",
            )  # fmt: skip


async def test_columns_come_and_go_in_the_middle_of_the_stream(url: str, db: Db) -> None:
    db("CREATE TABLE free (a int, b varbinary(9), c int, PRIMARY KEY (c, a))")
    async with harness(follow(url, {"customers": CustomerChanged, "free": Plain})) as t:
        await streaming(db)
        db("INSERT INTO customers (id, name) VALUES (1, 'ada')")
        db("ALTER TABLE customers DROP other, ADD more int DEFAULT 5 FIRST, RENAME COLUMN balance TO money")
        db("INSERT INTO customers (id, name) VALUES (2, 'ben')")
        db("INSERT INTO free VALUES (1, x'00ff', 2)")
        db("ALTER TABLE free DROP b, ADD u uuid DEFAULT '11111111-0000-0000-0000-000000000000', CHANGE c d int")
        db("UPDATE free SET d = 3")
        await until(lambda: len(operations(t)) + len(t.published(Plain)) == 5)
        assert [change.after and change.after.name for change in t.published(CustomerChanged)] == ["ada", "ben"]
        insert, gone, come = t.published(Plain)
        assert insert.after == {"a": 1, "b": "AP8=", "c": 2}
        assert insert.identity == {"a": 1, "c": 2}
        assert (gone.operation, gone.identity, gone.before) == (
            "delete", {"a": 1, "d": 2}, {"a": 1, "d": 2, "u": "11111111-0000-0000-0000-000000000000"},
        )  # fmt: skip
        assert (come.operation, come.identity) == ("insert", {"a": 1, "d": 3})


async def test_a_column_that_the_rows_need_is_renamed(url: str, db: Db, tmp_path: Path, caplog: Any) -> None:
    """The source waits, with one clear line, for a program whose rows are as the table was and is; then it goes on."""
    broker = f"sqlite:///{tmp_path}/events.db"
    async with follow(url, broker=broker):
        await streaming(db)
        db("INSERT INTO customers (id, name) VALUES (1, 'ada')")
        db("ALTER TABLE customers RENAME COLUMN name TO title")
        db("INSERT INTO customers (id, title) VALUES (2, 'ben')")
        await until(lambda: "has no column name, which the rows of CustomerChanged need" in caplog.text)
    async with follow(url, {"customers": RenamedChanged}, broker=broker):
        await customers(broker, 2)
        db("INSERT INTO customers (id, title) VALUES (3, 'cy')")
        assert await customers(broker, 3) == ["insert ada", "insert ben", "insert cy"]


@pytest.mark.parametrize(
    ("statements", "told"),
    [
        (["TRUNCATE customers", "INSERT INTO customers (id, name) VALUES (3, 'cy')"], ["truncate", "insert cy"]),
        (
            ["DROP TABLE customers", CUSTOMERS, "INSERT INTO customers (id, name) VALUES (3, 'cy')"],
            ["truncate", "insert cy"],
        ),
        (
            ["CREATE TABLE new LIKE customers", "INSERT INTO new (id, name) VALUES (1, 'eve')",
             "RENAME TABLE customers TO old, new TO customers"],
            ["truncate", "read eve"],
        ),
        (["CREATE OR REPLACE TABLE customers AS SELECT 5 AS id, 'dan' AS name"], ["truncate", "insert dan"]),
        (
            ["ALTER TABLE customers PARTITION BY HASH (id) PARTITIONS 2",
             "ALTER TABLE customers TRUNCATE PARTITION p1"],
            ["truncate", "read ben"],
        ),
        (["CREATE TEMPORARY TABLE customers (id int)", "DROP TABLE customers", "UPDATE customers SET name = 'x'"],
         ["update x", "update x"]),
    ],
    ids=["truncate", "drop", "rename", "replace", "partition", "temporary"],
)  # fmt: skip
async def test_what_statements_do_to_all_rows(
    url: str, db: Db, tmp_path: Path, statements: list[str], told: list[str]
) -> None:
    broker = f"sqlite:///{tmp_path}/events.db"
    db("INSERT INTO customers (id, name) VALUES (1, 'ada'), (2, 'ben')")
    async with follow(url, {"customers": RenamedChanged}, broker=broker):
        await customers(broker, 2)
        await streaming(db)
        for statement in statements:
            db(statement)
        assert (await customers(broker, 2 + len(told)))[2:] == told
    async with follow(url, {"customers": RenamedChanged}, broker=broker):  # and nothing is read again
        db("INSERT INTO customers (id, name) VALUES (7, 'zoe')")
        assert (await customers(broker, 3 + len(told)))[2:] == [*told, "insert zoe"]


async def test_a_large_transaction_is_published_in_parts_and_goes_on_in_its_middle(
    url: str, db: Db, tmp_path: Path
) -> None:
    broker = f"sqlite:///{tmp_path}/events.db"
    parts: list[int] = []

    class Dying(MysqlChanges):
        async def run(self, publish: Any) -> None:
            async def counted(events: Any, **options: Any) -> None:
                await publish(events, **options)
                parts.append(len(events))
                if len([part for part in parts if part]) == 4:
                    raise Unavailable("cut")

            counted.position, counted.stopping, counted.counts = publish.position, publish.stopping, publish.counts  # type: ignore[attr-defined]
            await super().run(counted)  # type: ignore[arg-type]

    app = App("follower", broker=broker)
    app.add(Dying(url, {"customers": CustomerChanged}, name="one"))
    async with app:
        await streaming(db)
        db("BEGIN")
        db("INSERT INTO customers (id, name) SELECT seq, concat('n', seq) FROM seq_1_to_3000")
        db("UPDATE customers SET name = 'x' WHERE id = 7")
        db("COMMIT")
        assert await customers(broker, 3001) == [f"insert n{n}" for n in range(1, 3001)] + ["update x"]
    assert len([part for part in parts if part]) >= 6
    assert sum(parts) == 3001, "what was durable is not published again"


async def test_a_table_that_is_added_later_and_domains_of_gtids(url: str, db: Db, tmp_path: Path) -> None:
    """What the earlier tables have to tell comes first; transactions of several GTID domains count each for itself."""
    db("CREATE TABLE more (id int PRIMARY KEY, v int)")
    db("INSERT INTO customers (id, name) VALUES (1, 'ada')")
    db("INSERT INTO more VALUES (1, 10)")
    broker = f"sqlite:///{tmp_path}/events.db"
    async with follow(url, broker=broker):
        await customers(broker, 1)
    for number, domain in enumerate((7, 0, 7, 8)):
        db(f"SET gtid_domain_id = {domain}")
        db("INSERT INTO customers (id, name) VALUES (%s, 'ben')", number + 2)
        db("UPDATE more SET v = v + 1")
    seen: list[tuple[str, Any]] = []
    app = follow(url, {"customers": CustomerChanged, "more": Plain}, broker=broker)

    @app.on(Plain)
    async def handle(change: Plain) -> None:
        seen.append((change.operation, change.after))

    async with app.running(new_groups=True):
        assert await customers(broker, 5) == ["read ada"] + ["insert ben"] * 4
        await until(lambda: seen)
        db("UPDATE more SET v = 50")
        await until(lambda: len(seen) == 2)
    assert seen == [("read", {"id": 1, "v": 14}), ("update", {"id": 1, "v": 50})]
    assert len(await customers(broker, 5)) == 5


def purge(db: Db) -> None:
    db("INSERT INTO customers (id, name) VALUES (2, 'ben')")
    db("FLUSH BINARY LOGS")
    db("FLUSH BINARY LOGS")  # the server keeps what it may need after a crash: the last but one may be
    [*_, (last, _)] = db("SHOW BINARY LOGS")
    deadline = time.monotonic() + PATIENCE
    while len(db("SHOW BINARY LOGS")) > 1:
        assert time.monotonic() < deadline
        db(f"PURGE BINARY LOGS TO '{last}'")


def reset(db: Db) -> None:
    db("RESET MASTER")
    db("INSERT INTO customers (id, name) VALUES (2, 'ben')")


def statement(db: Db) -> None:
    db("SET binlog_format = STATEMENT")
    db("INSERT INTO customers (id, name) VALUES (2, 'ben')")


def nameless(db: Db) -> None:
    db("SET GLOBAL binlog_row_metadata = NO_LOG")
    try:
        db("ALTER TABLE customers ADD x int")  # the server describes an open table as it did
        db("INSERT INTO customers (id, name) VALUES (2, 'ben')")
    finally:
        db("SET GLOBAL binlog_row_metadata = FULL")


def halved(db: Db) -> None:
    db("SET binlog_row_image = MINIMAL")
    db("INSERT INTO customers (id, name) VALUES (2, 'bex')")
    db("UPDATE customers SET name = 'ben' WHERE id = 2")


def compressed(db: Db) -> None:
    db("SET GLOBAL log_bin_compress = ON")
    try:
        db("INSERT INTO customers (id, name, notes) VALUES (2, 'ben', repeat('n', 1000))")
    finally:
        db("SET GLOBAL log_bin_compress = OFF")


def distributed(db: Db) -> None:
    db("XA START 'x'")
    db("INSERT INTO customers (id, name) VALUES (2, 'ben')")
    db("XA END 'x'")
    db("XA PREPARE 'x'")
    db("XA COMMIT 'x'")


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (purge, "the server's log does not reach back to what was read last"),
        (reset, "the server's log does not reach back to what was read last"),
        (statement, "a change of stentor.customers was logged as a statement (binlog_format)"),
        (nameless, "changes of stentor.customers were logged while binlog_row_metadata was not FULL"),
        (halved, "changes of stentor.customers were logged without all columns (binlog_row_image)"),
        (compressed, "the log has an event of type 166"),
        (distributed, "an XA transaction changed stentor.customers; whether it is committed shows later"),
    ],
)
async def test_changes_that_the_log_does_not_tell(
    url: str, db: Db, tmp_path: Path, caplog: Any, lose: Callable[[Db], None], why: str
) -> None:
    """One clear line; then, if that is wished, the tables are read again."""
    db("INSERT INTO customers (id, name) VALUES (1, 'ada')")
    broker = f"sqlite:///{tmp_path}/events.db"
    async with follow(url, broker=broker):
        await customers(broker, 1)
    gone(db)
    lose(db)
    async with follow(url, broker=broker):
        await until(lambda: f"{why}" in caplog.text and 'To go on, give the source on_lost="snapshot"' in caplog.text)
    async with follow(url, broker=broker, on_lost="snapshot"):
        assert sorted(await customers(broker, 3)) == ["read ada", "read ada", "read ben"]
        await streaming(db)
        db("SET binlog_format = ROW, binlog_row_image = FULL")
        db("UPDATE customers SET name = 'cy' WHERE id = 2")
        assert (await customers(broker, 4))[3] == "update cy"


async def test_xa_transactions_of_other_tables_are_nobodys_business(url: str, db: Db) -> None:
    db("CREATE TABLE others (id int PRIMARY KEY)")
    async with harness(follow(url)) as t:
        await streaming(db)
        for statement in ("XA START 'x'", "INSERT INTO others VALUES (1)", "XA END 'x'", "XA PREPARE 'x'"):
            db(statement)
        db("XA COMMIT 'x'")
        db("INSERT INTO customers (id, name) VALUES (1, 'ada')")
        await until(lambda: operations(t) == ["insert"])


@pytest.mark.parametrize(
    ("setup", "complaint"),
    [
        (["DROP TABLE customers"], "there is no table stentor.customers"),
        (["DROP TABLE customers", "CREATE VIEW customers AS SELECT 1 AS id, 'x' AS name"], ", but a VIEW"),
        (["ALTER TABLE customers DROP name"], "has no column name, which the rows of CustomerChanged need"),
        (["ALTER TABLE customers ENGINE = MyISAM"], "ALTER TABLE stentor.customers ENGINE = InnoDB"),
        (
            ["CREATE TABLE parents (id int PRIMARY KEY)",
             "ALTER TABLE customers ADD FOREIGN KEY (other) REFERENCES parents (id) ON DELETE CASCADE"],
            "by CASCADE or SET NULL is not in the binary log",
        ),
    ],
)  # fmt: skip
async def test_what_cannot_work_is_told_at_the_start(
    url: str, db: Db, caplog: Any, setup: list[str], complaint: str
) -> None:
    for statement in setup:
        db(statement)
    async with harness(follow(url)):
        await until(lambda: complaint in caplog.text)


@pytest.mark.parametrize(
    ("name", "value", "back"),
    [
        ("binlog_format", "MIXED", "ROW"),
        ("binlog_row_image", "MINIMAL", "FULL"),
        ("binlog_row_metadata", "NO_LOG", "FULL"),
        ("log_bin_compress", "ON", "OFF"),
    ],
)
async def test_a_setting_that_loses_something_is_refused(
    url: str, db: Db, caplog: Any, name: str, value: str, back: str
) -> None:
    db(f"SET GLOBAL {name} = {value}")
    try:
        async with harness(follow(url)):
            await until(lambda: f"({name} = {value}). Set {name} = {back} in the server's configuration" in caplog.text)
    finally:
        db(f"SET GLOBAL {name} = {back}")


async def test_a_server_without_a_binary_log_is_refused(tmp_path: Path, caplog: Any) -> None:
    with MariaDB(tmp_path, settings={"skip_log_bin": "ON"}) as server:
        async with harness(follow(server.url)):
            await until(
                lambda: "(log_bin = OFF). Set log_bin = ON in the server's configuration, and re" in caplog.text
            )


async def test_a_user_who_may_not(url: str, db: Db, caplog: Any) -> None:
    db("CREATE OR REPLACE USER nobody@127.0.0.1 IDENTIFIED BY 'secret'")
    db("GRANT SELECT ON stentor.* TO nobody@127.0.0.1")
    async with harness(follow(url.replace("stentor@", "nobody:wrong@"))):
        await until(lambda: "refuses the user or password: Access denied for user 'nobody'" in caplog.text)
    async with harness(follow(url.replace("stentor@", "nobody:secret@"))):
        await until(lambda: "the user lacks a right: Access denied" in caplog.text)
    assert "secret" not in caplog.text


async def test_tls_and_a_password(tmp_path: Path, caplog: Any) -> None:
    with MariaDB(tmp_path, secure=True) as server:
        trusted = ssl.create_default_context(cafile=str(server.folder / "tls" / "ca.pem"))
        with contextlib.closing(
            pymysql.connect(
                host="localhost", port=server.port, user=USER, password=PASSWORD.encode(), database=USER, ssl=trusted,
                autocommit=True,
            )
        ) as session, session.cursor() as cursor:  # fmt: skip
            cursor.execute(CUSTOMERS)
            async with harness(follow(server.url)) as t:
                cursor.execute("INSERT INTO customers (id, name) VALUES (1, 'ada')")
                await until(lambda: len(operations(t)) == 1)
                cursor.execute("UPDATE customers SET name = 'eve'")
                await until(lambda: len(operations(t)) == 2)
        strange = server.url.partition("?")[0] + "?tls=1"
        async with harness(follow(strange)):
            await until(lambda: "has a certificate that is not accepted here" in caplog.text)


async def test_two_sources_of_one_name(url: str, db: Db, caplog: Any) -> None:
    """The server cuts the older one, which comes again and cuts the other: told again and again."""
    async with harness(follow(url)):
        await streaming(db)
        async with harness(follow(url)):
            await until(lambda: "server_id" in caplog.text)


async def test_what_is_read_ahead_is_bounded_and_the_lag_is_told(
    url: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    held: list[int] = []
    counts: list[Any] = []

    class Watched(Log):
        def _put(self, item: Any, size: int) -> None:
            super()._put(item, size)
            held.append(self._held)

    class Slow(MysqlChanges):
        async def run(self, publish: Any) -> None:
            async def gated(events: Any, **options: Any) -> None:
                if events:
                    await gate.wait()
                await publish(events, **options)

            gated.position, gated.stopping, gated.counts = publish.position, publish.stopping, publish.counts  # type: ignore[attr-defined]
            counts.append(publish.counts)
            await super().run(gated)  # type: ignore[arg-type]

    monkeypatch.setattr(cdc_mysql, "Log", Watched)
    monkeypatch.setattr(cdc_mysql, "LOOK", 0.05)
    monkeypatch.setattr("stentor.sources.cdc_mysql_log.AHEAD", 100_000)
    app = App("follower")
    app.add(Slow(url, {"customers": CustomerChanged}, name="one"))
    async with harness(app) as t:
        await streaming(db)
        for number in range(100):
            db("INSERT INTO customers (id, name, notes) VALUES (%s, 'x', repeat('n', 10000))", number)
        await until(lambda: max(held, default=0) > 100_000)
        await until(lambda: (counts[0].lag or 0) >= 50)  # all but what was read ahead, and waits to be published
        assert max(held) < 120_000
        gate.set()
        await until(lambda: len(operations(t)) == 100)
        await until(lambda: counts[0].lag == 0)
    assert max(held) < 120_000


async def test_a_program_stops_in_the_middle_of_a_large_table(url: str, db: Db, tmp_path: Path) -> None:
    """At once, and the next one reads the table again, with the same ids for the same rows."""
    broker = f"sqlite:///{tmp_path}/events.db"
    db("INSERT INTO customers (id, name, notes) SELECT seq, 'x', repeat('n', 2000) FROM seq_1_to_20000")
    async with follow(url, broker=broker):
        await customers(broker, 500)
    first = len(await customers(broker, 500))
    assert first < 20_000
    await until(lambda: len([t for t in threading.enumerate() if t.name.startswith("stentor mysql")]) == 0)
    db("UPDATE customers SET name = 'y' WHERE id = 1")
    async with follow(url, broker=broker):
        await customers(broker, 20_002)
    found = {message.id for message in (await changes.told(broker, ["customers"]))["customers"]}
    assert len(found) == 20_002, "each row once, and the changed one as it was, its change, and as it is"


def test_what_is_no_source_is_refused() -> None:
    tables: dict[str, type[Change[Any]]] = {"customers": CustomerChanged}
    with pytest.raises(ConfigError, match="write mysql://user@host:3306/database"):
        MysqlChanges("postgresql://x/y", tables, name="one")
    with pytest.raises(ConfigError, match="unknown option"):
        MysqlChanges("mysql://x/y?wrong=1", tables, name="one")
    with pytest.raises(ConfigError, match="'x:port' is no host and port"):
        MysqlChanges("mysql://x:port/y", tables, name="one")
    with pytest.raises(DefinitionError, match="server_id must be 1 to 4294967295, not 0"):
        MysqlChanges("mysql://x/y", tables, name="one", server_id=0)
    with pytest.raises(DefinitionError, match='on_lost must be "stop" or "snapshot"'):
        MysqlChanges("mysql://x/y", tables, name="one", on_lost="go")  # type: ignore[arg-type]
