"""What a server that can only append and read needs besides: the spaces by a replicated map, the leases by messages.

Kafka and NATS JetStream share this; each brings a ``Feed`` and a few words to make, tell, read and remove a topic.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, NamedTuple

import msgspec

from stentor.broker import Durable
from stentor.brokers.log import LogBroker
from stentor.brokers.logstore import HOLD, Dropped, LogStore
from stentor.brokers.storage import Held, Write
from stentor.brokers.wire import unpack
from stentor.clock import Clock
from stentor.connect import BrokerUrl
from stentor.errors import BrokerError, ConfigError, Unavailable, UnknownTopic
from stentor.event import Topic
from stentor.message import Message
from stentor.subscription import Subscription

PATIENCE = 10.0
"""Seconds in which the leases have to be read."""
LEASES_KEPT = 3600.0

encode_lease = msgspec.msgpack.Encoder().encode
_lease = msgspec.msgpack.Decoder(tuple[str, bytes, float])

log = logging.getLogger("stentor.broker")


class Read(NamedTuple):
    """A message as it was read for a token: its offset, when it was stored (seconds since the epoch), its bytes."""

    token: Any
    offset: int
    time: float
    value: bytes


class Removed(Unavailable):
    """The server has removed messages by its own rules before they were read."""


class Feed(ABC):
    """Reads partitions from offsets on, ahead of whoever takes what was read."""

    def __init__(self) -> None:
        self._ready = asyncio.Event()
        """Set when something was read, or went wrong."""
        self._trouble: Unavailable | None = None
        self._died: Unavailable | None = None

    def _start(self, reading: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Read in a task. Should a bug end it, whoever reads is told so each time, and nothing waits in silence."""
        task = asyncio.create_task(reading, name=name)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s ended", task.get_name(), exc_info=error)
            self._died = Unavailable(f"the {task.get_name()} ended: {type(error).__name__}: {error}")
            self._ready.set()

    @abstractmethod
    def seek(self, token: Any, topic: str, index: int, offset: int) -> None:
        """Read a partition from an offset on; what is read is marked with ``token``."""

    @abstractmethod
    def drop(self, token: Any) -> None:
        """Read no more for a token."""

    @abstractmethod
    def take(self, limit: int) -> list[Read]:
        """What was read by now."""

    @abstractmethod
    async def close(self) -> None: ...

    async def read(self, limit: int, wait: float) -> list[Read]:
        """What was read, waiting up to ``wait`` seconds for the first; cancelling it loses nothing."""
        self._ready.clear()
        found = self.take(limit)
        if not found and wait > 0 and self._died is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._ready.wait()
            found = self.take(limit)
        if not found and self._died is not None:
            raise self._died
        return found

    def trouble(self) -> Unavailable | None:
        """Why it cannot read, told once; a ``Dropped`` when the topic is gone, ``Removed`` when it had to skip some."""
        trouble, self._trouble = self._trouble, None
        return trouble

    def fail(self, error: BrokerError) -> None:
        """Tell whoever reads."""
        self._trouble = error if isinstance(error, Unavailable) else Unavailable(str(error))
        if isinstance(error, UnknownTopic):
            self._trouble = Dropped(str(error))
        self._ready.set()


class LogStateBroker(LogBroker):
    """A broker whose spaces and leases are messages, too."""

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        super().__init__(url, clock)
        self._store: LogStore | None = None
        self._leases_feed: Feed | None = None
        self._leases: dict[str, tuple[bytes, float]] = {}
        self._leases_read = 0
        self._leases_seen = 0.0
        self._leases_lock = asyncio.Lock()
        self.beaten = -1
        """The offset of the last beat that was confirmed."""

    # ---- what the server's file provides ----------------------------------------------------------------------------

    def feed(self) -> Feed:
        raise NotImplementedError

    async def make(self, topic: str, partitions: int = 1, keep: float = -1, *, fewer: bool = False) -> None:
        """Make a topic that by itself removes nothing, or what is older than ``keep`` seconds.

        With ``fewer``, one replica less will do while a node is down. Raises ConfigError if there is another of its
        name, or Unavailable.
        """
        raise NotImplementedError

    async def tell(self, topic: str, value: bytes) -> int:
        """Store a message in a topic of one partition; its offset. Raises UnknownTopic or Unavailable."""
        raise NotImplementedError

    async def told(self, topic: str) -> list[bytes]:
        """The last messages of a topic of one partition, the newest among them. Raises UnknownTopic or Unavailable."""
        raise NotImplementedError

    async def remove(self, topic: str) -> None:
        """Remove a topic, which need not exist. Raises Unavailable."""
        raise NotImplementedError

    def otherwise(self, topic: str, count: int, wanted: int) -> ConfigError:
        text = f"topic {topic} has {count} partitions, not {wanted}; write partitions={count} there"
        return ConfigError(f"{self}: {text}")

    async def survives(self, topics: Sequence[str]) -> Durable:  # noqa: ARG002
        """What a confirmed event of any of these topics, as stored, survives: where the server tells, what it says."""
        return self.features.durable

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def lease_topic(self) -> str:
        return f"{self.prefix}stentor.leases"

    async def open_state(self) -> None:
        await self.make(self.lease_topic, keep=LEASES_KEPT)
        self._store = LogStore(_Generations(self))
        await self._store.open()
        await self._learn_durable()

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await super().declare(topics, subscriptions)
        await self._learn_durable()

    async def _learn_durable(self) -> None:
        """The least of the topics that this program uses is what its events survive."""
        with contextlib.suppress(BrokerError):  # one may not be allowed to ask; what is away confirms nothing either
            durable = await self.survives([self.lease_topic, *(known.stored for known, _ in self._topics.values())])
            self.features = msgspec.structs.replace(self.features, durable=durable)

    async def close_state(self) -> None:
        if self._store is not None:
            await self._store.close()
            self._store = None
        if self._leases_feed is not None:
            await self._leases_feed.close()
            self._leases_feed = None
        self._leases_seen = 0.0

    async def make_topic(self, topic: str, partitions: int) -> None:
        await self.make(topic, partitions)

    def reader(self) -> FeedReader:
        return FeedReader(self.feed(), self.prefix)

    # ---- spaces -----------------------------------------------------------------------------------------------------

    @property
    def spaces(self) -> LogStore:
        if self._store is None:
            raise Unavailable(f"{self} is not open")
        return self._store

    async def stores(self) -> None:
        """Raises Unavailable when nothing is stored: what a cluster says of itself looks well, only a write tells."""
        try:
            async with asyncio.timeout(3):
                await self.spaces.sync()
        except TimeoutError:
            raise Unavailable(f"{self}: nothing is stored within 3 s") from None

    async def names(self, space: str) -> list[str]:
        await self.spaces.sync()
        return list(self.spaces.entries(space))

    async def get(self, wanted: Sequence[tuple[str, str]]) -> list[bytes | None]:
        await self.spaces.sync()
        return await self.peek(wanted)

    async def peek(self, wanted: Sequence[tuple[str, str]]) -> list[bytes | None]:
        return [self.spaces.get(space, name) for space, name in wanted]

    async def write(self, writes: Sequence[Write]) -> list[bool]:
        store = self.spaces
        return list(await asyncio.gather(*(store.write(one.space, one.changes, one.fence) for one in writes)))

    async def forget(self, spaces: Sequence[str]) -> None:
        store = self.spaces
        await store.sync()
        for space in spaces:
            if names := list(store.entries(space)):
                await store.write(space, dict.fromkeys([*names, HOLD]))

    # ---- leases -----------------------------------------------------------------------------------------------------

    async def leases(self) -> dict[str, bytes]:
        async with self._leases_lock:
            [(first, end)] = await self.bounds(self.lease_topic, [0])
            feed = self._leases_feed
            if feed is None:
                # By the server's clock, which may differ from ours by minutes at the worst.
                [first] = await self.find(self.lease_topic, [0], time.time() - 300 - 3 * self.lease)
                feed = self._leases_feed = self.feed()
                self._leases_read = first
                feed.seek(self, self.lease_topic, 0, first)
            end = max(end, self.beaten + 1)
            deadline = time.monotonic() + PATIENCE
            while True:
                for read in await feed.read(1000, 0.0 if self._leases_read >= end else 0.2):
                    name, value, length = _lease.decode(read.value)
                    # By our own clock, from when we hear of it; one found at the beginning may be old by then.
                    age = max(0.0, time.time() - read.time) if not self._leases_seen else 0.0
                    self._leases_read = read.offset + 1
                    if length:
                        self._leases[name] = (value, time.monotonic() + length - min(age, length))
                    else:
                        self._leases.pop(name, None)  # ended by its owner: no standstill brings it back
                if self._leases_read >= end:
                    break
                if time.monotonic() > deadline:
                    raise Unavailable(f"{self}: the leases cannot be read")
            now = time.monotonic()
            if self._leases_seen and now - self._leases_seen > self.lease:
                # We, or the server, stood still: nobody is dead for that.
                self._leases = {
                    name: (value, max(end, now + self.lease)) for name, (value, end) in self._leases.items()
                }
            self._leases_seen = now
            self._leases = {name: lease for name, lease in self._leases.items() if lease[1] > now}
            return {name: value for name, (value, _) in self._leases.items()}


class MessageHeart:
    """A lease is a message of a topic that all members read; it ends by itself."""

    def __init__(self, broker: Any) -> None:
        self._broker = broker
        self._patience: float = max(1.0, broker.lease / 2)

    def beat(self, name: str, value: bytes, lease: float) -> None:
        raise NotImplementedError

    def end(self, name: str) -> None:
        self.beat(name, b"", 0.0)

    def close(self) -> None:
        """Nothing is its own."""


class FeedReader:
    """The partitions of one member."""

    def __init__(self, feed: Feed, prefix: str) -> None:
        self._feed = feed
        self._prefix = prefix

    def seek(self, held: Held, offset: int) -> None:
        self._feed.seek(held, held.stored, held.index, offset)

    def drop(self, held: Held) -> None:
        self._feed.drop(held)

    async def read(self, limit: int, wait: float) -> Sequence[tuple[Held, int, Message]]:
        found = await self._feed.read(limit, wait)
        if not found and (trouble := self._feed.trouble()) is not None:
            raise trouble
        return [
            (held, offset, unpack(value, held.stored.removeprefix(self._prefix), f"{held.index}-{offset}"))
            for held, offset, _, value in found
        ]

    async def close(self) -> None:
        await self._feed.close()


class _Generations:
    """The generations of the store, each a topic; one more topic says which is the newest."""

    def __init__(self, broker: LogStateBroker) -> None:
        self._broker = broker
        self._newest = f"{broker.prefix}stentor.state"

    async def open(self, generation: int) -> Generation:
        topic = f"{self._newest}.{generation}"
        await self._broker.make(topic, fewer=True)
        return Generation(self._broker, topic)

    async def newest(self) -> int:
        try:
            return max(map(int, await self._broker.told(self._newest)), default=0)
        except UnknownTopic:
            return 0

    async def point(self, generation: int) -> None:
        await self._broker.make(self._newest, fewer=True)
        await self._broker.tell(self._newest, str(generation).encode())

    async def drop(self, generation: int) -> None:
        await self._broker.remove(f"{self._newest}.{generation}")


class Generation:
    """A topic of one partition."""

    def __init__(self, broker: LogStateBroker, topic: str) -> None:
        self._broker = broker
        self.topic = topic

    async def append(self, record: bytes) -> object:
        try:
            return await self._broker.tell(self.topic, record)
        except UnknownTopic as error:
            raise Dropped(str(error)) from None

    async def tail(self, start: int) -> AsyncGenerator[tuple[int, bytes], None]:
        feed = self._broker.feed()
        feed.seek(self, self.topic, 0, start)
        try:
            while True:
                found = await feed.read(1000, 5.0)
                if isinstance(trouble := feed.trouble(), Dropped | Removed):
                    raise trouble  # any other passes: a feed finds its way back by itself
                for read in found:
                    yield read.offset, read.value
        finally:
            with contextlib.suppress(Unavailable):
                await feed.close()
