"""What OpenTelemetry's own SDK reads of a program."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from stentor import App, Event, Retry
from stentor.errors import ConfigError
from stentor.health import Health
from stentor.observe.otel import export
from stentor.testing.conformance.stage import until


class Placed(Event, topic="orders", key="customer", type="test.otel.placed"):
    customer: str
    amount: float = 1.0


def shop() -> App:
    app = App("shop", broker="memory://")

    @app.on(Placed, retry=Retry(attempts=1))
    async def charge(order: Placed) -> None:
        await asyncio.sleep(0.01)
        if order.amount < 0:
            raise ValueError("negative")

    return app


def done(app: App) -> int:
    """Events that are done with and settled; 0 while any is not."""
    assert app.program is not None
    [worker] = app.program.workers
    return 0 if worker.busy else worker.counts.handled + worker.counts.dead


class Seen:
    """The figures of one reading, by name and group."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        data = reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                assert scope.scope.name == "stentor"
                for metric in scope.metrics:
                    points: Any = metric.data.data_points
                    self.found[metric.name] = {point.attributes["group"]: point.value for point in points}
                    assert metric.description

    def __call__(self, name: str) -> Any:
        return self.found[f"stentor.{name}"]["shop.charge"]


async def test_it_reads_what_the_program_counts_and_measures() -> None:
    reader = InMemoryMetricReader()
    app = shop()
    export(app, MeterProvider([reader]).get_meter("stentor"))
    assert Seen(reader).found == {}  # nothing runs yet
    for run in (1, 2):  # the counts are those of the program that runs
        async with app.running():
            await app.publish([Placed(customer=f"c{n}", amount=-1.0 if n == 0 else 1.0) for n in range(10)])
            await until(lambda: done(app) == 10)
            Seen(reader)  # asks for the lag
            await asyncio.sleep(0)
            await until(lambda: "stentor.lag" in Seen(reader).found)
            seen = await asyncio.to_thread(Seen, reader)  # as an exporter's thread does
            assert (seen("handled"), seen("dead"), seen("failed")) == (9, 1, 0), run
            assert seen("handler.count") >= 9
            assert 0.005 < seen("handler.time") / seen("handler.count") < 1
            assert (seen("running"), seen("concurrency"), seen("held"), seen("worker_failed")) == (0, 64, 0, 0)
            assert seen("partitions") > 0
            assert seen("lag") == 0
        assert Seen(reader).found == {}


async def test_the_names_are_those_of_the_metrics() -> None:
    reader = InMemoryMetricReader()
    app = shop()
    export(app, MeterProvider([reader]).get_meter("stentor"))
    async with app.running() as program:
        await app.publish(Placed(customer="ada"))
        await until(lambda: done(app) == 1)
        body, _ = await Health(program).metrics("text/plain", {}, 0)
        Seen(reader)
        await until(lambda: "stentor.lag" in Seen(reader).found)
        told = {name.removesuffix(".time") for name in Seen(reader).found if not name.endswith(".count")}
    of_groups = {
        re.sub("_total$|_seconds_count$", "", name).removeprefix("stentor_")
        for name in re.findall(r"^(\w+)\{.*group=", body.decode(), re.MULTILINE)
        if not name.endswith(("_created", "_bucket", "_sum"))
    }
    renamed = {"lag_events": "lag", "lag_seconds": "lag.age", "parked_events": "parked"}
    assert {f"stentor.{renamed.get(name, name)}" for name in of_groups} == told


async def test_what_waits_is_told() -> None:
    reader = InMemoryMetricReader()
    app = App("shop", broker="memory://")
    gate = asyncio.Event()

    @app.on(Placed)
    async def charge(order: Placed) -> None:
        await gate.wait()

    export(app, MeterProvider([reader]).get_meter("stentor"))
    async with app.running():
        await app.publish([Placed(customer="ada") for _ in range(5)])
        await until(lambda: Seen(reader).found.get("stentor.lag", {}).get("shop.charge") == 5)
        assert Seen(reader)("lag.age") >= 0
        assert Seen(reader)("running") == 1
        gate.set()


def test_without_the_api_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
    with pytest.raises(ConfigError, match=r"pip install 'stentor\[otel\]'"):
        export(shop())
