"""The embedded broker's own ground: its file, its lock, its commits, its limits."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from stentor import App, Event, Outgoing
from stentor.brokers.sqlite import SqliteBroker
from stentor.brokers.sqlite_file import LARGEST, Tx
from stentor.connect import connect
from stentor.errors import (
    BrokerError,
    ConfigError,
    PublishUnknown,
    StorageFull,
    StorageUnusable,
    UnknownGroup,
    UnknownTopic,
)
from stentor.event import Topic
from stentor.message import Message, Partition, Settlement
from stentor.subscription import Subscription


class Owner:
    """A worker that only remembers what it owns."""

    def __init__(self) -> None:
        self.owned: list[Partition] = []
        self.gone: list[Partition] = []

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        self.owned += partitions

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        self.owned = [partition for partition in self.owned if partition not in partitions]

    def lost(self, partitions: Sequence[Partition]) -> None:
        self.gone += partitions


def message(id: str, key: str | None = "k", topic: str = "t", *, fresh: bool = False, data: bytes = b"{}") -> Message:
    return Message(id=id, source="/test", type="x", topic=topic, key=key, data=data, fresh=fresh)


@asynccontextmanager
async def opened(path: Path, options: str = "", topics: Sequence[Topic] = (Topic("t"),)) -> AsyncIterator[SqliteBroker]:
    """An open broker with the topic ``t`` and the group ``g``."""
    broker = connect(f"sqlite:///{path}{options}")
    assert isinstance(broker, SqliteBroker)
    await broker.open()
    try:
        await broker.declare(topics, [Subscription(group="g", topics=("t",))])
        yield broker
    finally:
        await broker.close()


async def until(condition: Any) -> None:
    """Wait for a condition (a function, sync or async), at most 20 s."""
    async with asyncio.timeout(60):
        while True:
            found = condition()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.01)


# ---- what cannot be opened ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite://stentor.db", "three or four slashes"),
        ("sqlite:///", "names no file"),
        ("sqlite:///x.db?colour=red", "unknown option colour"),
        ("sqlite:///x.db?synchronous=off", "synchronous='off'"),
        ("sqlite:///x.db?lease=long", "lease='long'"),
        ("sqlite:///x.db?retention=long", "retention"),
    ],
)
def test_a_wrong_url_is_refused_with_what_is_wrong(url: str, words: str) -> None:
    """Before anything is opened."""
    with pytest.raises(ConfigError, match="sqlite") as refused:
        connect(url)
    assert words in str(refused.value)


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """The error says which folder does not exist."""
    with pytest.raises(StorageUnusable, match="nowhere does not exist"):
        await connect(f"sqlite:///{tmp_path}/nowhere/x.db").open()


async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    """A text file is refused and keeps its bytes."""
    path = tmp_path / "x.db"
    path.write_bytes(b"these are my notes, no database\n" * 100)
    with pytest.raises(StorageUnusable, match="not a database"):
        await connect(f"sqlite:///{path}").open()
    assert path.read_bytes().startswith(b"these are my notes")


async def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    """A SQLite file with foreign tables is refused, not extended."""
    path = tmp_path / "x.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE customer (id INTEGER)")
    db.close()
    with pytest.raises(StorageUnusable, match=r"belongs to another program.*customer"):
        await connect(f"sqlite:///{path}").open()
    with closing(sqlite3.connect(path)) as db, db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)
    db.close()


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """A program that is older than the file stops before it writes."""
    path = tmp_path / "x.db"
    async with opened(path):
        pass
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE stentor_meta SET value = 99 WHERE name = 'version'")
    db.close()
    with pytest.raises(StorageUnusable, match=r"schema has version 99.*upgrade this program"):
        await connect(f"sqlite:///{path}").open()


async def test_a_corrupt_file_is_reported(tmp_path: Path) -> None:
    """Overwritten pages surface as StorageUnusable with what to do."""
    path = tmp_path / "x.db"
    async with opened(path) as broker:
        await broker.publish([message(str(i)) for i in range(2000)])
        await broker.file.submit(lambda tx: None)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(os.urandom(path.stat().st_size - 100))
    with pytest.raises(StorageUnusable, match="restore it from a backup"):
        await connect(f"sqlite:///{path}").open()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    """Tried in a process without root's rights, as root may write anywhere."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    code = (
        "import asyncio, os, sys\n"
        "from stentor.connect import connect\n"
        "import stentor.brokers.sqlite\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "from stentor.errors import StorageUnusable\n"
        "try: asyncio.run(connect(f'sqlite:///{sys.argv[1]}/x.db').open())\n"
        "except StorageUnusable as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False, cwd="/")
    assert "cannot be written" in done.stdout, done.stderr


# ---- writing -----------------------------------------------------------------------------------------------


async def test_events_come_back_in_order_after_a_reopen(tmp_path: Path) -> None:
    """What publish confirmed is there after the file was closed and opened, in order and as it was."""
    path = tmp_path / "x.db"
    sent = [
        Message(
            id=f"i{n}", source="/s", type="x", topic="t", key="ключ",
            data=bytes([n % 256]) * n,
            time="2026-01-01T00:00:00Z", subject="s", datacontenttype="text/plain",
            dataschema="urn:x", extensions={"a": 1, "b": True, "c": "é"},
        )
        for n in range(300)
    ]  # fmt: skip
    async with opened(path) as broker:
        receipts = await broker.publish(sent)
    assert [receipt.position for receipt in receipts] == sorted(receipt.position or 0 for receipt in receipts)
    async with opened(path) as broker:
        found = [(offset, read) async for offset, read in broker.browse("t", "earliest", follow=False)]
    assert [read for _, read in found] == sent
    assert [offset for offset, _ in found] == [receipt.position for receipt in receipts]


async def test_one_commit_for_all_that_waits(tmp_path: Path) -> None:
    """Publishes of one turn of the loop share transactions, and each gets its own position."""
    async with opened(tmp_path / "x.db") as broker:
        commits = 0

        def count(statement: str) -> None:
            nonlocal commits
            commits += statement == "COMMIT"

        broker.file._writer.set_trace_callback(count)
        receipts = await asyncio.gather(*(broker.publish([message(f"i{n}", fresh=True)]) for n in range(3000)))
        broker.file._writer.set_trace_callback(None)
    positions = [receipt[0].position for receipt in receipts]
    assert positions == list(range(positions[0] or 0, (positions[0] or 0) + 3000))
    assert commits <= 1 + 3000 // 128
    assert LARGEST > 3000


async def test_a_question_is_answered_of_one_moment(tmp_path: Path) -> None:
    """Who follows from a time asks for the first event since, then for the end: an event between is not to be lost."""
    async with opened(tmp_path / "x.db") as broker:
        asked, stored = threading.Event(), threading.Event()

        def question(db: sqlite3.Connection) -> tuple[int, int]:
            (before,) = db.execute("SELECT count(*) FROM stentor_event").fetchone()
            asked.set()
            assert stored.wait(20)
            (after,) = db.execute("SELECT count(*) FROM stentor_event").fetchone()
            return before, after

        answer = asyncio.create_task(broker.file.query(question))
        await until(asked.is_set)
        await broker.publish([message("1")])
        stored.set()
        assert await answer == (0, 0)


async def test_a_bad_operation_fails_alone(tmp_path: Path) -> None:
    """An operation that is refused takes nothing else of its transaction along."""

    def refuse(_: Tx) -> None:
        raise BrokerError("not this one")

    async with opened(tmp_path / "x.db") as broker:
        results = await asyncio.gather(
            broker.publish([message("a")]), broker.file.submit(refuse), broker.publish([message("b")]),
            return_exceptions=True,
        )  # fmt: skip
        assert isinstance(results[1], BrokerError)
        assert [m.id async for _, m in broker.browse("t", "earliest", follow=False)] == ["a", "b"]


async def test_a_repeated_publish_is_stored_once(tmp_path: Path) -> None:
    """The same source and id are one event, in one call, in two, and after a restart."""
    async with opened(tmp_path / "x.db") as broker:
        first = await broker.publish([message("a"), message("a"), message("b")])
        assert [receipt.duplicate for receipt in first] == [False, True, False]
    async with opened(tmp_path / "x.db") as broker:
        assert (await broker.publish([message("a")]))[0].duplicate
        assert [m.id async for _, m in broker.browse("t", "earliest", follow=False)] == ["a", "b"]


class FailingCommit:
    """A connection whose next COMMIT happens, but reports an error, as a disk may."""

    def __init__(self, db: sqlite3.Connection, *, happens: bool) -> None:
        self.db = db
        self.armed = True
        self.happens = happens

    def execute(self, statement: str, *parameters: Any) -> Any:
        if statement == "COMMIT" and self.armed:
            self.armed = False
            self.db.execute("COMMIT" if self.happens else "ROLLBACK")
            raise sqlite3.OperationalError("disk I/O error")
        return self.db.execute(statement, *parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.db, name)


@pytest.mark.parametrize("happens", [True, False])
async def test_an_unknown_commit_names_its_ids_and_a_repetition_is_safe(tmp_path: Path, happens: bool) -> None:
    """Whether the failed commit happened or not, publishing again with the ids stores each event once."""
    async with opened(tmp_path / "x.db") as broker:
        real = broker.file._writer
        broker.file._writer = FailingCommit(real, happens=happens)  # type: ignore[assignment]
        with pytest.raises(PublishUnknown) as unknown:
            await broker.publish([message("a", fresh=True), message("b", fresh=True)])
        assert unknown.value.ids == ["a", "b"]
        broker.file._writer = real
        again = await broker.publish([message("a"), message("b")])
        assert [receipt.duplicate for receipt in again] == [happens, happens]
        assert [m.id async for _, m in broker.browse("t", "earliest", follow=False)] == ["a", "b"]


async def test_a_full_disk_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    """StorageFull names the file; what was confirmed before stays, and room makes it work again."""
    async with opened(tmp_path / "x.db") as broker:
        await broker.publish([message("a")])
        await broker.file.submit(lambda tx: None)
        (pages,) = broker.file._writer.execute("PRAGMA page_count").fetchone()
        broker.file._writer.execute(f"PRAGMA max_page_count={pages + 5}")
        with pytest.raises(StorageFull, match=r"x\.db.*full"):
            await broker.publish([message("big", data=b"x" * 1_000_000)])
        broker.file._writer.execute("PRAGMA max_page_count=1000000")
        await broker.publish([message("b")])
        assert [m.id async for _, m in broker.browse("t", "earliest", follow=False)] == ["a", "b"]


@pytest.mark.slow
async def test_a_foreign_lock_is_waited_for_then_reported(tmp_path: Path) -> None:
    """Another program that sits on the file makes publish fail with a clear word, and it works once it lets go."""
    async with opened(tmp_path / "x.db") as broker:
        other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BrokerError, match="another program holds a lock"):
            await broker.publish([message("a")])
        other.execute("ROLLBACK")
        other.close()
        assert (await broker.publish([message("a")]))[0].position


async def test_unknown_topics_and_groups_are_refused(tmp_path: Path) -> None:
    """Nothing is created by a misspelling, and nothing of the call is stored."""
    async with opened(tmp_path / "x.db") as broker:
        with pytest.raises(UnknownTopic, match="'nope' was never declared"):
            await broker.publish([message("a"), message("b", topic="nope")])
        assert [m.id async for _, m in broker.browse("t", "earliest", follow=False)] == []
        with pytest.raises(UnknownGroup):
            await broker.subscribe(Subscription(group="nope", topics=("t",)), Owner())
        with pytest.raises(UnknownGroup, match="there are g"):
            await broker.admin.drop_group("nope")


# ---- groups and places -------------------------------------------------------------------------------------


async def test_a_stale_epoch_settles_nothing(tmp_path: Path) -> None:
    """After a replay took the partitions away, outputs, records and acks of the old owner are refused."""
    async with opened(tmp_path / "x.db", topics=(Topic("t"), Topic("out"))) as broker:
        owner = Owner()
        consumer = await broker.subscribe(Subscription(group="g", topics=("t",)), owner)
        await consumer.start()
        await broker.publish([message("a")])
        (delivery,) = await consumer.fetch(10, 1)
        await broker.file.submit(
            lambda tx: tx.db.execute("UPDATE stentor_slot SET epoch = epoch + 1, member = NULL").rowcount
        )
        settled = Settlement(
            delivery.partition, delivery.offset, outputs=[message("o", topic="out")], records={"q/1": b"x"}
        )
        (failure,) = await consumer.settle([settled])
        assert "taken over" in str(failure.error)
        assert [m async for _, m in broker.browse("out", "earliest", follow=False)] == []
        assert await broker.admin.journal("g", "t", delivery.partition.index, "") == {}
        assert owner.gone
        await consumer.close()


async def test_a_topic_that_a_group_no_longer_reads_holds_nothing_back(tmp_path: Path) -> None:
    """Declaring a group with fewer topics frees the others for retention."""
    async with opened(tmp_path / "x.db", topics=(Topic("t"), Topic("u"))) as broker:
        await broker.declare([], [Subscription(group="g", topics=("t", "u"))])
        await broker.declare([], [Subscription(group="g", topics=("t",))])
        assert [(lag.group, lag.topic) for lag in await broker.admin.lag()] == [("g", "t")]


async def test_retention_keeps_what_a_group_has_not_settled(tmp_path: Path) -> None:
    """Age alone removes nothing: first every group must be done with it."""
    async with opened(tmp_path / "x.db", "?retention=0ms&beat=0.1") as broker:
        await broker.publish([message(f"i{n}", key=f"k{n}") for n in range(100)])
        await broker._keep_house()
        assert (await broker.admin.topics())[0].events == 100
        consumer = await broker.subscribe(Subscription(group="g", topics=("t",)), Owner())
        await consumer.start()
        deliveries = await consumer.fetch(200, 1)
        await consumer.settle([Settlement(d.partition, d.offset) for d in deliveries])

        async def empty() -> bool:
            await broker.file.submit(
                lambda tx: tx.db.execute("DELETE FROM stentor_meta WHERE name = 'cleaned'").rowcount
            )
            await broker._keep_house()
            return (await broker.admin.topics())[0].events == 0

        await until(empty)
        assert (await broker.admin.lag())[0].events == 0
        await consumer.close()


async def test_publishers_wait_at_the_size_limit_until_there_is_room(tmp_path: Path) -> None:
    """Unsettled events are never dropped for room; settling them lets the publisher go on."""
    async with opened(tmp_path / "x.db", "?max_bytes=400000&retention=0ms&beat=0.1") as broker:
        await broker.publish([message(f"i{n}", data=b"x" * 1000) for n in range(600)])
        await until(lambda: broker._full)
        late = asyncio.create_task(broker.publish([message("late")]))
        consumer = await broker.subscribe(Subscription(group="g", topics=("t",)), Owner())
        await consumer.start()
        for _ in range(3):
            deliveries = await consumer.fetch(300, 1)
            await consumer.settle([Settlement(d.partition, d.offset) for d in deliveries])
        assert (await asyncio.wait_for(late, 60))[0].position
        await consumer.close()


async def test_namespaces_do_not_see_each_other(tmp_path: Path) -> None:
    """Topics and groups of one namespace are unknown in another, under the same names."""
    async with opened(tmp_path / "x.db", "?namespace=blue") as blue, opened(tmp_path / "x.db", "?namespace=red") as red:
        await blue.publish([message("b")])
        await red.publish([message("r")])
        assert [m.id async for _, m in blue.browse("t", "earliest", follow=False)] == ["b"]
        assert [m.id async for _, m in red.browse("t", "earliest", follow=False)] == ["r"]
        assert [group.name for group in await red.admin.groups()] == ["g"]
        with closing(sqlite3.connect(tmp_path / "x.db")) as db, db:
            names = {name for (name,) in db.execute("SELECT name FROM stentor_group")}
        db.close()
        assert names == {"blue.g", "red.g"}


async def test_the_wal_is_moved_into_the_file(tmp_path: Path) -> None:
    """Long publishing does not let the WAL grow without end."""
    async with opened(tmp_path / "x.db", "?synchronous=normal") as broker:
        for n in range(60):
            broker.file._checked = 0.0
            await broker.publish([message(f"i{n}-{m}", data=b"x" * 20_000) for m in range(50)])
        await broker.file.submit(lambda tx: None)
        assert (tmp_path / "x.db-wal").stat().st_size < 100 * 1024 * 1024
        assert (tmp_path / "x.db").stat().st_size > 10 * 1024 * 1024


def test_durability_is_stated_and_checked(tmp_path: Path) -> None:
    """synchronous=normal survives the program only, and an app that demands more refuses it."""
    full, normal = f"sqlite:///{tmp_path}/x.db", f"sqlite:///{tmp_path}/x.db?synchronous=normal"
    assert connect(full).features.durable == "host"
    assert connect(normal).features.durable == "process"
    with pytest.raises(ConfigError, match="demands durable='host'"):
        asyncio.run(_run(App("shop", broker=normal, durable="host")))
    with pytest.raises(ConfigError, match="demands durable='replica'"):
        asyncio.run(_run(App("shop", broker=full, durable="replica")))


async def _run(app: App) -> None:
    async with app.connected():
        pass


class Ping(Event, topic="pings", key="n"):
    """For the tests through an app."""

    n: int


async def test_delayed_events_survive_a_restart_and_can_be_cancelled(tmp_path: Path) -> None:
    """A delay outlives the program; a cancelled one never comes."""
    app = App("shop", broker=f"sqlite:///{tmp_path}/x.db")
    seen: list[int] = []

    @app.on(Ping)
    async def ping(event: Ping) -> None:
        seen.append(event.n)

    async with app.connected():
        await app.publish([Outgoing(Ping(n=1), delay="300ms"), Outgoing(Ping(n=2), delay="300ms", id="two"), Ping(n=3)])
        assert await app.cancel("two")
        assert not await app.cancel("two")
    async with app:
        await until(lambda: 1 in seen)
    assert seen == [3, 1]
