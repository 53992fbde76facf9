"""What operators ask of the embedded broker; nothing here needs a running worker."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stentor.broker import GroupInfo, Start, TopicInfo
from stentor.brokers.sqlite_file import Tx
from stentor.brokers.sqlite_rows import decode_done, make_message, offset
from stentor.errors import BrokerError, UnknownGroup, UnknownTopic
from stentor.message import Lag, Message, dead_topic, new_id

if TYPE_CHECKING:
    from stentor.brokers.sqlite import SqliteBroker


class SqliteAdmin:
    """The administration of one file, within the broker's namespace."""

    def __init__(self, broker: SqliteBroker) -> None:
        self._broker = broker
        self._prefix = broker._prefix

    def _name(self, stored: str) -> str:
        return stored[len(self._prefix) :]

    def _ours(self, stored: str) -> bool:
        return stored.startswith(self._prefix)

    async def topics(self) -> list[TopicInfo]:
        def ask(db: sqlite3.Connection) -> list[TopicInfo]:
            found = []
            for number, name in db.execute("SELECT id, name FROM stentor_topic ORDER BY name").fetchall():
                if self._ours(name):
                    count, size, oldest, newest = db.execute(
                        "SELECT count(*), sum(length(body) + length(head)), min(ts), max(ts) FROM stentor_event "
                        "WHERE topic = ?",
                        (number,),
                    ).fetchone()
                    found.append(TopicInfo(self._name(name), count, size or 0, oldest, newest))
            return found

        return await self._broker.file.query(ask)

    async def groups(self) -> list[GroupInfo]:
        def ask(db: sqlite3.Connection) -> list[GroupInfo]:
            found = []
            for number, name, app in db.execute("SELECT id, name, app FROM stentor_group ORDER BY name").fetchall():
                if self._ours(name):
                    topics = db.execute(
                        "SELECT t.name FROM stentor_reads r JOIN stentor_topic t ON t.id = r.topic WHERE r.grp = ? "
                        "ORDER BY t.name",
                        (number,),
                    ).fetchall()
                    found.append(
                        GroupInfo(
                            self._name(name), app, tuple(self._name(t) for (t,) in topics), self._living(db, number)
                        )
                    )
            return found

        return await self._broker.file.query(ask)

    def _living(self, db: sqlite3.Connection, group: int) -> int:
        now = time.monotonic()
        rows = db.execute(
            "SELECT w.lease, w.host, w.pid FROM stentor_member m LEFT JOIN stentor_worker w ON w.id = m.worker "
            "WHERE m.grp = ?",
            (group,),
        ).fetchall()
        return sum(not self._broker.is_dead(lease, host, pid, now) for lease, host, pid in rows)

    async def lag(self) -> list[Lag]:
        now = self._broker._clock.now()

        def ask(db: sqlite3.Connection) -> list[Lag]:
            found = []
            rows = db.execute(
                "SELECT g.id, g.name, t.id, t.name FROM stentor_reads r JOIN stentor_group g ON g.id = r.grp "
                "JOIN stentor_topic t ON t.id = r.topic ORDER BY g.name, t.name"
            ).fetchall()
            for group, name, topic, home in rows:
                if not self._ours(name):
                    continue
                waiting, oldest = self._waiting(db, group, topic)
                done = sum(self._done(db, group, topic))
                (parked,) = db.execute(
                    "SELECT count(*) FROM stentor_journal WHERE grp = ? AND topic = ? AND name >= 'q/' AND name < 'q0'",
                    (group, topic),
                ).fetchone()
                events = max(0, waiting - done)
                seconds = max(0.0, now - oldest) if events and oldest is not None else 0.0
                found.append(Lag(self._name(name), self._name(home), events, seconds, parked, self._living(db, group)))
            return found

        return await self._broker.file.query(ask)

    @staticmethod
    def _waiting(db: sqlite3.Connection, group: int, topic: int) -> tuple[int, float | None]:
        """Events at or above the places of a group, and when the first of them was stored.

        Only between the lowest and the highest place must each event be compared with that of its slot; above, the
        index alone is counted.
        """
        low, high = db.execute(
            "SELECT min(prefix), max(prefix) FROM stentor_place WHERE grp = ? AND topic = ?", (group, topic)
        ).fetchone()
        if low is None:
            return 0, None
        between = (
            "FROM stentor_event e JOIN stentor_place p ON p.grp = ? AND p.topic = e.topic AND p.slot = e.slot "
            "WHERE e.topic = ? AND e.seq >= ? AND e.seq < ? AND e.seq >= p.prefix"
        )
        scope = (group, topic, low, high)
        (mixed,) = db.execute(f"SELECT count(*) {between}", scope).fetchone()
        (above,) = db.execute(
            "SELECT count(*) FROM stentor_event WHERE topic = ? AND seq >= ?", (topic, high)
        ).fetchone()
        first = (
            db.execute(f"SELECT e.ts {between} ORDER BY e.seq LIMIT 1", scope).fetchone()
            or db.execute(
                "SELECT ts FROM stentor_event WHERE topic = ? AND seq >= ? ORDER BY seq LIMIT 1", (topic, high)
            ).fetchone()
        )
        return mixed + above, first[0] if first else None

    @staticmethod
    def _done(db: sqlite3.Connection, group: int, topic: int) -> list[int]:
        rows = db.execute(
            "SELECT prefix, done FROM stentor_place WHERE grp = ? AND topic = ? AND done != x''", (group, topic)
        ).fetchall()
        return [sum(offset >= prefix for offset in decode_done(done)) for prefix, done in rows]

    # ---- changes ----------------------------------------------------------------------------------------------------

    def _group(self, db: sqlite3.Connection, name: str) -> int:
        found = db.execute("SELECT id FROM stentor_group WHERE name = ?", (self._prefix + name,)).fetchone()
        if found is None:
            known = [
                self._name(n) for (n,) in db.execute("SELECT name FROM stentor_group ORDER BY name") if self._ours(n)
            ]
            raise UnknownGroup(f"no group {name!r}; there are {', '.join(known) or 'none'}")
        return int(found[0])

    async def rename_group(self, old: str, new: str) -> None:
        def rename(tx: Tx) -> None:
            group = self._group(tx.db, old)
            if tx.db.execute("SELECT 1 FROM stentor_group WHERE name = ?", (self._prefix + new,)).fetchone():
                raise BrokerError(f"group {new!r} exists already")
            tx.db.execute("UPDATE stentor_group SET name = ? WHERE id = ?", (self._prefix + new, group))
            for home in (dead_topic, _timer_topic, _source_topic):
                taken = tx.db.execute(
                    "SELECT id FROM stentor_topic WHERE name = ?", (self._prefix + home(new),)
                ).fetchone()
                if taken is None:
                    tx.db.execute(
                        "UPDATE stentor_topic SET name = ? WHERE name = ?",
                        (self._prefix + home(new), self._prefix + home(old)),
                    )
            self._broker._load_topics(tx)

        await self._broker.file.submit(rename)

    async def drop_group(self, name: str) -> None:
        def drop(tx: Tx) -> None:
            group = self._group(tx.db, name)
            members = self._living(tx.db, group)
            if members:
                raise BrokerError(f"group {name!r} has {members} running members; stop them first")
            self._broker.forget_group(tx, group)

        await self._broker.file.submit(drop)

    async def replay(self, group: str, start: Start, topics: Sequence[str] = ()) -> int:
        replay = f"{group}@{new_id()}"

        def rewind(tx: Tx) -> int:
            db = tx.db
            number = self._group(db, group)
            read = dict(
                db.execute(
                    "SELECT t.name, t.id FROM stentor_reads r JOIN stentor_topic t ON t.id = r.topic WHERE r.grp = ?",
                    (number,),
                ).fetchall()
            )
            unknown = [topic for topic in topics if self._prefix + topic not in read]
            if unknown:
                raise UnknownTopic(f"group {group!r} does not read topic {unknown[0]!r}")
            tx.flush()
            count = 0
            for topic in [read[self._prefix + name] for name in topics] if topics else read.values():
                position = offset(db, topic, start)
                # Events up to where the group had come are seen again.
                places = db.execute(
                    "SELECT prefix, done FROM stentor_place WHERE grp = ? AND topic = ?", (number, topic)
                ).fetchall()
                reached = max(max([prefix, *(offset + 1 for offset in decode_done(done))]) for prefix, done in places)
                db.execute(
                    "UPDATE stentor_reads SET replay = ?, until = ? WHERE grp = ? AND topic = ?",
                    (replay, max(reached, position), number, topic),
                )
                db.execute(
                    "UPDATE stentor_place SET prefix = ?, done = x'' WHERE grp = ? AND topic = ?",
                    (position, number, topic),
                )
                self._clear(db, number, topic, position)
                count += db.execute(
                    "SELECT count(*) FROM stentor_event WHERE topic = ? AND seq >= ?", (topic, position)
                ).fetchone()[0]
            # A new epoch and no owner: whatever runs of the old one can no longer settle.
            db.execute("UPDATE stentor_slot SET member = NULL, epoch = epoch + 1, clean = 1 WHERE grp = ?", (number,))
            tx.regrouped = True
            return count

        count = await self._broker.file.submit(rewind)
        self._broker._wake()
        return count

    @staticmethod
    def _clear(db: sqlite3.Connection, group: int, topic: int, position: int) -> None:
        """Forget parked events, attempts and progress from a position on, and holds of keys with nothing parked."""
        where = "grp = ? AND topic = ?"
        for prefix in ("q/", "a/", "p/"):
            db.execute(
                f"DELETE FROM stentor_journal WHERE {where} AND name >= ? AND name < ?",
                (group, topic, f"{prefix}{position:020d}", f"{prefix[0]}0"),
            )
        # The value of a hold begins with the offset of its dead letter.
        db.execute(
            f"DELETE FROM stentor_journal WHERE {where} AND name GLOB 'k/*' "
            "AND substr(value, 1, 20) >= CAST(? AS BLOB)",
            (group, topic, f"{position:020d}"),
        )

    async def cancel(self, id: str) -> bool:
        return await self._broker.file.submit(
            lambda tx: tx.db.execute("DELETE FROM stentor_delayed WHERE id = ?", (id,)).rowcount > 0
        )

    async def delayed(self) -> list[Message]:
        def ask(db: sqlite3.Connection) -> list[Message]:
            found = []
            for due, topic, id, key, type, head, body in db.execute(
                "SELECT d.due, t.name, d.id, d.key, d.type, d.head, d.body FROM stentor_delayed d "
                "JOIN stentor_topic t ON t.id = d.topic ORDER BY d.due, d.n"
            ):
                if self._ours(topic):
                    found.append(make_message(self._name(topic), id, key, type, head, body))
                    found[-1].due = due
            return found

        return await self._broker.file.query(ask)

    async def journal(self, group: str, topic: str, partition: int, prefix: str) -> dict[str, bytes]:
        def ask(db: sqlite3.Connection) -> dict[str, bytes]:
            found = db.execute("SELECT id FROM stentor_topic WHERE name = ?", (self._prefix + topic,)).fetchone()
            if found is None:
                raise UnknownTopic(f"topic {topic!r} was never declared")
            rows = db.execute(
                "SELECT name, value FROM stentor_journal WHERE grp = ? AND topic = ? AND slot = ? AND name >= ? "
                "ORDER BY name",
                (self._group(db, group), found[0], partition, prefix),
            ).fetchall()
            return {name: value for name, value in rows if name.startswith(prefix)}

        return await self._broker.file.query(ask)

    async def mark(self, group: str, topic: str, partition: int, name: str, value: bytes) -> None:
        number = self._broker.topic_id(topic)

        def write(tx: Tx) -> None:
            tx.db.execute(
                "INSERT OR REPLACE INTO stentor_journal VALUES (?, ?, ?, ?, ?)",
                (self._group(tx.db, group), number, partition, name, value),
            )
            tx.told = True

        await self._broker.file.submit(write)


def _timer_topic(group: str) -> str:
    return f"stentor.timer.{group}"


def _source_topic(group: str) -> str:
    return f"stentor.source.{group}"
