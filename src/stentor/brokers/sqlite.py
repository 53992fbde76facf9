"""The embedded broker: one SQLite file, shared by the processes of one host.

Partitions are 64 hash slots, stored in the event's row; ``seq`` orders all events of the file. A group owns slots by
``stentor_slot`` (member and epoch); its place in each is the settled prefix and the set done above it. See
``sqlite_file.py`` for how the file is written.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from stentor.broker import Features, Finding, Owner, Start
from stentor.brokers.sqlite_admin import SqliteAdmin
from stentor.brokers.sqlite_consumer import SqliteConsumer
from stentor.brokers.sqlite_file import Row, SqliteFile, Tx, alive, host_id
from stentor.brokers.sqlite_rows import PAGE, SLOTS, encode_head, make_message, offset
from stentor.clock import Clock, seconds
from stentor.connect import BrokerUrl, duration, one_of
from stentor.errors import BrokerError, ConfigError, PublishUnknown, StentorError, UnknownGroup, UnknownTopic
from stentor.event import Topic
from stentor.message import Message, Receipt
from stentor.subscription import Slots, Subscription

SEEN = 7 * 86400.0
HOUSEKEEPING = 5.0
STEP = 2000
"""Rows that one housekeeping transaction deletes at most."""


class SqliteBroker:
    """``sqlite:///relative.db`` or ``sqlite:////absolute.db``.

    Options: ``synchronous`` ("full", the default: a confirmed event survives a power cut; "normal": it survives the
    program's crash only), ``lease`` and ``beat`` (seconds; a process silent for ``lease`` loses its partitions),
    ``retention`` (a duration: how long settled events are kept, default 7d), ``max_bytes`` (publishers wait when the
    file holds so much; default no limit).
    """

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        if url.host:
            raise ConfigError(
                f"{url}: write sqlite:///relative.db or sqlite:////absolute/path.db (three or four slashes)"
            )
        name = url.path[1:]
        if not name:
            raise ConfigError(f"{url}: names no file; write sqlite:///stentor.db")
        self.path = Path(name).absolute()
        self._clock = clock
        self._prefix = url.namespace
        synchronous = url.option("synchronous", "full", one_of("full", "normal"))
        self.lease = url.option("lease", 10.0, float)
        beat = url.option("beat", 2.5, float)
        self._retention = url.option("retention", 7 * 86400.0, duration)
        self._limit = url.option("max_bytes", 0, int)
        self.features = Features(
            name="sqlite", durable="host" if synchronous == "full" else "process", shared=True, atomic=True,
            dedupe=True, replay=True, cancel=True, browse=True,
        )  # fmt: skip
        self.file = SqliteFile(self.path, synchronous=synchronous, beat=beat)
        self._topics: dict[str, int] = {}
        self._slots = Slots(SLOTS)
        self._host = host_id()
        self._worker = 0
        self._evicted = False
        self._consumers: list[SqliteConsumer] = []
        self._balancing: asyncio.Task[None] | None = None
        self._nudge = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._version = 0
        self._full = False
        self._doubted: set[str] = set()
        """Ids of events whose commit failed in a way that leaves open whether it happened."""
        self._last_housekeeping = 0.0

    def __str__(self) -> str:
        return f"sqlite:///{self.path}"

    @property
    def admin(self) -> SqliteAdmin:
        return SqliteAdmin(self)

    # ---- life ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        if not self.file.closed:
            return
        self.file = SqliteFile(self.path, synchronous=self.file._synchronous, beat=self.file.beat)
        self.file.open()
        self.file.on_beat = self._beat
        self.file.on_wake = self._wake
        self._worker = 0
        self._ticking = asyncio.create_task(self._tick(), name="stentor sqlite tick")

    async def close(self) -> None:
        if self.file.closed:
            return
        for task in (self._ticking, self._balancing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._balancing = None
        if self._worker:
            worker = self._worker
            await self.file.submit(lambda tx: tx.db.execute("DELETE FROM stentor_worker WHERE id = ?", (worker,)))
        await self.file.close()
        self._wake()

    async def health(self) -> str | None:
        if self.file.closed:
            return f"{self.path} is not open"
        try:
            await asyncio.wait_for(self.file.submit(lambda tx: None), 5)
        except TimeoutError:
            return f"{self.path}: no transaction within 5 s"
        except BrokerError as error:
            return str(error)
        return None

    async def review(self) -> list[Finding]:
        return []  # what there is to say of the file can be seen without opening it

    async def _tick(self) -> None:
        """Twice a second: see what other processes did without telling, move what fell due, keep house."""
        while True:
            try:
                (version,) = self.file.reader.execute("PRAGMA data_version").fetchone()
                if version != self._version:
                    self._version = version
                    self._wake()
                wait = 0.5
                (due,) = self.file.reader.execute("SELECT min(due) FROM stentor_delayed").fetchone()
                if due is not None:
                    wait = min(wait, max(0.0, due - self._clock.now()))
                    if wait == 0.0:
                        await self.file.submit(self._fall_due)
                        self._wake()
                crowded = self._limit and self._over_limit(self.file.reader)
                if crowded or self._full or self._clock.monotonic() - self._last_housekeeping > HOUSEKEEPING:
                    self._last_housekeeping = self._clock.monotonic()
                    await self._keep_house()
                await self._clock.sleep(wait)
            except BrokerError:
                await self._clock.sleep(0.5)

    def _wake(self, regrouped: bool = True) -> None:
        self._stored()
        if regrouped:
            self._nudge.set()

    def _beat(self, tx: Tx) -> None:
        """Renew the lease, from the writer thread, so that a busy event loop loses nothing."""
        if self._worker:
            found = tx.db.execute(
                "UPDATE stentor_worker SET lease = ? WHERE id = ?", (time.monotonic() + self.lease, self._worker)
            )
            self._evicted = self._evicted or found.rowcount == 0

    # ---- declaring ----------------------------------------------------------------------------------------------

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        def write(tx: Tx) -> None:
            tx.flush()
            for topic in topics:
                retention = None if topic.retention is None else seconds(topic.retention)
                tx.db.execute(
                    "INSERT INTO stentor_topic (name, retention) VALUES (?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET retention = excluded.retention",
                    (self._prefix + topic.name, retention),
                )
            for subscription in subscriptions:
                self._declare_group(tx, subscription)
            self._load_topics(tx)

        await self.file.submit(write)

    def _declare_group(self, tx: Tx, subscription: Subscription) -> None:
        db = tx.db
        expires = subscription.expires if subscription.instance else 0.0
        db.execute(
            "INSERT INTO stentor_group (name, app, single, expires, touched) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET app = excluded.app, single = excluded.single, touched = excluded.touched",
            (self._prefix + subscription.name, subscription.app, subscription.single, expires, tx.now),
        )
        (group,) = db.execute(
            "SELECT id FROM stentor_group WHERE name = ?", (self._prefix + subscription.name,)
        ).fetchone()
        db.executemany(
            "INSERT OR IGNORE INTO stentor_slot (grp, slot) VALUES (?, ?)", [(group, slot) for slot in range(SLOTS)]
        )
        wanted = set()
        for name in subscription.topics:
            db.execute("INSERT OR IGNORE INTO stentor_topic (name) VALUES (?)", (self._prefix + name,))
            (topic,) = db.execute("SELECT id FROM stentor_topic WHERE name = ?", (self._prefix + name,)).fetchone()
            wanted.add(topic)
            known = db.execute("SELECT 1 FROM stentor_reads WHERE grp = ? AND topic = ?", (group, topic)).fetchone()
            if known is None:
                start = 1 if subscription.start == "earliest" else tx.last + 1
                db.execute("INSERT INTO stentor_reads (grp, topic) VALUES (?, ?)", (group, topic))
                db.executemany(
                    "INSERT INTO stentor_place (grp, topic, slot, prefix) VALUES (?, ?, ?, ?)",
                    [(group, topic, slot, start) for slot in range(SLOTS)],
                )
        for (topic,) in db.execute("SELECT topic FROM stentor_reads WHERE grp = ?", (group,)).fetchall():
            if topic not in wanted:  # a topic that the group no longer reads must not hold events back for ever
                db.execute("DELETE FROM stentor_reads WHERE grp = ? AND topic = ?", (group, topic))
                db.execute("DELETE FROM stentor_place WHERE grp = ? AND topic = ?", (group, topic))

    def _load_topics(self, tx: Tx) -> None:
        cut = len(self._prefix)
        rows = tx.db.execute("SELECT name, id FROM stentor_topic").fetchall()
        self._topics = {name[cut:]: number for name, number in rows if name.startswith(self._prefix)}

    def topic_id(self, name: str) -> int:
        """The number of a declared topic. Raises UnknownTopic."""
        number = self._topics.get(name)
        if number is None:
            found = self.file.reader.execute(
                "SELECT id FROM stentor_topic WHERE name = ?", (self._prefix + name,)
            ).fetchone()
            if found is None:
                raise UnknownTopic(f"topic {name!r} was never declared in {self.path}")
            number = self._topics[name] = int(found[0])
        return number

    # ---- publishing ---------------------------------------------------------------------------------------------

    def row(self, message: Message, now: float) -> Row:
        """The row of a message. Raises UnknownTopic."""
        topic = self._topics.get(message.topic) or self.topic_id(message.topic)
        head = encode_head(message)
        return (topic, self._slots.of(message.key), message.id, message.key, message.type, now, head, message.data)

    async def publish(self, messages: Sequence[Message]) -> Sequence[Receipt]:
        now = self._clock.now()
        while self._full:
            await self._clock.sleep(0.05)
        try:
            if len(messages) == 1:
                (message,) = messages
                if message.fresh and message.due <= now:
                    position = await self.file.append(self.row(message, now))
                    if self._waiting:
                        self._stored()
                    return (Receipt(message.id, message.topic, position),)
            rows = [self.row(message, now) for message in messages]
            positions = await self.file.submit(lambda tx: self.store(tx, messages, rows, now))
        except PublishUnknown as error:
            raise self.doubt(messages, error) from None
        self._stored()
        return [
            Receipt(message.id, message.topic, position if position > 0 else None, position == -1)
            for message, position in zip(messages, positions, strict=True)
        ]

    def _stored(self) -> None:
        """Let this process's own consumers look."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def doubt(self, messages: Sequence[Message], error: PublishUnknown) -> PublishUnknown:
        """The commit of these failed, and yet it may be there: a repetition must look for them."""
        self._doubted.update(message.id for message in messages)
        for message in messages:
            message.fresh = False
        return PublishUnknown([message.id for message in messages], error.why)

    def _found(self, tx: Tx, message: Message) -> bool:
        """Whether a message of a doubted commit is there after all."""
        self._doubted.discard(message.id)
        tx.flush()
        return any(
            tx.db.execute(
                f"SELECT 1 FROM {table} WHERE id = ? AND topic = ?", (message.id, self.topic_id(message.topic))
            ).fetchone()
            for table in ("stentor_event", "stentor_delayed")
        )

    def store(self, tx: Tx, messages: Sequence[Message], rows: Sequence[Row], now: float) -> list[int]:
        """Write messages in a transaction; positions, 0 for delayed ones, -1 for duplicates."""
        positions = []
        for message, row in zip(messages, rows, strict=True):
            if not message.fresh:
                found = tx.db.execute(
                    "INSERT OR IGNORE INTO stentor_seen (id, ts) VALUES (?, ?)",
                    (f"{message.source}\0{message.id}", now),
                )
                if found.rowcount == 0 or (message.id in self._doubted and self._found(tx, message)):
                    positions.append(-1)
                    continue
            if message.due > now:
                topic, slot, id, key, type, _, head, body = row
                tx.db.execute(
                    "INSERT INTO stentor_delayed (due, topic, slot, id, key, type, head, body) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (message.due, topic, slot, id, key, type, head, body),
                )
                tx.told = True
                positions.append(0)
            else:
                positions.append(tx.append(row))
        return positions

    def _fall_due(self, tx: Tx) -> None:
        now = self._clock.now()
        rows = tx.db.execute(
            "SELECT n, topic, slot, id, key, type, head, body FROM stentor_delayed WHERE due <= ? "
            "ORDER BY due, n LIMIT 500",
            (now,),
        ).fetchall()
        for _, topic, slot, id, key, type, head, body in rows:
            tx.append((topic, slot, id, key, type, now, head, body))
        tx.db.executemany("DELETE FROM stentor_delayed WHERE n = ?", [(row[0],) for row in rows])

    # ---- membership ---------------------------------------------------------------------------------------------

    async def subscribe(self, subscription: Subscription, owner: Owner) -> SqliteConsumer:
        found = self.file.reader.execute(
            "SELECT id FROM stentor_group WHERE name = ?", (self._prefix + subscription.name,)
        ).fetchone()
        if found is None:
            raise UnknownGroup(f"group {subscription.name!r} was never declared in {self.path}")
        return SqliteConsumer(self, subscription, owner, found[0])

    async def join(self, consumer: SqliteConsumer) -> None:
        """Make a consumer a member and let it have its share."""
        await self.file.submit(lambda tx: self._register(tx, [consumer]))
        self._consumers.append(consumer)
        if self._balancing is None:
            self._balancing = asyncio.create_task(self._balance(), name="stentor sqlite balance")
        await self._share_out(consumer)

    def _register(self, tx: Tx, consumers: Sequence[SqliteConsumer]) -> None:
        db = tx.db
        if not self._worker:
            found = db.execute(
                "INSERT INTO stentor_worker (lease, host, pid, address) VALUES (?, ?, ?, ?)",
                (time.monotonic() + self.lease, self._host, os.getpid(), self.file.address),
            )
            self._worker = int(found.lastrowid or 0)
        for consumer in consumers:
            found = db.execute("INSERT INTO stentor_member (grp, worker) VALUES (?, ?)", (consumer.group, self._worker))
            consumer.member = int(found.lastrowid or 0)
        tx.regrouped = True

    async def _balance(self) -> None:
        """Keep every consumer at its share, as processes come and go."""
        while True:
            self._nudge.clear()
            try:
                if self._evicted:
                    await self._return()
                for consumer in list(self._consumers):
                    await self._share_out(consumer)
            except StentorError:
                await self._clock.sleep(0.5)
            try:
                await asyncio.wait_for(self._nudge.wait(), self.file.beat)
                await self._clock.sleep(0.02)  # let a burst of wake-ups pass
            except TimeoutError:
                continue

    async def _return(self) -> None:
        """This process was silent for too long and lost its place: come back as a new member."""
        for consumer in self._consumers:
            consumer.lose(list(consumer._owned))
        self._worker = 0
        self._evicted = False
        await self.file.submit(lambda tx: self._register(tx, self._consumers))

    async def _share_out(self, consumer: SqliteConsumer) -> None:
        async with consumer.lock:
            if consumer.closed or not self._needs_share(consumer):
                return
            known = dict(consumer._owned)
            lost, surplus, gained = await self.file.submit(lambda tx: consumer.balance(tx, known))
            if lost:
                consumer.lose(lost)
            if surplus:
                await consumer.give_up(surplus)
            if gained:
                await consumer.take(gained)

    def _needs_share(self, consumer: SqliteConsumer) -> bool:
        """A look without a transaction: has anything about the group's members or slots changed?"""
        db = self.file.reader
        now = time.monotonic()
        members = db.execute(
            "SELECT m.id, w.lease, w.host, w.pid FROM stentor_member m LEFT JOIN stentor_worker w ON w.id = m.worker "
            "WHERE m.grp = ? ORDER BY m.id",
            (consumer.group,),
        ).fetchall()
        slots = db.execute(
            "SELECT member, epoch FROM stentor_slot WHERE grp = ? ORDER BY slot", (consumer.group,)
        ).fetchall()
        dead = any(self.is_dead(lease, host, pid, now) for _, lease, host, pid in members)
        state = (tuple(row[0] for row in members), tuple(slots))
        if not dead and state == consumer.balanced:
            return False
        consumer.balanced = None if dead else state
        return True

    def is_dead(self, lease: float | None, host: str | None, pid: int | None, now: float) -> bool:
        """Whether a worker's lease is over, or its process is known to be gone."""
        if lease is None or host is None or pid is None:
            return True
        if host.partition("/")[0] != self._host.partition("/")[0]:
            return True  # an earlier boot: its monotonic clock means nothing any more
        return lease < now or (host == self._host and pid != os.getpid() and not alive(pid))

    # ---- housekeeping -------------------------------------------------------------------------------------------

    async def _keep_house(self) -> None:
        """Drop what is settled everywhere and past its retention, a step at a time; one process at a time does it."""
        now = self._clock.now()
        for consumer in self._consumers:
            consumer.pass_idle()
        stamps = [(c.group, self._clock.now()) for c in self._consumers if c.subscription.instance]

        def clean(tx: Tx) -> bool:
            db = tx.db
            db.executemany("UPDATE stentor_group SET touched = ? WHERE id = ?", [(at, group) for group, at in stamps])
            found = db.execute("SELECT value FROM stentor_meta WHERE name = 'cleaned'").fetchone()
            mono = time.monotonic()
            if found is not None and 0 <= mono - found[0] < HOUSEKEEPING * 0.8 and not self._full:
                return self._over_limit(db)
            db.execute("INSERT OR REPLACE INTO stentor_meta VALUES ('cleaned', ?)", (mono,))
            db.execute(
                "DELETE FROM stentor_seen WHERE id IN (SELECT id FROM stentor_seen WHERE ts < ? LIMIT ?)",
                (now - SEEN, STEP),
            )
            for (group,) in db.execute(
                "SELECT id FROM stentor_group WHERE expires > 0 AND touched + expires < ?", (now,)
            ).fetchall():
                self.forget_group(tx, group)
            self._trim(tx, now)
            return self._over_limit(db)

        self._full = await self.file.submit(clean)

    def _over_limit(self, db: sqlite3.Connection) -> bool:
        if not self._limit:
            return False
        size, free, pages = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "freelist_count", "page_count")
        )
        return bool((pages - free) * size > self._limit)

    def _trim(self, tx: Tx, now: float) -> None:
        db = tx.db
        for topic, name, retention in db.execute("SELECT id, name, retention FROM stentor_topic").fetchall():
            if "stentor.dead." in name:
                continue  # dead letters stay until an operator drops them
            age = 0.0 if self._over_limit(db) else self._retention if retention is None else retention
            (low,) = db.execute("SELECT min(prefix) FROM stentor_place WHERE topic = ?", (topic,)).fetchone()
            low = tx.last + 1 if low is None else low
            db.execute(
                "DELETE FROM stentor_event WHERE seq IN "
                "(SELECT seq FROM stentor_event WHERE topic = ? AND seq < ? AND ts < ? ORDER BY seq LIMIT ?)",
                (topic, low, now - age, STEP),
            )

    def forget_group(self, tx: Tx, group: int) -> None:
        """Remove all that is kept of a group; its dead letters stay."""
        for table in ("reads", "place", "slot", "member", "journal"):
            tx.db.execute(f"DELETE FROM stentor_{table} WHERE grp = ?", (group,))
        tx.db.execute("DELETE FROM stentor_group WHERE id = ?", (group,))

    def browse(self, topic: str, start: Start, *, follow: bool) -> AsyncIterator[tuple[int, Message]]:
        return self._browse(topic, start, follow)

    async def _browse(self, topic: str, start: Start, follow: bool) -> AsyncIterator[tuple[int, Message]]:
        number = self.topic_id(topic)
        position = await self.file.query(lambda db: offset(db, number, start))
        while True:
            rows = self.file.reader.execute(
                "SELECT seq, id, key, type, head, body FROM stentor_event WHERE topic = ? AND seq >= ? "
                "ORDER BY seq LIMIT ?",
                (number, position, PAGE),
            ).fetchall()
            for seq, id, key, type, head, body in rows:
                yield seq, make_message(topic, id, key, type, head, body)
                position = seq + 1
            if not rows:
                if not follow:
                    return
                await self.wait(1.0)

    async def wait(self, timeout: float) -> None:
        """Until something may have been stored, or the time is up."""
        future: asyncio.Future[None] = self.file.loop.create_future()
        self._waiting.append(future)
        timer = self.file.loop.call_later(timeout, lambda: None if future.done() else future.set_result(None))
        try:
            await future
        finally:
            timer.cancel()
            if future in self._waiting:
                self._waiting.remove(future)
