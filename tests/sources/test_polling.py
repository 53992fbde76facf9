"""Sources that ask again and again: each thing once, nothing left out, and no hurry where something fails."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from stentor import Event
from stentor.errors import ConfigError, DefinitionError
from stentor.sources import polling
from stentor.sources.polling import Feed, HttpPoll, TablePoll
from tests.real import server_url
from tests.sources import reading
from tests.sources.reading import Line, Reader, until


class Order(Event, topic="orders", type="com.example.order"):
    number: int
    paid: bool = False


class Post(Event, topic="posts", type="com.example.post"):
    id: str
    title: str
    published: datetime | None = None
    link: str = ""


running = partial(reading.running, (Order, Post, Line))


@asynccontextmanager
async def api(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """A server that answers to everything by a function; its URL."""
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield "http://127.0.0.1:{}/orders".format(*runner.addresses[0][1:2])
    finally:
        await runner.cleanup()


# ---- HTTP -----------------------------------------------------------------------------------------------------------


async def test_an_answer_is_read_only_where_it_changed() -> None:
    orders: list[dict[str, Any]] = [{"number": 1, "paid": True}, {"number": 2}]
    asked: list[str | None] = []
    full = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal full
        asked.append(request.headers.get("If-None-Match"))
        assert request.headers["X-Key"] == f"key {len(asked)}"
        tag = f'"{len(orders)}"'
        if asked[-1] == tag:
            return web.Response(status=304)
        full += 1
        return web.json_response({"data": {"orders": orders}}, headers={"ETag": tag})

    async with api(answer) as url:
        source = HttpPoll(
            url, to=Order, every="20ms", items="data.orders", id="number",
            headers=lambda: {"X-Key": f"key {len(asked) + 1}"},
        )  # fmt: skip
        async with running(source) as found:
            await until(lambda: len(asked) > 4)
            assert found == [Order(number=1, paid=True), Order(number=2)]
            del orders[0]
            orders += [{"number": 3}, {"number": 4}]
            await until(lambda: len(found) == 4)
            assert [order.number for order in found] == [1, 2, 3, 4]
            assert full == 2
            assert asked[0] is None


async def test_a_cursor_is_followed_at_once_and_kept_over_a_restart(tmp_path: Path) -> None:
    last = 10
    asked: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.query.get("after"))
        start = int(asked[-1] or 0)
        page = list(range(start + 1, min(start + 3, last) + 1))
        return web.json_response({"items": [{"number": n} for n in page], "next": page[-1] if page else None})

    async with api(answer) as url:
        source = HttpPoll(
            f"{url}?sort=number", to=Order, every="200ms", items="items", id="number", cursor=("after", "next")
        )
        file = f"sqlite:///{tmp_path}/events.db"
        async with running(source, url=file) as found:
            await until(lambda: len(found) == 10 and len(asked) > 6)
            assert asked[:6] == [None, "3", "6", "9", "10", "10"]
        asked.clear()
        last = 12
        async with running(source, url=file) as found:
            await until(lambda: len(found) == 2)
            assert [order.number for order in found] == [11, 12]
            assert asked[0] == "10"


async def test_the_pages_of_a_cursor_are_asked_for_at_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(delay: float) -> None:
        waits.append(delay)
        await asyncio.sleep(0)

    async def answer(request: web.Request) -> web.Response:
        start = int(request.query.get("after", 0))
        page = list(range(start + 1, min(start + 3, 10) + 1))
        return web.json_response({"items": [{"number": n} for n in page], "next": page[-1]})

    async with api(answer) as url:
        source = HttpPoll(url, to=Order, every="1h", items="items", id="number", cursor=("after", "next"), rate="20/s")
        monkeypatch.setattr(polling, "asyncio", SimpleNamespace(sleep=sleep))
        async with running(source) as found:
            await until(lambda: len(found) >= 3 and waits)
    assert waits[0] == 0.05
    with pytest.raises(DefinitionError, match="source http: rate"):
        HttpPoll(url, to=Order, rate="often")


async def test_items_without_an_id_come_when_they_change() -> None:
    order = {"number": 1, "paid": False}

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(order)

    async with api(answer) as url, running(HttpPoll(url, to=Order, every="10ms")) as found:
        await until(lambda: len(found) == 1)
        order["paid"] = True
        await until(lambda: len(found) == 2)
        assert [order.paid for order in found] == [False, True]


async def test_failures_are_asked_again_when_the_server_says(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(delay: float) -> None:
        waits.append(delay)
        await asyncio.sleep(0.01)

    date = format_datetime(datetime.now(UTC) + timedelta(seconds=500), usegmt=True)
    answers = [
        web.Response(status=429, headers={"Retry-After": "77"}),
        web.Response(status=503, headers={"Retry-After": date}),
        web.Response(status=500, headers={"Retry-After": "soon"}),
        web.Response(text="<html>"),
        web.json_response({"other": []}),
        web.json_response({"data": [{"name": "no number"}]}),
        web.json_response({"data": [{"number": 7}]}),
    ]

    async def answer(request: web.Request) -> web.Response:
        return answers.pop(0) if len(answers) > 1 else web.json_response({"data": [{"number": 7}]})

    async with api(answer) as url:
        source = HttpPoll(url, to=Order, every="10ms", items="data", id="number")
        monkeypatch.setattr(polling, "asyncio", SimpleNamespace(sleep=sleep))
        async with running(source) as found:
            await until(lambda: found)
    told = [record.message for record in caplog.records if record.name == "stentor.source"]
    for number, text in enumerate((
        "answers 429; again in 77 s", "answers 503; again in", "answers 500; again in",
        "does not answer with JSON", "answers without 'data'", "answers with an item without 'number'",
    )):  # fmt: skip
        assert text in told[number]
    assert waits[0] == 77
    assert 400 < waits[1] <= 500
    assert [0.9 * n <= wait / 0.01 <= 1.1 * n for n, wait in zip((4, 8, 16, 20), waits[2:], strict=False)] == [True] * 4


async def test_a_server_that_is_away_or_says_too_much_is_an_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "LARGEST", 1000)
    big = "x" * 5000

    async def answer(request: web.Request) -> web.Response:
        return web.json_response([{"number": 1, "note": big}])

    async with running(HttpPoll("http://127.0.0.1:1/", to=Order, every="10ms")):
        await until(lambda: "Cannot connect" in caplog.text)
    async with api(answer) as url, running(HttpPoll(url, to=Order, every="10ms")) as found:
        await until(lambda: "answers more than 1000 bytes" in caplog.text)
        assert found == []
        big = ""
        await until(lambda: found == [Order(number=1)])


ATOM = """<?xml version="1.0"?><feed xmlns="http://www.w3.org/2005/Atom"><title>t</title><id>f</id>{}</feed>"""
ATOM_ENTRY = """<entry><id>urn:{0}</id><title>Post {0}</title><link href="https://example.com/{0}"/>
<published>2026-01-0{0}T12:00:00+01:00</published><updated>2026-01-0{0}T12:00:00Z</updated></entry>"""
RSS = """<?xml version="1.0"?><rss version="2.0"><channel><title>t</title>{}</channel></rss>"""
RSS_ENTRY = """<item><guid>urn:{0}</guid><title>Post {0}</title><link>https://example.com/{0}</link>
<pubDate>Thu, 0{0} Jan 2026 11:00:00 GMT</pubDate></item>"""


@pytest.mark.parametrize(("frame", "entry"), [(ATOM, ATOM_ENTRY), (RSS, RSS_ENTRY)], ids=["atom", "rss"])
async def test_entries_of_a_feed_come_once_the_oldest_first(frame: str, entry: str) -> None:
    numbers = [2, 1]

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=frame.format("".join(entry.format(n) for n in numbers)), content_type="text/xml")

    async with api(answer) as url, running(Feed(url, to=Post, every="10ms")) as found:
        await until(lambda: len(found) == 2)
        numbers.insert(0, 3)
        numbers.pop()
        await until(lambda: len(found) == 3)
        assert found == [
            Post(
                id=f"urn:{n}", title=f"Post {n}", published=datetime(2026, 1, n, 11, tzinfo=UTC),
                link=f"https://example.com/{n}",
            )
            for n in (1, 2, 3)
        ]  # fmt: skip


async def test_what_is_no_feed_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="<html><p>moved", content_type="text/html")

    async with api(answer) as url, running(Feed(url, to=Post, every="10ms")) as found:
        await until(lambda: "is neither RSS nor Atom" in caplog.text)
        assert found == []


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "shop.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("CREATE TABLE orders (number INTEGER PRIMARY KEY, paid BOOLEAN, at TIMESTAMP, n INTEGER)")
        yield connection


async def test_rows_come_once_in_their_order_and_a_restart_goes_on(
    tmp_path: Path, db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "MANY", 7)
    file = f"sqlite:///{tmp_path}/events.db"

    def source() -> TablePoll:
        return TablePoll(f"sqlite:///{tmp_path}/shop.db", "orders", "number", to=Order, every="10ms", late="50ms")

    db.executemany("INSERT INTO orders (number, paid) VALUES (?, ?)", [(n, n % 2 == 0) for n in range(1, 31)])
    async with running(source(), url=file) as found:
        await until(lambda: len(found) == 30)
        assert found == [Order(number=n, paid=n % 2 == 0) for n in range(1, 31)]
    db.executemany("INSERT INTO orders (number, paid) VALUES (?, 0)", [(n,) for n in range(31, 41)])
    async with running(source(), url=file) as found:
        await until(lambda: len(found) == 10)
        db.execute("INSERT INTO orders (number, paid) VALUES (50, 0)")
        await until(lambda: len(found) == 11)
        assert [order.number for order in found] == [*range(31, 41), 50]


async def test_rows_that_are_committed_late_are_found(tmp_path: Path, db: sqlite3.Connection) -> None:
    def add(number: int) -> None:
        db.execute("INSERT INTO orders (number, paid) VALUES (?, 0)", (number,))

    source = TablePoll(f"sqlite:///{tmp_path}/shop.db", "orders", "number", to=Order, every="10ms", late="1h")
    async with running(source) as found:
        for number in (2, 4, 1, 3, 9, 8):
            add(number)
            await until(lambda: number in [order.number for order in found])  # noqa: B023
        assert [order.number for order in found] == [2, 4, 1, 3, 9, 8]
    first = TablePoll(f"sqlite:///{tmp_path}/shop.db", "orders", "number", to=Order, every="10ms", late="0s")
    async with running(first) as found:
        await until(lambda: len(found) == 6)
        add(5)  # behind what was read, and nobody was to look there
        add(10)
        await until(lambda: len(found) == 7)
        assert found[-1].number == 10


async def test_how_much_is_remembered_has_a_limit(
    tmp_path: Path, db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "MANY", 20)
    monkeypatch.setattr(polling, "REMEMBERED", 30)
    db.executemany("INSERT INTO orders (number, paid) VALUES (?, 0)", [(n,) for n in range(1, 201)])
    positions: list[Any] = []
    source = TablePoll(f"sqlite:///{tmp_path}/shop.db", "orders", "number", to=Order, every="10ms", late="1h")
    ask = source.ask

    async def asked(publish: Any) -> None:
        await ask(publish)
        positions.append(publish.position)

    monkeypatch.setattr(source, "ask", asked)
    async with running(source) as found:
        await until(lambda: len(found) == 200 and len(positions) > 2)
        assert positions[-1]["row"] == [170]
        assert len(positions[-1]["seen"]) == 30
    assert [order.number for order in found] == list(range(1, 201))


async def test_a_column_of_times_with_a_key_for_equal_ones(
    tmp_path: Path, db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "MANY", 2)

    def change(number: int, second: int) -> None:
        db.execute(
            "INSERT OR REPLACE INTO orders VALUES (?, 0, ?, 0)", (number, f"2026-01-01 00:00:{second:02d}.000000")
        )

    for number in range(5):
        change(number, 1)
    db.execute("INSERT INTO orders (number, paid) VALUES (99, 0)")  # has no time yet
    url = f"sqlite:///{tmp_path}/shop.db"
    source = TablePoll(url, "orders", "at", key="number", to=Order, every="10ms", late="0s")
    async with running(source) as found:
        await until(lambda: len(found) == 5)
        change(2, 2)
        await until(lambda: len(found) == 6)
        assert [order.number for order in found] == [0, 1, 2, 3, 4, 2]


async def test_what_is_wrong_with_a_table_is_said(
    tmp_path: Path, db: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    for table, column, text in (("nothing", "n", "there is no table nothing"), ("orders", "x", "has no column 'x'")):
        async with running(TablePoll(f"sqlite:///{tmp_path}/shop.db", table, column, to=Order, every="10ms")):
            await until(lambda: text in caplog.text)  # noqa: B023


@pytest.mark.slow
@pytest.mark.server
async def test_a_table_of_postgresql(tmp_path_factory: pytest.TempPathFactory) -> None:
    import psycopg

    url = server_url("postgresql", tmp_path_factory)
    async with await psycopg.AsyncConnection.connect(url.partition("?")[0], autocommit=True) as db:
        await db.execute("CREATE SCHEMA polled")
        await db.execute(
            "CREATE TABLE polled.orders (number int, paid bool, at timestamptz DEFAULT now(), id uuid PRIMARY KEY, "
            "price numeric(10, 2) DEFAULT 9.5)"
        )
        insert = "INSERT INTO polled.orders (number, paid, id) SELECT n, true, gen_random_uuid() FROM {}"
        await db.execute(insert.format("generate_series(1, 1200) n"))
        rows: list[dict[str, Any]] = []

        def order(row: dict[str, Any]) -> Order:
            rows.append(row)
            return Order(number=row["number"], paid=row["paid"])

        alchemy = url.partition("?")[0].replace("postgresql://", "postgresql+psycopg://")
        source = TablePoll(alchemy, "polled.orders", "at", key="id", to=order, every="20ms", late="200ms")
        async with running(source) as found:
            await until(lambda: len(found) >= 1200)
            await db.execute(insert.format("generate_series(1201, 1210) n"))
            await until(lambda: len(found) >= 1210)
            await asyncio.sleep(0.3)
            assert sorted(order.number for order in found) == list(range(1, 1211))
    assert rows[0]["price"] == "9.50"
    assert datetime.fromisoformat(rows[0]["at"]).tzinfo is not None


@pytest.mark.slow
async def test_each_row_once_over_kills_of_the_reader(tmp_path: Path, db: sqlite3.Connection) -> None:
    arguments = f"'sqlite:///{tmp_path}/shop.db', 'orders', 'number', to=Line, every='20ms', late='100ms'"
    reader = Reader(tmp_path, "stentor.sources.polling", "TablePoll", arguments)
    count = 0
    try:
        for _ in range(6):
            reader.start()
            for _ in range(10):
                for _ in range(20):
                    db.execute("INSERT INTO orders (number, n) VALUES (?, ?)", (count + 1, count))
                    count += 1
                await asyncio.sleep(0.05)
            await reader.published(count - 150)
            reader.kill()
        reader.start()
        assert sorted(await reader.published(count)) == list(range(count))
    finally:
        reader.kill()


async def test_a_table_is_left_only_when_its_question_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop in the middle of it: the connection is closed behind it, not left to whoever collects it."""
    url = f"sqlite:///{tmp_path}/shop.db"
    source = TablePoll(url, "orders", "id", to=Order)
    asked, goes_on = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(after: Any) -> list[Any]:
        asked.set()
        goes_on.wait(30)
        order.append("answered")
        return []

    monkeypatch.setattr(source, "_rows", slow)
    monkeypatch.setattr(source._engine, "dispose", lambda: order.append("closed"))
    async with running(source):
        await until(asked.is_set)
    goes_on.set()
    await until(lambda: len(order) == 2)
    assert order == ["answered", "closed"]


def test_what_makes_no_sense_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="source http: every must be longer than nothing"):
        HttpPoll("http://x/", to=Order, every="0s")
    with pytest.raises(DefinitionError, match="'ftp://x' is no HTTP URL"):
        HttpPoll("ftp://x", to=Order)
    with pytest.raises(DefinitionError, match="source table: Could not parse"):
        TablePoll("nowhere", "t", "c", to=Order)
    with pytest.raises(ConfigError, match=r"source table: .*mariadb"):
        TablePoll("mariadb+mariadbconnector://x/y", "t", "c", to=Order)
