"""The memory broker: all of the contract inside one process, nothing after it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any

from stentor.broker import FETCH_BYTES, Features, Finding, GroupInfo, Owner, Start, TopicInfo
from stentor.brokers.track import Track, quota
from stentor.clock import Clock, seconds
from stentor.connect import BrokerUrl
from stentor.errors import BrokerError, LeaseLost, StentorError, UnknownGroup, UnknownTopic
from stentor.event import Topic
from stentor.message import Delivery, Failure, Lag, Mark, Message, Outcome, Partition, Receipt, Settlement
from stentor.subscription import Slots, Subscription

SLOTS = 64
WINDOW = 7 * 86400.0
TRIM = 4096


class _Log:
    """One topic: messages from offset ``base`` on, with their slots and the times they were stored."""

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        self.retention = None if topic.retention is None else seconds(topic.retention)
        self.base = 0
        self.messages: list[Message] = []
        self.slots: list[int] = []
        self.times: list[float] = []
        self.bytes = 0
        self.waiting: list[asyncio.Future[None]] = []

    @property
    def end(self) -> int:
        return self.base + len(self.messages)

    def wake(self) -> None:
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


class _Group:
    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.places: dict[str, list[tuple[int, set[int]]]] = {}
        """By topic: prefix and done set of each slot, as of when it was last owned."""
        self.replays: dict[str, tuple[str, int]] = {}
        self.journal: dict[tuple[str, int], dict[str, bytes]] = {}
        self.owners: list[MemoryConsumer | None] = [None] * SLOTS
        self.clean = [True] * SLOTS
        self.epoch = 0
        self.members: list[MemoryConsumer] = []
        self.lock = asyncio.Lock()
        self.marks = 0

    def place(self, topic: str, slot: int) -> tuple[int, set[int]]:
        """Prefix and done set of a slot now."""
        owner = self.owners[slot]
        track = None if owner is None else owner.tracks[topic][slot]
        return self.places[topic][slot] if track is None else (track.prefix, track.done)


class MemoryBroker:
    """``memory://``: for tests, and for programs whose events may die with the process.

    Options: ``max_bytes`` (default 256 MiB) bounds what is held; publishers wait when unsettled events reach it.
    """

    features = Features(
        name="memory", durable="process", shared=False, atomic=True, dedupe=True, replay=True, cancel=True, browse=True,
        restart=False,
    )  # fmt: skip

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        self._clock = clock
        self._prefix = url.namespace
        self._limit = url.option("max_bytes", 256 * 1024 * 1024, int)
        self._logs: dict[str, _Log] = {}
        self._groups: dict[str, _Group] = {}
        self._readers: dict[str, list[_Group]] = {}
        self._slots = Slots(SLOTS)
        self._delayed: list[tuple[float, int, Message]] = []
        self._order = itertools.count()
        self._timer: Any = None
        self._seen: dict[tuple[str, str], tuple[float, int | None]] = {}
        self._bytes = 0
        self._space: list[asyncio.Future[None]] = []
        self._names = itertools.count(1)

    @property
    def admin(self) -> MemoryBroker:
        return self

    async def open(self) -> None:
        self._set_timer()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def health(self) -> str | None:
        return None

    async def review(self) -> list[Finding]:
        return []

    def _log(self, name: str) -> _Log:
        log = self._logs.get(name)
        if log is None:
            log = self._logs[name] = _Log(Topic(name))
        return log

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        for topic in topics:
            if topic.name not in self._logs:
                self._logs[topic.name] = _Log(topic)
        for subscription in subscriptions:
            group = self._groups.get(subscription.name)
            if group is None:
                group = self._groups[subscription.name] = _Group(subscription)
            group.subscription = subscription
            for name in subscription.topics:
                log = self._log(name)
                if name not in group.places:
                    start = log.base if subscription.start == "earliest" else log.end
                    group.places[name] = [(start, set()) for _ in range(SLOTS)]
                readers = self._readers.setdefault(name, [])
                if group not in readers:
                    readers.append(group)

    # ---- publishing ---------------------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message]) -> Sequence[Receipt]:
        for message in messages:
            if message.topic not in self._logs:
                raise UnknownTopic(f"topic {message.topic!r} was never declared")
        while self._bytes > self._limit and not self._trim():
            space: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._space.append(space)
            await space
        return self._append(messages)

    def _append(self, messages: Sequence[Message]) -> list[Receipt]:
        now = self._clock.now()
        receipts = []
        touched: set[str] = set()
        for message in messages:
            identity = (message.source, message.id)
            if not message.fresh:
                seen = self._seen.get(identity)
                if seen is not None and seen[0] > now:
                    receipts.append(Receipt(message.id, message.topic, seen[1], True))
                    continue
            position: int | None = None
            if message.due > now:
                heapq.heappush(self._delayed, (message.due, next(self._order), message))
                self._set_timer()
            else:
                position = self._store(message, now)
                touched.add(message.topic)
            if not message.fresh:
                self._remember(identity, now, position)
            receipts.append(Receipt(message.id, message.topic, position))
        for name in touched:
            log = self._logs[name]
            if log.waiting:
                log.wake()
        return receipts

    def _remember(self, identity: tuple[str, str], now: float, position: int | None) -> None:
        self._seen[identity] = (now + WINDOW, position)
        if len(self._seen) > 1_000_000:
            for key in list(itertools.islice(self._seen, 100_000)):
                del self._seen[key]

    def _store(self, message: Message, now: float) -> int:
        log = self._logs[message.topic]
        size = len(message.data) + 256
        log.messages.append(message)
        log.slots.append(self._slots.of(message.key))
        log.times.append(now)
        log.bytes += size
        self._bytes += size
        end = log.base + len(log.messages)
        if end % TRIM == 0:
            self._trim_log(log)
        return end - 1

    def _trim(self) -> bool:
        for log in self._logs.values():
            self._trim_log(log)
        return self._bytes <= self._limit

    def _trim_log(self, log: _Log) -> None:
        """Drop what every group has settled once it is past its retention or half the limit is used."""
        name = log.topic.name
        groups = self._readers.get(name, [])
        if name.startswith("stentor.dead.") or (log.retention is None and self._bytes <= self._limit // 2):
            return
        low = min((self._low(group, name) for group in groups), default=log.end)
        keep = low - log.base
        if log.retention is not None:
            oldest = self._clock.now() - log.retention
            keep = min(keep, next((i for i, time in enumerate(log.times[:keep]) if time >= oldest), keep))
        if keep > 0:
            dropped = sum(len(message.data) + 256 for message in log.messages[:keep])
            del log.messages[:keep], log.slots[:keep], log.times[:keep]
            log.base += keep
            log.bytes -= dropped
            self._bytes -= dropped
        if self._bytes <= self._limit:
            space, self._space = self._space, []
            for future in space:
                if not future.done():
                    future.set_result(None)

    def _low(self, group: _Group, topic: str) -> int:
        """The first offset that a group may still need."""
        log = self._logs[topic]
        places = [group.place(topic, slot) for slot in range(SLOTS)]
        for offset in range(max(log.base, min(prefix for prefix, _ in places)), log.end):
            prefix, done = places[log.slots[offset - log.base]]
            if offset >= prefix and offset not in done:
                return offset
        return log.end

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._delayed:
            wait = max(0.0, self._delayed[0][0] - self._clock.now())
            # In short steps: a wall clock that is set forward must not delay what is due by it.
            self._timer = self._clock.call_later(min(wait, 1.0), self._fall_due)

    def _fall_due(self) -> None:
        now = self._clock.now()
        touched = set()
        while self._delayed and self._delayed[0][0] <= now:
            _, _, message = heapq.heappop(self._delayed)
            self._store(message, now)
            touched.add(message.topic)
        for name in touched:
            self._logs[name].wake()
        self._set_timer()

    # ---- groups -------------------------------------------------------------------------------------------------

    async def subscribe(self, subscription: Subscription, owner: Owner) -> MemoryConsumer:
        group = self._groups.get(subscription.name)
        if group is None:
            raise UnknownGroup(f"group {subscription.name!r} was never declared")
        return MemoryConsumer(self, group, owner, f"{next(self._names):08d}")

    async def _spread(self, group: _Group) -> None:
        """Give every member its share of the slots, taking from those that have too many."""
        async with group.lock:
            names = [member.name for member in group.members]
            single = group.subscription.single
            for member in group.members:
                surplus = member.owned[quota(names, member.name, SLOTS, single=single) :]
                if surplus:
                    await member.owner.revoked([p for slot in surplus for p in member.partitions(slot)])
                    for slot in surplus:
                        member.give_back(slot, clean=True)
            for member in group.members:
                room = quota(names, member.name, SLOTS, single=single) - len(member.owned)
                free = [slot for slot in range(SLOTS) if group.owners[slot] is None][:room]
                if free:
                    await member.take(free)

    # ---- administration -----------------------------------------------------------------------------------------

    async def topics(self) -> list[TopicInfo]:
        return [
            TopicInfo(
                name, len(log.messages), log.bytes, log.times[0] if log.times else None,
                log.times[-1] if log.times else None,
            )
            for name, log in sorted(self._logs.items())
        ]  # fmt: skip

    async def groups(self) -> list[GroupInfo]:
        return [
            GroupInfo(name, group.subscription.app, group.subscription.topics, len(group.members))
            for name, group in sorted(self._groups.items())
        ]

    async def lag(self) -> list[Lag]:
        found = []
        now = self._clock.now()
        for name, group in sorted(self._groups.items()):
            for topic in group.places:
                log = self._logs[topic]
                waiting, oldest = 0, now
                current = [group.place(topic, slot) for slot in range(SLOTS)]
                low = min(prefix for prefix, _ in current)
                for offset in range(max(low, log.base), log.end):
                    prefix, done = current[log.slots[offset - log.base]]
                    if offset >= prefix and offset not in done:
                        waiting += 1
                        oldest = min(oldest, log.times[offset - log.base])
                parked = sum(
                    sum(name.startswith("q/") for name in journal)
                    for (home, _), journal in group.journal.items()
                    if home == topic
                )
                found.append(Lag(name, topic, waiting, now - oldest, parked, len(group.members)))
        return found

    def _group(self, name: str) -> _Group:
        if name not in self._groups:
            raise UnknownGroup(f"no group {name!r}; there are {', '.join(sorted(self._groups)) or 'none'}")
        return self._groups[name]

    async def rename_group(self, old: str, new: str) -> None:
        self._group(old)
        if new in self._groups:
            raise BrokerError(f"group {new!r} exists already")
        self._groups[new] = self._groups.pop(old)
        dead = f"stentor.dead.{old}"
        if dead in self._logs:
            self._logs[f"stentor.dead.{new}"] = self._logs.pop(dead)

    async def drop_group(self, name: str) -> None:
        group = self._group(name)
        if group.members:
            raise BrokerError(f"group {name!r} has {len(group.members)} members; stop them first")
        del self._groups[name]
        for readers in self._readers.values():
            if group in readers:
                readers.remove(group)

    async def replay(self, group: str, start: Start, topics: Sequence[str] = ()) -> int:
        target = self._group(group)
        count = 0
        async with target.lock:
            members = list(target.members)
            for member in members:
                # A new epoch: what runs of the old one can no longer settle.
                partitions = [p for slot in member.owned for p in member.partitions(slot)]
                member.owner.lost(partitions)
                for slot in list(member.owned):
                    member.give_back(slot, clean=True)
            for topic in topics or target.places:
                if topic not in target.places:
                    raise UnknownTopic(f"group {group!r} does not read topic {topic!r}")
                log = self._logs[topic]
                offset = self._offset(log, start)
                replay = f"{group}@{next(self._order)}"
                reached = max(max(done, default=-1) + 1 or prefix for prefix, done in target.places[topic])
                target.replays[topic] = (replay, max(reached, offset))
                count += max(0, log.end - offset)
                target.places[topic] = [(offset, set()) for _ in range(SLOTS)]
                for (home, _), journal in target.journal.items():
                    if home == topic:
                        for name in [n for n in journal if n[:2] in ("q/", "a/", "p/") and int(n[2:22]) >= offset]:
                            del journal[name]
                        for name in [n for n, v in journal.items() if n[:2] == "k/" and int(v[:20]) >= offset]:
                            del journal[name]
        await self._spread(target)
        return count

    @staticmethod
    def _offset(log: _Log, start: Start) -> int:
        if start == "earliest":
            return log.base
        if start == "latest":
            return log.end
        if isinstance(start, datetime):
            moment = start.timestamp()
            return next((log.base + i for i, time in enumerate(log.times) if time >= moment), log.end)
        return min(max(int(start), log.base), log.end)

    async def cancel(self, id: str) -> bool:
        kept = [entry for entry in self._delayed if entry[2].id != id]
        found = len(kept) < len(self._delayed)
        heapq.heapify(kept)
        self._delayed = kept
        self._set_timer()
        return found

    async def delayed(self) -> list[Message]:
        return [message for _, _, message in sorted(self._delayed, key=lambda entry: entry[:2])]

    async def journal(self, group: str, topic: str, partition: int, prefix: str) -> dict[str, bytes]:
        held = self._group(group).journal.get((topic, partition), {})
        return {name: value for name, value in held.items() if name.startswith(prefix)}

    async def mark(self, group: str, topic: str, partition: int, name: str, value: bytes) -> None:
        target = self._group(group)
        target.journal.setdefault((topic, partition), {})[name] = value
        target.marks += 1

    async def browse(self, topic: str, start: Start, *, follow: bool) -> AsyncIterator[tuple[int, Message]]:
        if topic not in self._logs:
            raise UnknownTopic(f"topic {topic!r} was never declared")
        log = self._logs[topic]
        offset = self._offset(log, start)
        while True:
            while offset < log.end:
                offset = max(offset, log.base)
                yield offset, log.messages[offset - log.base]
                offset += 1
            if not follow:
                return
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            log.waiting.append(future)
            await future


class MemoryConsumer:
    """A member of a group in this process."""

    until = math.inf

    async def sure(self) -> None:
        """Nobody else can own what is owned here."""

    def __init__(self, broker: MemoryBroker, group: _Group, owner: Owner, name: str) -> None:
        self.name = name
        self.owner = owner
        self.owned: list[int] = []
        self._broker = broker
        self._group = group
        self._logs = [broker._logs[topic] for topic in group.subscription.topics]
        self.tracks: dict[str, list[Track | None]] = {log.topic.name: [None] * SLOTS for log in self._logs}
        self._scan = {log.topic.name: log.base for log in self._logs}
        self._closed = False

    def partitions(self, slot: int) -> list[Partition]:
        return [track.partition for tracks in self.tracks.values() if (track := tracks[slot]) is not None]

    async def take(self, slots: list[int]) -> None:
        """Become the owner of free slots; the worker loads their journals before anything is fetched."""
        group = self._group
        group.epoch += 1
        fresh: list[tuple[str, int, Track]] = []
        for slot in slots:
            group.owners[slot] = self
            for log in self._logs:
                topic = log.topic.name
                prefix, done = group.places[topic][slot]
                partition = Partition(topic, slot, group.epoch, clean=group.clean[slot])
                replay, until = group.replays.get(topic, ("", 0))
                fresh.append(
                    (topic, slot, Track(partition, prefix, done, known=log.end, replay=replay, replay_until=until))
                )
            group.clean[slot] = True
        self.owned.extend(slots)
        for topic, slot, track in fresh:
            self.tracks[topic][slot] = track
        await self.owner.assigned([track.partition for _, _, track in fresh])
        for topic, _, track in fresh:
            self._scan[topic] = min(self._scan[topic], track.prefix)
        for log in self._logs:
            log.wake()

    def give_back(self, slot: int, *, clean: bool) -> None:
        group = self._group
        for topic, tracks in self.tracks.items():
            track = tracks[slot]
            if track is not None:
                group.places[topic][slot] = (track.prefix, {offset for offset in track.done if offset >= track.prefix})
                tracks[slot] = None
        group.owners[slot] = None
        group.clean[slot] = clean
        self.owned.remove(slot)

    async def start(self) -> None:
        self._group.members.append(self)
        await self._broker._spread(self._group)

    async def fetch(self, limit: int, wait: float) -> Sequence[Delivery]:
        found = self._collect(limit)
        if found or self._closed:
            return found
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        for log in self._logs:
            log.waiting.append(future)
        timer = loop.call_later(wait, lambda: None if future.done() else future.set_result(None))
        try:
            await future
        finally:
            timer.cancel()
            for log in self._logs:
                if future in log.waiting:
                    log.waiting.remove(future)
        return self._collect(limit)

    def _collect(self, limit: int) -> list[Delivery]:
        found: list[Delivery] = []
        size = 0
        for log in self._logs:
            topic = log.topic.name
            offset, end, base = max(self._scan[topic], log.base), log.end, log.base
            tracks, messages, slots = self.tracks[topic], log.messages, log.slots
            while offset < end and len(found) < limit and size < FETCH_BYTES:
                track = tracks[slots[offset - base]]
                if track is not None and track.take(offset):
                    seen = track.seen(offset) if track.suspects else False
                    replay = track.replay if offset < track.replay_until else ""
                    message = messages[offset - base]
                    size += len(message.data)
                    found.append(Delivery(message, track.partition, offset, seen, replay))
                offset += 1
            self._scan[topic] = offset
        return found

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Failure]:
        failures: list[Failure] = []
        for settlement in settlements:
            partition = settlement.partition
            track = self.tracks[partition.topic][partition.index]
            if track is None or track.partition is not partition or self._closed:
                failures.append(Failure(settlement, LeaseLost(f"{partition!r} is no longer owned")))
                continue
            if settlement.outputs:
                error = self._refusal(settlement.outputs)
                if error is not None:
                    failures.append(Failure(settlement, error))
                    continue
                self._broker._append(settlement.outputs)
            if settlement.records:
                journal = self._group.journal.setdefault((partition.topic, partition.index), {})
                for name, value in settlement.records.items():
                    if value is None:
                        journal.pop(name, None)
                    else:
                        journal[name] = value
            if settlement.outcome is Outcome.ACK:
                track.settle(settlement.offset)
        if self._broker._space:  # publishers wait: what is settled now may be room for them
            self._broker._trim()
        return failures

    def _refusal(self, outputs: Sequence[Message]) -> StentorError | None:
        for message in outputs:
            if message.topic not in self._broker._logs:
                return UnknownTopic(f"topic {message.topic!r} was never declared")
        return None

    def _journal(self, partition: Partition) -> dict[str, bytes]:
        return self._group.journal.get((partition.topic, partition.index), {})

    async def names(self, partition: Partition) -> list[str]:
        return sorted(name for name in self._journal(partition) if not name.startswith("m/"))

    async def read(self, partition: Partition, names: Sequence[str]) -> dict[str, bytes]:
        journal = self._journal(partition)
        return {name: journal[name] for name in names if name in journal}

    async def marks(self) -> Sequence[Mark]:
        if not self._group.marks:
            return ()
        found = []
        for slot in self.owned:
            for partition in self.partitions(slot):
                for name, value in self._journal(partition).items():
                    if name.startswith("m/"):
                        found.append(Mark(partition, name, value))
        return found

    async def close(self) -> None:
        await self._leave(clean=True)

    async def abandon(self) -> None:
        """Leave as a killed process does: what was delivered counts as seen by the next owner. For tests."""
        await self._leave(clean=False)

    async def _leave(self, *, clean: bool) -> None:
        if self._closed:
            return
        self._closed = True
        async with self._group.lock:
            for slot in list(self.owned):
                self.give_back(slot, clean=clean)
            if self in self._group.members:
                self._group.members.remove(self)
        for log in self._logs:
            log.wake()
        await self._broker._spread(self._group)
