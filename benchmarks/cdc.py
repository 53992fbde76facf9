"""PostgreSQL's and MariaDB's changes as events, beside bare reading of the replication stream.

Each case finds the same backlog in its slot, inserts of five columns, ten a transaction: the bare readers receive the
messages and count them; Stentor decodes them, makes typed events of them, checks these, and publishes them.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

import servers
from benchmarks import ours
from benchmarks.measure import Bar, Case, Figures, Results, Row, fresh, timed
from benchmarks.postgresql_peers import server

MANY = 20_000
MARIA = "CREATE TABLE cdc (id bigint PRIMARY KEY, name text, amount double, at timestamp(6) NULL, ok bool)"
CREATE = "CREATE TABLE cdc (id bigint PRIMARY KEY, name text, amount float8, at timestamptz, ok bool)"
OPTIONS = {"proto_version": "1", "publication_names": "cdc", "messages": "true"}


def _url(folder: Path) -> str:
    return server(folder).replace("//stentor@", "//postgres@")


def emptied(folder: Path) -> str:
    """The URL of the database with an empty table and no slot."""
    import psycopg

    url = _url(folder)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        db.execute("DROP PUBLICATION IF EXISTS cdc")
        db.execute("DROP TABLE IF EXISTS cdc")
        db.execute(CREATE)
        db.execute("ALTER TABLE cdc REPLICA IDENTITY FULL")
    return url


def fill(url: str) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as db:
        for first in range(0, MANY, 10):
            db.execute(
                "INSERT INTO cdc SELECT n, 'name ' || n, n * 1.5, now(), true FROM generate_series(%s::int, %s) n",
                (first, first + 9),
            )


def prepared(folder: Path) -> str:
    """The URL of a database whose slot ``cdc`` holds the backlog."""
    import psycopg

    url = emptied(folder)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("CREATE PUBLICATION cdc FOR TABLE cdc")
        db.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
    fill(url)
    return url


def raw_psycopg2(folder: Path) -> Figures:
    import psycopg2  # type: ignore[import-untyped]
    import psycopg2.extras  # type: ignore[import-untyped]

    url = prepared(folder)
    with closing(
        psycopg2.connect(url, connection_factory=psycopg2.extras.LogicalReplicationConnection)
    ) as connection, timed() as taken:  # fmt: skip
        cursor = connection.cursor()
        cursor.start_replication(slot_name="cdc", options=OPTIONS, decode=False)
        seen = 0
        while seen < MANY:
            message = cursor.read_message()
            if message is None:
                select.select([connection], [], [], 1)
            elif message.payload[:1] == b"I":
                seen += 1
    return {"events": MANY / taken()}


def raw_psycopg3(folder: Path) -> Figures:
    import psycopg

    url = prepared(folder)
    arguments: dict[str, Any] = {"replication": "database", "autocommit": True}
    with closing(psycopg.connect(url, **arguments)) as connection, timed() as taken:
        options = ", ".join(f"{name} '{value}'" for name, value in OPTIONS.items())
        connection.pgconn.exec_(f"START_REPLICATION SLOT cdc LOGICAL 0/0 ({options})".encode())
        seen = 0
        while seen < MANY:
            size, data = connection.pgconn.get_copy_data(1)
            if size == 0:
                select.select([connection], [], [], 1)
                connection.pgconn.consume_input()
            elif bytes(data[25:26]) == b"I":
                seen += 1
    return {"events": MANY / taken()}


def maria(folder: Path) -> tuple[str, Any]:
    """The URL of a MariaDB with an empty table, and a connection to it."""
    import pymysql

    url = servers.shared("mariadb", folder / "mariadb", os.getppid())
    port = urlsplit(url).port or 0
    db = pymysql.connect(host="127.0.0.1", port=port, user="stentor", database="stentor", autocommit=True)
    ask(db, "DROP TABLE IF EXISTS cdc")
    ask(db, MARIA)
    return url, db


def ask(db: Any, statement: str) -> Any:
    with db.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchone()


def fill_maria(db: Any) -> None:
    for first in range(0, MANY, 10):
        values = f"SELECT seq, concat('name ', seq), seq * 1.5, now(6), 1 FROM seq_{first}_to_{first + 9}"
        ask(db, f"INSERT INTO cdc {values}")


def raw_mysql(folder: Path) -> Figures:
    from pymysqlreplication import BinLogStreamReader
    from pymysqlreplication.row_event import WriteRowsEvent

    url, db = maria(folder)
    [since] = ask(db, "SELECT @@global.gtid_binlog_pos")
    fill_maria(db)
    db.close()
    settings = {"host": "127.0.0.1", "port": urlsplit(url).port, "user": "stentor"}
    reader = BinLogStreamReader(
        settings, server_id=99, blocking=True, only_events=[WriteRowsEvent], auto_position=since, is_mariadb=True,
        enable_logging=False,
    )  # fmt: skip
    with closing(reader), timed() as taken:
        seen = 0
        while seen < MANY:
            seen += len(reader.fetchone().rows)
        seconds = taken()
    return {"events": MANY / seconds}


async def stentor_mysql(folder: Path, broker_url: str) -> Figures:
    from stentor.sources.cdc_mysql import MysqlChanges
    from stentor.sources.change import Change

    class LineChanged(Change[Line], topic="lines", type="bench.line"):
        pass

    url, db = maria(folder)
    dumping = "SELECT 1 FROM information_schema.processlist WHERE command = 'Binlog Dump'"

    async def streaming() -> bool:
        return ask(db, dumping) is not None

    with closing(db):
        source = MysqlChanges(url, {"cdc": LineChanged}, name="cdc")
        return await backlog(source, broker_url, streaming, partial(fill_maria, db))


class Line(Struct):
    id: int
    name: str
    amount: float
    at: datetime
    ok: bool


async def stentor(folder: Path, broker_url: str) -> Figures:
    import psycopg

    from stentor.sources.cdc_postgresql import PostgresChanges
    from stentor.sources.change import Change

    class LineChanged(Change[Line], topic="lines", type="bench.line"):
        pass

    url = emptied(folder)
    source = PostgresChanges(url, {"cdc": LineChanged}, slot="cdc")
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as db:

        async def streaming() -> bool:
            found = await db.execute("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'")
            return await found.fetchone() is not None

        return await backlog(source, broker_url, streaming, partial(fill, url))


async def backlog(
    source: Any, broker_url: str, streaming: Callable[[], Awaitable[bool]], fill: Callable[[], None]
) -> Figures:
    """Once to meet the empty table, then, when the backlog is there, until all of it is durable in the broker."""
    from stentor import App
    from stentor.connect import connect

    done = asyncio.Event()

    class Counted:
        name = "cdc"

        async def run(self, publish: Any) -> None:
            running = asyncio.create_task(source.run(publish))
            while publish.counts.events < MANY and not running.done():
                await asyncio.sleep(0.005)
            if not running.done():
                done.set()
            await running

    app = App("bench")
    app.add(Counted())
    broker = connect(broker_url)
    await broker.open()
    async with app.running(broker=broker, new_groups=True):
        while not await streaming():
            await asyncio.sleep(0.01)
    while await streaming():
        await asyncio.sleep(0.01)
    await asyncio.to_thread(fill)
    with timed() as taken:
        async with app.running(broker=broker):
            await done.wait()
            seconds = taken()
    await broker.close()
    return {"events": MANY / seconds}


def _run(run: Callable[..., Any], broker: str, folder: Path) -> Figures:
    figures: Figures = asyncio.run(run(folder, broker or ours.url(fresh(folder, "cdc.db"))))
    return figures


def bars(results: Results) -> list[Bar]:
    raw = {"Stentor": "raw psycopg2", "MariaDB": "raw mysql-replication"}
    return [
        Bar(f"events, times {peer} ({case}, {to})", results.ratios(f"{case}, {to}", peer, "events"), 0.5, at_least=True)
        for case, peer in raw.items()
        for to in ("memory", "SQLite")
    ]


def _start(folder: Path) -> Figures:
    server(folder)
    return {}


ROW = Row(
    name="cdc",
    title="PostgreSQL's and MariaDB's changes as typed events, from the log to the broker",
    cases=[
        Case("raw psycopg2", raw_psycopg2, "psycopg2-binary", "read_message, counted"),
        Case("raw psycopg 3", raw_psycopg3, "psycopg[binary]", "get_copy_data, counted"),
        Case("Stentor, memory", partial(_run, stentor, "memory://"), note="decoded, typed, checked, published"),
        Case("Stentor, SQLite", partial(_run, stentor, ""), note="the same, durable on the disk"),
        Case("raw mysql-replication", raw_mysql, "mysql-replication", "MariaDB's rows decoded, counted"),
        Case("MariaDB, memory", partial(_run, stentor_mysql, "memory://"), note="as above, from the binary log"),
        Case("MariaDB, SQLite", partial(_run, stentor_mysql, ""), note="the same, durable on the disk"),
    ],
    columns={"events": "events/s"},
    base="raw psycopg2",
    bars=bars,
    prepare=_start,
)
