"""The RocketMQ broker: a queue of a topic for each partition, spaces and leases in topics of one queue.

It speaks RocketMQ's remoting protocol to the name server and to the brokers (see ``docs/decisions``): the newer gRPC
cannot read a queue from an offset, and makes no topics.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from stentor.broker import Durable, Features, Finding
from stentor.brokers import findings
from stentor.brokers.log_state import Feed, LogStateBroker, MessageHeart, Read, Removed, encode_lease
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
    SYSTEM_BUSY,
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
)
from stentor.brokers.storage import Entry, Stored
from stentor.brokers.trust import trust
from stentor.brokers.wire import unpack
from stentor.clock import Clock
from stentor.connect import BrokerUrl, one_of
from stentor.errors import BrokerError, ConfigError, PublishUnknown, StentorError, Unavailable, UnknownTopic

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

_route = msgspec.json.Decoder(dict[str, Any])


def _stored(name: str) -> str:
    """A topic's name on the server, which takes no dots."""
    found = name.replace(".", "%")
    if len(found) > 127:
        raise ConfigError(f"RocketMQ takes names of at most 127 characters, namespace included: {name}")
    return found


class RocketMQBroker(LogStateBroker):
    """``rocketmq://[user:password@]name-server[:9876][,another]``. RocketMQ 5.3 or newer; no proxy is needed.

    Options: those of ``LogBroker``, ``tls=1``, ``ca``, ``cert``, ``key`` (files; TLS always verifies the server), and
    ``durable`` ("host", the default: the brokers are expected to run with ``flushDiskType=SYNC_FLUSH``; "process":
    not).
    """

    trims = False

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        super().__init__(url, clock)
        self._name_servers = [str(server) for server in url.addresses(9876)]
        self.tls = trust(url, 9876)
        self.context = self.tls.context if self.tls else None
        self.signer = Signer(url.user, url.password or "") if url.user else None
        durable: Durable = url.option("durable", "host", one_of("host", "process"))
        self.features = Features(
            name="rocketmq", durable=durable, shared=True, atomic=False, dedupe=False, replay=True, cancel=True,
            browse=True, max_bytes=SEND_BYTES, one_order=False,
        )  # fmt: skip
        self._links: dict[str, asyncio.Task[Link]] = {}
        self._homes: dict[str, tuple[str, str]] = {}
        """By topic as stored: the name and the address of the broker that holds it."""
        self._last: dict[str, tuple[str, str]] = {}
        self._ends: dict[tuple[str, int], int] = {}
        """What was confirmed; the server shows it a few milliseconds later."""
        self._telling = asyncio.Lock()

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def native(self) -> RocketMQBroker:
        """The broker itself: ``call`` sends any request of the remoting protocol."""
        return self

    async def connect(self) -> None:
        masters = await self.masters()
        for _, address in masters:
            check(await self._call(address, BROKER_CONFIG, {}), self)
        await self.open_state()

    async def disconnect(self) -> None:
        await self.close_state()
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
            why = "a disk that fills loses its oldest events, whoever still needs them"
            forced = settings.get("cleanFileForciblyEnable")
            found.append(findings.setting("cleanFileForciblyEnable", forced, ["false"], why))
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
        """Ask the broker that holds a topic, again while it is too busy. Raises UnknownTopic or Unavailable."""
        name, address = await self.home(topic)
        fields |= {"n" if code == SEND_BATCH else "bname": name, "b" if code == SEND_BATCH else "topic": _stored(topic)}
        deadline, wait = time.monotonic() + patience, 0.01
        try:
            # It answers so for what it takes out of its queue unbegun, as after 200 ms (``waitTimeMillsInSendQueue``).
            while (found := await self._call(address, code, fields, body, patience)).code == SYSTEM_BUSY:
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(wait)
                wait = min(2 * wait, 0.2)
        except Unavailable:
            self._homes.pop(_stored(topic), None)  # it may have moved
            raise
        return found

    # ---- data -------------------------------------------------------------------------------------------------------

    async def make(self, topic: str, partitions: int = 1, keep: float = -1, *, fewer: bool = False) -> None:  # noqa: ARG002  it removes by age alone, all topics alike
        # All queues of a topic are on one broker, so that a partition is a queue's number.
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

    async def remove(self, topic: str) -> None:
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

        steps = [fill(*queue, numbers) for queue, numbers in queues.items()]
        await (asyncio.gather(*steps) if len(steps) != 1 else steps[0])  # an event alone needs no task
        return results

    async def tell(self, topic: str, value: bytes) -> int:
        async with self._telling:  # the server's threads keep no order
            try:
                return await self.send(topic, 0, [value])
            except PublishUnknown as error:
                raise Unavailable(error.why) from None

    async def told(self, topic: str) -> list[bytes]:
        first, end = await self._bounds(topic, 0)
        return [one.body for one in await self.pull(topic, 0, max(first, end - PULL_COUNT), PULL_COUNT)]

    def feed(self) -> RocketMQFeed:
        return RocketMQFeed(self)

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

    # ---- leases -----------------------------------------------------------------------------------------------------

    def heart(self) -> _Heart:
        return _Heart(self)


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


class Cursor:
    """How far a partition is read."""

    __slots__ = ("buffer", "room", "task")

    def __init__(self) -> None:
        self.buffer: deque[Read] = deque()
        self.room = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class RocketMQFeed(Feed):
    """A pull under way for each partition, held by the server while there is nothing; one connection a broker."""

    def __init__(self, broker: RocketMQBroker) -> None:
        super().__init__()
        self._broker = broker
        self._links: dict[str, Link] = {}
        self._cursors: dict[Any, Cursor] = {}
        self._lock = asyncio.Lock()

    def seek(self, token: Any, topic: str, index: int, offset: int) -> None:
        self.drop(token)
        cursor = self._cursors[token] = Cursor()
        cursor.task = asyncio.create_task(self._follow(cursor, token, topic, index, offset))

    def drop(self, token: Any) -> None:
        cursor = self._cursors.pop(token, None)
        if cursor is not None and cursor.task is not None:
            cursor.task.cancel()

    def take(self, limit: int) -> list[Read]:
        found: list[Read] = []
        for token, cursor in list(self._cursors.items()):
            while cursor.buffer and len(found) < limit:
                found.append(cursor.buffer.popleft())
            if len(cursor.buffer) < AHEAD:
                cursor.room.set()
            if len(found) == limit:
                # The others come first the next time.
                self._cursors[token] = self._cursors.pop(token)
                break
        return found

    async def _link(self, topic: str) -> tuple[str, Link]:
        name, address = await self._broker.home(topic)
        async with self._lock:
            link = self._links.get(address)
            if link is None or not link.open:
                link = self._links[address] = await Link.connect(address, self._broker.signer, self._broker.context)
        return name, link

    async def _follow(self, cursor: Cursor, token: Any, topic: str, index: int, offset: int) -> None:
        pause = 0.05
        while True:
            if len(cursor.buffer) >= AHEAD:
                cursor.room.clear()
                await cursor.room.wait()
            try:
                name, link = await self._link(topic)
                fields = pull_fields(index, offset, PULL_COUNT, POLL) | {"topic": _stored(topic), "bname": name}
                found = await link.call(PULL, fields, patience=POLL + 10)
                if found.code == OK:
                    for one in messages(found.body):
                        if one.offset >= offset:
                            cursor.buffer.append(Read(token, one.offset, one.time, one.body))
                            offset = one.offset + 1
                    pause = 0.05
                    if not isinstance(self._trouble, Removed):
                        self._trouble = None
                    self._ready.set()
                elif found.code == MOVED:
                    after = int(found.fields["nextBeginOffset"])
                    if after <= offset:
                        await asyncio.sleep(0.02)  # it is not as far yet
                        continue
                    self.fail(
                        Removed(f"{self._broker} removed {after - offset} unread messages of {topic} by their age")
                    )
                    offset = after
                elif found.code not in (NOT_FOUND, TRY_AGAIN):
                    raise failure(found, self._broker)
            except BrokerError as error:
                self.fail(error)
                self._broker._homes.pop(_stored(topic), None)
                await asyncio.sleep(pause)
                pause = min(2.0, pause * 2)

    async def close(self) -> None:
        tasks = [cursor.task for cursor in self._cursors.values() if cursor.task is not None]
        for token in list(self._cursors):
            self.drop(token)
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in self._links.values():
            link.abort()


class _Heart(MessageHeart):
    def __init__(self, broker: RocketMQBroker) -> None:
        super().__init__(broker)
        self._topic = _stored(broker.lease_topic)
        home = broker._homes.get(self._topic)
        if home is None:
            raise OSError("the broker is being looked for")
        self._name, address = home
        self._line = Line(address, broker.signer, broker.context, self._patience)

    def beat(self, name: str, value: bytes, lease: float) -> None:
        fields = send_fields(0) | {"b": self._topic, "n": self._name}
        found = self._line.call(SEND_BATCH, fields, batch([encode_lease((name, value, lease))]))
        if found.code != OK:
            raise OSError(f"the lease was not taken: {found.code}")
        self._broker.beaten = max(self._broker.beaten, int(found.fields["queueOffset"]))

    def close(self) -> None:
        self._line.close()
