"""The ways to run an app: in a web framework, from a script, as a program that a signal stops."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from stentor import App, Depends, Receipt
from stentor.brokers.memory import MemoryConsumer
from stentor.errors import (
    InvalidEvent,
    NotConnected,
    StentorError,
)
from tests.orders import OrderPlaced

SOURCE = Path(__file__).parents[1] / "src"


async def handle(order: OrderPlaced) -> None: ...


async def test_a_worker_that_fails_ends_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App("shop", broker="memory://")
    app.on(OrderPlaced)(handle)

    async def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug in the broker")

    monkeypatch.setattr(MemoryConsumer, "fetch", broken)
    with pytest.raises(ZeroDivisionError, match="a bug in the broker"):
        async with app:
            await asyncio.Event().wait()
    assert app.program is None


async def test_an_app_lives_in_fastapi() -> None:
    app = App("shop", broker="memory://")
    done = asyncio.Event()

    @app.on(OrderPlaced)
    async def charge(order: OrderPlaced) -> None:
        done.set()

    web = FastAPI(lifespan=app.lifespan)

    @web.post("/orders/{order_id}")
    async def place(order_id: str) -> dict[str, str]:
        receipt = await app.publish(OrderPlaced(order_id=order_id))
        return {"id": receipt.id}

    @web.post("/threads/{order_id}")
    def place_in_a_thread(order_id: str) -> dict[str, str]:
        return {"id": app.publish_sync(OrderPlaced(order_id=order_id)).id}

    async with (
        web.router.lifespan_context(web),
        httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://test") as client,
    ):
        for path in ("/orders/a", "/threads/b"):
            answer = await client.post(path)
            assert answer.status_code == 200
            assert answer.json()["id"]
            await asyncio.wait_for(done.wait(), 60)
            done.clear()
    assert app.program is None


def test_the_sync_side_connects_by_itself_and_stays_connected() -> None:
    app = App("shop", broker="memory://")
    try:
        assert app.publish_sync(OrderPlaced(order_id="a")).position == 0
        receipts: list[Receipt] = []
        threads = [
            threading.Thread(target=lambda: receipts.append(app.publish_sync(OrderPlaced(order_id="b"))))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(receipt.position or 0 for receipt in receipts) == list(range(1, 9))
    finally:
        assert app._portal is not None
        app._portal.close()


def test_with_connected_in_a_script() -> None:
    app = App("shop", broker="memory://")
    with app.connected():
        assert app.publish_sync([OrderPlaced(order_id="a")])[0].position == 0
        with pytest.raises(InvalidEvent):
            app.publish_sync(OrderPlaced(order_id=5))  # type: ignore[arg-type]
    assert app.program is None


async def test_publish_sync_inside_the_loop_is_refused() -> None:
    app = App("shop", broker="memory://")
    async with app.connected():
        with pytest.raises(NotConnected, match=r"publish_sync blocks: inside an event loop use `await app.publish"):
            app.publish_sync(OrderPlaced(order_id="a"))


def run_script(text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(text))
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
        env=environment,
        check=False,
    )


def test_a_plain_script_publishes_and_ends(tmp_path: Path) -> None:
    done = run_script(
        """
        from stentor import App, Event

        class OrderPlaced(Event, topic="orders", key="order_id"):
            order_id: str

        app = App("script", broker="memory://")
        print(app.publish_sync(OrderPlaced(order_id="a")).position)
        print(app.publish_sync(OrderPlaced(order_id="b")).position)
        """,
        tmp_path,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("0\n1\n", "", 0)


def test_a_django_view_publishes(tmp_path: Path) -> None:
    done = run_script(
        """
        from django.conf import settings

        settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="x", USE_TZ=True)

        import django
        from django.http import JsonResponse
        from django.test import Client
        from django.urls import path
        from stentor import App, Event

        class OrderPlaced(Event, topic="orders", key="order_id"):
            order_id: str

        app = App("shop", broker="memory://")

        def place(request, order_id):
            receipt = app.publish_sync(OrderPlaced(order_id=order_id))
            return JsonResponse({"position": receipt.position})

        urlpatterns = [path("orders/<str:order_id>", place)]
        django.setup()
        client = Client()
        print([client.post(f"/orders/{key}").json()["position"] for key in "abc"])
        """,
        tmp_path,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[0, 1, 2]\n", "", 0)


def test_run_blocks_until_a_signal_and_stops_in_order(tmp_path: Path) -> None:
    done = run_script(
        """
        import asyncio, os, signal
        from stentor import App, Event

        class OrderPlaced(Event, topic="orders", key="order_id"):
            order_id: str

        app = App("shop", broker="memory://")

        @app.on(OrderPlaced)
        async def charge(order: OrderPlaced) -> None:
            print("begin", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.1)
            print("end", flush=True)

        async def started(program):
            print(*program.notes, sep="; ")
            await app.publish(OrderPlaced(order_id="a"))

        app.run(started=started)
        print("stopped")
        """,
        tmp_path,
    )
    assert done.stdout == "shop.charge: OrderPlaced (concurrency 64)\nbegin\nend\nstopped\n"
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_wrong_program_ends_run_with_its_error(tmp_path: Path) -> None:
    done = run_script(
        """
        from stentor import App, Event

        class OrderPlaced(Event, topic="orders"):
            order_id: str

        app = App("shop", broker="memory://")

        @app.on(OrderPlaced)
        async def charge(order: str) -> None: ...

        app.run()
        """,
        tmp_path,
    )
    assert done.returncode == 1
    assert "DefinitionError: handler charge" in done.stderr.splitlines()[-1]


async def test_errors_share_one_base() -> None:
    import stentor.errors

    for name, value in vars(stentor.errors).items():
        if isinstance(value, type) and value.__module__ == "stentor.errors":
            assert issubclass(value, StentorError), name


async def test_dependencies_of_the_app_close_when_it_stops_outside_the_harness_too() -> None:
    from typing import Annotated

    closed: list[str] = []

    async def pool() -> AsyncIterator[str]:
        yield "pool"
        closed.append("pool")

    app = App("shop", broker="memory://")
    done = asyncio.Event()

    @app.on(OrderPlaced)
    async def charge(order: OrderPlaced, p: Annotated[str, Depends(pool, scope="app")]) -> None:
        done.set()

    async with app:
        await app.publish(OrderPlaced(order_id="a"))
        await asyncio.wait_for(done.wait(), 60)
        assert closed == []
    assert closed == ["pool"]
