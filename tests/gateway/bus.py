"""A bus for tests: apps that a gateway is made of, services that count what they get, and the real Envoy between."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import httpx
import uvicorn

from servers import Missing, free_port
from servers.envoy import Envoy
from stentor import App, Event
from stentor.gateway import files
from stentor.gateway.relay import relay_of
from stentor.gateway.routes import Model, Settings, make, read_settings
from stentor.serve import serve
from tests.real import unavailable

PLACED, PAID, SENT = "com.shop.order.placed", "com.shop.order.paid", "com.shop.parcel.sent"


class Placed(Event, topic="orders", key="order", type=PLACED):
    order: str


class Paid(Event, topic="payments", key="order", type=PAID):
    order: str


class Sent(Event, topic="parcels", key="order", type=SENT):
    order: str


def apps() -> list[App]:
    """Shop publishes Placed, which billing takes; billing publishes Paid, which shop and store take."""
    shop, billing, store = App("shop"), App("billing"), App("store")
    shop.publishes(Placed)

    @billing.on(Placed)
    async def charge(order: Placed) -> Paid:
        return Paid(order=order.order)

    @shop.on(Paid)
    async def note(paid: Paid) -> None: ...

    @store.on(Paid)
    async def pack(paid: Paid) -> None: ...

    return [shop, billing, store]


def event(type: str = PLACED, number: int = 1, key: str | None = None, **headers: str) -> dict[str, str]:
    """The headers of an event in binary mode."""
    found = {"ce-specversion": "1.0", "ce-id": str(number), "ce-source": "/till/7", "ce-type": type}
    found |= {} if key is None else {"ce-partitionkey": key}
    return found | {"content-type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}


def structured(type: str = PLACED, number: int = 1, **more: Any) -> bytes:
    return json.dumps({"specversion": "1.0", "id": str(number), "source": "/till/7", "type": type, **more}).encode()


class Service:
    """A service under uvicorn that notes the headers of all it gets; ``answer`` gives each its status, or waits."""

    def __init__(self, port: int = 0) -> None:
        self.port = port or free_port()
        self.got: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.queries: list[str] = []
        self.accepted: Counter[str] = Counter()
        """By id: how often it was taken."""
        self.ready = 200
        self.answer: Callable[[int], int] = lambda count: 202
        self.delay = 0.0
        self.held: asyncio.Event | None = None
        """No event is answered before it is set."""
        self._server: uvicorn.Server | None = None

    @property
    def at(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            part = await receive()
            body += part.get("body", b"")
            if not part.get("more_body"):
                break
        if scope["path"] != "/events":
            status = self.ready
        else:
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            self.queries.append(scope["query_string"].decode())
            self.got.append(headers)
            self.bodies.append(body)
            status = self.answer(len(self.got))
            if self.delay:
                await asyncio.sleep(self.delay)
            if self.held is not None:
                await self.held.wait()
            if status < 300:
                self.accepted[headers.get("ce-id", "")] += 1
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def start(self) -> None:
        config = uvicorn.Config(self, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        self._server = server = uvicorn.Server(config)
        server.capture_signals = nullcontext  # type: ignore[assignment,method-assign]
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=2048)
        self._task = asyncio.create_task(server.serve([self._listener]))
        while not server.started:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Down: its port refuses connections."""
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
            await self._task
            self._listener.close()
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


class Bus:
    """An Envoy in front of services, by the settings of a gateway."""

    def __init__(self, folder: Path, toml: str, services: dict[str, list[Service]], made: list[App]) -> None:
        self.folder = folder
        self.services = services
        self._apps = made
        self.toml = toml
        self.ports = {name: free_port() for name in ("listen", "inside", "admin")}
        self.relay = App("gateway")
        self.broker = f"sqlite:///{folder}/relay.db"
        scheme = "https" if "[tls]" in toml else "http"
        self.url = f"{scheme}://localhost:{self.ports['listen']}"

    def model(self) -> Model:
        places = "\n".join(f"{name} = {[one.at for one in them]}" for name, them in self.services.items())
        head = "\n".join(f"{name} = '127.0.0.1:{port}'" for name, port in self.ports.items())
        settings: Settings = read_settings(f"{head}\n{self.toml}\n[services]\n{places}\n", "test")
        return make(self._apps, settings)

    def write(self) -> Model:
        model = self.model()
        files.write(model, self.folder)
        return model

    def one(self, name: str) -> Service:
        return self.services[name][0]


@asynccontextmanager
async def running(
    folder: Path,
    toml: str = "",
    *,
    made: list[App] | None = None,
    client: dict[str, Any] | None = None,
    relay: bool = False,
    **hosts: int,
) -> AsyncIterator[tuple[Bus, httpx.AsyncClient]]:
    """Services (one host each, or as many as named), an Envoy, and a client of it with these options.

    With ``relay`` the service "gateway" is the real one, on a broker in the folder.
    """
    made = apps() if made is None else made
    names = dict.fromkeys([*(app.name for app in made), "gateway"], 1) | hosts
    services = {name: [Service() for _ in range(count)] for name, count in names.items()}
    bus = Bus(folder, toml, services, made)
    model = bus.write()
    stack = AsyncExitStack()
    if relay:
        bus.relay = relay_of(made, model)
        await stack.enter_async_context(bus.relay.running(url=bus.broker))
        await stack.enter_async_context(serve(bus.relay, bus.one("gateway").at))
        del services["gateway"]
    for them in services.values():
        for one in them:
            await one.start()
    envoy = Envoy(folder, f"127.0.0.1:{bus.ports['admin']}")
    try:
        try:
            await asyncio.to_thread(envoy.start)
        except Missing as missing:
            unavailable(missing)
        async with httpx.AsyncClient(base_url=bus.url, timeout=30, **(client or {})) as session:
            yield bus, session
    finally:
        await stack.aclose()
        await asyncio.to_thread(envoy.kill)
        for them in services.values():
            for one in them:
                await one.stop()
