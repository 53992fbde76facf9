"""RocketMQ's remoting protocol: frames of a length, a JSON head and a body, many requests at once on a connection."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import socket
import ssl
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import msgspec
from msgspec import Struct

from stentor.brokers.trust import refused
from stentor.errors import AuthenticationFailed, BrokerError, StorageFull, TooLarge, Unavailable, UnknownTopic

SEND_BATCH = 320
PULL = 11
CREATE_TOPIC = 17
DELETE_TOPIC = 215
DELETE_TOPIC_NAMES = 216
BROKER_CONFIG = 26
BROKER_STATE = 28
FIND_BY_TIME = 29
MAX_OFFSET = 30
MIN_OFFSET = 31
ROUTE = 105
CLUSTER = 106

OK = 0
SYSTEM_BUSY = 2
NOT_FLUSHED = frozenset({10, 11, 12})
"""The message is stored, but neither its flush nor its copy was confirmed in time."""
ILLEGAL = 13
NO_ROOM = 14
NO_PERMISSION = 16
NO_TOPIC = 17
NOT_FOUND = 19
TRY_AGAIN = 20
MOVED = 21

VERSION = 477
"""RocketMQ 5.3: servers shape some answers by the client's version."""


class Head(Struct, gc=False, rename={"fields": "extFields"}):
    """The head of a request or an answer."""

    code: int
    opaque: int
    flag: int = 0
    remark: str | None = None
    fields: dict[str, str] | None = None


class Answer(Struct, gc=False):
    """What a server said."""

    code: int
    remark: str
    fields: dict[str, str]
    body: bytes


class Pulled(Struct, gc=False):
    """One message of a pull: its offset, when it was stored (seconds since the epoch), and its bytes."""

    offset: int
    time: float
    body: bytes


_encode = msgspec.json.Encoder().encode
_head = msgspec.json.Decoder(Head).decode
_length = struct.Struct(">II")
_fixed = struct.Struct(">ii4x4x4xqqiq")  # length, magic; queue offset, physical offset, flags, time of birth
_item = struct.Struct(">iiiii")


class Signer:
    """Signs requests with a user's password, as RocketMQ's access control wants it."""

    def __init__(self, user: str, password: str) -> None:
        self._user = user
        self._key = password.encode()

    def sign(self, fields: dict[str, str], body: bytes) -> None:
        """Add who asks, and the proof."""
        fields["AccessKey"] = self._user
        content = "".join(fields[name] for name in sorted(fields)).encode() + body
        fields["Signature"] = base64.b64encode(hmac.new(self._key, content, hashlib.sha1).digest()).decode()


def request(code: int, opaque: int, fields: dict[str, Any], body: bytes, signer: Signer | None) -> bytes:
    """The bytes of a request."""
    texts = {name: value if type(value) is str else str(value) for name, value in fields.items()}
    if signer is not None:
        signer.sign(texts, body)
    head = _encode(
        {"code": code, "language": "PYTHON", "version": VERSION, "opaque": opaque, "flag": 0, "extFields": texts}
    )
    return _length.pack(4 + len(head) + len(body), len(head)) + head + body


def answer(frame: memoryview) -> tuple[int, Answer] | None:
    """The number of a request and what was answered; None for what the server asks of its own."""
    size = int.from_bytes(frame[1:4], "big")
    head = _head(frame[4 : 4 + size])
    if not head.flag & 1:
        return None
    return head.opaque, Answer(head.code, head.remark or "", head.fields or {}, bytes(frame[4 + size :]))


def check(found: Answer, broker: object) -> Answer:
    """The answer, unless it is an error."""
    if found.code == OK:
        return found
    raise failure(found, broker)


def failure(found: Answer, broker: object) -> BrokerError | TooLarge:
    """An answer as an error of Stentor's tree."""
    text = (found.remark.splitlines() or [""])[0].partition(", see ")[0][:300]
    if found.code == NO_PERMISSION:
        return AuthenticationFailed(f"{broker} refuses the user or password: {text}")
    if found.code == NO_TOPIC:
        return UnknownTopic(f"{broker} has no such topic: {text}")
    if found.code == ILLEGAL:
        return TooLarge(f"{broker} refuses a message: {text}")
    if found.code == NO_ROOM and "disk" in text:
        return StorageFull(f"{broker} takes no messages: {text}")
    return Unavailable(f"{broker} answers {found.code}: {text}")


def batch(bodies: Sequence[bytes]) -> bytes:
    """Messages as the body of one request: they are stored together, in order, or not at all."""
    parts: list[bytes] = []
    for body in bodies:
        parts += (_item.pack(22 + len(body), 0, 0, 0, len(body)), body, b"\0\0")
    return b"".join(parts)


def messages(data: bytes) -> Iterator[Pulled]:
    """What the body of a pull holds."""
    at = 0
    while at < len(data):
        length, _, offset, _, flags, _ = _fixed.unpack_from(data, at)
        stored = at + 48 + (20 if flags & 16 else 8)
        (time,) = struct.unpack_from(">q", data, stored)
        body = stored + 8 + (20 if flags & 32 else 8) + 12
        (size,) = struct.unpack_from(">i", data, body)
        found = data[body + 4 : body + 4 + size]
        if flags & 1 and flags >> 8 & 7 in (0, 3):  # other people's clients compress; LZ4 and ZSTD stay as they are
            with contextlib.suppress(zlib.error):
                found = zlib.decompress(found)
        yield Pulled(offset, time / 1000, found)
        at += length


def address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[host]:port``."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


class Link(asyncio.Protocol):
    """A connection to one server; what it is asked is answered in any order."""

    def __init__(self, name: str, signer: Signer | None) -> None:
        self.name = name
        self.open = True
        self._signer = signer
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = count(1)

    @classmethod
    async def connect(cls, name: str, signer: Signer | None, context: ssl.SSLContext | None) -> Link:
        """Raises Unavailable, or AuthenticationFailed where a certificate is refused."""
        host, port = address(name)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(5):
                _, link = await loop.create_connection(lambda: cls(name, signer), host, port, ssl=context)
        except ssl.SSLCertVerificationError as error:
            raise refused(name, str(error)) from None
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"{name} cannot be reached: {str(error) or 'no answer within 5 s'}") from None
        return link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        if (raw := transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at = 0
        with memoryview(buffer) as view:
            while len(buffer) - at >= 4:
                size = int.from_bytes(view[at : at + 4], "big")
                if len(buffer) - at - 4 < size:
                    break
                with view[at + 4 : at + 4 + size] as frame:
                    found = answer(frame)
                at += 4 + size
                if found is not None:
                    future = self._waiting.pop(found[0], None)
                    if future is not None and not future.done():
                        future.set_result(found[1])
        if at:
            del buffer[:at]

    def connection_lost(self, _: Exception | None) -> None:
        self.open = False
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(Unavailable(f"the connection to {self.name} is gone"))

    def ask(self, code: int, fields: dict[str, Any], body: bytes = b"") -> asyncio.Future[Answer]:
        """Send a request; its answer comes by the future. Raises Unavailable."""
        if not self.open or self._transport is None:
            raise Unavailable(f"the connection to {self.name} is gone")
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._transport.write(request(code, number, fields, body, self._signer))
        return future

    async def call(self, code: int, fields: dict[str, Any], body: bytes = b"", patience: float = 5.0) -> Answer:
        """Ask, and wait for the answer; a server that is silent for ``patience`` seconds is given up."""
        future = self.ask(code, fields, body)
        try:
            async with asyncio.timeout(patience):
                return await future
        except TimeoutError:
            self.abort()
            raise Unavailable(f"{self.name} does not answer within {patience:g} s") from None

    def abort(self) -> None:
        """End it at once."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()


class Line:
    """A connection for a thread: one request at a time. Raises OSError."""

    def __init__(self, name: str, signer: Signer | None, context: ssl.SSLContext | None, patience: float) -> None:
        host, port = address(name)
        raw = socket.create_connection((host, port), patience)
        self._socket = context.wrap_socket(raw, server_hostname=host) if context else raw
        self._file = self._socket.makefile("rb")
        self._signer = signer

    def call(self, code: int, fields: dict[str, Any], body: bytes = b"") -> Answer:
        self._socket.sendall(request(code, 1, fields, body, self._signer))
        while True:
            size = int.from_bytes(self._file.read(4), "big")
            frame = self._file.read(size)
            if size == 0 or len(frame) < size:
                raise OSError("the connection is gone")
            found = answer(memoryview(frame))
            if found is not None:
                return found[1]

    def close(self) -> None:
        self._file.close()
        self._socket.close()
