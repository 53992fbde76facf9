"""What batch handlers cost when there is nothing to do, and after a crash."""

import asyncio
from typing import Any

import pytest

from stentor import App, Batch, Event
from stentor import worker as worker_module
from stentor.batches import run_batch
from stentor.testing import harness


class Tick(Event, topic="ticks", key=None, type="com.example.tick"):
    n: int


@pytest.mark.parametrize("wait", ["0ms", "1ms"])
async def test_an_idle_batch_handler_takes_no_turns(monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    app = App("idle", broker="memory://")
    handled = asyncio.Event()
    takes = 0

    @app.on(Tick, batch=Batch(size=10, wait=wait))
    async def many(ticks: list[Tick]) -> None:
        handled.set()

    async def counted(*args: Any) -> None:
        nonlocal takes
        takes += 1
        await run_batch(*args)

    monkeypatch.setattr(worker_module, "run_batch", counted)
    async with app:
        await app.publish(Tick(n=1))
        await asyncio.wait_for(handled.wait(), 10)
        after = takes
        for _ in range(100):
            await asyncio.sleep(0.001)
        assert takes == after


async def test_after_a_crash_the_starts_of_a_batch_are_recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App("shop")
    active = most = 0
    begin = worker_module.Worker.begin

    @app.on(Tick, batch=Batch(size=10))
    async def many(ticks: list[Tick]) -> None: ...

    async def counted(*args: Any) -> bool:
        nonlocal active, most
        active += 1
        most = max(most, active)
        good = await begin(*args)
        active -= 1
        return good

    monkeypatch.setattr(worker_module.Worker, "begin", counted)
    async with harness(app) as t:
        await t.crash(many, at="before_settle")
        await t.publish([Tick(n=n) for n in range(5)])
        await t.settled()
        assert most == 5
        assert t.dead(many) == []
