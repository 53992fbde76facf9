"""What the NATS broker needs of a connection: questions with answers, and partitions read ahead.

Both use core NATS through nats-py; the JetStream API is spoken as its documents give it (ADR-1, ADR-13, ADR-50).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

from stentor.brokers.log_state import Feed, Read
from stentor.brokers.trust import PLAIN
from stentor.errors import BrokerError, StentorError, StorageFull, TooLarge, Unavailable, UnknownTopic
from stentor.message import new_id

ASK_PATIENCE = 10.0
"""Seconds that the server has for an answer."""
AHEAD = 2000
"""Messages that a reader keeps ready; each partition may add a pull to it."""
AHEAD_BYTES = 16 * 1024 * 1024
PULL = 500
"""Messages that a pull asks for."""
PULL_EXPIRES = 30.0
PULL_BEAT = 5.0
"""Seconds between signs of life of an idle pull."""
IDLE = 60.0
"""Seconds after which the server forgets a consumer that nobody asks."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.decode

_LINE = len(b"NATS/1.0")
"""Where a status follows, if one does (ADR-4)."""
_FULL = {10023, 10028, 10047, 10076, 10077, 10122}
_TOO_LARGE = {10054, 10097}
_MISSING = {10059}
_AWAY = {10004, 10005, 10006, 10007, 10008, 10009, 10074, 10164}


class Silent(Unavailable):
    """Nobody answered: a cluster, or a stream of it, whose leader died does not until there is another."""


class Refused(BrokerError):
    """The JetStream API said no; ``number`` is its ``err_code``."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def refusal(who: object, error: Mapping[str, Any]) -> StentorError:
    """What an error of the JetStream API means."""
    number, text = error.get("err_code", 0), f"{who}: {error.get('description', 'refused')}"
    if number in _MISSING:
        return UnknownTopic(text)
    if number in _FULL:
        return StorageFull(text)
    if number in _TOO_LARGE:
        return TooLarge(text)
    if number in _AWAY or error.get("code") in (408, 503):
        return Unavailable(text)
    return Refused(text, number)


def status(message: Msg) -> str:
    """The status of a message that has no data but tells something, else empty."""
    return "" if message.data or not message.headers else message.headers.get("Status", "")


class Place(NamedTuple):
    """Where a delivered message stands: in its stream, in its consumer, when it was stored, how many follow."""

    offset: int
    delivered: int
    time: float
    pending: int

    @classmethod
    def of(cls, message: Msg) -> Place:
        """Read from the reply subject: ``$JS.ACK.``, two or four names, then five numbers (ADR-15)."""
        parts = message.reply.split(".")
        at = 5 if len(parts) < 11 else 7
        return cls(int(parts[at]), int(parts[at + 1]), int(parts[at + 2]) / 1e9, int(parts[at + 3]))


class Frame(NamedTuple):
    """A message to be sent. ``headers`` as they are sent, with the line before and the empty one after them (ADR-4)."""

    subject: str
    payload: bytes = b""
    reply: str = ""
    headers: bytes = b""

    def __bytes__(self) -> bytes:
        to, size = f"{self.subject} {self.reply}".encode(), len(self.payload)
        if self.headers:
            ahead = len(self.headers)
            return b"HPUB %b %d %d\r\n%b%b\r\n" % (to, ahead, ahead + size, self.headers, self.payload)
        return b"PUB %b %d\r\n%b\r\n" % (to, size, self.payload)


class Speaker(Client):
    """The library's client goes by the server's word whether there is TLS: this one logs in to nobody without it.

    It also gives what comes to its listeners at once, where the library's has a queue and a task for each
    subscription, and reads no headers but those that tell a status: a third of what receiving an event takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listeners: dict[int, Callable[[Msg], None]] = {}
        """By the number of a subscription."""

    def write(self, frames: Iterable[Frame]) -> None:
        """Send at once what this connection has still to send, and these: the library's flusher is a turn later."""
        assert self._transport is not None
        pending, self._pending, self._pending_data_size = self._pending, [], 0
        self._transport.writelines([*pending, *map(bytes, frames)])

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        listener = self.listeners.get(sid)
        if listener is None:  # of those who use the connection as the library's
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        told = await self._process_headers(headers) if headers and headers[_LINE : _LINE + 1] == b" " else None
        try:
            listener(self._build_message(sid, subject, reply, data, told))
        except Exception as error:  # what is not as the server sends it
            await self._error_cb(error)

    def _connect_command(self) -> bytes:
        assert isinstance(self._transport, TcpTransport)
        writer = self._transport._io_writer
        assert writer is not None
        if "tls" in self.options and writer.get_extra_info("ssl_object") is None:
            writer.close()
            raise nats.errors.Error(PLAIN)
        protocol: Any = writer.transport.get_protocol()
        if "tls" in self.options and protocol is not None:  # it is None where the server has hung up by now
            protocol._over_ssl = True  # the library did not tell it: asyncio would warn when the server hangs up
        return super()._connect_command()


class _Post:
    """Messages that were sent together, and their answers so far."""

    __slots__ = ("answers", "done", "first", "left")

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.left = count
        self.answers: list[Msg | None] = [None] * count
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """True when all have come, False when the connection was lost before."""

    def end(self, came: bool) -> None:
        if not self.done.done():
            self.done.set_result(came)


class Link:
    """A connection. Its answers come to one inbox; when it is lost, all that wait are told."""

    def __init__(self, who: object, options: Mapping[str, Any]) -> None:
        self._who = who
        self._options = options
        self._inbox = f"_INBOX.{new_id()}"
        self._posts: dict[int, _Post] = {}
        """By the numbers of the inbox that their answers come to."""
        self._next = 0
        self.nc = Speaker()
        self.on_lost: list[Callable[[], None]] = []
        self.trouble = ""
        self._opened = False

    async def open(self) -> None:
        """Connect, at once or not at all; from then on it connects again by itself, for ever. Raises what nats-py
        raises.
        """
        await self.nc.connect(
            **self._options, allow_reconnect=False, max_reconnect_attempts=-1, reconnect_time_wait=1,
            disconnected_cb=self._lost, error_cb=self._failed, pending_size=0, connect_timeout=3, ping_interval=2,
            max_outstanding_pings=2, name="stentor",
        )  # fmt: skip
        self.nc.options["allow_reconnect"] = self._opened = True
        await self.listen(self._came, f"{self._inbox}.*")

    async def close(self) -> None:
        self._lose()
        if self._opened:  # a client that never connected cannot be closed
            if not self.nc.is_connected:
                self.nc._pending_data_size = 0  # else it writes what is pending to a connection that is closed
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                await self.nc.close()

    async def _failed(self, error: Exception) -> None:
        self.trouble = " ".join(str(error).split()) or type(error).__name__

    async def _lost(self) -> None:
        self._lose()

    def _lose(self) -> None:
        posts, self._posts = self._posts, {}
        for post in posts.values():
            post.end(False)
        for told in self.on_lost:
            told()

    def _came(self, message: Msg) -> None:
        number = int(message.subject.rpartition(".")[2])
        post = self._posts.pop(number, None)
        if post is not None:
            post.answers[number - post.first] = message
            post.left -= 1
            if not post.left:
                post.end(True)

    async def listen(self, listener: Callable[[Msg], None], subject: str = "") -> Subscription:
        """Hear what is sent to a subject, by default a new one, in the task that reads the connection. Raises
        Unavailable.
        """
        try:
            inbox = await self.nc.subscribe(subject or f"_INBOX.{new_id()}")
        except (nats.errors.Error, OSError) as error:
            raise Unavailable(f"{self._who}: {error}") from None
        self.nc.listeners[inbox._id] = listener
        return inbox

    async def mute(self, inbox: Subscription) -> None:
        del self.nc.listeners[inbox._id]
        with contextlib.suppress(nats.errors.Error, OSError):
            await inbox.unsubscribe()

    def send(self, *frames: Frame) -> None:
        """Send messages. Raises Unavailable, and then nothing was sent."""
        if not self.nc.is_connected:
            raise Unavailable(f"{self._who} is away{f': {self.trouble}' if self.trouble else ''}")
        size = max((len(one.payload) + len(one.headers) for one in frames), default=0)
        if size > self.nc.max_payload:  # the server would hang up
            raise Unavailable(f"{self._who} takes {self.nc.max_payload:,} bytes at most, not {size:,}")
        self.nc.write(frames)

    async def post(self, *messages: Frame, patience: float = ASK_PATIENCE) -> list[Msg | Unavailable]:
        """Send messages and wait for the answer to each, or why there is none. Raises as ``send``."""
        post = _Post(self._next, len(messages))
        self._next += len(messages)
        numbers = range(post.first, self._next)
        self.send(
            *(
                Frame(m.subject, m.payload, f"{self._inbox}.{n}", m.headers)
                for n, m in zip(numbers, messages, strict=True)
            )
        )
        self._posts |= dict.fromkeys(numbers, post)
        missing: Unavailable = Silent(f"{self._who} does not answer within {patience:g} s")
        try:
            async with asyncio.timeout(patience):
                if not await post.done:
                    missing = Unavailable(f"{self._who}: the connection was lost")
        except TimeoutError:
            pass
        finally:
            if post.left:
                for number in numbers:
                    self._posts.pop(number, None)
        return [missing if answer is None else answer for answer in post.answers]

    async def ask(self, subject: str, payload: bytes = b"", patience: float = ASK_PATIENCE) -> Msg:
        """The answer to a question. Raises Unavailable."""
        [answer] = await self.post(Frame(subject, payload), patience=patience)
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    async def api(self, call: str, /, patience: float = ASK_PATIENCE, **body: Any) -> dict[str, Any]:
        """Call the JetStream API. Raises Unavailable, UnknownTopic, StorageFull, or Refused."""
        answer = await self.ask(f"$JS.API.{call}", _encode(body) if body else b"", patience)
        if status(answer):
            raise Unavailable(f"{self._who}: JetStream does not answer; is it enabled, and for this account?")
        found: dict[str, Any] = _decode(answer.data)
        if "error" in found:
            raise refusal(self._who, found["error"])
        return found

    async def consumer(self, stream: str, subject: str, **start: Any) -> tuple[str, dict[str, Any]]:
        """Make a consumer that only reads, and is forgotten when idle: its name, and what the server says of it."""
        name = new_id()
        settings = {
            "name": name, "ack_policy": "none", "filter_subject": subject, "replay_policy": "instant",
            "inactive_threshold": int(IDLE * 1e9), "mem_storage": True, "num_replicas": 1, **start,
        }  # fmt: skip
        found = await self.api(
            f"CONSUMER.CREATE.{stream}.{name}.{subject}", stream_name=stream, config=settings, action="create"
        )
        return name, found

    def discard(self, stream: str, name: str) -> None:
        """Let the server forget a consumer now; the answer does not matter."""
        with contextlib.suppress(Unavailable):
            self.send(Frame(f"$JS.API.CONSUMER.DELETE.{stream}.{name}"))


def stream_of(topic: str) -> str:
    """The stream of a topic: a stream's name has no dots."""
    return topic.replace(".", "~")  # not "%": NATS 2.9 delivers nothing of such a stream


class Cursor:
    """How far a partition is read."""

    __slots__ = ("consumer", "delivered", "heard", "inbox", "index", "next", "token", "topic", "wanted")

    def __init__(self, token: Any, topic: str, index: int, offset: int) -> None:
        self.token = token
        self.topic = topic
        self.index = index
        self.next = offset
        """The offset that is wanted next."""
        self.consumer = ""
        """The name of its consumer on the server; empty when it needs a new one."""
        self.inbox: Subscription | None = None
        self.delivered = 0
        """Messages that the consumer sent, by its own count."""
        self.wanted = 0
        """Messages that are still to come of the last pull."""
        self.heard = 0.0


class NatsFeed(Feed):
    """Reads partitions from offsets on and keeps what it read until it is taken.

    Each partition has a consumer without acks on the server. When it misses a message, falls silent or is gone, it gets
    a new one at the next offset.
    """

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link
        self._cursors: dict[Any, Cursor] = {}
        self._ended: list[tuple[str, str, Subscription]] = []
        self._buffer: deque[tuple[Cursor, Read]] = deque()
        self._bytes = 0
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        link.on_lost.append(self._lost)

    def seek(self, token: Any, topic: str, index: int, offset: int) -> None:
        self.drop(token)
        self._cursors[token] = Cursor(token, topic, index, offset)
        self._work.set()
        if self._task is None:
            self._task = self._start(self._run(), "stentor nats reader")

    def drop(self, token: Any) -> None:
        cursor = self._cursors.pop(token, None)
        if cursor is not None:
            self._restart(cursor)

    def _restart(self, cursor: Cursor) -> None:
        if cursor.inbox is not None:
            self._ended.append((stream_of(cursor.topic), cursor.consumer, cursor.inbox))
        cursor.consumer, cursor.inbox, cursor.wanted = "", None, 0
        self._work.set()

    async def _clear(self) -> None:
        """Let the server forget what ended."""
        while self._ended:
            stream, consumer, inbox = self._ended.pop()
            await self._link.mute(inbox)
            if consumer:
                self._link.discard(stream, consumer)

    def _lost(self) -> None:
        for cursor in self._cursors.values():
            self._restart(cursor)

    def take(self, limit: int) -> list[Read]:
        found: list[Read] = []
        full = self._full
        while self._buffer and len(found) < limit:
            cursor, read = self._buffer.popleft()
            self._bytes -= len(read.value)
            if self._cursors.get(read.token) is cursor:
                found.append(read)
        if full and not self._full:
            self._work.set()
        return found

    @property
    def _full(self) -> bool:
        return len(self._buffer) >= AHEAD or self._bytes > AHEAD_BYTES

    async def close(self) -> None:
        self._link.on_lost.remove(self._lost)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for token in list(self._cursors):
            self.drop(token)
        await self._clear()

    async def _run(self) -> None:
        """Make consumers where they are missing, ask for more where all has come."""
        while True:
            self._work.clear()
            now = time.monotonic()
            for cursor in self._cursors.values():
                if cursor.wanted and now - cursor.heard > 2.5 * PULL_BEAT:
                    self._restart(cursor)
            await self._clear()
            new = [cursor for cursor in self._cursors.values() if not cursor.consumer]
            results = await asyncio.gather(*map(self._begin, new))
            for cursor in list(self._cursors.values()):
                if cursor.consumer and not cursor.wanted and not self._full:
                    await self._pull(cursor)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PULL_BEAT if all(results) else 0.2):
                    if not all(results):
                        await asyncio.sleep(0.2)
                    await self._work.wait()

    async def _begin(self, cursor: Cursor) -> bool:
        stream, subject = stream_of(cursor.topic), f"{cursor.topic}.{cursor.index}"
        start = {"deliver_policy": "by_start_sequence", "opt_start_seq": max(1, cursor.next)}
        try:
            inbox = await self._link.listen(lambda message: self._came(cursor, inbox, message))
            try:
                name, _ = await self._link.consumer(stream, subject, **start)
            except BaseException:
                self._ended.append((stream, "", inbox))
                raise
        except BrokerError as error:
            self.fail(error)
            return False
        cursor.consumer, cursor.inbox, cursor.delivered = name, inbox, 0
        if self._cursors.get(cursor.token) is not cursor:
            self._restart(cursor)
        return True

    async def _pull(self, cursor: Cursor) -> None:
        body = {
            "batch": PULL, "expires": int(PULL_EXPIRES * 1e9), "idle_heartbeat": int(PULL_BEAT * 1e9),
            "max_bytes": AHEAD_BYTES,
        }  # fmt: skip
        assert cursor.inbox is not None
        cursor.wanted, cursor.heard = PULL, time.monotonic()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream_of(cursor.topic)}.{cursor.consumer}"
        try:
            self._link.send(Frame(subject, _encode(body), cursor.inbox.subject))
        except Unavailable as error:
            self._restart(cursor)
            self.fail(error)

    def _came(self, cursor: Cursor, inbox: Subscription, message: Msg) -> None:
        if cursor.inbox is not inbox:
            return  # it has a new one by now
        cursor.heard = time.monotonic()
        told = status(message)
        if told == "100":
            return
        if told in ("404", "408"):
            cursor.wanted = 0
            self._work.set()
            return
        if told:
            whole = (message.headers or {}).get("Description", "")
            if told == "409" and ("Batch" in whole or "Size" in whole):
                cursor.wanted = 0
                self._work.set()
            else:
                self._restart(cursor)
            return
        place = Place.of(message)
        if place.delivered != cursor.delivered + 1:
            self._restart(cursor)
            return
        cursor.delivered = place.delivered
        cursor.next = place.offset + 1
        cursor.wanted -= 1
        self._bytes += len(message.data)
        self._buffer.append((cursor, Read(cursor.token, place.offset, place.time, message.data)))
        self._trouble = None
        self._ready.set()
        if not cursor.wanted:
            self._work.set()
