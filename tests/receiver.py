"""A real HTTP server that takes what is delivered, and answers as a test tells it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, NamedTuple

import uvicorn

Answer = tuple[int, dict[str, str], bytes] | int


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """``answer`` decides, and may be changed at any time; ``requests`` are all that came."""

    url: str

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answer: Callable[[Request], Answer] = lambda request: 202
        self.connections: set[Any] = set()
        self._more = asyncio.Condition()

    async def got(self, count: int) -> list[Request]:
        async with self._more, asyncio.timeout(60):
            await self._more.wait_for(lambda: len(self.requests) >= count)
        return self.requests

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        request = Request(scope["method"], scope["path"], headers, body)
        self.connections.add(scope["client"])
        answer = self.answer(request)
        status, extra, said = (answer, {}, b"") if isinstance(answer, int) else answer
        raw = [(name.encode(), value.encode()) for name, value in {**extra, "content-length": str(len(said))}.items()]
        async with self._more:
            self.requests.append(request)
            self._more.notify_all()
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": said})


@asynccontextmanager
async def receiving(
    receiver: Receiver | None = None, *, host: str = "127.0.0.1", port: int = 0, **tls: Any
) -> AsyncIterator[Receiver]:
    """Serve a receiver; ``tls`` as uvicorn's options."""
    receiver = receiver or Receiver()
    server = uvicorn.Server(uvicorn.Config(receiver, lifespan="off", log_config=None, ws="none", **tls))
    server.capture_signals = nullcontext  # type: ignore[assignment,method-assign]
    listener = socket.create_server((host, port))
    started, ready = server.startup, asyncio.Event()

    async def startup(sockets: Any = None) -> None:
        await started(sockets)
        ready.set()

    server.startup = startup  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve([listener]))
    async with asyncio.timeout(60):
        await ready.wait()
    receiver.url = f"http{'s' if tls else ''}://{host}:{listener.getsockname()[1]}/hook"
    try:
        yield receiver
    finally:
        server.should_exit = True
        await task
