"""What the tests of databases share: tables, random transactions on them, a program that follows them, and the count.

Run as a program (``python -m tests.sources.changes KIND URL BROKER``) it is the one that gets killed.
"""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec
from msgspec import Struct

from servers import Server
from stentor import App
from stentor.connect import connect
from stentor.errors import UnknownTopic
from stentor.event import Topic
from stentor.message import Message
from stentor.sources.change import Change

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
COUNT = int(os.environ.get("STENTOR_TEST_TRANSACTIONS", "5000"))
"""Random transactions of a test with kills; ``STENTOR_TEST_TRANSACTIONS=100000`` is the long one."""


class Account(Struct):
    id: int
    owner: str
    balance: int


class Entry(Struct):
    account: int
    line: int
    note: str | None


class AccountChanged(Change[Account], topic=Topic("accounts", partitions=4), type="test.account"):
    pass


class EntryChanged(Change[Entry], topic=Topic("entries", partitions=4), type="test.entry"):
    pass


TABLES: dict[str, type[Change[Any]]] = {"accounts": AccountChanged, "entries": EntryChanged}
CREATE = [
    "CREATE TABLE accounts (id int PRIMARY KEY, owner varchar(50) NOT NULL, balance int NOT NULL)",
    "CREATE TABLE entries (account int, line int, note text, PRIMARY KEY (account, line))",
]
SAME = "SELECT 1 FROM entries WHERE account = ? AND line = ?"


def source(kind: str, url: str) -> Any:
    if kind == "postgresql":
        from stentor.sources.cdc_postgresql import PostgresChanges

        return PostgresChanges(url, TABLES, slot="chaos")
    if kind == "mysql":
        from stentor.sources.cdc_mysql import MysqlChanges

        return MysqlChanges(url, TABLES, name="chaos")
    if kind == "sqlite":
        from stentor.sources.cdc_sqlite import SqliteChanges

        return SqliteChanges(url, TABLES)
    raise ValueError(kind)


# ---- random transactions --------------------------------------------------------------------------------------------


class Connection(Protocol):
    """What the clients of all databases have."""

    def cursor(self) -> Any: ...
    def commit(self) -> Any: ...
    def close(self) -> Any: ...


def transaction(cursor: Any, chance: random.Random, mark: str, fresh: Iterator[int]) -> None:
    """One to five statements; those that would break a rule of the tables change nothing."""
    for _ in range(chance.randint(1, 5)):
        id, line = chance.randint(1, 200), chance.randint(1, 4)
        note = chance.choice((None, "ä", f"note {chance.random()}", "x" * 9000 if chance.random() < 0.05 else "short"))
        what, values = chance.choice((
            ("INSERT INTO accounts SELECT ?, ?, ? FROM one WHERE NOT EXISTS (SELECT 1 FROM accounts WHERE id = ?)",
             (id, f"owner {id}", chance.randint(0, 999), id)),
            ("UPDATE accounts SET balance = balance + ? WHERE id = ?", (chance.randint(-9, 9), id)),
            ("UPDATE accounts SET owner = ?, balance = 0 WHERE id = ?", (f"new {chance.random()}", id)),
            ("DELETE FROM accounts WHERE id = ?", (id,)),
            ("UPDATE accounts SET id = ? WHERE id = ?", (next(fresh), id)),
            (f"INSERT INTO entries SELECT ?, ?, ? FROM one WHERE NOT EXISTS ({SAME})", (id, line, note, id, line)),
            ("UPDATE entries SET note = ? WHERE account = ? AND line <= ?", (note, id, line)),
            ("DELETE FROM entries WHERE account = ?", (id,)),
        ))  # fmt: skip
        cursor.execute(what.replace("?", mark), values)


class Writer(threading.Thread):
    """Commits random transactions, as many as it is allowed, also across restarts of the server."""

    def __init__(self, connect: Callable[[], Connection], count: int, mark: str = "%s", *, seed: int = 1) -> None:
        super().__init__(daemon=True)
        self._connect = connect
        self._count = count
        self._mark = mark
        self._chance = random.Random(seed)
        self._fresh = iter(range(1000 * seed, 10_000_000))
        self.done = 0
        self._allowed = 0.0
        self.patience = 60.0

    def run(self) -> None:
        last = time.monotonic()
        while self.done < self._count:
            try:
                connection = self._connect()
                try:
                    while self.done < self._count:
                        if self.done >= self._allowed:
                            last = time.monotonic()
                            time.sleep(0.005)
                            continue
                        transaction(connection.cursor(), self._chance, self._mark, self._fresh)
                        connection.commit()
                        self.done += 1
                        last = time.monotonic()
                finally:
                    connection.close()
            except Exception:
                if time.monotonic() - last > self.patience:
                    raise
                time.sleep(0.02)

    def allow(self, share: float) -> None:
        """Let it commit this share of the transactions; it waits there, so that no test hangs on who is faster."""
        self._allowed = self._count * share

    def reach(self, share: float) -> None:
        """Until this share of the transactions is committed."""
        self.allow(share)
        deadline = time.monotonic() + 600
        while self.done < self._count * share:
            assert self.is_alive() or self.done >= self._count
            assert time.monotonic() < deadline
            time.sleep(0.005)


# ---- the program that follows ---------------------------------------------------------------------------------------


class Follower:
    """The program below in a process of its own."""

    def __init__(self, kind: str, url: str, broker: str) -> None:
        self._command = [sys.executable, "-m", "tests.sources.changes", kind, url, broker]
        self._process: subprocess.Popen[bytes] | None = None
        self.kills = 0

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)

    def kill(self) -> None:
        """SIGKILL, also where it has not begun yet."""
        assert self._process is not None
        assert self._process.poll() is None, "the program ended by itself"
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self.kills += 1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def main(kind: str, url: str, broker: str) -> None:
    app = App("follower", broker=broker)
    app.add(source(kind, url))
    app.run()


# ---- the count ------------------------------------------------------------------------------------------------------


class Model:
    """The tables as the change events tell them; each event is checked against what came before it."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[tuple[Any, ...], Any]] = {"accounts": {}, "entries": {}}
        self.ids: set[str] = set()
        self.repeated = 0
        self.operations: dict[str, int] = {}
        self.faults: list[str] = []
        """Changes that do not fit what came before."""

    def apply(self, cls: type[Change[Any]], message: Message, *, reading: bool) -> None:
        """``reading``: more rows are still to be read, so a change may be of a row that was not told yet."""
        if message.id in self.ids:
            self.repeated += 1
            return
        self.ids.add(message.id)
        change = msgspec.json.decode(message.data, type=cls)
        rows = self.tables[change.table.rpartition(".")[2]]
        key = tuple(change.identity.values())
        self.operations[change.operation] = self.operations.get(change.operation, 0) + 1
        told = rows.get(key, change.before if reading else None)
        if change.operation == "read":
            fits = rows.get(key, change.after) == change.after
        else:
            fits = (told is None) == (change.operation == "insert") and change.before == told
        if not fits or change.unchanged:
            self.faults.append(f"{change} after {told}")
        if change.after is None:
            rows.pop(key, None)
        else:
            rows[key] = change.after


async def told(broker: str, topics: Iterable[str] = tuple(TABLES)) -> dict[str, list[Message]]:
    """All that was published so far, by topic."""
    opened = connect(broker)
    await opened.open()
    found: dict[str, list[Message]] = {name: [] for name in topics}
    try:
        for name in found:
            with contextlib.suppress(UnknownTopic):  # as long as nothing was published
                found[name] = [message async for _, message in opened.browse(name, "earliest", follow=False)]
    finally:
        await opened.close()
    return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def customers(broker: str, count: int) -> list[str]:
    """Operations and names or titles of the customers that were published, when there are ``count``."""
    async with asyncio.timeout(PATIENCE):
        while len(messages := (await told(broker, ["customers"]))["customers"]) < count:
            await asyncio.sleep(0.05)
    changes = [msgspec.json.decode(message.data) for message in messages]
    rows = [change.get("after") or {} for change in changes]
    names = [row.get("name") or row.get("title") or "" for row in rows]
    return [f"{change['operation']} {name}".strip() for change, name in zip(changes, names, strict=True)]


async def more_told(broker: str, than: int) -> int:
    """How many events were published, as soon as there are more than that."""
    async with asyncio.timeout(PATIENCE):
        while (count := sum(map(len, (await told(broker)).values()))) <= than:
            await asyncio.sleep(0.02)
    return count


async def caught_up(broker: str, truth: dict[str, dict[tuple[Any, ...], Any]]) -> Model:
    """The model when what was told leads to the tables as they are; fails when it does not within a minute."""
    deadline = time.monotonic() + PATIENCE
    while True:
        messages = await told(broker)
        model = Model()
        for name, cls in TABLES.items():
            reads = [n for n, message in enumerate(messages[name]) if b'"operation":"read"' in message.data]
            for n, message in enumerate(messages[name]):
                model.apply(cls, message, reading=n < max(reads, default=0))
        if model.tables == truth or time.monotonic() > deadline:
            assert model.tables == truth
            assert model.faults == []
            return model
        await asyncio.sleep(0.2)


def stored(connection: Connection) -> dict[str, dict[tuple[Any, ...], Any]]:
    """The tables as they are."""
    cursor = connection.cursor()
    cursor.execute("SELECT id, owner, balance FROM accounts")
    accounts = {(row[0],): Account(*row) for row in cursor.fetchall()}
    cursor.execute("SELECT account, line, note FROM entries")
    return {"accounts": accounts, "entries": {(row[0], row[1]): Entry(*row) for row in cursor.fetchall()}}


async def outlives_kills(
    kind: str,
    url: str,
    connect_to: Callable[[], Connection],
    folder: Path,
    *,
    server: Server | None = None,
    mark: str = "%s",
) -> None:
    """Nothing is lost or doubled: SIGKILL of the source while it reads the tables and while it follows, a restart and
    a SIGKILL of the server. The tables are there, with 4,001 rows each, and a table ``one`` with one row.
    """
    broker = f"sqlite:///{folder}/events.db"
    writer = Writer(connect_to, COUNT, mark)
    with Follower(kind, url, broker) as follower:
        writer.start()
        known = 0
        for step in range(1, 13):
            await asyncio.to_thread(writer.reach, step / 15)
            if step > 2:  # the first ones meet it as it starts and reads, the others as it follows
                known = await more_told(broker, known)
                writer.allow((step + 0.5) / 15)
            if server is not None and step in (5, 9):
                server.stop() if step == 5 else server.kill()
                server.start()
            else:
                follower.kill()
                follower.start()
        await asyncio.to_thread(writer.reach, 1)
        writer.join()
        with contextlib.closing(connect_to()) as connection:
            truth = stored(connection)
        model = await caught_up(broker, truth)
    print(f"{writer.done} transactions, {follower.kills} kills, {model.repeated} ids repeated, {model.operations}")
    assert model.repeated == 0, "SQLite stores position and events together"
    assert model.operations["read"] >= 8000
    assert all(model.operations[what] > COUNT / 10 for what in ("insert", "update", "delete"))


if __name__ == "__main__":
    main(*sys.argv[1:])
