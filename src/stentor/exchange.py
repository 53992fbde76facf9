"""What features mount on ``app.asgi``: an endpoint is a path and an async function of one Exchange, a request's way.

Raise ``Refused`` in it to answer with a problem body (RFC 9457). What requests with a body take together, in memory and
in number, is bounded for all endpoints at once.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs

from stentor.message import Receipt
from stentor.program import Program

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = "application/json"
PROBLEM = "application/problem+json"
REQUESTS = 256
"""Requests with a body under way at once; further ones are told to come again."""
BUFFER = 64 * 1024 * 1024
"""Bytes of their bodies in memory at once, beside the one that a request may always have."""
SLOW = 30.0
"""Seconds in which a request must bring its body."""
LINGER = 2.0
"""Seconds for which the rest of a refused body is read and dropped, so that its sender gets to see the answer."""
SHOWN = 500
"""Characters of a refusal's text that are sent."""


OWN = {"/events": ("POST", "OPTIONS")} | dict.fromkeys(("/healthz", "/readyz", "/metrics", "/flow"), ("GET",))
"""The paths that every app answers at, with their methods."""
SOCKET = "WEBSOCKET"
"""The method, as it were, of an endpoint for WebSocket connections."""


class Endpoint(NamedTuple):
    """A path of ``app.asgi`` and what answers there; put there by ``App.mount``.

    A path that ends in ``/`` takes all below it; ``Exchange.below`` is the rest. With GET comes HEAD. For ``SOCKET``
    the answer is an ASGI application of one connection: it gets scope, receive and send instead of an Exchange.
    """

    path: str
    answer: Callable[..., Awaitable[None]]
    methods: tuple[str, ...] = ("POST",)

    def takes(self, method: str, path: str) -> bool | None:
        """Whether it answers; None when only the method is wrong."""
        if path != self.path and not (self.path.endswith("/") and path.startswith(self.path)):
            return False
        return method in self.methods or (method == "HEAD" and "GET" in self.methods) or None


class Verify(Protocol):
    """How the sender of a webhook is known; ``stentor.sources.webhook`` has five."""

    def check(self, headers: Mapping[str, str], body: bytes, now: float) -> None:
        """Raises Refused with 401 when the request is not the sender's, or is too old (``now``: since the epoch)."""
        ...

    def names(self, headers: Mapping[str, str], payload: Any) -> tuple[str | None, str | None]:
        """The id of the delivery, which a repetition has again, and the name of what happened."""
        ...


def path_of(scope: Scope) -> str:
    """The path below the one where ``app.asgi`` is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    below = root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/")
    return path[len(root) :] if below else path


def header_map(scope: Scope, *, once: bool = False) -> dict[str, str]:
    """As ``Exchange.headers``."""
    found: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name, text = raw.decode("latin-1").lower(), value.decode("latin-1")
        if name in found:
            if once and name.startswith(("ce-", "content-")):
                attribute = name.removeprefix("ce-")
                raise Refused(400, f"attribute {attribute!r} stands in two headers", attribute=attribute)
            text = f"{found[name]}, {text}"
        found[name] = text
    return found


class Refused(Exception):
    """A request is answered with a problem body; ``extra`` are its further members, ``retry`` is for Retry-After."""

    def __init__(
        self, status: int, detail: str, *, retry: int | None = None, allow: str | None = None, **extra: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.extra = extra
        self.headers: dict[str, str] = {}
        if retry is not None:
            self.headers["retry-after"] = str(retry)
        if allow is not None:
            self.headers["allow"] = allow


class Room:
    """What requests with a body take together."""

    def __init__(self) -> None:
        self.requests = 0
        self.bytes = 0
        self.counts: Counter[str] = Counter()
        """What became of them: "published" and "duplicate" events, and refusals by their status."""
        self.closing = asyncio.Event()
        """Set when the server stops: answers without an end must end."""

    @contextmanager
    def taken(self, exchange: Exchange) -> Iterator[None]:
        """A request's place among those under way, and afterwards its bytes given back. Raises Refused."""
        if self.requests >= REQUESTS:
            raise Refused(429, f"{REQUESTS} requests are under way; come again", retry=1)
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1
            self.bytes -= exchange.size


class Exchange:
    """One HTTP request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, running: Callable[[], Program], room: Room) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._running = running
        self._room = room
        self.started = False
        """The answer has begun."""
        self.method: str = scope["method"]
        self.path = path_of(scope)
        self.below = ""
        """What the path has below that of its endpoint."""
        self.size = 0
        """Bytes of the body that were read."""
        self.complete = False
        """The body was read to its end, or the client is gone."""

    @property
    def closing(self) -> asyncio.Event:
        """Set when the server stops."""
        return self._room.closing

    @property
    def program(self) -> Program:
        """The running app. Raises Refused with 503 while it does not run."""
        return self._running()

    def headers(self, *, once: bool = False) -> dict[str, str]:
        """The headers by name in lower case, repeated ones joined; ``once``: those of CloudEvents stand once."""
        return header_map(self._scope, once=once)

    def query(self) -> dict[str, list[str]]:
        """The parameters of the query string."""
        return parse_qs(self._scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)

    async def read(self) -> bytes:
        """The next piece of the body. Raises Refused when the client went away."""
        event = await self._receive()
        if event["type"] != "http.request":
            self.complete = True
            raise Refused(400, "the client went away before the body was complete")
        self.complete = not event.get("more_body", False)
        chunk: bytes = event.get("body", b"")
        self.size += len(chunk)
        return chunk

    async def body(self) -> bytes:
        """All of the body, refused as soon as it is known to be too large or too much beside the others."""
        program, room = self.program, self._room
        limit = program.limit
        length = dict(self._scope["headers"]).get(b"content-length", b"")
        announced = int(length) if length.isdigit() and len(length) < 20 else 0
        if announced > limit:
            raise Refused(413, f"{announced:,} bytes; {limit:,} are taken at most")
        chunks = []
        try:
            async with program.clock.timeout(SLOW):
                while not self.complete:
                    chunk = await self.read()
                    room.bytes += len(chunk)
                    if self.size > limit:
                        raise Refused(413, f"over {limit:,} bytes, which are taken at most")
                    if room.bytes > BUFFER and room.bytes > self.size:
                        raise Refused(429, f"{BUFFER:,} bytes of other requests are under way; come again", retry=1)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refused(408, f"the body did not come within {SLOW:g} s") from None
        return b"".join(chunks)

    async def answer(
        self, status: int, body: Any, content: str = JSON, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole answer; what is not bytes becomes JSON."""
        await self._start(status, body, content, headers or {})

    async def accept(self, receipts: Sequence[Receipt]) -> None:
        """Answer 202, and which events were stored, now or before."""
        again = [receipt.id for receipt in receipts if receipt.duplicate]
        self._room.counts["published"] += len(receipts) - len(again)
        self._room.counts["duplicate"] += len(again)
        await self.answer(202, {"ids": [receipt.id for receipt in receipts], "duplicates": again})

    async def begin(self, content: str, headers: Mapping[str, str]) -> None:
        """Begin an answer that is sent piece by piece."""
        given = {"content-type": content, "cache-control": "no-store", **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def write(self, piece: bytes) -> None:
        """Send a piece of it; waits while the client takes nothing."""
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        """End it."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def gone(self) -> None:
        """Back when the client is gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def refuse(self, refused: Refused) -> None:
        """Send a problem body; the rest of a request's body is read for a while, else its sender gets a reset."""
        detail = refused.detail if len(refused.detail) <= SHOWN else refused.detail[:SHOWN] + "…"
        title = HTTPStatus(refused.status).phrase
        problem = {"type": "about:blank", "title": title, "status": refused.status, "detail": detail, **refused.extra}
        linger = self.method == "POST" and not self.complete
        headers = {**refused.headers, "connection": "close"} if linger else refused.headers
        await self._start(refused.status, problem, PROBLEM, headers, more=linger)
        if linger:
            await self._linger()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(
        self, status: int, body: Any, content: str, headers: Mapping[str, str], *, more: bool = False
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()  # ASCII: whatever the text holds
        given = {"content-type": content, "content-length": str(len(data)), "cache-control": "no-store", **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _linger(self) -> None:
        try:
            async with asyncio.timeout(LINGER):
                while not self.complete:
                    await self.read()
        except (TimeoutError, Refused):
            pass
