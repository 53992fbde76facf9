"""HTTP ingress: an ASGI 3 application that takes CloudEvents and tells how the app is.

``POST /events`` takes events in binary, structured and batched mode and answers 202 once the broker has them durably;
``/healthz``, ``/readyz`` and ``/metrics`` are for those who watch. Refusals are problem bodies as of RFC 9457.

One request's way: ``_events`` -> ``_body`` (bounded) -> ``read`` (check, topic, key) -> ``publish`` (ingress.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from stentor.errors import ConfigError, StentorError
from stentor.health import Health, failures
from stentor.ingress import JSON, PROBLEM, Refused, declared_topic, mode_of, publish, read, takes_json
from stentor.program import Program

if TYPE_CHECKING:
    from stentor.app import App

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

REQUESTS = 256
"""Requests to /events under way at once; further ones are told to come again."""
BUFFER = 64 * 1024 * 1024
"""Bytes of their bodies in memory at once, beside the one that a request may always have."""
SLOW = 30.0
"""Seconds in which a request must bring its body."""
LINGER = 2.0
"""Seconds for which the rest of a refused body is read and dropped, so that its sender gets to see the answer."""
SHOWN = 500
"""Characters of a refusal's text that are sent."""

log = logging.getLogger("stentor.http")


class Ingress:
    """The ASGI application of an app: to serve by itself (it then runs the app), or to mount in another.

    A type that the app knows is checked by decoding and goes to its topic, under the attribute ``partitionkey`` or else
    the key of its class. Any other type is refused, unless ``?topic=`` names a topic that the app declares.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._health: Health | None = None
        self._requests = 0
        self._buffered = 0
        self.counts: Counter[str] = Counter()
        """What it did: "published" and "duplicate" events, and refusals of /events by their status."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            raise NotImplementedError(f"ASGI scope {scope['type']!r}")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Run the app from startup to shutdown, unless someone else runs it already."""
        await receive()
        if self._app.program is not None:
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        began = False
        try:
            # A worker that fails does not end the server: /healthz says so, and what watches it decides.
            async with self._app.running(on_fatal=lambda error: log.critical("a worker failed: %r", error)):
                await send({"type": "lifespan.startup.complete"})
                began = True
                await receive()
        except Exception as error:
            if not isinstance(error, StentorError):  # those say what to do; the server shows the message
                log.exception("%s cannot %s", self._app, "stop in order" if began else "start")
            kind = "lifespan.shutdown.failed" if began else "lifespan.startup.failed"
            await send({"type": kind, "message": f"{type(error).__name__}: {error}"})
        else:
            await send({"type": "lifespan.shutdown.complete"})

    # ---- requests -----------------------------------------------------------------------------------------------

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, root = scope["path"], scope.get("root_path", "")
        if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
            path = path[len(root) :]
        exchange = Exchange(scope, receive, send)
        try:
            if path == "/events":
                await self._events(exchange)
            elif path in ("/healthz", "/readyz", "/metrics"):
                await self._watch(path, exchange)
            else:
                raise Refused(404, "there are /events, /healthz, /readyz and /metrics")
        except Refused as refused:
            if path == "/events":
                self.counts[str(refused.status)] += 1
            await exchange.refuse(refused)
        except Exception:
            log.exception("a request to %s failed", path)
            if exchange.started:
                raise
            await exchange.refuse(Refused(500, "the server failed; its log says why"))

    def _program(self) -> Program:
        program = self._app.program
        if program is None:
            raise Refused(503, f"{self._app.name} does not run (yet)", retry=1)
        return program

    async def _watch(self, path: str, exchange: Exchange) -> None:
        if exchange.method not in ("GET", "HEAD"):
            raise Refused(405, f"{path} is read with GET", allow="GET, HEAD")
        program = self._program()
        health = self._health
        if health is None or health.program is not program:
            health = self._health = Health(program)
        if path == "/healthz":
            reasons = failures(program)
            state = {"status": "failed" if reasons else "ok", "app": program.name, "reasons": reasons}
            await exchange.answer(503 if reasons else 200, state)
        elif path == "/readyz":
            state = await health.ready()
            await exchange.answer(503 if state["reasons"] else 200, state)
        else:
            accept = exchange.headers().get("accept", "")
            try:
                body, content = await health.metrics(accept, self.counts, self._requests)
            except ConfigError as error:
                raise Refused(501, str(error)) from None
            await exchange.answer(200, body, content)

    # ---- events -------------------------------------------------------------------------------------------------

    async def _events(self, exchange: Exchange) -> None:
        if exchange.method != "POST":
            raise Refused(405, "events are sent with POST", allow="POST")
        program = self._program()
        headers = exchange.headers(once=True)
        if not takes_json(headers.get("accept", "")):
            raise Refused(406, f"answers are {JSON} or {PROBLEM}; Accept asks for neither")
        mode = mode_of(headers)
        topic = declared_topic(program, exchange.query())
        if self._requests >= REQUESTS:
            raise Refused(429, f"{REQUESTS} requests are under way; come again", retry=1)
        self._requests += 1
        try:
            body = await self._body(exchange, headers, program)
            messages = read(program, mode, headers, body, topic)
            receipts = await publish(program, messages) if messages else ()
        finally:
            self._requests -= 1
            self._buffered -= exchange.size
        again = [receipt.id for receipt in receipts if receipt.duplicate]
        self.counts["published"] += len(receipts) - len(again)
        self.counts["duplicate"] += len(again)
        await exchange.answer(202, {"ids": [receipt.id for receipt in receipts], "duplicates": again})

    async def _body(self, exchange: Exchange, headers: Mapping[str, str], program: Program) -> bytes:
        """The body, refused as soon as it is known to be too large or too much beside the others."""
        limit = program.limit
        length = headers.get("content-length", "")
        announced = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
        if announced > limit:
            raise Refused(413, f"{announced:,} bytes; {program.broker.features.name} takes {limit:,} at most")
        chunks = []
        try:
            async with program.clock.timeout(SLOW):
                while not exchange.complete:
                    chunk = await exchange.read()
                    self._buffered += len(chunk)
                    if exchange.size > limit:
                        raise Refused(413, f"over {limit:,} bytes, which {program.broker.features.name} takes at most")
                    if self._buffered > BUFFER and self._buffered > exchange.size:
                        raise Refused(429, f"{BUFFER:,} bytes of other requests are under way; come again", retry=1)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refused(408, f"the body did not come within {SLOW:g} s") from None
        return b"".join(chunks)


class Exchange:
    """One HTTP request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.started = False
        """The answer has begun."""
        self.method: str = scope["method"]
        self.size = 0
        """Bytes of the body that were read."""
        self.complete = False
        """The body was read to its end, or the client is gone."""

    def headers(self, *, once: bool = False) -> dict[str, str]:
        """The headers by name in lower case, repeated ones joined; ``once``: those of CloudEvents stand once."""
        found: dict[str, str] = {}
        for raw, value in self._scope["headers"]:
            name, text = raw.decode("latin-1").lower(), value.decode("latin-1")
            if name in found:
                if once and name.startswith(("ce-", "content-")):
                    attribute = name.removeprefix("ce-")
                    raise Refused(400, f"attribute {attribute!r} stands in two headers", attribute=attribute)
                text = f"{found[name]}, {text}"
            found[name] = text
        return found

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

    async def answer(self, status: int, body: Any, content: str = JSON) -> None:
        """Send a whole answer; what is not bytes becomes JSON."""
        await self._start(status, body, content, {})

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
