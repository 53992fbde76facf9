"""Users: browsers (and others) that subscribe to events and publish them, each with permissions of their own.

``GET /stream`` is Server-Sent Events, ``POST /stream`` takes CloudEvents as ``/events`` does, and ``/ws`` does both
over a WebSocket, in the CloudEvents binding for it (subprotocol ``cloudevents.json``): every message is a CloudEvent.
``?type=`` (repeated) and ``?where=`` (CloudEvents SQL) say what to tell, ``?last=`` or Last-Event-ID where to go on.

What Stentor itself says over a WebSocket has the types ``stentor.position`` (where the client is: at the start, and
after a while without events), ``stentor.accepted`` and ``stentor.refused`` (answers to what was published).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

import msgspec

from stentor.cesql import CesqlSyntaxError, parse
from stentor.cloudevents import STRUCTURED, attributes
from stentor.errors import DefinitionError, StentorError
from stentor.exchange import SOCKET, Endpoint, Exchange, Receive, Refused, Scope, Send, header_map
from stentor.identity import Identify, Identity, Visit, cookies
from stentor.ingress import mode_of, publish, read
from stentor.message import Receipt, new_id
from stentor.program import Program
from stentor.sources.follow import Client, Dropped, Reader, Told, read_places, write_places

if TYPE_CHECKING:
    from stentor.app import App

log = logging.getLogger("stentor.http")
QUIET = 15.0
"""Seconds without an event after which a client is told its position: a sign of life, which proxies want to see."""
SLOW = 30.0
"""Seconds in which a client must take what is sent to it."""
LAST = 1.0
"""Seconds for the last words to a client."""
CLIENTS = 1000
"""Connections at once, in a process."""
WHERE = 4000
"""Characters of a filter."""
SUBPROTOCOL = "cloudevents.json"


def users(
    app: App, types: tuple[type[Any], ...], identify: Identify, origins: tuple[str, ...], stream: str, socket: str
) -> None:
    """What ``App.users`` does."""
    if not callable(identify):
        raise DefinitionError(f"users: identify is a function of a Visit that gives an Identity; it is {identify!r}")
    found = Users(app, [app.catalog.add(cls, "users: ").type for cls in types], identify, origins)
    app.mount(Endpoint(stream, found.stream, ("GET",)))
    app.mount(Endpoint(stream, found.post))
    app.mount(Endpoint(socket, found.talk, (SOCKET,)))


class Users:
    """The endpoints for users of one app, and the readers that its clients share."""

    def __init__(self, app: App, types: list[str], identify: Identify, origins: tuple[str, ...]) -> None:
        self._app = app
        self._types = types
        self._identify = identify
        self._origins = origins
        self._program: Program | None = None
        self._readers: dict[str, Reader] = {}
        self.clients = 0

    # ---- who, and what they may -----------------------------------------------------------------------------------

    def _running(self) -> Program:
        program = self._app.program
        if program is None or program.runtime.stopping.is_set():
            raise Refused(503, f"{self._app.name} does not run (yet)", retry=1)
        if self._program is not program:
            self._program, self._readers = program, {}
        return program

    async def _who(self, headers: Mapping[str, str], query: Mapping[str, list[str]]) -> Identity:
        """The identity behind a request. Raises Refused for a page of another site, or nobody."""
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and urlsplit(origin).netloc != headers.get("host"):
            raise Refused(403, f"pages of {origin[:100]} may not come here")
        visit = Visit(headers, cookies(headers.get("cookie", "")), {name: values[-1] for name, values in query.items()})
        found = self._identify(visit)
        identity = await found if inspect.isawaitable(found) else found
        if identity is None:
            raise Refused(401, "nobody is known by these credentials")
        if not isinstance(identity, Identity):
            raise TypeError(f"identify gave {identity!r}; it gives an Identity or None")
        return identity

    def _allowed(self, types: tuple[Any, ...]) -> list[str]:
        """The types by name, as far as ``App.users`` was given them."""
        wanted = {cls if isinstance(cls, str) else self._app.catalog.add(cls).type for cls in types}
        return [type for type in self._types if type in wanted]

    def _client(self, program: Program, identity: Identity, query: Mapping[str, list[str]], last: str) -> Client:
        """What a client asks for, if it may. Raises Refused."""
        allowed = self._allowed(identity.subscribe)
        types = query.get("type") or allowed
        for type in types:
            if type not in allowed:
                raise Refused(403, f"{identity.name} may not subscribe to {type[:200]!r}", parameter="type")
        if not types:
            raise Refused(403, f"{identity.name} may not subscribe to anything")
        try:
            filters = [parse(text[:WHERE]) for text in [identity.where, *query.get("where", [])[:4]] if text]
            places = read_places(last)
        except CesqlSyntaxError as error:
            raise Refused(400, str(error), parameter="where") from None
        except ValueError as error:
            raise Refused(400, str(error), parameter="last") from None
        names = {name for type in types if (spec := program.catalog.find(type)) is not None for name in spec.names}
        topics = {spec.topic.name for type in types if (spec := program.catalog.find(type)) is not None}

        def wants(told: Told) -> bool:
            return told.message.type in names and all(each.matches(told.attributes) for each in filters)

        return Client(program, wants, sorted(topics), places)

    # ---- subscribing ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Room for one client. Raises Refused."""
        if self.clients >= CLIENTS:
            raise Refused(503, f"{CLIENTS} clients are connected; come again", retry=5)
        self.clients += 1
        try:
            yield
        finally:
            self.clients -= 1

    async def _tell(self, program: Program, client: Client, send: Callable[[Told | None], Awaitable[None]]) -> str:
        """Tell a client what it asked for until it is let go; returns why."""
        readers = []
        for topic in client.topics:
            reader = self._readers.get(topic)
            if reader is None or reader.task.done():  # by an error
                reader = self._readers[topic] = Reader(program, topic)
            reader.users += 1
            readers.append(reader)
        try:
            async with aclosing(client.events(readers, QUIET)) as events:
                async for told in events:
                    async with program.clock.timeout(SLOW):
                        await send(told)
        except Dropped as dropped:
            return str(dropped)
        except StentorError as error:
            log.warning("a client cannot be told events: %s", error)
            return "events cannot be read now"
        except TimeoutError:
            return f"nothing was taken within {SLOW:g} s"
        finally:
            for reader in readers:
                reader.clients.discard(client)
                reader.users -= 1
                if not reader.users:
                    reader.task.cancel()
                    if self._readers.get(reader.topic) is reader:  # it is a while until it has ended
                        del self._readers[reader.topic]
        return ""

    async def stream(self, exchange: Exchange) -> None:
        """``GET``: Server-Sent Events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
        program, headers, query = self._running(), exchange.headers(), exchange.query()
        identity = await self._who(headers, query)
        client = self._client(program, identity, query, headers.get("last-event-id") or query.get("last", [""])[-1])

        async def send(told: Told | None) -> None:
            lines = [f"id: {write_places(client.places)}".encode()]  # without data it only moves the last event id
            if told is not None:
                lines += [b"data: " + line for line in _json(told, client).replace(b"\r", b"").split(b"\n")]
            await exchange.write(b"\n".join(lines) + b"\n\n")

        async with self._place():
            await exchange.begin("text/event-stream", {"x-accel-buffering": "no", **self._cross(headers)})
            if exchange.method == "HEAD":
                await exchange.end()
                return
            await exchange.write(b"retry: 1000\n\n")
            telling = asyncio.create_task(self._tell(program, client, send))
            gone = asyncio.create_task(exchange.gone())
            stops = asyncio.create_task(_stops(program, exchange))
            async with _first(telling, gone, stops):
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST):
                        if telling.done() and not gone.done():
                            await exchange.write(f"event: bye\ndata: {telling.result()}\n\n".encode())
                        await exchange.end()

    def _cross(self, headers: Mapping[str, str]) -> dict[str, str]:
        origin = headers.get("origin")
        if origin is None or origin not in self._origins:
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-credentials": "true",
            "vary": "origin",
        }

    # ---- publishing -------------------------------------------------------------------------------------------------

    async def _publish(
        self, program: Program, identity: Identity, mode: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[Receipt, ...]:
        """Store what someone sent, under their name. Raises Refused."""
        messages = read(program, mode, headers, body, None)
        allowed = self._allowed(identity.publish)
        where = None if identity.where is None else parse(identity.where)
        for message in messages:
            spec = program.catalog.find(message.type)
            if spec is None or spec.type not in allowed:
                raise Refused(403, f"{identity.name} may not publish {message.type!r}", attribute="type")
            # Nobody speaks for others, nor takes an id that others use.
            message.source = f"{self._app.catalog.source}/users/{quote(identity.name, safe='')}"
            if where is not None and not where.matches(attributes(message)):
                raise Refused(403, f"{identity.name} may not publish this {message.type}")
        return await publish(program, messages) if messages else ()

    async def post(self, exchange: Exchange) -> None:
        """``POST``: CloudEvents in any of their modes."""
        program, headers = self._running(), exchange.headers(once=True)
        identity = await self._who(headers, exchange.query())
        if "ce-id" not in headers and not headers.get("content-type", "").startswith("application/cloudevents"):
            raise Refused(415, "send a CloudEvent: application/cloudevents+json, or ce- headers")
        mode = mode_of(headers)
        await exchange.accept(await self._publish(program, identity, mode, headers, await exchange.body()))

    # ---- WebSocket ------------------------------------------------------------------------------------------------

    async def talk(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, from its beginning to its end."""
        await receive()
        headers = header_map(scope)
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        try:
            program = self._running()
            identity = await self._who(headers, query)
            client = self._client(program, identity, query, query.get("last", [""])[-1])
            async with self._place():
                chosen = SUBPROTOCOL if SUBPROTOCOL in scope.get("subprotocols", ()) else None
                await send({"type": "websocket.accept", "subprotocol": chosen})
                await self._converse(_Line(program, identity, client, receive, send))
        except Refused as refused:
            if "websocket.http.response" in scope.get("extensions", {}):
                given = {"content-type": "text/plain; charset=utf-8", **refused.headers}
                raw = [(name.encode(), value.encode()) for name, value in given.items()]
                await send({"type": "websocket.http.response.start", "status": refused.status, "headers": raw})
                await send({"type": "websocket.http.response.body", "body": refused.detail.encode()})
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": refused.detail[:100]})

    async def _converse(self, line: _Line) -> None:
        telling = asyncio.create_task(self._tell(line.program, line.client, line.tell))
        listening = asyncio.create_task(self._listen(line))
        stops = asyncio.create_task(line.program.runtime.stopping.wait())
        async with _first(telling, listening, stops):
            with suppress(OSError, TimeoutError):  # OSError: it has gone
                async with asyncio.timeout(LAST):
                    if listening.done():
                        listening.result()
                        return
                    code, why = (1013, telling.result()) if telling.done() else (1001, "the server stops")
                    await line.send({"type": "websocket.close", "code": code, "reason": why[:100]})

    async def _listen(self, line: _Line) -> None:
        """Publish what a client sends, one after the other, until it is gone."""
        while (event := await line.receive())["type"] != "websocket.disconnect":
            text = event.get("text")
            body = text.encode("utf-8", "replace") if text is not None else event.get("bytes") or b""
            try:
                if len(body) > line.program.limit:
                    raise Refused(413, f"{len(body):,} bytes; {line.program.limit:,} is the most")
                (receipt,) = await self._publish(line.program, line.identity, STRUCTURED, {}, body)
            except Refused as refused:
                await line.say("refused", id=_id_of(body), status=refused.status, detail=refused.detail)
            else:
                await line.say("accepted", id=receipt.id, duplicate=receipt.duplicate)


class _Line:
    """A WebSocket connection of an identity."""

    def __init__(self, program: Program, identity: Identity, client: Client, receive: Receive, send: Send) -> None:
        self.program = program
        self.identity = identity
        self.client = client
        self.receive = receive
        self.send = send

    async def tell(self, told: Told | None) -> None:
        if told is None:
            await self.say("position")
        else:
            await self.send({"type": "websocket.send", "text": _json(told, self.client).decode()})

    async def say(self, what: str, **data: Any) -> None:
        """A word of Stentor's own, as a CloudEvent."""
        event = {
            "specversion": "1.0", "id": new_id(), "source": self.program.catalog.source, "type": f"stentor.{what}",
            "position": write_places(self.client.places), "data": data,
        }  # fmt: skip
        await self.send({"type": "websocket.send", "text": msgspec.json.encode(event).decode()})


@asynccontextmanager
async def _first(*tasks: asyncio.Task[Any]) -> AsyncIterator[None]:
    """The body runs when one of them has ended; then none of them runs."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _stops(program: Program, exchange: Exchange) -> None:
    waits = [asyncio.create_task(event.wait()) for event in (program.runtime.stopping, exchange.closing)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _json(told: Told, client: Client) -> bytes:
    """An event in JSON, with the extension ``position``: what to come back with."""
    return b'{"position":"' + write_places(client.places).encode() + b'",' + told.json[1:]


def _id_of(body: bytes) -> str | None:
    try:
        id = msgspec.json.decode(body, type=dict[str, Any]).get("id")
    except (ValueError, RecursionError):
        return None
    return id if isinstance(id, str) else None
