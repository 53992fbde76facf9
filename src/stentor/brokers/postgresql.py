"""The PostgreSQL broker: one table of events, one of spaces, every step one short transaction.

``seq`` counts the events of a topic. It is taken from the topic's row, whose lock is held to the end of the (short)
transaction, so that sequence is commit order: a reader misses nothing, and waits for nobody else's transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import psycopg

from stentor.broker import Features, Finding
from stentor.brokers import findings
from stentor.brokers.log import LogBroker
from stentor.brokers.postgresql_client import Connection, Line, cut, failure, in_time, transacted, whole
from stentor.brokers.postgresql_tables import TABLES, VERSION
from stentor.brokers.storage import DUPLICATE, Entry, Held, Stored, Write
from stentor.brokers.trust import trust
from stentor.brokers.wire import pack_delayed, unpack, unpack_delayed, unpack_waiting
from stentor.clock import Clock
from stentor.connect import BrokerUrl
from stentor.errors import ConfigError, PublishUnknown, StentorError, StorageUnusable, Unavailable, UnknownTopic
from stentor.message import Message, new_id

T = TypeVar("T")

WINDOW = 7 * 86400.0
"""Seconds for which a source and id are remembered."""
FALL = 500
"""Delayed messages that one step lets appear."""
STARTING = 30.0
"""Seconds that a start may wait for others which make the tables."""
LOOK = 5.0
"""Seconds after which a connection that only listens is asked whether it still stands."""
OLD = 600.0
"""Seconds after which a transaction is worth a word: as long as it is open, the tables grow."""
_SEEN = "INSERT INTO seen SELECT id, %s FROM unnest(%s::text[]) AS id ON CONFLICT DO NOTHING RETURNING id"


class PostgresBroker(LogBroker):
    """``postgresql://[user:password@]host[:port]/database``. PostgreSQL 14 or newer.

    Options: those of ``LogBroker``; ``schema`` (of Stentor's tables, default "stentor"); ``tls=1``, ``ca``, ``cert``,
    ``key`` (files; TLS always verifies the server).
    """

    native_delay = True
    features = Features(
        name="postgresql", durable="host", shared=True, atomic=True, dedupe=True, replay=True, cancel=True, browse=True
    )

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        super().__init__(url, clock)
        host, port = url.address(5432)
        self._schema = url.option("schema", "stentor")
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", self._schema):
            raise ConfigError(f"{url}: schema={self._schema!r} is no plain name")
        self._arguments: dict[str, Any] = {
            "host": host, "port": port, "dbname": url.path.strip("/") or url.user,
            "user": url.user, "password": url.password, "connect_timeout": 5, "application_name": "stentor",
        }  # fmt: skip
        if tls := trust(url, 5432):
            named = {"sslrootcert": tls.ca, "sslcert": tls.cert, "sslkey": tls.key}
            self._arguments |= {"sslmode": "verify-full"} | {name: file for name, file in named.items() if file}
        self.patience = max(2.0, self.lease / 2)
        settings = {
            "search_path": self._schema,
            "synchronous_commit": "on",
            # A client that fell silent must not hold its locks for as long as TCP believes in it.
            "idle_in_transaction_session_timeout": int(self.patience * 1000),
            "statement_timeout": int(self.patience * 1000),
        }
        self._arguments["options"] = " ".join(f"-c {name}={value}" for name, value in settings.items())
        self.lines: set[Line] = set()
        """All that may hold a connection, those of readers too."""
        self._ask, self._append, self._written = Line(self, again=True), Line(self), Line(self)
        self._numbers: dict[str, int] = {}
        self._name = new_id()
        self._batch = 0
        self._lost: dict[int, list[str]] = {}
        """The ids of batches of unknown fate, by their number."""
        self._news = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self._swept = 0.0

    # ---- life -------------------------------------------------------------------------------------------------------

    async def session(self) -> Connection:
        """A connection of Stentor's: its own schema first, every commit on disk."""
        return await psycopg.AsyncConnection.connect(**self._arguments, autocommit=True)

    @property
    def native(self) -> Callable[[], Awaitable[Connection]]:
        """Makes a ``psycopg.AsyncConnection`` on Stentor's schema."""
        return self.session

    async def connect(self) -> None:
        try:
            connection = await self.session()
            try:
                await in_time(connection, transacted(self._make_tables)(connection), STARTING)
            finally:
                await connection.close()
        except (psycopg.Error, OSError) as error:
            raise failure(error, self) from None
        for line in (self._ask, self._append, self._written):
            line.open()
        self._listening = asyncio.create_task(self._listen(), name="stentor postgresql listen")

    async def _make_tables(self, connection: Connection) -> None:
        # Several processes may start at once, and one makes the tables while the others wait.
        await connection.execute(f"SET LOCAL statement_timeout = {int(STARTING * 1000)}")
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (f"stentor {self._schema}",))
        found = await (await connection.execute("SELECT to_regclass(%s)", (f"{self._schema}.version",))).fetchone()
        if found == (None,):
            await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {self._schema}")
            await connection.execute(f"SET LOCAL search_path = {self._schema}")
            await connection.execute(TABLES)
            await connection.execute("INSERT INTO version VALUES (%s)", (VERSION,))
        row = await (await connection.execute(f"SELECT version FROM {self._schema}.version")).fetchone()
        if row is None or row[0] > VERSION:
            raise StorageUnusable(f"{self}: the tables are of version {row and row[0]}, this program's {VERSION}")

    async def disconnect(self) -> None:
        listening, self._listening = self._listening, None
        try:
            if listening is not None:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
        finally:
            await whole(asyncio.gather(*(line.close() for line in self.lines)))

    async def ping(self) -> None:
        await self._rows("SELECT 1")

    async def review(self) -> list[Finding]:
        before = time.time()
        [(moment, replica)] = await self._rows("SELECT extract(epoch FROM clock_timestamp()), pg_is_in_recovery()")
        found = [findings.clock(float(moment), before, time.time())]
        names = (
            "server_version", "fsync", "full_page_writes", "autovacuum", "max_connections", "synchronous_standby_names",
        )  # fmt: skip
        settings = dict(await self._rows("SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", (list(names),)))
        found.append(findings.version("PostgreSQL", settings["server_version"].partition(" ")[0], (14,)))
        found += [
            findings.setting(name, settings[name], ["on"], "a power cut can destroy the database", "fail")
            for name in ("fsync", "full_page_writes")
        ]
        found.append(findings.setting("autovacuum", settings["autovacuum"], ["on"], "the tables only grow"))
        standby = settings["synchronous_standby_names"]
        found.append(Finding("standby", "ok", standby or "none is waited for: a commit is on this machine's disk"))
        if replica:
            found.append(Finding("role", "fail", "a standby takes no events", "name the primary in the URL"))
        [(used, oldest)] = await self._rows(
            "SELECT count(*), max(extract(epoch FROM clock_timestamp() - xact_start)) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend'"
        )
        full = "workers are refused: raise max_connections, or let other programs share theirs"
        found.append(findings.room("connections", used, int(settings["max_connections"]), full))
        if float(oldest or 0) > OLD:
            found.append(
                Finding("transactions", "warn", f"one has been open for {float(oldest) / 60:.0f} minutes",
                        "while it lasts vacuum frees nothing, and tables grow: end it (pg_stat_activity)")
            )  # fmt: skip
        return found

    async def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        async def ask(connection: Connection) -> list[tuple[Any, ...]]:
            cursor = await connection.execute(query, values)
            return await cursor.fetchall() if cursor.description else []

        return await self._ask.run(ask, sent=lambda why: Unavailable(f"{self} cannot be reached: {why}"))

    async def _listen(self) -> None:
        """Wake readers when any process has stored something."""
        while not self.closed or self._listening is not None:
            with contextlib.suppress(psycopg.Error, OSError):  # TimeoutError is an OSError
                connection = await self.session()
                try:
                    await in_time(connection, connection.execute(f"LISTEN {self._schema}"), self.patience)
                    while True:
                        async for _ in connection.notifies(timeout=LOOK):
                            self._news.set()
                        await in_time(connection, connection.execute("SELECT 1"), self.patience)
                finally:  # not ``async with``: that would wait for a rollback first
                    await connection.close()
            await asyncio.sleep(0.5)

    async def news(self, wait: float) -> None:
        """Until something may have been stored, or the time is up; NOTIFY is a hint, so never for long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(wait, 0.5)):
                await self._news.wait()
        self._news.clear()

    # ---- data -------------------------------------------------------------------------------------------------------

    async def make_topic(self, topic: str, partitions: int) -> None:  # noqa: ARG002  rows have their partition
        await self._rows("INSERT INTO topic (name) VALUES (%s) ON CONFLICT DO NOTHING", (topic,))

    async def _number(self, topic: str) -> int:
        if topic not in self._numbers:
            rows = await self._rows("SELECT id FROM topic WHERE name = %s", (topic,))
            if not rows:
                raise UnknownTopic(f"topic {topic!r} was never declared on {self}")
            self._numbers[topic] = rows[0][0]
        return self._numbers[topic]

    async def append(self, entries: Sequence[Entry]) -> Sequence[int | StentorError]:
        topics = {entry.topic for entry in entries}
        for topic in topics:
            await self._number(topic)
        self._batch += 1
        plain = len(topics) == 1 and not self._lost and all(e.message.fresh and not e.due for e in entries)
        try:
            found = await self._sent(
                partial(self._put, entries) if plain else transacted(partial(self._append_any, entries))
            )
        except PublishUnknown as error:
            self._lost[self._batch] = [self._identity(e.message) for e in entries if e.message.fresh]
            raise PublishUnknown([entry.message.id for entry in entries], error.why) from None
        self._lost.clear()
        self._news.set()
        return found

    async def _sent(self, step: Callable[[Connection], Awaitable[T]]) -> T:
        """The answer to a batch, which is sent again, once, when its answer is lost."""
        lost = ""
        while True:
            try:
                return await self._append.run(step, sent=lambda why: PublishUnknown([], why))
            except (PublishUnknown, Unavailable) as error:
                if lost:
                    raise PublishUnknown([], lost) from None
                if not isinstance(error, PublishUnknown):
                    raise  # nothing was sent
                lost = error.why

    async def _put(self, entries: Sequence[Entry], connection: Connection) -> list[int | StentorError]:
        """Fresh events of one topic: one statement, and so one round trip."""
        cursor = await connection.execute(
            "SELECT append(%b, %b, %b::bigint, %b::int, %b::int[], %b::bytea[])",
            (self.clock.now(), self._name, self._batch, self._numbers[entries[0].topic],
             [entry.partition for entry in entries], [entry.body for entry in entries]),
        )  # fmt: skip
        [(first,)] = await cursor.fetchall()
        return list(range(first, first + len(entries)))

    async def _append_any(self, entries: Sequence[Entry], connection: Connection) -> list[int | StentorError]:
        cursor = await connection.execute("SELECT number, result FROM last_batch(%s)", (self._name,))
        [(number, result)] = await cursor.fetchall()
        if number == self._batch:
            return list(result)
        if ids := self._lost.get(number):  # it was stored after all: its ids count as if they had been given
            await connection.execute(_SEEN, (self.clock.now(), sorted(ids)))
        found = await self._store(connection, entries)
        await connection.execute(
            "UPDATE batch SET number = %s, result = %s, ts = %s WHERE who = %s",
            (self._batch, found, self.clock.now(), self._name),
        )
        return list(found)

    def _identity(self, message: Message) -> str:
        return self._text(f"{self.prefix}\0{message.source}\0{message.id}")

    async def _store(self, connection: Connection, entries: Sequence[Entry]) -> list[int]:
        """Store entries in a transaction; a place for each, 0 if it is delayed."""
        now = self.clock.now()
        identities = [None if entry.message.fresh else self._identity(entry.message) for entry in entries]
        wanted = sorted({identity for identity in identities if identity is not None})
        new: set[str] = set()
        if wanted:
            cursor = await connection.execute(_SEEN, (now, wanted))
            new = {row[0] for row in await cursor.fetchall()}
        results = [0] * len(entries)
        stored: dict[str, list[int]] = {}
        delayed: list[Entry] = []
        for at, (entry, identity) in enumerate(zip(entries, identities, strict=True)):
            if identity is not None:
                if identity not in new:
                    results[at] = DUPLICATE
                    continue
                new.discard(identity)
            if entry.due:
                delayed.append(entry)
            else:
                stored.setdefault(entry.topic, []).append(at)
        for topic, places in sorted(stored.items()):
            cursor = await connection.execute(
                "SELECT put(%b, %b::int, %b::int[], %b::bytea[])",
                (now, self._numbers[topic], [entries[at].partition for at in places],
                 [entries[at].body for at in places]),
            )  # fmt: skip
            [(first,)] = await cursor.fetchall()
            for number, at in enumerate(places, first):
                results[at] = number
        if delayed:
            await connection.execute(
                "INSERT INTO delayed (prefix, due, id, body) "
                "SELECT %s, d.due, d.id, d.body FROM unnest(%s::float8[], %s::text[], %s::bytea[]) AS d(due, id, body)",
                (self.prefix, [e.due for e in delayed], [self._text(e.message.id) for e in delayed],
                 [pack_delayed(e.message) for e in delayed]),
            )  # fmt: skip
        return results

    @staticmethod
    def _text(text: str) -> str:
        return text.replace("\0", "\x1f")  # PostgreSQL keeps no zero in text

    def reader(self) -> PostgresReader:
        return PostgresReader(self)

    async def bounds(self, topic: str, partitions: Sequence[int]) -> list[tuple[int, int]]:
        rows = await self._rows(
            "SELECT coalesce((SELECT min(seq) FROM event WHERE topic = t.id AND part = p), t.last + 1), t.last + 1 "
            "FROM unnest(%s::int[]) WITH ORDINALITY AS w(p, n), topic t WHERE t.name = %s ORDER BY n",
            (list(partitions), topic),
        )
        return [(first, end) for first, end in rows]

    async def find(self, topic: str, partitions: Sequence[int], moment: float) -> list[int]:
        rows = await self._rows(
            "SELECT coalesce((SELECT seq FROM event WHERE topic = t.id AND part = p AND ts >= %s ORDER BY seq LIMIT 1),"
            " t.last + 1) FROM unnest(%s::int[]) WITH ORDINALITY AS w(p, n), topic t WHERE t.name = %s ORDER BY n",
            (moment, list(partitions), topic),
        )
        return [offset for (offset,) in rows]

    async def pending(self, places: Sequence[tuple[str, int, int]]) -> list[tuple[int, float | None]]:
        rows = await self._rows(
            "SELECT (SELECT count(*) FROM event WHERE topic = t.id AND part = w.part AND seq >= w.at), "
            "(SELECT ts FROM event WHERE topic = t.id AND part = w.part AND seq >= w.at ORDER BY seq LIMIT 1) "
            "FROM unnest(%s::text[], %s::int[], %s::bigint[]) WITH ORDINALITY AS w(name, part, at, n) "
            "JOIN topic t ON t.name = w.name ORDER BY n",
            tuple(list(column) for column in zip(*places, strict=True)) if places else ([], [], []),
        )
        return [(count, oldest) for count, oldest in rows]

    async def page(self, topic: str, index: int, offset: int, limit: int) -> Sequence[Stored]:
        rows = await self._rows(
            "SELECT seq, ts, body FROM event WHERE topic = %s AND part = %s AND seq >= %s ORDER BY seq LIMIT %s",
            (await self._number(topic), index, offset, limit),
        )
        name = topic.removeprefix(self.prefix)
        return [Stored(seq, ts, unpack(body, name, f"{index}-{seq}")) for seq, ts, body in rows]

    async def trim(self, topic: str, index: int, offset: int) -> None:
        await self._rows(
            "DELETE FROM event WHERE topic = %s AND part = %s AND seq < %s", (await self._number(topic), index, offset)
        )

    # ---- spaces -----------------------------------------------------------------------------------------------------

    async def names(self, space: str) -> list[str]:
        return [name for (name,) in await self._rows("SELECT name FROM space WHERE space = %s", (space,))]

    async def get(self, wanted: Sequence[tuple[str, str]]) -> list[bytes | None]:
        rows = await self._rows(
            "SELECT s.value FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS w(space, name, n) "
            "LEFT JOIN space s ON s.space = w.space AND s.name = w.name ORDER BY n",
            ([space for space, _ in wanted], [self._text(name) for _, name in wanted]),
        )
        return [value for (value,) in rows]

    async def write(self, writes: Sequence[Write]) -> list[bool]:
        for topic in {entry.topic for write in writes for entry in write.outputs}:
            await self._number(topic)
        found = await self._written.run(
            transacted(partial(self._write, writes)),
            sent=lambda why: Unavailable(f"{self}: it is not known whether this was written: {why}"),
        )
        if any(write.outputs for write in writes):
            self._news.set()
        return found

    async def _write(self, writes: Sequence[Write], connection: Connection) -> list[bool]:
        # Always in one order, so that two processes never wait for each other.
        absent = sorted({write.space for write in writes if write.fence[1] is None})
        if absent:
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtext(s)) FROM unnest(%s::text[]) AS s", (absent,)
            )
        cursor = await connection.execute(
            "SELECT s.space, s.name, s.value FROM space s JOIN unnest(%s::text[], %s::text[]) AS w(space, name) "
            "ON s.space = w.space AND s.name = w.name ORDER BY s.space, s.name FOR UPDATE OF s",
            ([write.space for write in writes], [write.fence[0] for write in writes]),
        )
        held = {(space, name): value for space, name, value in await cursor.fetchall()}
        stands = [held.get((write.space, write.fence[0])) == write.fence[1] for write in writes]
        kept: dict[tuple[str, str], bytes | None] = {}
        outputs: list[Entry] = []
        for write, ok in zip(writes, stands, strict=True):
            if ok:
                kept |= {(write.space, self._text(name)): value for name, value in write.changes.items()}
                outputs += write.outputs
        gone = [place for place, value in kept.items() if value is None]
        put = [(*place, value) for place, value in sorted(kept.items(), key=lambda row: row[0]) if value is not None]
        if gone:
            await connection.execute(
                "DELETE FROM space s USING unnest(%s::text[], %s::text[]) AS w(space, name) "
                "WHERE s.space = w.space AND s.name = w.name",
                _columns(gone),
            )
        if put:
            await connection.execute(
                "INSERT INTO space SELECT * FROM unnest(%s::text[], %s::text[], %s::bytea[]) "
                "ON CONFLICT (space, name) DO UPDATE SET value = excluded.value",
                _columns(put),
            )
        if outputs:
            await self._store(connection, outputs)
        return stands

    async def forget(self, spaces: Sequence[str]) -> None:
        await self._rows("DELETE FROM space WHERE space = ANY(%s)", (list(spaces),))

    # ---- leases -----------------------------------------------------------------------------------------------------

    def heart(self) -> PostgresHeart:
        return PostgresHeart(psycopg.connect(**self._arguments, autocommit=True), self.prefix, self.lease / 2)

    async def leases(self) -> dict[str, bytes]:
        rows = await self._rows(
            "SELECT name, value FROM lease WHERE until > clock_timestamp() AND starts_with(name, %s)",
            (self.prefix + "/",),
        )
        cut = len(self.prefix) + 1
        return {name[cut:]: value for name, value in rows}

    # ---- delays -----------------------------------------------------------------------------------------------------

    async def delayed(self, now: float) -> float:
        if time.monotonic() - self._swept > 60:
            self._swept = time.monotonic()
            await self._rows("DELETE FROM seen WHERE ts < %s", (self.clock.now() - WINDOW,))
            await self._rows("DELETE FROM batch WHERE ts < %s", (self.clock.now() - WINDOW,))
            await self._rows("DELETE FROM lease WHERE until < clock_timestamp() - interval '1 hour'")
        due = await self._rows(
            "SELECT n, body FROM delayed WHERE prefix = %s AND due <= %s ORDER BY due, n LIMIT %s",
            (self.prefix, now, FALL),
        )
        entries: list[tuple[int, Entry]] = []
        for number, body in due:
            with contextlib.suppress(UnknownTopic):
                entry = await self.entry(unpack_delayed(body), now)
                entry.message.fresh = True  # its id was looked up when it was published
                await self._number(entry.topic)
                entries.append((number, entry))

        async def fall(connection: Connection) -> None:
            cursor = await connection.execute(
                "DELETE FROM delayed WHERE n = ANY(%s) RETURNING n", ([number for number, _ in entries],)
            )
            ours = {number for (number,) in await cursor.fetchall()}
            await self._store(connection, [entry for number, entry in entries if number in ours])

        if entries:
            await self._written.run(transacted(fall), sent=lambda why: Unavailable(f"{self} cannot be reached: {why}"))
            self._news.set()
        [(first,)] = await self._rows("SELECT min(due) FROM delayed WHERE prefix = %s", (self.prefix,))
        return 0.5 if first is None else max(0.0, first - self.clock.now())

    async def withdraw(self, id: str) -> bool:
        rows = await self._rows(
            "DELETE FROM delayed WHERE prefix = %s AND id = %s RETURNING n", (self.prefix, self._text(id))
        )
        return bool(rows)

    async def waiting(self) -> list[Message]:
        rows = await self._rows("SELECT body FROM delayed WHERE prefix = %s ORDER BY due, n", (self.prefix,))
        return [unpack_waiting(bytes(body)) for (body,) in rows]


def _columns(rows: Iterable[Sequence[Any]]) -> tuple[list[Any], ...]:
    return tuple(list(column) for column in zip(*rows, strict=True))


class PostgresReader:
    """Reads all its partitions by one query, on a connection of its own."""

    def __init__(self, broker: PostgresBroker) -> None:
        self._broker = broker
        self._line = Line(broker, again=True).open()
        self._next: dict[tuple[str, int], tuple[Held, int]] = {}
        self._buffer: list[tuple[Held, int, Message]] = []

    def seek(self, held: Held, offset: int) -> None:
        self._next[held.stored, held.index] = (held, offset)
        self._broker._news.set()

    def drop(self, held: Held) -> None:
        place = (held.stored, held.index)
        if place in self._next and self._next[place][0] is held:
            del self._next[place]
        self._buffer = [entry for entry in self._buffer if entry[0] is not held]

    async def read(self, limit: int, wait: float) -> Sequence[tuple[Held, int, Message]]:
        if not self._buffer:
            await self._fill(limit)
        if not self._buffer and wait:
            await self._broker.news(wait)
            await self._fill(limit)
        found, self._buffer = self._buffer[:limit], self._buffer[limit:]
        return found

    async def _fill(self, limit: int) -> None:
        if not self._next:
            return
        wanted = dict(self._next)
        places = [(self._broker._numbers.get(topic), index, at) for (topic, index), (_, at) in wanted.items()]
        if any(number is None for number, _, _ in places):
            places = [(await self._broker._number(t), index, at) for (t, index), (_, at) in wanted.items()]
        handles = list(wanted.values())

        async def ask(connection: Connection) -> list[tuple[Any, ...]]:
            cursor = await connection.execute(
                "SELECT w.n, e.seq, e.body FROM unnest(%s::int[], %s::int[], %s::bigint[]) "
                "WITH ORDINALITY AS w(topic, part, at, n) CROSS JOIN LATERAL (SELECT seq, body FROM event "
                "WHERE topic = w.topic AND part = w.part AND seq >= w.at ORDER BY seq LIMIT %s) e ORDER BY w.n, e.seq",
                (*_columns(places), max(1, limit // len(places))),
                binary=True,
            )
            return await cursor.fetchall()

        broker = self._broker
        rows = await self._line.run(ask, sent=lambda why: Unavailable(f"{broker} cannot be reached: {why}"))
        cut = len(broker.prefix)
        for number, offset, body in rows:
            held = handles[number - 1][0]
            place = (held.stored, held.index)
            if place in self._next and self._next[place][0] is held:
                self._buffer.append((held, offset, unpack(body, held.stored[cut:], f"{held.index}-{offset}")))
                self._next[place] = (held, offset + 1)

    async def close(self) -> None:
        await self._line.close()


class PostgresHeart:
    """A lease is a row with the time of its end, by the server's clock."""

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]], prefix: str, patience: float) -> None:
        self._connection = connection
        self._prefix = prefix + "/"
        self._patience = patience

    def beat(self, name: str, value: bytes, lease: float) -> None:
        self._execute(
            "INSERT INTO lease VALUES (%s, %s, clock_timestamp() + make_interval(secs => %s)) "
            "ON CONFLICT (name) DO UPDATE SET value = excluded.value, until = excluded.until",
            (self._prefix + name, value, lease),
        )

    def end(self, name: str) -> None:
        self._execute("DELETE FROM lease WHERE name = %s", (self._prefix + name,))

    def _execute(self, query: str, values: Sequence[Any]) -> None:
        watch = threading.Timer(self._patience, cut, [self._connection])
        watch.start()
        try:
            self._connection.execute(query, values)
        finally:
            watch.cancel()

    def close(self) -> None:
        self._connection.close()
