"""What KEDA is told, over real gRPC, by the bytes of its own protocol; and how many processes a group needs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from stentor import App, Event
from stentor.connect import connect
from stentor.errors import ConfigError
from stentor.histogram import Histogram
from stentor.message import Lag
from stentor.observe.flow import Flow
from stentor.scaling import keda as keda_module
from stentor.scaling.keda import SERVICE, Scaler, messages, serve, wanted
from stentor.scaling.need import by_flow, by_lag
from stentor.serve import serve as serve_http
from stentor.testing.conformance.stage import until


class Placed(Event, topic="orders", key="customer", type="test.keda.placed"):
    customer: str


def lag(events: int = 0, seconds: float = 0.0, parked: int = 0, members: int = 1) -> Lag:
    return Lag(group="shop.charge", topic="orders", events=events, seconds=seconds, parked=parked, members=members)


@pytest.mark.parametrize(
    ("lags", "need"),
    [
        ([lag()], 0),
        ([lag(parked=1)], 1),  # a retry comes due
        ([lag(events=5, seconds=0.1, members=3)], 1),
        ([lag(events=5, seconds=10, members=3)], 3),
        ([lag(events=5, seconds=15, members=3)], 4.5),
        ([lag(events=5, seconds=3600, members=3)], 6),  # at most twice as many at once
        ([lag(events=5, seconds=15, members=0)], 1.5),
        ([lag(events=1, seconds=5, members=4), lag(events=1, seconds=10, members=4)], 4),
    ],
)
def test_a_backlog_asks_for_processes_by_its_age(lags: list[Lag], need: float) -> None:
    assert by_lag(lags, 10) == pytest.approx(need)


def test_arrivals_ask_for_processes_by_littles_law() -> None:
    none = Histogram()
    flow = Flow(
        group="g", arrivals=900, throughput=900, utilisation=0.9, processes=1, running=9, concurrency=10, partitions=8,
        service=Histogram([0.01] * 5), waiting=none, settling=none, waits=0, oldest=0, parked=0, retries=0, dead=0,
        hottest=None,
    )  # fmt: skip
    assert by_flow(flow, 1.0) == pytest.approx(0.9)  # 1,000/s is the most of one
    assert by_flow(flow, 0.6) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("metadata", "wrong"),
    [
        ({}, "lacks group"),
        ({"group": "g", "lag": "soon"}, "metadata lag"),
        ({"group": "g", "lag": "0s"}, "metadata lag has to be above 0"),
        ({"group": "g", "busy": "2"}, "metadata busy is above 0 and at most 1, not '2'"),
        ({"group": "g", "busy": "much"}, "not 'much'"),
        ({"group": "g", "url": "http://pods", "ahead": "2h"}, "metadata ahead is above 0 and at most 1h"),
        ({"group": "g", "url": "http://pods", "ahead": "0s"}, "metadata ahead is above 0"),
        ({"group": "g", "url": "http://pods", "ahead": "soon"}, "metadata ahead"),
        ({"group": "g", "ahead": "1m"}, "and needs url"),
    ],
)
def test_bad_metadata_is_refused_with_what_is_wrong(metadata: dict[str, str], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        wanted(metadata)


def test_the_messages_are_those_of_the_protocol() -> None:
    """Bytes as KEDA's own encoder makes them from externalscaler.proto: field numbers and types."""
    kinds = messages()
    reference = b"\n\x04shop\x12\x07default\x1a\n\n\x05group\x12\x01g"
    read = kinds["ScaledObjectRef"].FromString(reference)
    assert (read.name, read.namespace) == ("shop", "default")
    assert {entry.key: entry.value for entry in read.scalerMetadata} == {"group": "g"}
    value = kinds["MetricValue"](metricName="m", metricValue=2, metricValueFloat=1.5)
    assert value.SerializeToString() == b"\n\x01m\x10\x02\x19\x00\x00\x00\x00\x00\x00\xf8?"
    assert kinds["IsActiveResponse"](result=True).SerializeToString() == b"\x08\x01"
    request = kinds["GetMetricsRequest"].FromString(b"\n" + bytes([len(reference)]) + reference + b"\x12\x01m")
    assert (request.scaledObjectRef.name, request.metricName) == ("shop", "m")


class Keda:
    """Asks a scaler as KEDA does."""

    scaler: Scaler

    def __init__(self, channel: aio.Channel, metadata: dict[str, str]) -> None:
        self._channel = channel
        self._kinds = messages()
        entries = [self._kinds["Entry"](key=key, value=value) for key, value in metadata.items()]
        self._reference = self._kinds["ScaledObjectRef"](name="shop", namespace="default", scalerMetadata=entries)

    async def ask(self, method: str, answer: str, request: Any = None) -> Any:
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}", lambda message: message.SerializeToString(), self._kinds[answer].FromString
        )
        return await call(self._reference if request is None else request)

    async def active(self) -> bool:
        return bool((await self.ask("IsActive", "IsActiveResponse")).result)

    async def need(self) -> float:
        [spec] = (await self.ask("GetMetricSpec", "GetMetricSpecResponse")).metricSpecs
        request = self._kinds["GetMetricsRequest"](scaledObjectRef=self._reference, metricName=spec.metricName)
        [value] = (await self.ask("GetMetrics", "GetMetricsResponse", request)).metricValues
        assert value.metricName == spec.metricName
        assert spec.targetSize == spec.targetSizeFloat == 1
        assert value.metricValue == pytest.approx(value.metricValueFloat, abs=1)
        return float(value.metricValueFloat)

    def stream(self) -> AsyncIterator[Any]:
        call = self._channel.unary_stream(
            f"/{SERVICE}/StreamIsActive", lambda message: message.SerializeToString(),
            self._kinds["IsActiveResponse"].FromString,
        )  # fmt: skip
        answers: AsyncIterator[Any] = call(self._reference).__aiter__()
        return answers


@asynccontextmanager
async def asked(broker_url: str, **metadata: str) -> AsyncIterator[Keda]:
    broker = connect(broker_url)
    await broker.open()
    try:
        async with (
            serve(scaler := Scaler(broker), "127.0.0.1:0") as port,
            aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            keda = Keda(channel, metadata)
            keda.scaler = scaler
            yield keda
    finally:
        await broker.close()


def shop(url: str) -> App:
    app = App("shop", broker=url)

    @app.on(Placed)
    async def charge(order: Placed) -> None:
        await asyncio.sleep(0.01)

    return app


async def test_a_group_with_work_is_active_and_needs_processes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    app = shop(url)
    async with app.connected(), asked(url, group="shop.charge", lag="100ms") as keda:
        states = keda.stream()
        assert (await anext(states)).result is False
        assert (await keda.active(), await keda.need()) == (False, 0)
        await app.publish([Placed(customer=f"c{n}") for n in range(20)])
        assert await keda.active()
        assert (await anext(states)).result is True
        await until(keda.need, "it is needed")
        assert await keda.need() <= 2
    async with app, asked(url, group="shop.charge") as keda:

        async def idle() -> bool:
            return not await keda.active()

        await until(idle, "the backlog is worked off")
        assert await keda.need() == 0


async def test_what_comes_in_counts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While events come as fast as they are handled there is no backlog, and yet a process is needed."""
    monkeypatch.setattr(keda_module, "APART", 0.0)
    url = f"sqlite:///{tmp_path}/shop.db"
    app = shop(url)
    async with app, serve_http(app, "127.0.0.1:0", grace=1) as address:
        async with asked(url, group="shop.charge", url=address, busy="0.5") as keda:
            assert await keda.need() == 0  # the first question has nothing to compare with
            await app.publish([Placed(customer=f"c{n}") for n in range(50)])

            async def idle() -> bool:
                return not await keda.active()

            await until(idle, "the backlog is worked off")
            monkeypatch.setattr(keda_module, "APART", 60.0)
            async with asked(url, group="shop.charge", url=address, busy="0.5") as other:
                assert await other.need() == 0  # a scaler of its own begins anew
            monkeypatch.setattr(keda_module, "APART", 0.0)
            need = await keda.need()
            assert 0 < need < 1
            monkeypatch.setattr(keda_module, "APART", 60.0)
            assert await keda.need() == need, "another trigger that asks at once is told the same"
        async with asked(url, group="shop.charge", url="http://127.0.0.1:1") as keda:
            assert await keda.need() == 0, "nobody there is no error"


@pytest.mark.parametrize("days", [0.5, 3])
async def test_what_is_foreseen_counts_once_it_was_closer_for_a_day(
    days: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keda_module, "APART", 0.0)
    url = f"sqlite:///{tmp_path}/shop.db"
    app = shop(url)
    async with app, serve_http(app, "127.0.0.1:0", grace=1) as address:
        metadata = {"group": "shop.charge", "url": address, "ahead": "10m"}
        async with asked(url, **metadata) as keda:
            ahead = keda.scaler.ahead(wanted(metadata))
            begin = time.time() - days * 86_400
            for minute in range(1, int(days * 1440)):  # more came then, as it rose and fell every four hours
                ahead.saw(begin + 60 * minute, 60.0, 1e6 * (1.5 + math.sin(minute / 240 * 2 * math.pi)))
            await keda.need()
            await app.publish([Placed(customer=f"c{n}") for n in range(50)])

            async def idle() -> bool:
                return not await keda.active()

            await until(idle, "the backlog is worked off")
            need = await keda.need()
            assert (0 < need < 1) if days < 1 else (need > 10)


@pytest.mark.parametrize(
    ("metadata", "code", "wrong"),
    [
        ({"group": "shop.none"}, grpc.StatusCode.NOT_FOUND, "there is no group 'shop.none'; there are shop.charge"),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "lacks group"),
        ({"group": "shop.charge", "url": "ftp://x"}, grpc.StatusCode.INVALID_ARGUMENT, "not 'ftp://x'"),
    ],
)
async def test_a_wrong_trigger_is_told(
    metadata: dict[str, str], code: grpc.StatusCode, wrong: str, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    async with shop(url).connected(), asked(url, **metadata) as keda:
        with pytest.raises(aio.AioRpcError, match=wrong) as caught:
            await keda.need()
        assert caught.value.code() is code


async def test_an_address_that_is_taken_is_told(tmp_path: Path) -> None:
    broker = connect(f"sqlite:///{tmp_path}/shop.db")
    await broker.open()
    with pytest.raises(ConfigError, match="cannot serve at nowhere:x"):
        async with serve(Scaler(broker), "nowhere:x"):
            pass
    await broker.close()
