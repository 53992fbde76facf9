"""HTTP ingress under pressure: bodies too large or too slow, publishers held, a broker that cannot be reached."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from stentor import App, Context
from stentor.errors import PublishUnknown, StorageFull, TooLarge, Unavailable, UnknownTopic
from stentor.serve import serve
from tests.http_site import BODY, HEADERS, STRUCTURED, Placed, Site, make, numbered, served, stuck


async def test_bodies_up_to_the_limit_are_taken_and_larger_ones_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(make("sqlite", tmp_path)) as site:
        limit = site.app.broker.features.max_bytes
        binary = {**HEADERS, "ce-type": "com.other", "content-type": "application/octet-stream"}
        blob = os.urandom(limit - 1000)
        assert (await site.post(blob, binary, topic="anything")).status_code == 202
        (got,) = await site.stored("anything")
        assert got.data == blob
        # Attributes count too; so does what is sent without a length, as soon as it is too much.
        over = await site.post(os.urandom(limit - 10), {**binary, "ce-id": "e-2"}, topic="anything")
        assert over.status_code == 413
        reads = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal reads
            for _ in range(100_000):
                reads += 1
                yield bytes(64 * 1024)

        announced = await site.post(os.urandom(2 * limit), {**binary, "ce-id": "e-3"}, topic="anything")
        assert (announced.status_code, announced.json()["status"]) == (413, 413)
        monkeypatch.setattr("stentor.exchange.LINGER", 0.2)
        with suppress(httpx.NetworkError):  # the server stopped to listen: not every client looks for an answer then
            assert (await site.post(endless(), {**binary, "ce-id": "e-4"}, topic="anything")).status_code == 413
        assert reads < 100_000
        assert len(await site.stored("anything")) == 1


async def test_a_body_that_does_not_come_gets_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stentor.exchange.SLOW", 0.05)
    async with served(make()) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"POST /events HTTP/1.1\r\nhost: x\r\ncontent-type: application/cloudevents+json\r\n")
        writer.write(b"content-length: 100\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        await writer.wait_closed()


# ---- come again later -----------------------------------------------------------------------------------------------


async def test_a_full_broker_holds_publishers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stentor.ingress.HELD", 0.1)
    app = App("shop", broker="memory://?max_bytes=2000")

    @app.on(Placed)
    async def charge(order: Placed, ctx: Context) -> None:
        await ctx.stopping.wait()

    async with served(Site(app)) as site:
        answers = [await site.post(numbered(number), STRUCTURED) for number in range(10)]
        statuses = [answer.status_code for answer in answers]
        assert statuses == [202] * statuses.count(202) + [429] * statuses.count(429)
        assert 0 < statuses.count(429) < 10
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert len(await site.stored()) == statuses.count(202)


async def test_whoever_was_held_comes_again_and_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(make()) as site, stuck(site) as held:
        monkeypatch.setattr("stentor.ingress.HELD", 0.1)
        assert (await site.post(numbered(1), STRUCTURED)).status_code == 429
        held.release()
        assert (await site.post(numbered(1), STRUCTURED)).json() == {"ids": ["e-1"], "duplicates": []}
        assert (await site.post(numbered(1), STRUCTURED)).json() == {"ids": ["e-1"], "duplicates": ["e-1"]}
        assert len(await site.stored()) == 1


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (StorageFull("the disk is full"), 429, True),
        (Unavailable("connection refused"), 503, True),
        (PublishUnknown(["e-1"], "connection lost"), 503, True),
        (UnknownTopic("topic 'orders' was never declared"), 503, True),
        (TooLarge("too large"), 413, False),
        (RuntimeError("secret"), 500, False),
    ],
)
async def test_what_the_broker_says(
    error: Exception, status: int, retry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(messages: Any) -> Any:
        raise error

    async with served(make()) as site:
        monkeypatch.setattr(site.app.broker, "publish", refuse)
        answer = await site.post(BODY, STRUCTURED)
        assert (answer.status_code, "retry-after" in answer.headers) == (status, retry)
        assert ("secret" in answer.text) is False
        assert answer.json().get("ids") == (["e-1"] if isinstance(error, PublishUnknown) else None)


async def test_requests_and_their_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(make()) as site, stuck(site) as held:
        monkeypatch.setattr("stentor.exchange.REQUESTS", 3)
        waiting = [asyncio.create_task(site.post(BODY, STRUCTURED)) for _ in range(3)]
        await held.reached(3)
        answer = await site.post(BODY, STRUCTURED)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        monkeypatch.setattr("stentor.exchange.REQUESTS", 256)
        monkeypatch.setattr("stentor.exchange.BUFFER", 3 * len(BODY))
        assert (await site.post(BODY, STRUCTURED)).status_code == 429
        held.release()
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {202}
        assert (await site.post(BODY, STRUCTURED)).status_code == 202


async def test_503_until_the_app_runs_and_after() -> None:
    site = make()
    async with serve(site.app, "127.0.0.1:0") as url, httpx.AsyncClient(base_url=url) as client:
        for _ in range(2):
            answer = await client.post("/events", content=BODY, headers=STRUCTURED)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await client.get(path)).status_code == 503
            async with site.app.connected():  # publishing needs no worker
                assert (await client.post("/events", content=BODY, headers=STRUCTURED)).status_code == 202


async def test_503_when_the_broker_is_closed(tmp_path: Path) -> None:
    async with served(make("sqlite", tmp_path), connect_only=True) as site:
        await site.app.broker.close()
        answer = await site.post(BODY, STRUCTURED)
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
