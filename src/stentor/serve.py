"""Serving an app over HTTP inside the event loop that runs it; for ``stentor run --http``."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from stentor.errors import ConfigError

if TYPE_CHECKING:
    from stentor.app import App

log = logging.getLogger("stentor.http")
BACKLOG = 2048
FRAME = 1024 * 1024
"""Bytes of a WebSocket message at most."""


@asynccontextmanager
async def serve(app: App, address: str, *, grace: int = 10) -> AsyncIterator[str]:
    """Serve ``app.asgi`` at ``HOST:PORT`` (port 0 takes a free one) while the body runs; gives the URL.

    At the end no connection is accepted any more, and requests under way have ``grace`` seconds to end. The app itself
    is run by the caller, around this: until it runs, and after it stopped, requests get 503. Signals stay the caller's.

    Raises:
        ConfigError: the address is wrong or taken, or uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise ConfigError("serving HTTP needs uvicorn: pip install 'stentor[http]'") from None
    listener = _listen(address)
    asgi = app.asgi
    sockets: Any = "websockets-sansio" if find_spec("websockets") else "none"
    config = uvicorn.Config(
        asgi, lifespan="off", ws=sockets, ws_max_size=FRAME, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=grace,
    )  # fmt: skip
    ready = asyncio.get_running_loop().create_future()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready.set_result(None)

    server = Server(config)
    server.capture_signals = nullcontext  # type: ignore[assignment,method-assign]
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    task = asyncio.create_task(server.serve([listener]), name="stentor http")
    try:
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            raise ConfigError(f"--http {address}: the server ended at once")
        log.info("%s listens on %s", app.name, url)
        yield url
    finally:
        asgi.close()
        server.should_exit = True
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:  # whoever stops us cannot wait for the requests under way
            task.cancel()
            raise
        finally:
            listener.close()


def _listen(address: str) -> socket.socket:
    host, colon, digits = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not digits.isascii() or not digits.isdigit() or int(digits) > 65535:
        raise ConfigError(f"--http {address!r} is no HOST:PORT; write for example 127.0.0.1:8080 or [::1]:8080")
    try:
        family = socket.getaddrinfo(host, int(digits), type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, int(digits)), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"--http {address}: cannot listen there: {error.strerror or error}") from None
