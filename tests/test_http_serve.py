"""Serving an app, mounting it in another, and running it under uvicorn as a program of its own."""

import asyncio
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from stentor.errors import ConfigError
from stentor.serve import serve
from tests.http_site import BODY, STRUCTURED, Placed, make, served, stuck

# ---- serving --------------------------------------------------------------------------------------------------------


async def test_serving_stops_in_order() -> None:
    site = make()
    async with served(site), stuck(site) as held, httpx.AsyncClient(timeout=30) as client:

        async def release_when_nobody_listens(url: str) -> None:
            await closed(url)
            assert not request.done()
            held.release()

        async with serve(site.app, "127.0.0.1:0") as url:
            request = asyncio.create_task(client.post(f"{url}/events", content=BODY, headers=STRUCTURED))
            await held.reached(1)
            watch = asyncio.create_task(release_when_nobody_listens(url))
        # Leaving took as long as the request that was under way.
        assert watch.done()
        await watch
        assert (await request).status_code == 202


async def closed(url: str) -> None:
    """Come back as soon as nobody listens at a URL any more."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except ConnectionError:
                return
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.mark.parametrize(
    "address", ["", "8080", ":8080", "localhost:", "localhost:http", "localhost:99999", "no host:1"]
)
async def test_a_wrong_address_is_one_clear_error(address: str) -> None:
    with pytest.raises(ConfigError, match="--http"):
        async with serve(make().app, address):
            pass


async def test_a_taken_port_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--http {address}: cannot listen there: .*in use"):
            await serve(make().app, address).__aenter__()


async def test_without_uvicorn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"pip install 'stentor\[http\]'"):
        async with serve(make().app, "127.0.0.1:0"):
            pass


async def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    async with serve(make().app, "[::1]:0") as url, httpx.AsyncClient(base_url=url) as client:
        assert url.startswith("http://[::1]:")
        assert (await client.get("/healthz")).status_code == 503


# ---- mounting -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def hosted(application: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Any ASGI application on a real uvicorn, with its lifespan."""
    server = uvicorn.Server(uvicorn.Config(application, lifespan="on", log_config=None, ws="none"))
    server.capture_signals = nullcontext  # type: ignore[assignment,method-assign]
    listener = socket.create_server(("127.0.0.1", 0))
    started = server.startup
    ready = asyncio.Event()

    async def startup(sockets: Any = None) -> None:
        await started(sockets)
        ready.set()

    server.startup = startup  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve([listener]))
    async with asyncio.timeout(60):
        await ready.wait()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            yield client
    finally:
        server.should_exit = True
        await task


@pytest.mark.parametrize("prefix", ["", "/stentor", "/deep/er"])
async def test_mounted_in_fastapi_with_its_lifespan(prefix: str) -> None:
    site = make()
    api = FastAPI(lifespan=site.app.lifespan)

    @api.get("/own")
    async def own() -> str:
        return "mine"

    api.mount(prefix, site.app.asgi)
    async with hosted(api) as client:
        assert (await client.get("/own")).json() == "mine"
        assert (await client.get(f"{prefix}/readyz")).status_code == 200
        assert (await client.post(f"{prefix}/events", content=BODY, headers=STRUCTURED)).status_code == 202
        assert await site.handled(1) == [Placed(order_id="o-1")]
        assert (await client.get(f"{prefix}/nothing")).status_code == 404
    assert site.app.program is None


async def test_served_alone_it_runs_the_app() -> None:
    site = make()
    async with hosted(site.app.asgi) as client:
        assert (await client.post("/events", content=BODY, headers=STRUCTURED)).status_code == 202
        assert await site.handled(1) == [Placed(order_id="o-1")]
    assert site.app.program is None
    # Where the app runs already, its lifespan is left to whoever runs it.
    async with site.app:
        async with hosted(site.app.asgi) as client:
            assert (await client.get("/readyz")).status_code == 200
        assert site.app.program is not None


async def test_uvicorn_as_a_program_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from tests.http_site import make\n"
        f"asgi = make('sqlite', {str(tmp_path)!r}).app.asgi\n"
        "wrong = __import__('stentor').App('x', broker='sqlite:///x.db?colour=red').asgi\n"
    )

    async def start(name: str) -> asyncio.subprocess.Process:
        root = str(Path(__file__).parents[1])
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "uvicorn", f"shop:{name}", "--port", "0", "--app-dir", str(tmp_path)),
            cwd=root, env={"PYTHONPATH": f"{root}:{root}/src", "PATH": ""}, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    process = await start("asgi")
    assert process.stderr is not None
    found = None
    async with asyncio.timeout(60):
        while found is None:
            line = (await process.stderr.readline()).decode()
            assert line, "it ended at once"
            found = re.search(r"http://127.0.0.1:\d+", line)
    async with httpx.AsyncClient(base_url=found[0]) as client:
        assert (await client.post("/events", content=BODY, headers=STRUCTURED)).status_code == 202
    process.send_signal(signal.SIGTERM)
    _, rest = await process.communicate()
    assert "Traceback" not in rest.decode()
    process = await start("wrong")
    _, said = await process.communicate()
    assert process.returncode == 3
    assert "unknown option colour" in said.decode()
    assert "Traceback" not in said.decode()
