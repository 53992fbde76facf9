"""Health, readiness and metrics, over real HTTP."""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from stentor import App, Context, Group, Retry
from stentor.connect import connect
from tests.http_site import BODY, OBJECT, STRUCTURED, Placed, Site, make, numbered, served

# ---- health ---------------------------------------------------------------------------------------------------------


async def test_a_running_app_is_alive_and_ready() -> None:
    async with served(make()) as site:
        alive = await site.client.get("/healthz")
        assert (alive.status_code, alive.json()) == (200, {"status": "ok", "app": "shop", "reasons": []})
        assert alive.headers["cache-control"] == "no-store"
        assert (await site.client.head("/healthz")).status_code == 200
        ready = await site.client.get("/readyz")
        state = ready.json()
        assert (ready.status_code, state["status"], state["reasons"]) == (200, "ready", [])
        assert state["broker"] == {"name": "memory", "trouble": None}
        assert {group["group"]: group["partitions"] for group in state["groups"]} == dict.fromkeys(
            ("shop.charge", "shop.book", "shop.watch"), 64
        )
        assert state["oldest_unacked_seconds"] == 0


async def test_a_failed_worker_shows() -> None:
    failed = asyncio.Event()
    site = make()
    async with served(site, on_fatal=lambda error: failed.set()):
        program = site.app.program
        assert program is not None
        worker = next(worker for worker in program.workers if worker.group == "shop.charge")

        async def broken(limit: int, wait: float) -> Any:
            raise ZeroDivisionError("a bug")

        worker.consumer.fetch = broken  # type: ignore[method-assign]
        await site.post(BODY, STRUCTURED)  # wakes the fetch that waits
        async with asyncio.timeout(60):
            await failed.wait()
        for path in ("/healthz", "/readyz"):
            answer = await site.client.get(path)
            assert answer.status_code == 503
            assert answer.json()["reasons"] == ["the worker of shop.charge stopped: ZeroDivisionError: a bug"]
        metrics = (await site.client.get("/metrics")).text
        assert 'stentor_worker_failed{group="shop.charge"} 1.0' in metrics
        assert 'stentor_worker_failed{group="shop.book"} 0.0' in metrics
        # Other groups go on, and so does the ingress: what it takes is durable.
        assert (await site.post(numbered(2), STRUCTURED)).status_code == 202


async def test_a_closed_broker_shows(tmp_path: Path) -> None:
    async with served(make("sqlite", tmp_path), connect_only=True) as site:
        assert (await site.client.get("/readyz")).status_code == 200
        await site.app.broker.close()
        answer = await site.client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
        assert "is not open" in answer.json()["broker"]["trouble"]
        assert (await site.client.get("/healthz")).status_code == 200  # a restart of this process would not help
        assert "stentor_broker_up 0.0" in (await site.client.get("/metrics")).text


async def test_a_broker_that_does_not_answer_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stentor.health.PATIENCE", 0.05)

    async def never() -> Any:
        await asyncio.Event().wait()

    async with served(make()) as site:
        monkeypatch.setattr(site.app.broker, "health", never)
        monkeypatch.setattr(site.app.broker, "lag", never)
        answer = await site.client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["oldest_unacked_seconds"] is None
        assert answer.json()["reasons"][:2] == [
            "memory: broker: no answer within 0.05 s", "lag: no answer within 0.05 s",
        ]  # fmt: skip
        assert (await site.client.get("/metrics")).status_code == 200


async def test_a_worker_in_trouble_or_without_partitions_is_not_ready() -> None:
    async with served(make()) as site:
        program = site.app.program
        assert program is not None
        worker = program.workers[0]
        worker.trouble = "connection refused"
        answer = await site.client.get("/readyz")
        assert (answer.status_code, answer.json()["reasons"]) == (503, [f"{worker.group}: connection refused"])
        worker.trouble = None
        shares, worker.shares = worker.shares, {}
        answer = await site.client.get("/readyz")
        assert answer.json()["reasons"] == [f"{worker.group}: no partition is assigned yet"]
        worker.shares = shares
        assert (await site.client.get("/readyz")).status_code == 200


async def test_standing_by_is_ready() -> None:
    broker = connect("memory://")
    await broker.open()

    def single() -> Site:
        app = App("shop")
        group = Group("only", single=True)

        @group.on(Placed)
        async def charge(order: Placed) -> None: ...

        app.add(group)
        return Site(app)

    async with served(single(), broker=broker) as first, served(single(), broker=broker) as second:
        states = [(await site.client.get("/readyz")).json() for site in (first, second)]
    assert [state["status"] for state in states] == ["ready", "ready"]
    groups = [group for state in states for group in state["groups"]]
    assert sorted(group["partitions"] for group in groups) == [0, 64]
    assert [group["standing_by"] for group in groups] == [group["partitions"] == 0 for group in groups]


async def test_the_age_of_the_oldest_event_shows_and_is_asked_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    go = asyncio.Event()
    app = App("shop", broker="memory://")

    @app.on(Placed)
    async def charge(order: Placed) -> None:
        await go.wait()

    async with served(Site(app)) as site:
        asked = 0
        lag = site.app.broker.admin.lag

        async def counted() -> Any:
            nonlocal asked
            asked += 1
            return await lag()

        monkeypatch.setattr(site.app.broker, "lag", counted)
        monkeypatch.setattr("stentor.health.FRESH", 1000.0)
        await site.post(BODY, STRUCTURED)
        answers = await asyncio.gather(*(site.client.get("/readyz") for _ in range(10)))
        assert asked == 1
        (entry,) = answers[0].json()["lag"]
        assert (entry["group"], entry["topic"], entry["events"]) == ("shop.charge", "orders", 1)
        monkeypatch.setattr("stentor.health.FRESH", 0.0)
        later = (await site.client.get("/readyz")).json()
        assert later["oldest_unacked_seconds"] >= answers[0].json()["oldest_unacked_seconds"] >= 0
        assert asked == 2
        go.set()


# ---- metrics --------------------------------------------------------------------------------------------------------


async def test_metrics_count_what_happened() -> None:
    app = App("shop", broker="memory://")
    site = Site(app)

    @app.on(Placed, retry=Retry(attempts=2, first="1ms"), where=lambda order: order.amount > 0)
    async def charge(order: Placed, ctx: Context) -> None:
        if order.order_id == "bad" or (order.order_id == "flaky" and ctx.attempt == 1):
            raise ValueError(order.order_id)
        await site.saw(order)

    async with served(site):
        for number, (name, amount) in enumerate([("a", 1), ("b", 1), ("flaky", 1), ("bad", 1), ("free", 0)]):
            data = {"order_id": name, "amount": amount}
            body = json.dumps({**OBJECT, "id": f"e-{number}", "data": data}).encode()
            assert (await site.post(body, STRUCTURED)).status_code == 202
        repeated = json.dumps({**OBJECT, "id": "e-0"}).encode()
        assert (await site.post(repeated, STRUCTURED)).json()["duplicates"] == ["e-0"]
        assert (await site.post(b"{}", STRUCTURED)).status_code == 400
        await site.handled(3)
        async with asyncio.timeout(60):  # the counters move after the handlers have returned
            while not {'dead_total{group="shop.charge"} 1.0', 'in_flight{group="shop.charge"} 0.0'} <= {
                line.removeprefix("stentor_") for line in (await site.client.get("/metrics")).text.splitlines()
            }:
                pass
        for accept, parse in ((None, parse_text), ("application/openmetrics-text; version=1.0.0", parse_openmetrics)):
            answer = await site.client.get("/metrics", headers={"accept": accept} if accept else {})
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(accept.partition(";")[0] if accept else "text/plain")
            found = {
                (sample.name, *sample.labels.values()): sample.value
                for family in parse(answer.text)
                for sample in family.samples
            }
            group = "shop.charge"
            counts = {name: found[f"stentor_{name}_total", group] for name in ("handled", "failed", "dead", "skipped")}
            assert counts == {"handled": 3, "failed": 2, "dead": 1, "skipped": 1}
            assert found["stentor_retried_total", group] == 2
            assert found["stentor_refused_total", group] == 0
            assert found["stentor_partitions", group] == 64
            assert found["stentor_lag_events", group, "orders"] >= 0
            assert ("stentor_lag_seconds", group, "orders") in found
            assert found["stentor_parked", group, "orders"] == 0
            assert ("stentor_in_flight", group) in found
            assert found["stentor_published_total", "http"] == 5
            assert found["stentor_http_duplicates_total",] == 1
            assert found["stentor_http_refused_total", "400"] == 1
            assert found["stentor_broker_up",] == 1
            assert found["stentor_info", "shop", "memory"] == 1


async def test_metrics_without_the_library_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(make()) as site:
        monkeypatch.setitem(sys.modules, "prometheus_client.exposition", None)
        answer = await site.client.get("/metrics")
        assert answer.status_code == 501
        assert "pip install 'stentor[http]'" in answer.json()["detail"]


async def test_the_queries_of_the_docs_ask_for_what_is_told() -> None:
    """docs/operations.md has queries for Prometheus: of names and labels that /metrics has."""
    page = (Path(__file__).parent.parent / "docs" / "operations.md").read_text("utf-8")
    queries = "".join(re.findall(r"```promql\n(.*?)```", page, re.DOTALL))
    wanted = set(re.findall(r'stentor_\w+{group="shop.charge"}', queries))
    assert len(wanted) >= 5
    async with served(make()) as site:
        await site.post(BODY, STRUCTURED)
        text = (await site.client.get("/metrics")).text
    told = set(re.findall(r'^(stentor_\w+){(?:[^}]*,)?group="shop.charge"', text, re.MULTILINE))
    assert {name.partition("{")[0] for name in wanted} <= told, told
