"""HTTP ingress: an ASGI 3 application that takes CloudEvents and tells how the app is.

``POST /events`` takes events in binary, structured and batched mode and answers 202 once the broker has them durably;
``/healthz``, ``/readyz``, ``/metrics`` and ``/flow`` are for those who watch; features mount more (``App.mount``).

One request's way: ``_http`` (its endpoint) -> ``_events`` -> ``exchange.body`` (bounded) -> ``read`` (check, topic,
key) -> ``publish`` (ingress.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stentor.errors import ConfigError, StentorError
from stentor.exchange import (
    JSON,
    OWN,
    PROBLEM,
    SOCKET,
    Endpoint,
    Exchange,
    Receive,
    Refused,
    Room,
    Scope,
    Send,
    path_of,
)
from stentor.health import Health
from stentor.ingress import declared_topic, mode_of, publish, read, takes_json
from stentor.program import Program

if TYPE_CHECKING:
    from stentor.app import App

READING = ("GET", "HEAD", "OPTIONS")
"""Methods whose requests bring nothing, so that no place is needed for them."""
log = logging.getLogger("stentor.http")


class Ingress:
    """The ASGI application of an app: to serve by itself (it then runs the app), or to mount in another.

    A type that the app knows is checked by decoding and goes to its topic, under the attribute ``partitionkey`` or else
    the key of its class. Any other type is refused, unless ``?topic=`` names a topic that the app declares.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._health: Health | None = None
        self._room = Room()
        self._own = [
            Endpoint(path, self._events if path == "/events" else self._watch, methods) for path, methods in OWN.items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            raise NotImplementedError(f"ASGI scope {scope['type']!r}")

    def close(self) -> None:
        """The server stops: answers without an end are ended."""
        self._room.closing.set()

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
        exchange = Exchange(scope, receive, send, self._program, self._room)
        try:
            endpoint = self._endpoint(exchange.method, exchange.path)
            exchange.below = exchange.path[len(endpoint.path) :]
            if exchange.method in READING:
                await endpoint.answer(exchange)
            else:
                with self._room.taken(exchange):
                    await endpoint.answer(exchange)
        except Refused as refused:
            if exchange.method not in READING and refused.status != 404:
                self._room.counts[str(refused.status)] += 1
            await exchange.refuse(refused)
        except Exception:
            log.exception("a request to %s failed", exchange.path)
            if exchange.started:
                raise
            await exchange.refuse(Refused(500, "the server failed; its log says why"))

    def _endpoint(self, method: str, path: str) -> Endpoint:
        """What answers there. Raises Refused when nothing does, or not with that method."""
        endpoints = [*self._own, *self._app.endpoints]
        near: list[str] = []
        for endpoint in endpoints:
            takes = endpoint.takes(method, path)
            if takes:
                return endpoint
            if takes is None:
                near += endpoint.methods
        if near == [SOCKET]:
            raise Refused(426, f"{path} takes WebSocket connections")
        if near:
            near = [method for method in near if method != SOCKET]
            allow = ", ".join(near + ["HEAD"] * ("GET" in near))
            raise Refused(405, f"{path} takes {allow}", allow=allow)
        *some, last = dict.fromkeys(endpoint.path for endpoint in endpoints)
        raise Refused(404, f"there are {', '.join(some)} and {last}")

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            endpoint = self._endpoint(SOCKET, path_of(scope))
        except Refused:
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await endpoint.answer(scope, receive, send)

    def _program(self) -> Program:
        program = self._app.program
        if program is None:
            raise Refused(503, f"{self._app.name} does not run (yet)", retry=1)
        return program

    async def _watch(self, exchange: Exchange) -> None:
        program, path = exchange.program, exchange.path
        health = self._health
        if health is None or health.program is not program:
            health = self._health = Health(program)
        if path == "/healthz":
            state = await health.alive()
            await exchange.answer(503 if state["reasons"] else 200, state)
        elif path == "/readyz":
            state = await health.ready()
            await exchange.answer(503 if state["reasons"] else 200, state)
        elif path == "/flow":
            await exchange.answer(200, await health.flow())
        else:
            accept = exchange.headers().get("accept", "")
            try:
                body, content = await health.metrics(accept, self._room.counts, self._room.requests)
            except ConfigError as error:
                raise Refused(501, str(error)) from None
            await exchange.answer(200, body, content)

    # ---- events -------------------------------------------------------------------------------------------------

    async def _events(self, exchange: Exchange) -> None:
        headers = exchange.headers(once=True)
        if exchange.method == "OPTIONS":
            await self._consent(exchange, headers)
            return
        program = exchange.program
        if not takes_json(headers.get("accept", "")):
            raise Refused(406, f"answers are {JSON} or {PROBLEM}; Accept asks for neither")
        mode = mode_of(headers)
        topic = declared_topic(program, exchange.query())
        messages = read(program, mode, headers, await exchange.body(), topic)
        await exchange.accept(await publish(program, messages) if messages else ())

    @staticmethod
    async def _consent(exchange: Exchange, headers: Mapping[str, str]) -> None:
        """The handshake of CloudEvents web hooks (1.0.2, section 4): whoever may post here may say where it comes from.

        The answer is given at once, so that a URL in WebHook-Request-Callback is never called.
        """
        answer = {"allow": "POST, OPTIONS"}
        if origin := headers.get("webhook-request-origin"):
            answer |= {"webhook-allowed-origin": origin, "webhook-allowed-rate": "*"}
        await exchange.answer(200, b"", headers=answer)
