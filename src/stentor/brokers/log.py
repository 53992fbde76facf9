"""The engine of the server brokers: the contract on top of an append-only log and a small durable map.

A broker file subclasses ``LogBroker`` and provides the primitives below, in three parts:

- **data**: topics of partitions; ``append``, readers, bounds, the offset of a time, trimming. Offsets rise within a
  partition; gaps are allowed.
- **spaces**: durable maps from name to bytes. ``write`` compares one entry and changes many, as one step. The group's
  place in a partition, its owner and epoch, and its journal are one space; what is declared is another.
- **leases**: which members are alive. The heartbeat is a thread, so that a busy event loop loses nothing.

All else is here and in the two files beside it: declaring, publishing in groups, the spread of partitions, places,
journal, marks, replay, lag, retention (``log_consumer.py``, ``log_admin.py``), and delays where the server has none
(``staging.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from stentor.broker import Features, Finding, Owner, Start
from stentor.brokers.heartbeat import Heart, Heartbeat
from stentor.brokers.log_admin import LogAdmin
from stentor.brokers.log_consumer import LogConsumer, free_owner
from stentor.brokers.staging import DELAY_TOPIC, Staging
from stentor.brokers.storage import DUPLICATE, UNPLACED, Entry, GroupRecord, Reader, Stored, TopicRecord, Write
from stentor.brokers.trust import Trust, refused
from stentor.brokers.wire import pack, pack_delayed
from stentor.clock import Clock, seconds
from stentor.connect import BrokerUrl, count, duration
from stentor.errors import (
    BrokerError,
    PublishUnknown,
    StentorError,
    TooLarge,
    Unavailable,
    UnknownGroup,
    UnknownTopic,
    Unsupported,
)
from stentor.event import Topic
from stentor.message import Message, Receipt, new_id
from stentor.subscription import Slots, Subscription

log = logging.getLogger("stentor.broker")

HOUSEKEEPING = 15.0
"""Seconds between two rounds of trimming, of all processes together."""
GROUP_COMMIT = 2000
"""Messages that one append carries at most."""
PAGE = 500
"""Messages that browsing reads at once."""


_encode = msgspec.msgpack.encode
_topic = msgspec.msgpack.Decoder(TopicRecord).decode
_group = msgspec.msgpack.Decoder(GroupRecord).decode


class LogBroker:
    """A broker made of the primitives of a server.

    Options of all of them: ``lease`` and ``beat`` (seconds; a process silent for ``lease`` loses its partitions),
    ``retention`` (a duration: how long settled events are kept, default 7d; where the broker ``trims``),
    ``partitions`` (of topics that this program makes, in place of what the topic says).
    """

    features: Features
    native_delay = False
    """The server holds delayed messages back; else ``Staging`` does."""
    trims = True
    """Settled events can be removed; else the server removes by its own rules, and ``retention`` is refused."""
    tls: Trust | None = None

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        self.url = url
        self.clock = clock
        self.prefix = url.namespace
        self.lease = url.option("lease", 10.0, float)
        self.beat = url.option("beat", 2.5, float)
        if self.trims:
            self.retention = url.option("retention", 7 * 86400.0, duration)
        self._partitions = url.option("partitions", 0, count)
        self.closed = True
        self.consumers: list[LogConsumer] = []
        self.staging = Staging(self)
        self._topics: dict[str, tuple[TopicRecord, Slots]] = {}
        self._queue: list[tuple[Sequence[Entry], asyncio.Future[list[int | StentorError]]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._heartbeat: Heartbeat | None = None

    def __str__(self) -> str:
        return str(self.url)

    # ---- primitives: what a broker file provides --------------------------------------------------------------------

    @property
    def native(self) -> Any:
        """The client library's own object, outside the contract."""
        raise NotImplementedError

    async def connect(self) -> None:
        """Raises AuthenticationFailed, StorageUnusable or Unavailable."""
        raise NotImplementedError

    async def disconnect(self) -> None:
        raise NotImplementedError

    async def ping(self) -> None:
        """Raises BrokerError, with one line, when the server is away or cannot store."""
        raise NotImplementedError

    async def review(self) -> list[Finding]:
        """As ``Broker.review``."""
        raise NotImplementedError

    async def make_topic(self, topic: str, partitions: int) -> None:
        """Make a topic on the server if it is not there."""
        raise NotImplementedError

    async def append(self, entries: Sequence[Entry]) -> Sequence[int | StentorError]:
        """Store entries durably; an offset, DUPLICATE, UNPLACED or an error for each.

        One call at a time. An entry is not stored when one of its key before it was not. Raises Unavailable when
        nothing was sent.
        """
        raise NotImplementedError

    def reader(self) -> Reader:
        raise NotImplementedError

    async def bounds(self, topic: str, partitions: Sequence[int]) -> list[tuple[int, int]]:
        """The first offset held and the one after the last, of each partition."""
        raise NotImplementedError

    async def find(self, topic: str, partitions: Sequence[int], moment: float) -> list[int]:
        """The first offset stored at or after a time (seconds since the epoch), else the end, of each partition."""
        raise NotImplementedError

    async def pending(self, places: Sequence[tuple[str, int, int]]) -> list[tuple[int, float | None]]:
        """For each topic, partition and offset: how many messages are held from there on, and when the first of them
        was stored.
        """
        raise NotImplementedError

    async def page(self, topic: str, index: int, offset: int, limit: int) -> Sequence[Stored]:
        """Messages of a partition from an offset on."""
        raise NotImplementedError

    async def trim(self, topic: str, index: int, offset: int) -> None:
        """Messages below the offset are not needed any more. Only with ``trims``."""
        raise NotImplementedError

    async def names(self, space: str) -> list[str]:
        raise NotImplementedError

    async def get(self, wanted: Sequence[tuple[str, str]]) -> list[bytes | None]:
        """The values of (space, name) pairs, in one round trip."""
        raise NotImplementedError

    async def peek(self, wanted: Sequence[tuple[str, str]]) -> list[bytes | None]:
        """As ``get``, for the owner of the spaces: all that it wrote itself is there, and that is enough."""
        return await self.get(wanted)

    async def write(self, writes: Sequence[Write]) -> list[bool]:
        """Carry out each write whose fence holds; durable on return. Raises Unavailable when that is not known."""
        raise NotImplementedError

    async def before_claims(self, spaces: Sequence[str], living: Mapping[str, str], me: str) -> None:
        """A member looks at who owns spaces, or is about to take some: see to it that the dead cannot settle."""

    async def forget(self, spaces: Sequence[str]) -> None:
        """Remove spaces with all that is in them."""
        raise NotImplementedError

    def heart(self) -> Heart:
        """A connection for the heartbeat, used in a thread."""
        raise NotImplementedError

    async def leases(self) -> dict[str, bytes]:
        """The names whose lease is not over, with what they said."""
        raise NotImplementedError

    async def delayed(self, now: float) -> float:
        """Let what is due appear; seconds until the next look. Only with ``native_delay``."""
        raise NotImplementedError

    async def withdraw(self, id: str) -> bool:
        """Drop a delayed message. Only with ``native_delay``."""
        raise NotImplementedError

    async def waiting(self) -> list[Message]:
        """The delayed messages, with ``due``, the next one first. Only with ``native_delay``."""
        raise Unsupported("listing delayed events", self.features.name, "wait until they have fallen due")

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def admin(self) -> LogAdmin:
        return LogAdmin(self)

    async def open(self) -> None:
        if not self.closed:
            return
        try:
            await self.connect()
        except BaseException as error:
            await self.disconnect()
            if isinstance(error, Unavailable) and self.tls is not None and (why := await self.tls.refusal()):
                raise refused(self, why) from None
            raise
        self.closed = False
        self._ticking = asyncio.create_task(self._tick(), name=f"stentor {self.features.name} tick")

    async def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        async with contextlib.AsyncExitStack() as leaving:  # all of it, also when this is cancelled
            leaving.push_async_callback(self.disconnect)
            leaving.push_async_callback(self._end_heartbeat)
            leaving.push_async_callback(self._end_tasks)
            await self.staging.stop()

    async def _end_heartbeat(self) -> None:
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            await heartbeat.stop()

    async def _end_tasks(self) -> None:
        tasks = [task for task in (self._ticking, self._flushing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._flushing = None

    async def health(self) -> str | None:
        if self.closed:
            return f"{self} is not open"
        try:
            async with asyncio.timeout(5):
                await self.ping()
        except TimeoutError:
            return f"{self} does not answer within 5 s"
        except StentorError as error:
            return str(error)
        return None

    async def _tick(self) -> None:
        """Let delayed events appear, keep house."""
        cleaned = self.clock.monotonic()
        trouble = ""
        while not self.closed:
            wait = 0.5
            try:
                if self.native_delay:
                    wait = min(wait, await self.delayed(self.clock.now()))
                if self.clock.monotonic() - cleaned > HOUSEKEEPING:
                    cleaned = self.clock.monotonic()
                    await self.admin.keep_house(HOUSEKEEPING)
                trouble = ""
            except StentorError as error:
                if str(error) != trouble:
                    trouble = str(error)
                    log.warning("%s; trying again", error)
            await self.clock.sleep(max(wait, 0.002))

    # ---- what is declared --------------------------------------------------------------------------------------------

    @property
    def meta(self) -> str:
        """The space of what is declared: topics under ``t/``, groups under ``g/``."""
        return f"{self.prefix}meta"

    def space(self, group: str, topic: str, index: int) -> str:
        """The space of a group's (by its id) place in a partition."""
        return f"{self.prefix}{group}/{topic}/{index}"

    async def records(self) -> tuple[dict[str, TopicRecord], dict[str, GroupRecord]]:
        """All topics and groups that are declared."""
        names = await self.names(self.meta)
        values = await self.get([(self.meta, name) for name in names])
        found = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
        topics = {name[2:]: _topic(value) for name, value in found if name.startswith("t/")}
        groups = {name[2:]: _group(value) for name, value in found if name.startswith("g/")}
        return dict(sorted(topics.items())), dict(sorted(groups.items()))

    async def topic(self, name: str) -> TopicRecord:
        """A declared topic. Raises UnknownTopic."""
        return (self._topics.get(name) or await self._look_up(name))[0]

    async def _look_up(self, name: str) -> tuple[TopicRecord, Slots]:
        [value] = await self.get([(self.meta, f"t/{name}")])
        if value is None:
            raise UnknownTopic(f"topic {name!r} was never declared on {self}")
        record = _topic(value)
        self._topics[name] = record, Slots(record.partitions)
        return self._topics[name]

    async def group(self, name: str) -> GroupRecord:
        """A declared group. Raises UnknownGroup."""
        [value] = await self.get([(self.meta, f"g/{name}")])
        if value is None:
            _, groups = await self.records()
            raise UnknownGroup(f"no group {name!r} on {self}; there are {', '.join(groups) or 'none'}")
        return _group(value)

    async def change(self, name: str, before: Any, after: Any) -> bool:
        """Change what is declared under a name, if it still is what it was."""
        fence = None if before is None else _encode(before)
        value = None if after is None else _encode(after)
        return (await self.write([Write(self.meta, (name, fence), {name: value})]))[0]

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        wanted = {topic.name: topic for topic in topics}
        for subscription in subscriptions:
            for name in subscription.topics:
                wanted.setdefault(name, Topic(name))
        known, groups = await self.records()
        for name, topic in wanted.items():
            await self._declare_topic(topic, known.get(name), name in {topic.name for topic in topics})
        for subscription in subscriptions:
            await self._declare_group(subscription, groups.get(subscription.name))

    async def _declare_topic(self, topic: Topic, known: TopicRecord | None, told: bool) -> None:
        retention = None if topic.retention is None else seconds(topic.retention)
        if known is None:
            internal = topic.name.startswith("stentor.")
            count = 1 if internal else self._partitions or topic.partitions
            record = TopicRecord(self.prefix + topic.name, count, retention)
            await self.make_topic(record.stored, count)
            await self.change(f"t/{topic.name}", None, record)
        elif told and known.retention != retention:
            await self.change(f"t/{topic.name}", known, msgspec.structs.replace(known, retention=retention))
        await self._look_up(topic.name)  # what is known stays until then: others publish meanwhile

    async def _declare_group(self, subscription: Subscription, known: GroupRecord | None) -> None:
        name = f"g/{subscription.name}"
        expires = subscription.expires if subscription.instance else 0.0
        record = GroupRecord(
            new_id() if known is None else known.id, subscription.app, subscription.topics, subscription.single,
            expires, self.clock.now() if expires else 0.0,
        )  # fmt: skip
        if known is None and not await self.change(name, None, msgspec.structs.replace(record, topics=())):
            known = await self.group(subscription.name)  # another process was first
            record = msgspec.structs.replace(record, id=known.id)
        # Places first: from the moment that the group is known to read a topic, nothing of it may be removed.
        for topic in subscription.topics:
            if known is None or topic not in known.topics:
                await self._place(record.id, topic, subscription.start)
        await self.write([Write(self.meta, ("!", None), {name: _encode(record)})])
        if known is not None:
            gone = [topic for topic in known.topics if topic not in subscription.topics]
            await self.admin.forget_places(record.id, gone)

    async def _place(self, group: str, topic: str, start: Start) -> None:
        """Fix where a group begins in each partition, unless that is done."""
        record = await self.topic(topic)
        offsets = await self.starts(record, start)
        await self.write(
            [
                Write(self.space(group, topic, index), ("!owner", None), free_owner(offset))
                for index, offset in enumerate(offsets)
            ]
        )

    async def starts(self, record: TopicRecord, start: Start) -> list[int]:
        """The offset of a place in a topic, for each of its partitions."""
        partitions = range(record.partitions)
        if isinstance(start, datetime):
            return await self.find(record.stored, partitions, start.timestamp())
        bounds = await self.bounds(record.stored, partitions)
        if start == "earliest":
            return [first for first, _ in bounds]
        if start == "latest":
            return [end for _, end in bounds]
        position = int(start)
        if self.features.one_order:
            return [min(max(position, first), end) for first, end in bounds]
        # The offset of one partition: the others begin with what was stored at or after the same time.
        index, offset = position % record.partitions, position // record.partitions
        [(_, moment)] = await self.pending([(record.stored, index, offset)])
        found = [end for _, end in bounds] if moment is None else await self.find(record.stored, partitions, moment)
        found[index] = min(max(offset, bounds[index][0]), bounds[index][1])
        return found

    def position(self, record: TopicRecord, index: int, offset: int) -> int:
        """The place of a message in its topic, as receipts and browsing give it and as replay takes it."""
        return offset if self.features.one_order else offset * record.partitions + index

    # ---- publishing -------------------------------------------------------------------------------------------------

    async def entry(self, message: Message, now: float) -> Entry:
        """A message ready to be stored. Raises UnknownTopic or TooLarge."""
        record, slots = self._topics.get(message.topic) or await self._look_up(message.topic)
        if message.due > now and not self.native_delay:
            body = pack_delayed(message)
            home = self.staging.topic or await self.staging.start()
            entry = Entry(home, 0, body, message)
        else:
            body = pack(message)
            entry = Entry(
                record.stored, slots.of(message.key), body, message, message.due if message.due > now else 0.0
            )
        if len(body) > self.features.max_bytes:
            raise TooLarge(f"{message.id}: {len(body):,} bytes; {self} takes {self.features.max_bytes:,} at most")
        return entry

    async def publish(self, messages: Sequence[Message]) -> Sequence[Receipt]:
        now = self.clock.now()
        entries = [await self.entry(message, now) for message in messages]
        results = await self.store(entries)
        receipts: list[Receipt] = []
        failed: list[tuple[Message, StentorError]] = []
        for entry, result in zip(entries, results, strict=True):
            message = entry.message
            if not isinstance(result, int):
                failed.append((message, result))
            elif result == DUPLICATE:
                receipts.append(Receipt(message.id, message.topic, None, True))
            elif message.due > now or result == UNPLACED:
                receipts.append(Receipt(message.id, message.topic, None))
            else:
                place = self.position(self._topics[message.topic][0], entry.partition, result)
                receipts.append(Receipt(message.id, message.topic, place))
        if failed:
            error = failed[0][1]
            if receipts or any(isinstance(other, PublishUnknown) for _, other in failed):
                why = error.why if isinstance(error, PublishUnknown) else str(error)
                raise PublishUnknown([message.id for message, _ in failed], why)
            raise error
        return receipts

    async def store(self, entries: Sequence[Entry]) -> list[int | StentorError]:
        """Append entries together with what others publish now: one append is under way at a time, so that none of a
        key can be overtaken.
        """
        if self.closed:
            raise BrokerError(f"{self} is not open")
        future: asyncio.Future[list[int | StentorError]] = asyncio.get_running_loop().create_future()
        self._queue.append((entries, future))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush(), name="stentor publish")
        return await future

    async def _flush(self) -> None:
        while self._queue:
            taken: list[tuple[Sequence[Entry], asyncio.Future[list[int | StentorError]]]] = []
            entries: list[Entry] = []
            while self._queue and (not entries or len(entries) + len(self._queue[0][0]) <= GROUP_COMMIT):
                taken.append(self._queue.pop(0))
                entries.extend(taken[-1][0])
            try:
                results = await self.append(entries)
            except BaseException as error:
                for part, future in taken:
                    if future.done():
                        continue
                    if isinstance(error, PublishUnknown):  # each is told of its own
                        future.set_exception(PublishUnknown([entry.message.id for entry in part], error.why))
                    elif isinstance(error, StentorError):
                        future.set_exception(error)
                    else:
                        future.cancel()
                if not isinstance(error, StentorError):
                    raise
                continue
            at = 0
            for part, future in taken:
                if not future.done():
                    future.set_result(list(results[at : at + len(part)]))
                at += len(part)

    # ---- consuming --------------------------------------------------------------------------------------------------

    async def subscribe(self, subscription: Subscription, owner: Owner) -> LogConsumer:
        group = await self.group(subscription.name)
        partitions = {name: (await self.topic(name)).partitions for name in subscription.topics}
        stored = {name: (await self.topic(name)).stored for name in subscription.topics}
        if DELAY_TOPIC not in subscription.topics and not self.native_delay:
            await self.staging.start()
        return LogConsumer(self, subscription, owner, group.id, partitions, stored)

    @property
    def heartbeat(self) -> Heartbeat:
        """The lease of this process, renewed by a thread from the first member on."""
        if self._heartbeat is None:
            self._heartbeat = Heartbeat(self.heart, self.lease, self.beat)
        return self._heartbeat

    async def browse(self, topic: str, start: Start, *, follow: bool) -> AsyncIterator[tuple[int, Message]]:
        record = await self.topic(topic)
        offsets = await self.starts(record, start)
        if not follow:
            await self.await_visible(record)
        horizon = math.inf
        while True:
            if self.features.one_order:
                # Partitions are read one after the other, and events come meanwhile: what is at or after this end may
                # be seen in one of them before what it follows is seen in another. It is left for the next round.
                horizon = max(end for _, end in await self.bounds(record.stored, range(record.partitions)))
            heads: list[tuple[float, int, int, list[Stored]]] = []
            for index in range(record.partitions):
                page = list(await self.page(record.stored, index, offsets[index], PAGE))
                if page:
                    heads.append(self._head(index, page[::-1]))
            heapq.heapify(heads)
            if not heads and not follow:
                return
            while heads:
                _, _, index, page = heapq.heappop(heads)
                stored = page.pop()
                if stored.offset >= horizon:
                    break
                offsets[index] = stored.offset + 1
                yield self.position(record, index, stored.offset), stored.message
                page = page or list(await self.page(record.stored, index, offsets[index], PAGE))[::-1]
                if page:
                    heapq.heappush(heads, self._head(index, page))
            if follow:
                await self.clock.sleep(0.1)

    async def await_visible(self, record: TopicRecord) -> None:
        """Wait until what was confirmed until now can be read, where that is not the same."""

    def _head(self, index: int, page: list[Stored]) -> tuple[float, int, int, list[Stored]]:
        """What the partitions of a topic are merged by: offsets where they are of one order, else times."""
        return (0.0 if self.features.one_order else page[-1].time, page[-1].offset, index, page)
