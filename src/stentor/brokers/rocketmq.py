"""The RocketMQ broker: a queue of a topic for each partition, spaces and leases in topics of one queue.

It speaks RocketMQ's remoting protocol to the name server and to the brokers (see ``docs/decisions``): the newer gRPC
cannot read a queue from an offset, and makes no topics.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import struct
import time
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec

from stentor.broker import Features, Finding
from stentor.brokers import findings
from stentor.brokers.log import LogBroker
from stentor.brokers.logstore import Dropped, LogStore
from stentor.brokers.rocketmq_remoting import (
    BROKER_CONFIG,
    BROKER_STATE,
    CLUSTER,
    CREATE_TOPIC,
    DELETE_TOPIC,
    DELETE_TOPIC_NAMES,
    FIND_BY_TIME,
    MAX_OFFSET,
    MIN_OFFSET,
    MOVED,
    NO_TOPIC,
    NOT_FLUSHED,
    NOT_FOUND,
    OK,
    PULL,
    ROUTE,
    SEND_BATCH,
    TRY_AGAIN,
    Answer,
    Line,
    Link,
    Pulled,
    Signer,
    batch,
    check,
    failure,
    messages,
)  # fmt: skip
from stentor.brokers.storage import Entry, Held, Stored, Write
from stentor.brokers.wire import unpack
from stentor.clock import Clock
from stentor.connect import BrokerUrl
from stentor.errors import (
    BrokerError,
    ConfigError,
    PublishUnknown,
    StentorError,
    Unavailable,
    UnknownTopic,
)  # fmt: skip
from stentor.message import Message

SEND_BYTES = 1024 * 1024
"""What one request carries at most, or one message."""
SEND_PATIENCE = 10.0
POLL = 15.0
"""Seconds for which the server may hold a pull that finds nothing; it looks at its clock every 5."""
PULL_COUNT = 32
"""Messages a pull brings at most, by the server's default."""
AHEAD = 256
"""Messages that a reader keeps ready for each partition."""
GROUP = "CID_RMQ_SYS_stentor"
"""The consumer group that pulls are made for; RocketMQ makes groups of this prefix by itself."""

_lease = msgspec.msgpack.Decoder(tuple[str, bytes, float])
_route = msgspec.json.Decoder(dict[str, Any])


def _stored(name: str) -> str:
    """A topic's name on the server, which takes no dots."""
    found = name.replace(".", "%")
    if len(found) > 127:
        raise ConfigError(f"RocketMQ takes names of at most 127 characters, namespace included: {name}")
    return found


class RocketMQBroker(LogBroker):
    """``rocketmq://[user:password@]name-server[:9876][,another]``. RocketMQ 5.1 or newer; no proxy is needed.

    Options: those of ``LogBroker``, ``tls=1``, ``ca``, ``cert``, ``key`` (files; TLS always verifies the server), and
    ``durable`` ("host", the default: the brokers are expected to run with ``flushDiskType=SYNC_FLUSH``; "process":
    not).
    """

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        super().__init__(url, clock)
        self._name_servers = url.host.split(",")
        tls = url.option("tls", "") not in ("", "0")
        ca, cert, key = (url.option(name, "") for name in ("ca", "cert", "key"))
        self.context: ssl.SSLContext | None = None
        if tls:
            self.context = ssl.create_default_context(cafile=ca or None)
            if cert:
                self.context.load_cert_chain(cert, key or None)
        self.signer = Signer(url.user, url.password or "") if url.user else None
        durable = url.option("durable", "host")
        if durable not in ("host", "process"):
            raise ConfigError(f"{self}: option durable is host or process")
        self.features = Features(
            name="rocketmq", durable=durable, shared=True, atomic=False, dedupe=False, replay=True, cancel=True,  # type: ignore[arg-type]
            browse=True, max_bytes=SEND_BYTES,
        )  # fmt: skip
        self._links: dict[str, asyncio.Task[Link]] = {}
        self._homes: dict[str, tuple[str, str]] = {}
        """By topic as stored: the name and the address of the broker that holds it."""
        self._last: dict[str, tuple[str, str]] = {}
        self._ends: dict[tuple[str, int], int] = {}
        """What was confirmed; the server shows it a few milliseconds later."""
        self._store: LogStore | None = None
        self.beaten = -1
        """The offset of the last beat that was confirmed."""
        self._leases: dict[str, tuple[bytes, float]] = {}
        self._leases_read = -1

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def native(self) -> RocketMQBroker:
        """The broker itself: ``call`` sends any request of the remoting protocol."""
        return self

    async def connect(self) -> None:
        try:
            masters = await self.masters()
            for _, address in masters:
                check(await self._call(address, BROKER_CONFIG, {}), self)
            await self.make_topic(f"{self.prefix}stentor.leases", 1)
            self._store = LogStore(_Generations(self))
            await self._store.open()
        except BaseException:
            await self.disconnect()
            raise

    async def disconnect(self) -> None:
        if self._store is not None:
            await self._store.close()
            self._store = None
        links, self._links = self._links, {}
        for link in links.values():
            link.cancel()
            if link.done() and not link.cancelled() and link.exception() is None:
                link.result().abort()
        self._homes.clear()

    async def ping(self) -> None:
        for _, address in await self.masters():
            check(await self._call(address, BROKER_CONFIG, {}), self)

    async def review(self) -> list[Finding]:
        found = []
        for name, address in await self.masters():
            told = check(await self._call(address, BROKER_CONFIG, {}), self).body.decode()
            settings = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
            state = msgspec.json.decode(check(await self._call(address, BROKER_STATE, {}), self).body)["table"]
            version = state["brokerVersionDesc"].removeprefix("V").replace("_", ".")
            found.append(findings.version("RocketMQ", version, (5, 1)))
            if self.features.durable == "host":
                why = "a power cut loses what was confirmed last"
                found.append(findings.setting("flushDiskType", settings.get("flushDiskType"), ["SYNC_FLUSH"], why))
            kept = int(settings["fileReservedTime"])
            text = f"{name} removes events after {kept:,} hours, whoever still needs them"
            good = kept >= 24 * 365
            found.append(
                Finding("fileReservedTime", "ok" if good else "warn", text, "" if good else "set a year: 8760")
            )
            full, used = int(settings["diskSpaceCleanForciblyRatio"]), float(state["commitLogDiskRatio"])
            gone = "the oldest events are removed, whoever still needs them"
            found.append(findings.room("disk", round(used * 100), full, gone, "%"))
        return found

    async def _link(self, name: str) -> Link:
        task = self._links.get(name)
        if task is not None and task.done() and (task.cancelled() or task.exception() or not task.result().open):
            task = None
        if task is None:
            task = self._links[name] = asyncio.create_task(Link.connect(name, self.signer, self.context))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def _call(
        self, name: str, code: int, fields: dict[str, Any], body: bytes = b"", patience: float = 5.0
    ) -> Answer:
        return await (await self._link(name)).call(code, fields, body, patience)

    async def _name_server(self, code: int, fields: dict[str, Any]) -> Answer:
        trouble: Unavailable | None = None
        for name in self._name_servers:
            try:
                return await self._call(name, code, fields)
            except Unavailable as error:
                trouble = error
        raise trouble or Unavailable(f"{self} cannot be reached")

    async def masters(self) -> list[tuple[str, str]]:
        """The names and addresses of the brokers that take messages. Raises Unavailable."""
        found = await self._name_server(CLUSTER, {})
        if found.code != OK:
            raise ConfigError(f"{self} is no name server (it answers {found.code}); is it a proxy?")
        body = re.sub(rb"([{,])(\d+):", rb'\1"\2":', found.body)  # its numbers as keys are no JSON
        table = _route.decode(body).get("brokerAddrTable") or {}
        masters = [
            (name, data["brokerAddrs"]["0"]) for name, data in sorted(table.items()) if "0" in data["brokerAddrs"]
        ]
        if not masters:
            raise Unavailable(f"{self}: no broker has registered with the name server")
        return masters

    async def home(self, topic: str) -> tuple[str, str]:
        """The name and the address of the broker that holds a topic. Raises UnknownTopic or Unavailable."""
        stored = _stored(topic)
        home = self._homes.get(stored)
        if home is None:
            found = await self._name_server(ROUTE, {"topic": stored, "acceptStandardJsonOnly": "true"})
            if found.code == NO_TOPIC:  # the name server forgets the topics of a broker that is away
                if stored in self._last:
                    return self._last[stored]
                await self.masters()
            check(found, self)
            brokers = [b for b in _route.decode(found.body)["brokerDatas"] if "0" in b["brokerAddrs"]]
            if not brokers:
                raise Unavailable(f"{self}: the broker of topic {topic} is away")
            home = (brokers[0]["brokerName"], brokers[0]["brokerAddrs"]["0"])
            self._homes[stored] = self._last[stored] = home
        return home

    async def call(
        self, topic: str, code: int, fields: dict[str, Any], body: bytes = b"", patience: float = 5.0
    ) -> Answer:
        """Ask the broker that holds a topic. Raises UnknownTopic or Unavailable."""
        name, address = await self.home(topic)
        fields |= {"n" if code == SEND_BATCH else "bname": name, "b" if code == SEND_BATCH else "topic": _stored(topic)}
        try:
            return await self._call(address, code, fields, body, patience)
        except Unavailable:
            self._homes.pop(_stored(topic), None)  # it may have moved
            raise

    # ---- data -------------------------------------------------------------------------------------------------------

    async def make_topic(self, topic: str, partitions: int) -> None:
        """All queues of a topic are on one broker, so that a partition is a queue's number."""
        with contextlib.suppress(UnknownTopic):
            await self.home(topic)
            return
        masters = await self.masters()
        home = masters[zlib.crc32(topic.encode()) % len(masters)]
        fields = {
            "topic": _stored(topic), "defaultTopic": "TBW102", "readQueueNums": partitions,
            "writeQueueNums": partitions,
            "perm": 6, "topicFilterType": "SINGLE_TAG", "topicSysFlag": 0, "order": "false",
            "attributes": "+message.type=NORMAL",
        }  # fmt: skip
        check(await self._call(home[1], CREATE_TOPIC, fields), self)
        self._homes[_stored(topic)] = self._last[_stored(topic)] = home

    async def drop_topic(self, topic: str) -> None:
        """Remove a topic; it need not exist."""
        try:
            _, address = await self.home(topic)
        except UnknownTopic:
            return
        await self._call(address, DELETE_TOPIC, {"topic": _stored(topic)})
        for name in self._name_servers:
            with contextlib.suppress(Unavailable):
                await self._call(name, DELETE_TOPIC_NAMES, {"topic": _stored(topic)})
        self._homes.pop(_stored(topic), None)
        self._last.pop(_stored(topic), None)

    async def send(self, topic: str, index: int, bodies: Sequence[bytes]) -> int:
        """Store messages in a queue, all or none; the offset of the first. Raises PublishUnknown without ids."""
        await self.home(topic)
        fields = send_fields(index)
        try:
            found = await self.call(topic, SEND_BATCH, fields, batch(bodies), SEND_PATIENCE)
        except Unavailable as error:
            raise PublishUnknown([], str(error)) from None
        if found.code in NOT_FLUSHED:
            raise PublishUnknown([], f"the server did not confirm its flush in time ({found.code})")
        offset = int(check(found, self).fields["queueOffset"])
        key = (topic, index)
        self._ends[key] = max(self._ends.get(key, 0), offset + len(bodies))
        return offset

    async def append(self, entries: Sequence[Entry]) -> Sequence[int | StentorError]:
        queues: dict[tuple[str, int], list[int]] = {}
        for number, entry in enumerate(entries):
            queues.setdefault((entry.topic, entry.partition), []).append(number)
        results: list[int | StentorError] = [0] * len(entries)

        async def fill(topic: str, index: int, numbers: list[int]) -> None:
            failed: StentorError | None = None
            while numbers:
                size = taken = 0
                while taken < len(numbers) and (
                    not taken or size + len(entries[numbers[taken]].body) + 22 <= SEND_BYTES
                ):
                    size += len(entries[numbers[taken]].body) + 22
                    taken += 1
                now, numbers = numbers[:taken], numbers[taken:]
                if failed is None:
                    try:
                        first = await self.send(topic, index, [entries[number].body for number in now])
                        for at, number in enumerate(now):
                            results[number] = first + at
                        continue
                    except PublishUnknown as error:
                        failed = PublishUnknown([entries[number].message.id for number in now], error.why)
                    except StentorError as error:
                        failed = error
                    for number in now:
                        results[number] = failed
                    failed = Unavailable(f"{self}: not sent, as the one ahead of it was not confirmed")
                else:
                    for number in now:
                        results[number] = failed

        await asyncio.gather(*(fill(*queue, numbers) for queue, numbers in queues.items()))
        return results

    def reader(self) -> RocketMQReader:
        return RocketMQReader(self)

    async def _offset(self, topic: str, index: int, code: int, **fields: Any) -> int:
        return int(check(await self.call(topic, code, {"queueId": index, **fields}), self).fields["offset"])

    async def _bounds(self, topic: str, index: int) -> tuple[int, int]:
        first, end = await asyncio.gather(
            self._offset(topic, index, MIN_OFFSET), self._offset(topic, index, MAX_OFFSET)
        )
        return max(0, first), max(first, end, self._ends.get((topic, index), 0))

    async def bounds(self, topic: str, partitions: Sequence[int]) -> list[tuple[int, int]]:
        return list(await asyncio.gather(*(self._bounds(topic, index) for index in partitions)))

    async def _find(self, topic: str, index: int, moment: float) -> int:
        first, end = await self._bounds(topic, index)
        found = await self._offset(topic, index, FIND_BY_TIME, timestamp=max(0, int(moment * 1000)))
        found = min(max(found, first), end)
        # Its answer is the last message when the time is after all of them.
        page = await self.pull(topic, index, found, 1) if found < end else ()
        return found + 1 if page and page[0].offset == found and page[0].time < int(moment * 1000) / 1000 else found

    async def find(self, topic: str, partitions: Sequence[int], moment: float) -> list[int]:
        return list(await asyncio.gather(*(self._find(topic, index, moment) for index in partitions)))

    async def _pending(self, topic: str, index: int, offset: int) -> tuple[int, float | None]:
        first, end = await self._bounds(topic, index)
        offset = max(offset, first)
        if offset >= end:
            return 0, None
        page = await self.pull(topic, index, offset, 1)
        return end - offset, page[0].time if page else self.clock.now()

    async def pending(self, places: Sequence[tuple[str, int, int]]) -> list[tuple[int, float | None]]:
        return list(await asyncio.gather(*(self._pending(*place) for place in places)))

    async def pull(self, topic: str, index: int, offset: int, limit: int) -> list[Pulled]:
        """Messages of a queue from an offset on, or from the first that is held; none where it ends."""
        while True:
            found = await self.call(topic, PULL, pull_fields(index, offset, limit, 0.0))
            if found.code == OK:
                return [message for message in messages(found.body) if message.offset >= offset]
            if found.code == MOVED and int(found.fields["nextBeginOffset"]) > offset:
                offset = int(found.fields["nextBeginOffset"])
            elif found.code in (NOT_FOUND, MOVED):
                if offset >= self._ends.get((topic, index), 0):
                    return []
                await asyncio.sleep(0.002)  # confirmed, to be seen in a moment
            elif found.code != TRY_AGAIN:
                raise failure(found, self)

    async def page(self, topic: str, index: int, offset: int, limit: int) -> Sequence[Stored]:
        name = topic.removeprefix(self.prefix)
        offset = max(0, offset)
        found: list[Stored] = []
        while len(found) < limit:
            pulled = await self.pull(topic, index, offset, min(PULL_COUNT, limit - len(found)))
            if not pulled:
                break
            found += (Stored(one.offset, one.time, unpack(one.body, name, f"{index}-{one.offset}")) for one in pulled)
            offset = pulled[-1].offset + 1
        return found

    async def trim(self, topic: str, index: int, offset: int) -> None:
        """RocketMQ removes by age alone (``fileReservedTime``), all topics alike."""

    # ---- spaces -----------------------------------------------------------------------------------------------------

    @property
    def spaces(self) -> LogStore:
        if self._store is None:
            raise Unavailable(f"{self} is not open")
        return self._store

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
                await store.write(space, dict.fromkeys(names))

    # ---- leases -----------------------------------------------------------------------------------------------------

    def heart(self) -> RocketMQHeart:
        return RocketMQHeart(self)

    async def leases(self) -> dict[str, bytes]:
        topic = f"{self.prefix}stentor.leases"
        now = time.time()
        if self._leases_read < 0:
            self._leases_read = await self._find(topic, 0, now - 60 - 3 * self.lease)
        while True:
            found = await self.pull(topic, 0, self._leases_read, PULL_COUNT)
            for one in found:
                name, value, length = _lease.decode(one.body)
                self._leases[name] = (value, one.time + length)
                self._leases_read = one.offset + 1
            if not found:
                if self._leases_read > self.beaten:
                    break
                await asyncio.sleep(0.002)
        now = time.time()
        self._leases = {name: lease for name, lease in self._leases.items() if lease[1] > now}
        return {name: value for name, (value, _) in self._leases.items()}


def send_fields(index: int) -> dict[str, Any]:
    """The head of a request that stores a batch in a queue; topic and broker are still missing."""
    return {
        "a": "stentor", "c": "TBW102", "d": 4, "e": index, "f": 0, "g": int(time.time() * 1000), "h": 0, "i": "",
        "j": 0, "k": "false", "l": 16, "m": "true",
    }  # fmt: skip


def pull_fields(index: int, offset: int, limit: int, wait: float) -> dict[str, Any]:
    """The head of a pull; ``wait`` is how many seconds the server may hold it."""
    return {
        "consumerGroup": GROUP, "queueId": index, "queueOffset": offset, "maxMsgNums": limit,
        "sysFlag": 6 if wait else 4, "commitOffset": 0, "suspendTimeoutMillis": int(wait * 1000), "subscription": "*",
        "subVersion": 0, "expressionType": "TAG",
    }  # fmt: skip


class RocketMQReader:
    """A pull under way for each partition, held by the server while there is nothing; one connection a broker."""

    def __init__(self, broker: RocketMQBroker) -> None:
        self._broker = broker
        self._links: dict[str, Link] = {}
        self._buffers: dict[Held, deque[tuple[Held, int, Message]]] = {}
        self._tasks: dict[Held, asyncio.Task[None]] = {}
        self._room: dict[Held, asyncio.Event] = {}
        self._ready = asyncio.Event()
        self._trouble: BrokerError | None = None
        self._lock = asyncio.Lock()

    def seek(self, held: Held, offset: int) -> None:
        self.drop(held)
        self._buffers[held] = deque()
        self._room[held] = asyncio.Event()
        self._tasks[held] = asyncio.create_task(self._follow(held, offset))

    def drop(self, held: Held) -> None:
        self._buffers.pop(held, None)
        self._room.pop(held, None)
        if (task := self._tasks.pop(held, None)) is not None:
            task.cancel()

    async def read(self, limit: int, wait: float) -> Sequence[tuple[Held, int, Message]]:
        found = self._take(limit)
        if not found and wait:
            self._ready.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._ready.wait()
            found = self._take(limit)
        if not found and (trouble := self._trouble) is not None:
            self._trouble = None
            raise trouble
        return found

    def _take(self, limit: int) -> list[tuple[Held, int, Message]]:
        found: list[tuple[Held, int, Message]] = []
        for held, buffer in list(self._buffers.items()):
            if not buffer:
                continue
            while buffer and len(found) < limit:
                found.append(buffer.popleft())
            if len(buffer) < AHEAD:
                self._room[held].set()
            if len(found) == limit:
                # The others come first the next time.
                self._buffers[held] = self._buffers.pop(held)
                break
        return found

    async def _link(self, topic: str) -> tuple[str, Link]:
        name, address = await self._broker.home(topic)
        async with self._lock:
            link = self._links.get(address)
            if link is None or not link.open:
                link = self._links[address] = await Link.connect(address, self._broker.signer, self._broker.context)
        return name, link

    async def _follow(self, held: Held, offset: int) -> None:
        broker, topic, index = self._broker, held.stored, held.index
        short = topic.removeprefix(broker.prefix)
        buffer, room = self._buffers[held], self._room[held]
        pause = 0.05
        while True:
            if len(buffer) >= AHEAD:
                room.clear()
                await room.wait()
            try:
                name, link = await self._link(topic)
                fields = pull_fields(index, offset, PULL_COUNT, POLL) | {"topic": _stored(topic), "bname": name}
                found = await link.call(PULL, fields, patience=POLL + 10)
                if found.code == OK:
                    for one in messages(found.body):
                        if one.offset >= offset:
                            buffer.append((held, one.offset, unpack(one.body, short, f"{index}-{one.offset}")))
                            offset = one.offset + 1
                    pause = 0.05
                    self._trouble = None
                    self._ready.set()
                elif found.code == MOVED:
                    after = int(found.fields["nextBeginOffset"])
                    if after > offset:
                        offset = after
                    else:
                        await asyncio.sleep(0.02)  # it is not as far yet
                elif found.code not in (NOT_FOUND, TRY_AGAIN):
                    raise failure(found, broker)
            except BrokerError as error:
                if self._buffers.get(held) is not buffer:
                    return
                self._trouble = error
                self._ready.set()
                broker._homes.pop(_stored(topic), None)
                await asyncio.sleep(pause)
                pause = min(2.0, pause * 2)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for held in list(self._tasks):
            self.drop(held)
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in self._links.values():
            link.abort()


class RocketMQHeart:
    """A lease is a message of a topic that all members read; it ends by itself."""

    def __init__(self, broker: RocketMQBroker) -> None:
        self._broker = broker
        self._topic = _stored(f"{broker.prefix}stentor.leases")
        home = broker._homes.get(self._topic)
        if home is None:
            raise OSError("the broker is being looked for")
        self._name, address = home
        self._line = Line(address, broker.signer, broker.context, max(1.0, broker.lease / 2))

    def beat(self, name: str, value: bytes, lease: float) -> None:
        fields = send_fields(0) | {"b": self._topic, "n": self._name}
        body = msgspec.msgpack.encode((name, value, lease))
        found = self._line.call(SEND_BATCH, fields, batch([body]))
        if found.code != OK:
            raise OSError(f"the lease was not taken: {found.code}")
        self._broker.beaten = max(self._broker.beaten, int(found.fields["queueOffset"]))

    def end(self, name: str) -> None:
        self.beat(name, b"", 0.0)

    def close(self) -> None:
        self._line.close()


class _Generations:
    """The generations of the store, each a topic; one more topic says which is the newest."""

    def __init__(self, broker: RocketMQBroker) -> None:
        self._broker = broker
        self._newest = f"{broker.prefix}stentor.state"

    async def open(self, generation: int) -> _Generation:
        topic = f"{self._newest}.{generation}"
        self._broker._homes.pop(_stored(topic), None)
        await self._broker.make_topic(topic, 1)
        return _Generation(self._broker, topic)

    async def newest(self) -> int:
        try:
            first, end = await self._broker._bounds(self._newest, 0)
        except UnknownTopic:
            return 0
        found = await self._broker.pull(self._newest, 0, max(first, end - PULL_COUNT), PULL_COUNT)
        return max((struct.unpack(">q", one.body)[0] for one in found), default=0)

    async def point(self, generation: int) -> None:
        await self._broker.make_topic(self._newest, 1)
        try:
            await self._broker.send(self._newest, 0, [struct.pack(">q", generation)])
        except PublishUnknown as error:
            raise Unavailable(error.why) from None

    async def drop(self, generation: int) -> None:
        await self._broker.drop_topic(f"{self._newest}.{generation}")


class _Generation:
    """A topic of one queue; appends go one after the other, as the server's threads keep no order."""

    def __init__(self, broker: RocketMQBroker, topic: str) -> None:
        self._broker = broker
        self._topic = topic
        self._turn = asyncio.Lock()

    async def append(self, record: bytes) -> object:
        async with self._turn:
            try:
                return await self._broker.send(self._topic, 0, [record])
            except UnknownTopic as error:
                raise Dropped(str(error)) from None
            except PublishUnknown as error:
                raise Unavailable(error.why) from None

    async def tail(self, start: int) -> AsyncGenerator[tuple[int, bytes], None]:
        broker, offset = self._broker, start
        while True:
            try:
                name, address = await broker.home(self._topic)
                fields = pull_fields(0, offset, PULL_COUNT, POLL) | {"topic": _stored(self._topic), "bname": name}
                found = await broker._call(address, PULL, fields, patience=POLL + 10)
            except UnknownTopic as error:
                raise Dropped(str(error)) from None
            except Unavailable:
                broker._homes.pop(_stored(self._topic), None)
                raise
            if found.code == OK:
                for one in messages(found.body):
                    if one.offset >= offset:
                        offset = one.offset + 1
                        yield one.offset, one.body
            elif found.code == MOVED:
                if int(found.fields["nextBeginOffset"]) > offset:
                    raise Unavailable(f"{broker}: RocketMQ removed what the groups' places are made of (by its age)")
                await asyncio.sleep(0.02)
            elif found.code not in (NOT_FOUND, TRY_AGAIN):
                refusal = failure(found, broker)
                raise Dropped(str(refusal)) if isinstance(refusal, UnknownTopic) else refusal
