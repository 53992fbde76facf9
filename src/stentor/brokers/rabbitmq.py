"""The RabbitMQ broker: a stream for each partition, read from offsets on; spaces and leases are streams, too.

Queues lose the order of what is given back, streams give nothing back: ``docs/decisions`` says more. AMQP 0.9.1 tells
neither where a message was stored nor where a stream ends; the first is left open, the second is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote

from stentor.broker import Durable, Features, Finding
from stentor.brokers import findings
from stentor.brokers.log_state import Feed, LogStateBroker, MessageHeart, Read, encode_lease
from stentor.brokers.rabbitmq_wire import NOT_FOUND, Channel, Connection, Login, Lost, Refused, Timestamp, short, table
from stentor.brokers.storage import UNPLACED, Entry, Stored
from stentor.brokers.trust import refused, trust
from stentor.brokers.wire import CONTENT_TYPE, unpack
from stentor.clock import Clock
from stentor.connect import Address, BrokerUrl, count
from stentor.errors import (
    AuthenticationFailed,
    BrokerError,
    ConfigError,
    PublishUnknown,
    StentorError,
    Unavailable,
    UnknownTopic,
)

ASK_PATIENCE = 10.0
"""Seconds that the server has for an answer."""
OPEN_PATIENCE = 5.0
BEGIN_PATIENCE = 2.0
"""Seconds within which the first message of a stream that has one arrives."""
HEARTBEAT = 4
"""Seconds of silence after which a connection counts as lost, about."""
AHEAD = 500
"""Messages of a partition that are read ahead."""
AHEAD_BYTES = 16 * 1024 * 1024
LAST = 60_000
"""More messages than are published at once: so many are read from the last ones on."""
COUNTED = 100
"""So many waiting messages are looked at one by one, as some may be ours."""

_REFUSED = {403, 530}
_PRECONDITION = 406
_OFFSET, _TIME = b"\x0fx-stream-offsetl", b"\x0cstentor-timel"
_NOTHING = b"-"
"""The body of the message that a stream begins with: one that has none would not tell where it ends. More of them, by
several who made it together, do no harm."""

_long = struct.Struct(">q").unpack_from


def _properties() -> bytes:
    """Those of a message that is published now: it is told nowhere else when it was."""
    return b"\xa0\x00" + short(CONTENT_TYPE) + table({"stentor-time": int(time.time() * 1000)})


def _place(header: bytes) -> tuple[int, float]:
    """The offset of a delivered message, and when it was published."""
    at, then = header.find(_OFFSET), header.find(_TIME)
    moment = 0.0 if then < 0 else _long(header, then + len(_TIME))[0] / 1000
    return (_long(header, at + len(_OFFSET))[0] if at >= 0 else 0), moment


def _failure(who: object, error: Exception) -> BrokerError:
    """What a refusal, or the loss of a connection, means."""
    if isinstance(error, Refused):
        if error.code == NOT_FOUND and "no queue" in str(error):  # else it is there, and its process is not
            return UnknownTopic(f"{who}: {error}")
        if error.code in _REFUSED:
            return AuthenticationFailed(f"{who}: {error}")
        if error.code == _PRECONDITION and "a replica" not in str(error):  # a stream that is being made has none yet
            return ConfigError(f"{who}: {error}")  # type: ignore[return-value]
    return Unavailable(f"{who}: {error}")


class Line:
    """A connection that is opened when it is needed, and anew when it was lost, with one channel that confirms."""

    def __init__(self, who: object, login: Login) -> None:
        self.who = who
        self.login = login
        self._connection: Connection | None = None
        self._channel: Channel | None = None
        self._lock = asyncio.Lock()

    async def connection(self) -> Connection:
        """Raises AuthenticationFailed or Unavailable."""
        async with self._lock:
            if self._connection is None or self._connection.closed:
                self._channel = None
                try:
                    self._connection = await Connection.open(self.login, OPEN_PATIENCE)
                except ssl.SSLError as error:
                    raise refused(self.who, str(error)) from None
                except (Lost, Refused) as error:
                    raise _failure(self.who, error) from None
            return self._connection

    async def channel(self) -> Channel:
        """A channel of its own. Raises as ``connection``."""
        connection = await self.connection()
        try:
            async with asyncio.timeout(ASK_PATIENCE):
                return await connection.channel()
        except (Lost, Refused) as error:
            raise _failure(self.who, error) from None
        except TimeoutError:
            connection.abort()
            raise Unavailable(f"{self.who} does not answer within {ASK_PATIENCE:g} s") from None

    async def confirming(self) -> Channel:
        """The channel to publish on. Raises as ``connection``."""
        known = self._channel
        if known is not None and known.error is None:
            return known
        channel = await self.channel()
        try:
            await channel.confirms()
        except (Lost, Refused) as error:
            raise _failure(self.who, error) from None
        if self._channel is None or self._channel.error is not None:
            self._channel = channel
        return self._channel

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = self._channel = None


class Cursor:
    """How far a partition is read."""

    __slots__ = ("channel", "index", "next", "tag", "taken", "token", "topic")

    def __init__(self, token: Any, topic: str, index: int, offset: int) -> None:
        self.token = token
        self.topic = topic
        self.index = index
        self.next = offset
        """The offset that is wanted next."""
        self.channel: Channel | None = None
        self.tag = 0
        """The last delivery that was taken."""
        self.taken = 0
        """How many were taken since room was given for more."""


class RabbitMQFeed(Feed):
    """Reads partitions from offsets on and keeps what it read until it is taken; it has a connection of its own."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line
        self._cursors: dict[Any, Cursor] = {}
        self._buffer: deque[tuple[Cursor, Channel, int, Read]] = deque()
        self._bytes = 0
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None

    def seek(self, token: Any, topic: str, index: int, offset: int) -> None:
        self.drop(token)
        self._cursors[token] = Cursor(token, topic, index, offset)
        self._work.set()
        if self._task is None:
            self._task = self._start(self._run(), "stentor rabbitmq reader")

    def drop(self, token: Any) -> None:
        cursor = self._cursors.pop(token, None)
        if cursor is not None and cursor.channel is not None:
            cursor.channel.close()

    def take(self, limit: int) -> list[Read]:
        found: list[Read] = []
        while self._buffer and len(found) < limit:
            cursor, channel, tag, read = self._buffer.popleft()
            self._bytes -= len(read.value)
            if cursor.channel is channel:
                cursor.taken += 1
                if cursor.taken >= AHEAD // 4:
                    cursor.taken = 0
                    channel.ack(tag)
            if self._cursors.get(read.token) is cursor and read.value != _NOTHING:
                found.append(read)
        if self._connection is not None and self._bytes < AHEAD_BYTES:
            self._connection.resume()
        return found

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._cursors.clear()
        await self._line.close()

    async def _run(self) -> None:
        while True:
            self._work.clear()
            good = True
            for cursor in list(self._cursors.values()):
                if cursor.channel is None:
                    good = await self._begin(cursor) and good
            if not good:
                await asyncio.sleep(0.2)
                continue
            await self._work.wait()

    async def _begin(self, cursor: Cursor) -> bool:
        found: BrokerError
        try:
            channel = await self._line.channel()
        except BrokerError as error:
            self.fail(error)
            return False
        try:
            self._connection = channel.connection
            channel.arrived = lambda whose, tag, header, body: self._came(cursor, channel, tag, header, body)
            channel.ended = lambda: self._ended(cursor, channel)
            cursor.channel, cursor.taken = channel, 0
            async with asyncio.timeout(ASK_PATIENCE):
                await channel.qos(AHEAD)
                await channel.consume(f"{cursor.topic}.{cursor.index}", "a", cursor.next)
        except (Lost, Refused) as error:
            found = _failure(self._line.who, error)
        except TimeoutError:
            channel.connection.abort()
            found = Unavailable(f"{self._line.who} does not answer within {ASK_PATIENCE:g} s")
        else:
            if self._cursors.get(cursor.token) is not cursor:
                channel.close()
            return True
        cursor.channel = None
        self.fail(found)
        return False

    def _ended(self, cursor: Cursor, channel: Channel) -> None:
        if cursor.channel is channel:
            cursor.channel = None
            self._work.set()

    def _came(self, cursor: Cursor, channel: Channel, tag: int, header: bytes, body: bytes) -> None:
        offset, moment = _place(header)
        if cursor.channel is not channel:
            return
        value = body if offset >= cursor.next else _NOTHING  # a stream is read from the beginning of a chunk
        cursor.next = max(cursor.next, offset + 1)
        self._bytes += len(value)
        self._buffer.append((cursor, channel, tag, Read(cursor.token, offset, moment, value)))
        self._trouble = None
        self._ready.set()
        if self._bytes > AHEAD_BYTES:
            channel.connection.pause()


class RabbitMQBroker(LogStateBroker):
    """``amqp://[user:password@]host[:5672][,another][/vhost]``, ``amqps://`` for TLS. RabbitMQ 3.10 or newer.

    Options: those of ``LogBroker``, ``ca``, ``cert``, ``key`` (files; TLS always verifies the server) and ``replicas``
    (of the streams that this program makes, default: one for each node).
    """

    trims = False

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        super().__init__(url, clock)
        self.tls = tls = trust(url, 5671, secure=url.scheme == "amqps")
        context = tls.context if tls else None
        user = None if tls and tls.cert and not url.user else url.user or "guest"
        self._login = Login(
            url.addresses(5671 if tls else 5672), unquote(url.path.strip("/")) or "/", user,
            url.password or ("" if url.user else "guest"), context, HEARTBEAT,
        )  # fmt: skip
        self._replicas = url.option("replicas", 0, count)
        self.features = Features(
            name="rabbitmq", durable="process", shared=True, atomic=False, dedupe=False,
            replay=True, cancel=True, browse=True, placed=False, one_order=False,
        )  # fmt: skip
        self._data = Line(self, self._login)
        self._state = Line(self, self._login)
        self._asking = Line(self, self._login)

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def native(self) -> Connection:
        """The connection that events are published with."""
        if self._data._connection is None:
            raise Unavailable(f"{self} is not open")
        return self._data._connection

    def line(self) -> Line:
        """A connection more, which is not open yet."""
        return Line(self, self._login)

    async def connect(self) -> None:
        await self._data.confirming()
        await self.open_state()

    async def disconnect(self) -> None:
        await self.close_state()
        for line in (self._data, self._state, self._asking):
            await line.close()

    async def ping(self) -> None:
        connection = await self._data.connection()
        if connection.blocked:
            raise Unavailable(f"{self} takes no events now: {connection.blocked}")
        await self._there(f"{self.lease_topic}.0")
        await self.stores()

    async def survives(self, topics: Sequence[str]) -> Durable:
        return "replica" if await self._copies(topics) >= 2 else "process"

    async def _copies(self, topics: Sequence[str]) -> int:
        """The fewest copies of a topic on the nodes that the URL names: AMQP tells only of the node that is asked.

        A majority of the copies confirms: where there are two, one may be lost.
        """
        nodes = self._login.addresses
        ends = time.monotonic() + BEGIN_PATIENCE
        while len(nodes) > 1:
            held = dict(await asyncio.gather(*(self._held(node, topics) for node in nodes))).values()
            fewest = min(sum(topic in one for one in held) for topic in topics)
            if fewest >= 2 or self._replicas == 1 or time.monotonic() > ends:
                return fewest
            await asyncio.sleep(0.1)  # copies of what was just made are still beginning
        return 1

    async def _held(self, node: Address, topics: Sequence[str]) -> tuple[object, set[str]]:
        """Where an address leads, and the topics that there is a copy of: a node lets nobody read others."""
        line, held, peer = Line(self, self._login._replace(addresses=[node])), set[str](), None
        with contextlib.suppress(BrokerError, Lost, TimeoutError):  # a node that is away counts for nothing
            async with asyncio.timeout(BEGIN_PATIENCE):
                peer = (await line.connection()).peer
                for topic in topics:
                    channel = await line.channel()
                    with contextlib.suppress(Refused):
                        await channel.qos(1)
                        await channel.consume(f"{topic}.0", "a", "next")
                        held.add(topic)
                    channel.close()
        await line.close()
        return peer, held

    async def review(self) -> list[Finding]:
        connection = await self._data.connection()
        known = (await self.records())[0].values()
        copies = await self._copies([self.lease_topic, *(topic.stored for topic in known)])
        nodes = len(self._login.addresses)
        few = "a node is away, or topics have fewer: replicas=3 is for new ones" if copies < min(nodes, 3) else ""
        text = f"{copies} on the {nodes} nodes of the URL" if nodes > 1 else "none is seen but on the node of the URL"
        queues = [f"{topic.stored}.{index}" for topic in known for index in range(topic.partitions)]
        cut = []
        for queue in queues:
            with contextlib.suppress(Unavailable):  # a node without a copy lets nobody read
                if (await self._read(queue, "first"))[0][0]:
                    cut.append(f"{queue} has lost events")
        kept = "nothing was removed yet; AMQP does not tell of policies that will"
        why = "a policy with max-age or max-length-bytes removes them, whoever still needs them"
        return [
            findings.version("RabbitMQ", connection.version, (3, 10)),
            Finding("alarms", "warn" if connection.blocked else "ok", connection.blocked or "none",
                    "publishers wait until it is over" if connection.blocked else ""),
            findings.setting("channels", str(connection.most), [str(most) for most in range(256, 65536)], ""),
            Finding("replicas", "warn" if few else "ok", text, few),
            Finding("retention", "warn" if cut else "ok", ", ".join(cut) or kept, why if cut else ""),
        ]  # fmt: skip

    # ---- asking -----------------------------------------------------------------------------------------------------

    async def _call(self, call: Callable[[Channel], Any]) -> Any:
        """What the server answers on a channel of its own. Raises UnknownTopic, ConfigError, Unavailable."""
        channel = await self._asking.channel()
        try:
            async with asyncio.timeout(ASK_PATIENCE):
                return await call(channel)
        except (Lost, Refused) as error:
            raise _failure(self, error) from None
        except TimeoutError:
            channel.connection.abort()
            raise Unavailable(f"{self} does not answer within {ASK_PATIENCE:g} s") from None
        finally:
            channel.close()

    async def _there(self, queue: str, made: dict[str, Any] | None = None) -> None:
        await self._call(lambda channel: channel.declare(queue, made))

    async def _read(
        self, queue: str, start: int | str, enough: Callable[[list[tuple[int, float, bytes]]], bool] = bool
    ) -> list[tuple[int, float, bytes]]:
        """Messages of a stream (offset, time, body) from an offset on until there are enough, or all from "last" on."""
        found: list[tuple[int, float, bytes]] = []
        low = start if type(start) is int else 0

        async def read(channel: Channel) -> None:
            done = asyncio.Event()

            def arrived(whose: int, tag: int, header: bytes, body: bytes) -> None:  # noqa: ARG001
                channel.ack(tag)
                place, moment = _place(header)
                if place >= low and (start == "last" or not done.is_set()):
                    found.append((place, moment, body))
                    if enough(found):
                        done.set()

            channel.arrived, channel.ended = arrived, done.set
            await channel.qos(LAST if start == "last" else AHEAD)
            await channel.consume(queue, "a", start)
            await done.wait()
            if channel.error is not None:
                raise channel.error
            if start == "last":
                await channel.qos(LAST)  # by its answer, all that was stored has arrived

        await self._call(read)
        return found

    async def _end(self, topic: str, index: int) -> int:
        """The offset behind the last message."""
        return (await self._read(f"{topic}.{index}", "last"))[-1][0] + 1

    # ---- data -------------------------------------------------------------------------------------------------------

    async def make(self, topic: str, partitions: int = 1, keep: float = -1, *, fewer: bool = False) -> None:  # noqa: ARG002  a stream needs a majority
        settings: dict[str, Any] = {"x-queue-type": "stream"}
        if keep >= 0:
            settings |= {"x-max-age": f"{int(keep)}s", "x-stream-max-segment-size-bytes": 1_000_000}
        if self._replicas:
            settings["x-initial-cluster-size"] = self._replicas
        with contextlib.suppress(UnknownTopic):
            await self._there(f"{topic}.{partitions}")
            raise ConfigError(f"{self}: topic {topic} has more partitions than {partitions}; write as many there")
        missing = []
        for index in range(partitions):
            try:
                await self._there(f"{topic}.{index}")
            except UnknownTopic:
                missing.append(index)
        if missing and missing[0]:
            raise self.otherwise(topic, missing[0], partitions)
        beginning = encode_lease(("", b"", 0.0)) if topic == self.lease_topic else _NOTHING
        if not missing:
            if not await self._patiently(partial(self._begun, f"{topic}.0")):  # who made it died before that
                await self._tell(f"{topic}.0", beginning)
            return
        for index in reversed(range(partitions)):  # the first one last: with it the topic is whole
            queue = f"{topic}.{index}"
            if index in missing:
                await self._there(queue, settings)
            await self._patiently(partial(self._tell, queue, beginning))

    async def _begun(self, queue: str) -> bool:
        try:
            async with asyncio.timeout(BEGIN_PATIENCE):
                return bool(await self._read(queue, "first"))
        except TimeoutError:
            return False

    async def _patiently(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What a new stream answers, which a busy server may not find at once."""
        ends = time.monotonic() + ASK_PATIENCE
        while True:
            try:
                return await ask()
            except Unavailable:
                if time.monotonic() > ends:
                    raise
                await asyncio.sleep(0.1)

    async def remove(self, topic: str) -> None:
        with contextlib.suppress(UnknownTopic):
            await self._call(lambda channel: channel.delete(f"{topic}.0"))

    async def append(self, entries: Sequence[Entry]) -> Sequence[int | StentorError]:
        channel = await self._data.confirming()
        connection = channel.connection
        if connection.blocked:
            try:
                async with asyncio.timeout(OPEN_PATIENCE):
                    await connection.unblocked.wait()
            except TimeoutError:
                raise Unavailable(f"{self} takes no events now: {connection.blocked}") from None
        queues = [f"{entry.topic}.{entry.partition}" for entry in entries]
        try:
            async with asyncio.timeout(ASK_PATIENCE):
                batch = await channel.publish(queues, [entry.body for entry in entries], _properties())
        except (Lost, Refused, TimeoutError) as error:
            why = f"no confirm within {ASK_PATIENCE:g} s" if isinstance(error, TimeoutError) else str(error)
            if connection.blocked:
                why = f"the server takes no events now: {connection.blocked}"
            elif isinstance(error, TimeoutError):
                connection.abort()
            return [PublishUnknown([entry.message.id], why) for entry in entries]
        refused = set(batch.refused)
        away = {queue: await self._missing(queue) for queue in batch.returned}
        return [
            away[queue]
            if queue in away
            else Unavailable(f"{self}: {queue} did not take it")
            if number in refused
            else UNPLACED
            for number, queue in enumerate(queues)
        ]

    async def _missing(self, queue: str) -> BrokerError:
        """Why a message to a stream was returned: there is none, or it is not ready after a start of the server."""
        try:
            await self._there(queue)
        except BrokerError as error:
            return error
        return Unavailable(f"{self}: {queue} is not ready")

    async def _tell(self, queue: str, value: bytes) -> None:
        channel = await self._state.confirming()
        try:
            async with asyncio.timeout(ASK_PATIENCE):
                batch = await channel.publish([queue], [value], _properties())
        except (Lost, Refused) as error:
            raise Unavailable(f"{self}: {error}") from None
        except TimeoutError:
            channel.connection.abort()
            raise Unavailable(f"{self} does not answer within {ASK_PATIENCE:g} s") from None
        if batch.returned:
            raise await self._missing(queue)
        if batch.refused:
            raise Unavailable(f"{self}: {queue} did not take it")

    async def tell(self, topic: str, value: bytes) -> int:
        await self._tell(f"{topic}.0", value)
        return UNPLACED

    async def told(self, topic: str) -> list[bytes]:
        return [body for _, _, body in await self._read(f"{topic}.0", "last") if body != _NOTHING]

    def feed(self) -> RabbitMQFeed:
        return RabbitMQFeed(self.line())

    async def bounds(self, topic: str, partitions: Sequence[int]) -> list[tuple[int, int]]:
        first = 1
        if topic == self.lease_topic:  # the only one whose beginning is dropped
            first = (await self._read(f"{topic}.0", "first"))[0][0]
        ends = await asyncio.gather(*(self._end(topic, index) for index in partitions))
        return [(min(first, end), end) for end in ends]

    async def find(self, topic: str, partitions: Sequence[int], moment: float) -> list[int]:
        return list(await asyncio.gather(*(self._find(topic, index, moment) for index in partitions)))

    async def _find(self, topic: str, index: int, moment: float) -> int:
        end = await self._end(topic, index)
        # By the server's clock, a chunk at a time; messages have their publisher's.
        start = Timestamp(max(0, int(moment) - 10))
        last = (await self._read(f"{topic}.{index}", end - 1))[0]
        if last[1] < moment:
            return end
        found = await self._read(
            f"{topic}.{index}", start, lambda found: found[-1][1] >= moment or found[-1][0] + 1 >= end
        )
        return max(1, found[-1][0])

    async def pending(self, places: Sequence[tuple[str, int, int]]) -> list[tuple[int, float | None]]:
        return list(await asyncio.gather(*(self._pending(*place) for place in places)))

    async def _pending(self, topic: str, index: int, offset: int) -> tuple[int, float | None]:
        end = await self._end(topic, index)
        count = end - offset
        if count <= 0:
            return 0, None
        wanted = count if count <= COUNTED else 1
        found = await self._read(f"{topic}.{index}", offset, lambda found: len(found) >= wanted)
        real = [(place, moment) for place, moment, body in found if body != _NOTHING]
        if count <= COUNTED:
            count = len(real)
        return count, real[0][1] if real else None

    async def page(self, topic: str, index: int, offset: int, limit: int) -> Sequence[Stored]:
        end = await self._end(topic, index)
        if offset >= end:
            return []
        found = await self._read(
            f"{topic}.{index}", offset, lambda found: len(found) >= limit or found[-1][0] + 1 >= end
        )
        name = topic.removeprefix(self.prefix)
        return [
            Stored(place, moment, unpack(body, name, f"{index}-{place}"))
            for place, moment, body in found
            if body != _NOTHING
        ]

    # ---- leases -----------------------------------------------------------------------------------------------------

    def heart(self) -> _Heart:
        return _Heart(self)


class _Heart(MessageHeart):
    def __init__(self, broker: RabbitMQBroker) -> None:
        super().__init__(broker)
        self._queue = f"{broker.lease_topic}.0"
        self._runner = asyncio.Runner()
        self._line: Line | None = None

    def beat(self, name: str, value: bytes, lease: float) -> None:
        self._runner.run(self._beat(encode_lease((name, value, lease))))

    async def _beat(self, body: bytes) -> None:
        self._line = self._line or self._broker.line()
        async with asyncio.timeout(self._patience):
            channel = await self._line.confirming()
            batch = await channel.publish([self._queue], [body], _properties())
        if batch.refused or batch.returned:
            raise OSError("the lease was not taken")

    def close(self) -> None:
        if self._line is not None:
            self._runner.run(self._line.close())
        self._runner.close()
