"""A member of a group on the embedded broker: the slots it owns, what it reads of them, and how it settles."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from stentor.broker import FETCH_BYTES, Owner
from stentor.brokers.sqlite_file import Row, Tx
from stentor.brokers.sqlite_rows import PAGE, SLOTS, decode_done, encode_done, make_message
from stentor.brokers.track import Track, quota
from stentor.errors import LeaseLost, PublishUnknown, StentorError, Unavailable
from stentor.message import Delivery, Failure, Mark, Outcome, Partition, Settlement
from stentor.subscription import Subscription

if TYPE_CHECKING:
    from stentor.brokers.sqlite import SqliteBroker

_JOURNAL = ("grp", "topic", "slot", "name", "value")
_PLACE = ("grp", "topic", "slot", "prefix", "done")


class SqliteConsumer:
    """A member of a group, with the slots it owns."""

    until = math.inf

    async def sure(self) -> None:
        """A process beats for as long as it runs: only one that was stopped loses its lease unaware."""

    def __init__(self, broker: SqliteBroker, subscription: Subscription, owner: Owner, group: int) -> None:
        self.broker = broker
        self.subscription = subscription
        self.owner = owner
        self.group = group
        self.member = 0
        self.closed = False
        self.lock = asyncio.Lock()
        self.balanced: Any = None
        """Members and slots as they were when the last balance was struck."""
        self._topics = {name: broker.topic_id(name) for name in subscription.topics}
        self._tracks: dict[str, list[Track | None]] = {name: [None] * SLOTS for name in self._topics}
        self._scan = dict.fromkeys(self._topics, 1)
        self._owned: dict[int, int] = {}
        """slot -> epoch"""
        self._expected = ""
        """The owned slots with their epochs, as the database would list them."""
        self._filter = ""

    def partitions(self) -> list[Partition]:
        return [track.partition for tracks in self._tracks.values() for track in tracks if track is not None]

    async def start(self) -> None:
        await self.broker.join(self)

    # ---- ownership ------------------------------------------------------------------------------------------------

    def balance(self, tx: Tx, known: dict[int, int]) -> tuple[list[int], list[int], list[Any]]:
        """In a transaction: drop dead members, take free slots up to the quota.

        ``known`` is what this consumer believes it owns (slot -> epoch). Returns the slots of it that are lost, those
        to give up, and what is gained.
        """
        db, group = tx.db, self.group
        now = time.monotonic()
        members = db.execute(
            "SELECT m.id, w.id, w.lease, w.host, w.pid FROM stentor_member m "
            "LEFT JOIN stentor_worker w ON w.id = m.worker WHERE m.grp = ?",
            (group,),
        ).fetchall()
        living = []
        for member, worker, lease, host, pid in members:
            if member != self.member and self.broker.is_dead(lease, host, pid, now):
                db.execute(
                    "UPDATE stentor_slot SET member = NULL, clean = 0 WHERE grp = ? AND member = ?", (group, member)
                )
                db.execute("DELETE FROM stentor_member WHERE id = ?", (member,))
                db.execute(
                    "DELETE FROM stentor_worker WHERE id = ? AND id NOT IN (SELECT worker FROM stentor_member)",
                    (worker,),
                )
                tx.regrouped = True
            else:
                living.append(member)
        slots = db.execute(
            "SELECT slot, member, epoch, clean FROM stentor_slot WHERE grp = ? ORDER BY slot", (group,)
        ).fetchall()
        if self.member not in living:
            self.broker._evicted = True
            return [], [], []
        held = {slot: epoch for slot, member, epoch, _ in slots if member == self.member}
        lost = [slot for slot, epoch in known.items() if held.get(slot) != epoch]
        names = [f"{member:020d}" for member in living]
        fair = quota(names, f"{self.member:020d}", SLOTS, single=self.subscription.single)
        mine = [slot for slot in held if slot in known and slot not in lost]
        gained: list[Any] = []
        for slot, member, epoch, clean in slots:
            # Also what the file says is ours and this consumer does not hold: it begins anew, under a new epoch.
            if (member is None or (slot in held and slot not in mine)) and len(mine) + len(gained) < fair:
                db.execute(
                    "UPDATE stentor_slot SET member = ?, epoch = ?, clean = 1 WHERE grp = ? AND slot = ?",
                    (self.member, epoch + 1, group, slot),
                )
                places = db.execute(
                    "SELECT p.topic, p.prefix, p.done, r.replay, r.until FROM stentor_place p JOIN stentor_reads r "
                    "ON r.grp = p.grp AND r.topic = p.topic WHERE p.grp = ? AND p.slot = ?",
                    (group, slot),
                ).fetchall()
                gained.append((slot, epoch + 1, bool(clean) and member is None, places, tx.last))
            elif slot in held and slot not in mine:
                db.execute("UPDATE stentor_slot SET member = NULL, clean = 0 WHERE grp = ? AND slot = ?", (group, slot))
                tx.regrouped = True
        return lost, mine[fair:], gained

    async def take(self, gained: list[Any]) -> None:
        """Begin to own slots: the worker loads their journals, then they are fetched from."""
        names = {number: name for name, number in self._topics.items()}
        fresh: list[tuple[str, int, Track]] = []
        for slot, epoch, clean, places, last in gained:
            self._owned[slot] = epoch
            for number, prefix, done, replay, until in places:
                if number in names:
                    name = names[number]
                    track = Track(
                        Partition(name, slot, epoch, clean=clean), prefix, decode_done(done),
                        known=last + 1, replay=replay, replay_until=until,
                    )  # fmt: skip
                    fresh.append((name, slot, track))
        self._changed()
        await self.owner.assigned([track.partition for _, _, track in fresh])
        for name, slot, track in fresh:
            if self._owned.get(slot) == track.partition.epoch:
                self._tracks[name][slot] = track
                self._scan[name] = min(self._scan[name], track.prefix)
        self.broker._stored()

    async def give_up(self, slots: list[int]) -> None:
        """Let the worker finish what runs of the slots, then free them."""
        partitions = [p for p in self.partitions() if p.index in slots]
        await self.owner.revoked(partitions)
        release = self._releasing(slots)
        # Before the release is under way: what is settled from now on must not count on these.
        self._forget(slots)
        await self.broker.file.submit(release)

    def _releasing(self, slots: Sequence[int]) -> Callable[[Tx], None]:
        places = self._moved(slots)
        epochs = [(self.group, slot, self.member, self._owned[slot]) for slot in slots if slot in self._owned]

        def release(tx: Tx) -> None:
            owned = {
                slot
                for slot, member, epoch in tx.db.execute(
                    "SELECT slot, member, epoch FROM stentor_slot WHERE grp = ?", (self.group,)
                ).fetchall()
                if (self.group, slot, member, epoch) in epochs
            }
            tx.many("INSERT OR REPLACE", "stentor_place", _PLACE, [row for row in places if row[2] in owned])
            tx.db.executemany(
                "UPDATE stentor_slot SET member = NULL, clean = 1 "
                "WHERE grp = ? AND slot = ? AND member = ? AND epoch = ?",
                epochs,
            )
            tx.regrouped = True

        return release

    def _moved(self, slots: Sequence[int] | None = None) -> list[tuple[int, int, int, int, bytes]]:
        """The places that moved since they were last written."""
        rows = []
        for name, tracks in self._tracks.items():
            number = self._topics[name]
            for slot in range(SLOTS) if slots is None else slots:
                track = tracks[slot]
                if track is not None and track.moved:
                    track.moved = False
                    done = encode_done(track.done)
                    rows.append((self.group, number, slot, track.prefix, done))
        return rows

    def pass_idle(self) -> None:
        """Slots without anything under way have settled all that was scanned: let retention know."""
        for name, tracks in self._tracks.items():
            scanned = self._scan[name]
            for track in tracks:
                if track is not None and not track.outstanding and track.next <= scanned and track.prefix < scanned:
                    track.next = track.prefix = scanned
                    track.done.clear()
                    track.moved = True
        if any(track is not None and track.moved for tracks in self._tracks.values() for track in tracks):
            self._note_failure(self.broker.file.submit(self._settling([], self._moved(), self._expected)))

    @staticmethod
    def _note_failure(future: asyncio.Future[Any]) -> None:
        future.add_done_callback(lambda done: None if done.cancelled() else done.exception())

    def lose(self, slots: Collection[int]) -> None:
        """Others own these by now, or will."""
        self.owner.lost([partition for partition in self.partitions() if partition.index in slots])
        self._forget(slots)

    def _forget(self, slots: Collection[int]) -> None:
        for slot in slots:
            self._owned.pop(slot, None)
            for tracks in self._tracks.values():
                tracks[slot] = None
        self._changed()

    def _changed(self) -> None:
        self._expected = ",".join(f"{slot}:{epoch}" for slot, epoch in sorted(self._owned.items()))
        self._filter = "" if len(self._owned) == SLOTS else f" AND slot IN ({','.join(map(str, sorted(self._owned)))})"
        self.balanced = None

    # ---- reading --------------------------------------------------------------------------------------------------

    async def fetch(self, limit: int, wait: float) -> Sequence[Delivery]:
        if self.broker.file.closed and not self.closed:
            raise Unavailable(f"{self.broker.path} was closed under its consumers")
        found = self._collect(limit)
        if found or self.closed:
            return found
        await self.broker.wait(min(wait, 1.0))
        return [] if self.closed or self.broker.file.closed else self._collect(limit)

    def _collect(self, limit: int) -> list[Delivery]:
        found: list[Delivery] = []
        if not self._owned:
            return found
        size = 0
        db = self.broker.file.reader
        (end,) = db.execute("SELECT seq FROM stentor_event ORDER BY seq DESC LIMIT 1").fetchone() or (0,)
        for name, number in self._topics.items():
            tracks = self._tracks[name]
            while self._scan[name] <= end and len(found) < limit and size < FETCH_BYTES:
                room = min(PAGE, limit - len(found))
                rows = db.execute(
                    "SELECT seq, slot, id, key, type, head, body FROM stentor_event "
                    f"WHERE topic = ? AND seq >= ?{self._filter} ORDER BY seq LIMIT ?",
                    (number, self._scan[name], room),
                )
                seq = read = 0
                for seq, slot, id, key, type, head, body in rows:
                    read += 1
                    size += len(body)
                    track = tracks[slot]
                    if track is not None and track.take(seq):
                        seen = track.seen(seq) if track.suspects else False
                        replay = track.replay if seq < track.replay_until else ""
                        message = make_message(name, id, key, type, head, body)
                        found.append(Delivery(message, track.partition, seq, seen, replay))
                    if size >= FETCH_BYTES:
                        break
                rows.close()
                exhausted = read < room and size < FETCH_BYTES
                self._scan[name] = max(end + 1, seq + 1) if exhausted else seq + 1
        return found

    # ---- settling -------------------------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Failure]:
        failures: list[Failure] = []
        accepted: list[tuple[Settlement, list[Row]]] = []
        now = self.broker._clock.now()
        for settlement in settlements:
            partition = settlement.partition
            if self._owned.get(partition.index) != partition.epoch or self.closed:
                failures.append(Failure(settlement, LeaseLost(f"{partition!r} is no longer owned")))
                continue
            rows: list[Row] = []
            if settlement.outputs:
                try:
                    rows = [self.broker.row(message, now) for message in settlement.outputs]
                except StentorError as error:
                    failures.append(Failure(settlement, error))
                    continue
            accepted.append((settlement, rows))
            if settlement.outcome is Outcome.ACK:
                track = self._tracks[partition.topic][partition.index]
                if track is not None:
                    # In memory ahead of the file: nothing but this very settlement may be repeated if it fails.
                    track.settle(settlement.offset)
        if accepted:
            written = [(s, rows) for s, rows in accepted if rows or s.records]
            places, epochs = self._moved(), dict(self._owned)
            try:
                lost = await self.broker.file.submit(self._settling(written, places, self._expected, now))
            except BaseException as error:
                if isinstance(error, PublishUnknown):
                    self.broker.doubt([m for s, _ in written for m in s.outputs], error)
                for _, number, slot, _, _ in places:
                    self._unwritten(number, slot)
                raise
            if lost:
                self.lose([slot for slot in lost if self._owned.get(slot) == epochs.get(slot)])
                failures += [
                    Failure(s, LeaseLost(f"{s.partition!r} was taken over"))
                    for s, _ in accepted
                    if s.partition.index in lost
                ]
            elif any(rows for _, rows in written):
                self.broker._stored()
        return failures

    def _unwritten(self, number: int, slot: int) -> None:
        for name, known in self._topics.items():
            track = self._tracks[name][slot]
            if known == number and track is not None:
                track.moved = True

    def _settling(
        self,
        written: Sequence[tuple[Settlement, list[Row]]],
        places: Sequence[tuple[int, int, int, int, bytes]],
        expected: str,
        now: float = 0.0,
    ) -> Callable[[Tx], set[int]]:
        """The settling transaction: outputs and records, then places; what others own by now is left out."""

        def settle(tx: Tx) -> set[int]:
            lost = self._stolen(tx, expected)
            keep: dict[tuple[int, int, str], bytes | None] = {}
            for settlement, rows in written:
                slot = settlement.partition.index
                if slot in lost:
                    continue
                if rows:
                    self.broker.store(tx, settlement.outputs, rows, now)
                if settlement.records:
                    number = self._topics[settlement.partition.topic]
                    for name, value in settlement.records.items():
                        keep[number, slot, name] = value
            group = self.group
            tx.many(
                "INSERT OR REPLACE", "stentor_journal", _JOURNAL,
                [(group, *place, value) for place, value in keep.items() if value is not None],
            )  # fmt: skip
            gone = [(group, number, slot, name) for (number, slot, name), value in keep.items() if value is None]
            for start in range(0, len(gone), 100):
                part = gone[start : start + 100]
                marks = ",".join(["(?, ?, ?, ?)"] * len(part))
                tx.db.execute(
                    f"DELETE FROM stentor_journal WHERE (grp, topic, slot, name) IN (VALUES {marks})",
                    [value for row in part for value in row],
                )
            tx.many("INSERT OR REPLACE", "stentor_place", _PLACE, [row for row in places if row[2] not in lost])
            return lost

        return settle

    def _stolen(self, tx: Tx, expected: str) -> set[int]:
        """Slots that this consumer believes it owns and does not; one statement when all is well."""
        (owned,) = tx.db.execute(
            "SELECT group_concat(slot || ':' || epoch) FROM "
            "(SELECT slot, epoch FROM stentor_slot WHERE grp = ? AND member = ? ORDER BY slot)",
            (self.group, self.member),
        ).fetchone()
        if (owned or "") == expected:
            return set()
        return {
            int(part.partition(":")[0]) for part in set(expected.split(",")) - set((owned or "").split(",")) if part
        }

    # ---- the journal ----------------------------------------------------------------------------------------------

    async def names(self, partition: Partition) -> list[str]:
        rows = self.broker.file.reader.execute(
            "SELECT name FROM stentor_journal WHERE grp = ? AND topic = ? AND slot = ? AND NOT name GLOB 'm/*' "
            "ORDER BY name",
            (self.group, self._topics[partition.topic], partition.index),
        ).fetchall()
        return [name for (name,) in rows]

    async def read(self, partition: Partition, names: Sequence[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for start in range(0, len(names), 200):
            part = names[start : start + 200]
            found.update(
                self.broker.file.reader.execute(
                    "SELECT name, value FROM stentor_journal WHERE grp = ? AND topic = ? AND slot = ? "
                    f"AND name IN ({','.join('?' * len(part))})",
                    (self.group, self._topics[partition.topic], partition.index, *part),
                ).fetchall()
            )
        return found

    async def marks(self) -> Sequence[Mark]:
        found = []
        for name, number in self._topics.items():
            for slot, mark, value in self.broker.file.reader.execute(
                "SELECT j.slot, j.name, j.value FROM stentor_slot s JOIN stentor_journal j ON j.grp = s.grp "
                "AND j.topic = ? AND j.slot = s.slot AND j.name >= 'm/' AND j.name < 'm0' "
                "WHERE s.grp = ? AND s.member = ?",
                (number, self.group, self.member),
            ).fetchall():
                track = self._tracks[name][slot]
                if track is not None:
                    found.append(Mark(track.partition, mark, value))
        return found

    async def close(self) -> None:
        await self._leave(clean=True)

    async def abandon(self) -> None:
        """Leave as a killed process does. For tests."""
        await self._leave(clean=False)

    async def _leave(self, *, clean: bool) -> None:
        if self.closed:
            return
        async with self.lock:
            self.closed = True
            if self in self.broker._consumers:
                self.broker._consumers.remove(self)
            release = self._releasing(sorted(self._owned)) if clean else None

            def leave(tx: Tx) -> None:
                if release is not None:
                    release(tx)
                tx.db.execute("UPDATE stentor_slot SET member = NULL, clean = 0 WHERE member = ?", (self.member,))
                tx.db.execute("DELETE FROM stentor_member WHERE id = ?", (self.member,))
                tx.regrouped = True

            await self.broker.file.submit(leave)
            self._forget(list(self._owned))
        self.broker._wake()
