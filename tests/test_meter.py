"""What a worker measures: service and waiting times, hot keys, and how little of it a quick handler pays for."""

import asyncio
import random
from typing import Any

import pytest

from stentor import App, Batch, Event, Retry
from stentor.message import Message
from stentor.meter import KEYS, SAMPLES, HotKeys, Meter
from stentor.testing import harness
from stentor.testing.clock import VirtualClock


class Hit(Event, topic="hits", key="page"):
    page: str
    took: float = 0.0


def message(key: str | None = None, time: str | None = None) -> Message:
    return Message(id="1", source="/test", type="t", topic="hits", data=b"", key=key, time=time)


class Moments:
    """A monotonic clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def drive(meter: Meter, moments: Moments, rate: float, seconds: float, took: float) -> None:
    """Events at a steady rate, counted down as the worker does, with a tick each second."""
    count = int(rate * seconds)
    begin = moments.now
    for done in range(1, count + 1):
        moments.now = begin + done / rate
        meter.left -= 1
        if meter.left <= 0:
            meter.took(moments.now - took, message())
        if done % int(rate) == 0:
            meter.tick(done)


def test_every_event_of_a_slow_handler_counts() -> None:
    moments = Moments()
    meter = Meter(VirtualClock(), moments)
    drive(meter, moments, 100, 5, 0.02)
    assert meter.service.count == 500
    assert meter.service.total == pytest.approx(10)


def test_few_events_of_a_quick_one_stand_for_all() -> None:
    moments = Moments()
    meter = Meter(VirtualClock(), moments)
    drive(meter, moments, 100_000, 3, 1e-6)
    assert meter.service.count == pytest.approx(300_000, rel=0.1)
    assert meter.service.total == pytest.approx(0.3, rel=0.1)
    assert meter.every == pytest.approx(100_000 / SAMPLES, rel=0.5)


def test_a_rate_that_falls_is_seen_whole_again() -> None:
    moments = Moments()
    meter = Meter(VirtualClock(), moments)
    drive(meter, moments, 100_000, 1, 1e-6)
    moments.now += 1
    meter.tick(100_010)
    assert (meter.every, meter.left) == (1, 1)


def test_the_time_since_an_event_was_published_is_read_from_it() -> None:
    moments = Moments()
    clock = VirtualClock()
    meter = Meter(clock, moments)
    moments.now = 1.0
    meter.took(0.5, message(time="not a time"))
    meter.took(0.5, message())
    assert meter.waiting.count == 0
    meter.took(0.5, message(time="1970-01-01T00:00:00Z"))
    assert meter.waiting.total == pytest.approx(clock.now() - 0.5)


def test_a_hot_key_is_found_among_many() -> None:
    keys = HotKeys()
    chance = random.Random(1)
    for n in range(50_000):
        keys.add("hot" if chance.random() < 0.2 else f"key {n}")
    assert len(keys.counts) == KEYS
    assert keys.share == pytest.approx(0.2, rel=0.05)
    assert max(keys.counts, key=keys.counts.__getitem__) == "hot"


def test_no_key_is_called_hot_where_none_is() -> None:
    keys = HotKeys()
    for n in range(50_000):
        keys.add(f"key {n}")
    assert keys.share < 0.001


async def test_a_worker_measures_its_handlers_also_those_that_fail() -> None:
    app = App("site")

    @app.on(Hit, retry=Retry(attempts=2, first="1s"))
    async def count(hit: Hit) -> None:
        await asyncio.sleep(hit.took)
        if hit.page == "bad":
            raise ValueError("planned")

    async with harness(app) as t:
        await t.publish([Hit(page="a", took=0.05), Hit(page="bad", took=0.05), Hit(page="c", took=0.05)])
        await t.settled()
        meter = worker(app).meter
        assert meter.service.count == 3
        assert meter.service.quantile(0.5) == pytest.approx(0.05, rel=0.5)
        assert meter.keys.counts == {"a": 1, "bad": 1, "c": 1}
        assert meter.settled >= 3
        await t.advance("2s")
        await t.settled()
        assert meter.service.count == 4


async def test_events_of_a_batch_share_its_time() -> None:
    app = App("site")

    @app.on(Hit, batch=Batch(size=10))
    async def count(hits: list[Hit]) -> None:
        await asyncio.sleep(0.1)

    async with harness(app) as t:
        await t.publish([Hit(page=str(n)) for n in range(10)])
        await t.settled()
        meter = worker(app).meter
        assert meter.service.count == 10
        assert 0.1 <= meter.service.total < 0.2


async def test_quick_batches_count_as_often_as_they_are() -> None:
    """A sample stands for the batches that went by since the last, and one that failed is no call more."""
    app = App("site")
    failing = True

    @app.on(Hit, batch=Batch(size=4), retry=Retry(attempts=1))
    async def count(hits: list[Hit]) -> None:
        if failing:
            raise ValueError("planned")

    async with harness(app) as t:
        meter = worker(app).meter
        await t.publish([Hit(page=str(n)) for n in range(4)])
        await t.settled()
        assert meter.service.count == 8, "the batch, then one by one"
        assert meter.service.total < 0.05, "each by its own time"
        failing = False
        for _ in range(20):
            await t.publish([Hit(page=str(n)) for n in range(1000)])
            await t.settled()
        assert worker(app).counts.handled == 20_000
        assert meter.service.count == pytest.approx(20_000, rel=0.5)


def worker(app: App) -> Any:
    assert app.program is not None
    [found] = app.program.workers
    return found
