"""AMQP 0.9.1 over asyncio: the few methods that streams need, with batches of publishes and of deliveries in mind.

A batch of publishes is one write and one wait for its confirms; a delivery is three frames that are read in one go.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from stentor.connect import Address

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
END = b"\xce"
FRAME_MAX = 131_072

# Class and method in one number, as they stand at the head of a method frame.
CONNECTION_START, CONNECTION_START_OK = 0x000A000A, 0x000A000B
CONNECTION_TUNE, CONNECTION_TUNE_OK = 0x000A001E, 0x000A001F
CONNECTION_OPEN, CONNECTION_OPEN_OK = 0x000A0028, 0x000A0029
CONNECTION_CLOSE, CONNECTION_CLOSE_OK = 0x000A0032, 0x000A0033
CONNECTION_BLOCKED, CONNECTION_UNBLOCKED = 0x000A003C, 0x000A003D
CHANNEL_OPEN, CHANNEL_CLOSE, CHANNEL_CLOSE_OK = 0x0014000A, 0x00140028, 0x00140029
QUEUE_DECLARE, QUEUE_DELETE = 0x0032000A, 0x00320028
BASIC_QOS, BASIC_CONSUME, BASIC_CANCEL, BASIC_CANCEL_OK = 0x003C000A, 0x003C0014, 0x003C001E, 0x003C001F
BASIC_PUBLISH, BASIC_RETURN, BASIC_DELIVER = 0x003C0028, 0x003C0032, 0x003C003C
BASIC_ACK, BASIC_NACK = 0x003C0050, 0x003C0078
CONFIRM_SELECT = 0x0055000A

NOT_FOUND = 404

_FRAME = struct.Struct(">BHI")
_TAG = struct.Struct(">Q")
_head = _FRAME.unpack_from
_tag = _TAG.unpack_from
_method = struct.Struct(">I").unpack_from
_size = _TAG.unpack_from


class Lost(Exception):
    """The connection ended, or could not be made; one line says why."""


class Refused(Exception):
    """The server closed a channel or a connection; ``code`` is AMQP's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code


class Login(NamedTuple):
    """Where and as whom: no ``user`` means EXTERNAL, by the certificate."""

    addresses: Sequence[Address]
    vhost: str
    user: str | None
    password: str
    context: ssl.SSLContext | None
    heartbeat: int
    """Seconds without a word after which an end takes the other for gone, about."""


# ---- words -----------------------------------------------------------------------------------------------------------


def short(text: str) -> bytes:
    """A short string."""
    data = text.encode()
    return struct.pack(">B", len(data)) + data


def _long(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


class Timestamp(int):
    """Seconds since the epoch, as a value of a table."""


def _field(value: Any) -> bytes:
    match value:
        case bool():
            return b"t" + bytes([value])
        case Timestamp():
            return b"T" + _TAG.pack(value)
        case int():
            return b"l" + struct.pack(">q", value)
        case str():
            return b"S" + _long(value.encode())
        case Mapping():
            return b"F" + table(value)
        case _:
            raise TypeError(type(value))


def table(fields: Mapping[str, Any]) -> bytes:
    """A field table of booleans, integers, text and tables."""
    return _long(b"".join(short(name) + _field(value) for name, value in fields.items()))


def _short_at(data: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + data[at]
    return data[at + 1 : end].decode("utf-8", "replace"), end


def _text_at(data: bytes, name: bytes) -> str:
    """The text under a name in a table, found by its bytes; "" if there is none."""
    at = data.find(bytes([len(name)]) + name + b"S")
    if at < 0:
        return ""
    at += len(name) + 2
    (size,) = _method(data, at)
    return data[at + 4 : at + 4 + size].decode("utf-8", "replace")


def _frame(kind: int, channel: int, payload: bytes) -> bytes:
    return _FRAME.pack(kind, channel, len(payload)) + payload + END


def _call(channel: int, method: int, arguments: bytes = b"") -> bytes:
    return _frame(METHOD, channel, struct.pack(">I", method) + arguments)


# ---- a connection ----------------------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One connection; it knows by heartbeats when the other end is gone."""

    def __init__(self, login: Login) -> None:
        self.login = login
        self.version = ""
        """The server's, as it says."""
        self.blocked = ""
        """Why the server takes no publishes now; "" while it does."""
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._channels: dict[int, Channel] = {}
        self._numbers = 0
        self._free: list[int] = []
        self._rest = b""
        self._room = FRAME_MAX - 8
        self.most = 2047
        """Channels that it may have at once."""
        self._beats = 0.0
        self._heard = self._said = time.monotonic()
        self._beating: asyncio.TimerHandle | None = None
        self._paused = False

    @classmethod
    async def open(cls, login: Login, patience: float = 5.0) -> Connection:
        """Connect to one of the addresses and log in.

        Raises Lost where none of them answers, or Refused (wrong credentials, no such virtual host), or ssl.SSLError.
        """
        lost: Lost | None = None
        for address in random.sample(login.addresses, len(login.addresses)):  # all nodes get some
            try:
                return await cls._open(login, address, patience)
            except Lost as error:
                lost = error
        assert lost is not None
        raise lost

    @classmethod
    async def _open(cls, login: Login, address: Address, patience: float) -> Connection:
        loop = asyncio.get_running_loop()
        made = cls(login)
        try:
            async with asyncio.timeout(patience):
                await loop.create_connection(lambda: made, address.host, address.port, ssl=login.context)
                await made._opened
        except TimeoutError:
            made.abort()
            raise Lost(f"no answer within {patience:g} s") from None
        except ssl.SSLError:
            raise
        except OSError as error:
            raise Lost(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
        except BaseException:
            made.abort()
            raise
        return made

    @property
    def closed(self) -> bool:
        return self.error is not None

    @property
    def peer(self) -> object:
        """The address and port that it led to."""
        return self._transport and self._transport.get_extra_info("peername")

    def abort(self, error: Exception | None = None) -> None:
        """End it without a word to the other side."""
        self._fail(error or Lost("the connection was closed"))
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Say goodbye, for a second at most."""
        if not self.closed:
            self._write(_call(0, CONNECTION_CLOSE, struct.pack(">H", 200) + short("") + b"\0\0\0\0"))
            with contextlib.suppress(TimeoutError, Lost, Refused):
                async with asyncio.timeout(1):
                    await asyncio.shield(self._closed)
        self.abort()

    async def channel(self) -> Channel:
        """A new channel. Raises Lost."""
        if self.error is not None:
            raise Lost(str(self.error))
        if self._free:
            number = self._free.pop()
        else:
            if self._numbers >= self.most:
                raise Lost(f"the server allows {self.most} channels a connection")
            self._numbers += 1
            number = self._numbers
        made = self._channels[number] = Channel(self, number)
        await made.call(CHANNEL_OPEN, b"\0")
        return made

    def pause(self) -> None:
        """Read nothing more for now."""
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self._transport is not None and not self.closed:
            self._paused = False
            self._heard = time.monotonic()
            self._transport.resume_reading()

    # ---- what asyncio calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(b"AMQP\x00\x00\x09\x01")

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError):
            self._fail(exc)
        self._fail(Lost(str(exc) if exc is not None and str(exc) else "the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        channels = self._channels
        try:
            while end - at >= 8:
                kind, number, size = _head(data, at)
                start, stop = at + 7, at + 8 + size
                if stop > end:
                    break
                at = stop
                if kind == METHOD:
                    (method,) = _method(data, start)
                    channel = channels.get(number)
                    if method == BASIC_DELIVER:
                        if channel is not None:
                            (channel.tag,) = _tag(data, start + 5 + data[start + 4])
                            channel.whose = data[start + 5]
                    elif number == 0:
                        self._connection_method(method, data[start + 4 : stop - 1])
                    elif channel is not None:
                        channel.method(method, data[start + 4 : stop - 1])
                elif kind == BODY:
                    channel = channels.get(number)
                    if channel is not None:
                        channel.body(data[start : stop - 1])
                elif kind == HEADER:
                    channel = channels.get(number)
                    if channel is not None:
                        (channel.missing,) = _size(data, start + 4)
                        channel.header = data[start : stop - 1]
                        if not channel.missing:
                            channel.body(b"")
        except Exception as error:
            self.abort(error if isinstance(error, Lost | Refused) else Lost(f"not understood: {error!r}"))
            return
        self._rest = data[at:] if at < end else b""

    # ---- the connection's own methods -------------------------------------------------------------------------------

    def _connection_method(self, method: int, data: bytes) -> None:
        login = self.login
        if method == CONNECTION_START:
            self.version = _text_at(data, b"version")
            properties = {
                "product": "stentor",
                "capabilities": {
                    "authentication_failure_close": True, "basic.nack": True, "connection.blocked": True,
                    "consumer_cancel_notify": True, "publisher_confirms": True,
                },
            }  # fmt: skip
            way, answer = ("EXTERNAL", b"") if login.user is None else ("PLAIN", b"")
            if login.user is not None:
                answer = f"\0{login.user}\0{login.password}".encode()
            self._write(_call(0, CONNECTION_START_OK, table(properties) + short(way) + _long(answer) + short("en_US")))
        elif method == CONNECTION_TUNE:
            channels, size, beat = struct.unpack(">HIH", data)
            self.most = min(channels or 65535, 65535)
            size = min(size or FRAME_MAX, FRAME_MAX)
            self._room = size - 8
            beat = login.heartbeat if not beat else min(beat, login.heartbeat)
            self._write(_call(0, CONNECTION_TUNE_OK, struct.pack(">HIH", channels, size, beat)))
            self._write(_call(0, CONNECTION_OPEN, short(login.vhost) + b"\0\0"))
            self._beats = beat / 2
            self._beat()
        elif method == CONNECTION_OPEN_OK:
            if not self._opened.done():
                self._opened.set_result(None)
        elif method == CONNECTION_BLOCKED:
            self.blocked = _short_at(data, 0)[0] or "an alarm"
            self.unblocked.clear()
        elif method == CONNECTION_UNBLOCKED:
            self.blocked = ""
            self.unblocked.set()
        elif method == CONNECTION_CLOSE:
            (code,) = struct.unpack_from(">H", data)
            text, _ = _short_at(data, 2)
            self._write(_call(0, CONNECTION_CLOSE_OK))
            self._fail(Refused(code, text))
            if self._transport is not None:
                self._transport.close()
        elif method == CONNECTION_CLOSE_OK:
            self._fail(Lost("the connection was closed"))

    def _beat(self) -> None:
        if self.closed:
            return
        now = time.monotonic()
        if now - self._heard > 4 * self._beats and not self._paused:
            self.abort(Lost(f"nothing was heard for {4 * self._beats:g} s"))
            return
        if now - self._said >= self._beats * 0.9:
            self._write(_frame(HEARTBEAT, 0, b""))
        self._beating = self._loop.call_later(self._beats, self._beat)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._said = time.monotonic()
            self._transport.write(data)

    def _fail(self, error: Exception) -> None:
        if self.error is not None:
            return
        self.error = error
        if self._beating is not None:
            self._beating.cancel()
        self.unblocked.set()
        for channel in list(self._channels.values()):
            channel.fail(error if isinstance(error, Lost) else Lost(str(error)))
        self._channels.clear()
        for future in (self._opened, self._closed):
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody has to look

    def _ended(self, number: int) -> None:
        if self._channels.pop(number, None) is not None:
            self._free.append(number)


class Batch(NamedTuple):
    """Publishes under way together: the number of the last, and what was not stored of them."""

    first: int
    last: int
    done: asyncio.Future[None]
    refused: list[int]
    """Places in the batch that the server could not store."""
    returned: set[str]
    """Queues that are not there."""


class Channel:
    """A channel: calls one after the other, publishes with confirms, or deliveries to ``arrived``."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.error: Exception | None = None
        self.arrived: Callable[[int, int, bytes, bytes], None] = lambda whose, tag, header, body: None
        """Called with the consumer's letter, the delivery's tag, its header and its body."""
        self.ended: Callable[[], None] = lambda: None
        """Called once, when it is closed by the server, loses its connection, or its consumer is cancelled there."""
        self.tag = 0
        self.whose = 0
        self.header = b""
        self.missing = 0
        self._pieces: list[bytes] = []
        self._returning = ""
        self._calls: deque[asyncio.Future[bytes]] = deque()
        self._batches: deque[Batch] = deque()
        self._next = 1
        self._low = 1
        self._confirmed: set[int] = set()

    # ---- calls -------------------------------------------------------------------------------------------------------

    def call(self, method: int, arguments: bytes = b"") -> asyncio.Future[bytes]:
        """Send a method that has an answer; the answer's arguments. Its future raises Lost or Refused."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.error is not None:
            future.set_exception(self.error)
            return future
        self._calls.append(future)
        self.connection._write(_call(self.number, method, arguments))
        return future

    def declare(self, queue: str, arguments: Mapping[str, Any] | None = None) -> asyncio.Future[bytes]:
        """Make a durable queue; without arguments only look whether it is there (Refused with NOT_FOUND)."""
        bits = b"\x01" if arguments is None else b"\x02"
        return self.call(QUEUE_DECLARE, b"\0\0" + short(queue) + bits + table(arguments or {}))

    def delete(self, queue: str) -> asyncio.Future[bytes]:
        return self.call(QUEUE_DELETE, b"\0\0" + short(queue) + b"\0")

    def qos(self, count: int) -> asyncio.Future[bytes]:
        """How many deliveries each later consumer may have unacknowledged."""
        return self.call(BASIC_QOS, struct.pack(">IHB", 0, count, 0))

    def consume(self, queue: str, letter: str, offset: int | str) -> asyncio.Future[bytes]:
        """Read a stream from an offset, a Timestamp, "first", "last" or "next" on; ``letter`` names the consumer."""
        arguments = table({"x-stream-offset": offset})
        return self.call(BASIC_CONSUME, b"\0\0" + short(queue) + short(letter) + b"\0" + arguments)

    def cancel(self, letter: str) -> asyncio.Future[bytes]:
        return self.call(BASIC_CANCEL, short(letter) + b"\0")

    def ack(self, tag: int) -> None:
        """Acknowledge a delivery and all before it: for a stream this is room for as many more."""
        if self.error is None:
            self.connection._write(_call(self.number, BASIC_ACK, _TAG.pack(tag) + b"\x01"))

    def close(self) -> None:
        """Close it; what is still on its way is lost."""
        if self.error is None:
            self.ended = lambda: None
            self.arrived = lambda whose, tag, header, body: None
            # Its number is free once the server has answered.
            self.call(CHANNEL_CLOSE, struct.pack(">H", 200) + short("") + b"\0\0\0\0").add_done_callback(self._closed)

    def _closed(self, future: asyncio.Future[bytes]) -> None:
        if not future.cancelled():
            future.exception()
        self.connection._ended(self.number)
        self.fail(Lost("the channel was closed"))

    # ---- publishing --------------------------------------------------------------------------------------------------

    async def confirms(self) -> None:
        await self.call(CONFIRM_SELECT, b"\0")

    async def publish(self, queues: Sequence[str], bodies: Sequence[bytes], properties: bytes) -> Batch:
        """Publish to queues, in order, and wait until each is confirmed or refused. Raises Lost (maybe stored)."""
        if self.error is not None:
            raise self.error
        number, room = self.number, self.connection._room
        heads: dict[str, bytes] = {}
        parts: list[bytes] = []
        add = parts.append
        for queue, body in zip(queues, bodies, strict=True):
            head = heads.get(queue)
            if head is None:
                start = b"\x00\x3c\x00\x00"
                head = heads[queue] = (
                    _call(number, BASIC_PUBLISH, b"\0\0" + b"\0" + short(queue) + b"\x01")  # mandatory
                    + _FRAME.pack(HEADER, number, 12 + len(properties))
                    + start
                )
            size = len(body)
            add(head)
            add(_TAG.pack(size))
            add(properties)
            if not size:
                pass
            elif size <= room:
                add(END + _FRAME.pack(BODY, number, size))
                add(body)
            else:
                add(END)
                for at in range(0, size, room):
                    piece = body[at : at + room]
                    add((END if at else b"") + _FRAME.pack(BODY, number, len(piece)))
                    add(piece)
            add(END)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        batch = Batch(self._next, self._next + len(bodies) - 1, done, [], set())
        self._next += len(bodies)
        self._batches.append(batch)
        self.connection._write(b"".join(parts))
        await done
        return batch

    def _confirm(self, tag: int, multiple: bool, stored: bool) -> None:
        tags = [t for t in range(self._low, tag + 1) if t not in self._confirmed] if multiple else [tag]
        if not stored:
            for batch in self._batches:
                batch.refused.extend(t - batch.first for t in tags if batch.first <= t <= batch.last)
        if multiple:
            self._confirmed.difference_update(range(self._low, tag + 1))
            self._low = max(self._low, tag + 1)
        else:
            self._confirmed.add(tag)
        while self._low in self._confirmed:
            self._confirmed.discard(self._low)
            self._low += 1
        while self._batches and self._batches[0].last < self._low:
            batch = self._batches.popleft()
            if not batch.done.done():
                batch.done.set_result(None)

    # ---- what the connection hands on --------------------------------------------------------------------------------

    def body(self, piece: bytes) -> None:
        self.missing -= len(piece)
        if self.missing > 0:
            self._pieces.append(piece)
            return
        if self._pieces:
            piece = b"".join((*self._pieces, piece))
            self._pieces.clear()
        if self._returning:
            for batch in self._batches:
                batch.returned.add(self._returning)
            self._returning = ""
        else:
            self.arrived(self.whose, self.tag, self.header, piece)

    def method(self, method: int, data: bytes) -> None:
        if method in (BASIC_ACK, BASIC_NACK):
            self._confirm(_tag(data)[0], bool(data[8] & 1), method == BASIC_ACK)
        elif method == BASIC_RETURN:
            _, at = _short_at(data, 2)
            _, at = _short_at(data, at)
            self._returning, _ = _short_at(data, at)
        elif method == BASIC_CANCEL:
            self.ended()
        elif method == CHANNEL_CLOSE:
            (code,) = struct.unpack_from(">H", data)
            text, _ = _short_at(data, 2)
            self.connection._write(_call(self.number, CHANNEL_CLOSE_OK))
            self.connection._ended(self.number)
            self.fail(Refused(code, text))
        elif self._calls:
            future = self._calls.popleft()
            if not future.done():
                future.set_result(data)

    def fail(self, error: Exception) -> None:
        if self.error is not None:
            return
        self.error = error
        futures: list[asyncio.Future[Any]] = [*self._calls, *(batch.done for batch in self._batches)]
        self._calls.clear()
        self._batches.clear()
        for future in futures:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits gets it; some were not waited for
        self.ended()
