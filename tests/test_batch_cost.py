"""What batch handlers cost when there is nothing to do, and after a crash; what the settling of single events costs."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from stentor import App, Batch, Event
from stentor import worker as worker_module
from stentor.batches import run_batch
from stentor.message import Settlement
from stentor.parking import Parking
from stentor.testing import harness
from stentor.worker import Worker


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
        await asyncio.wait_for(handled.wait(), 60)
        after = takes
        for _ in range(100):
            await asyncio.sleep(0.001)
        assert takes == after


async def test_after_a_crash_the_starts_of_a_batch_are_recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App("shop")
    active = most = 0
    begin = Parking.begin

    @app.on(Tick, batch=Batch(size=10))
    async def many(ticks: list[Tick]) -> None: ...

    async def counted(*args: Any) -> bool:
        nonlocal active, most
        active += 1
        most = max(most, active)
        good = await begin(*args)
        active -= 1
        return good

    monkeypatch.setattr(Parking, "begin", counted)
    async with harness(app) as t:
        await t.crash(many, at="before_settle")
        await t.publish([Tick(n=n) for n in range(5)])
        await t.settled()
        assert most == 5
        assert t.dead(many) == []


class Tock(Event, topic="tocks", key=None, type="com.example.tock"):
    n: int


@pytest.mark.parametrize("urgent", ["an output", "the stop"])
async def test_a_plain_ack_waits_for_others_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, urgent: str
) -> None:
    monkeypatch.setattr(worker_module, "PAUSE", 3600.0)
    app = App("shop", broker=f"sqlite:///{tmp_path}/stentor.db")
    ended: asyncio.Queue[int] = asyncio.Queue()

    @app.on(Tick)
    async def one(tick: Tick) -> Tock | None:
        ended.put_nowait(tick.n)
        return Tock(n=tick.n) if tick.n == 3 else None

    async def waiting() -> int:
        [lag] = await app.broker.admin.lag()
        return lag.events

    async with app:
        await app.publish(Tick(n=1))  # the first is settled at once
        await ended.get()
        while await waiting():
            await asyncio.sleep(0.001)
        await app.publish(Tick(n=2))
        await ended.get()
        await asyncio.sleep(0.05)  # had it been settled, it would be by now
        assert await waiting() == 1
        if urgent == "an output":
            await app.publish(Tick(n=3))
            while await waiting():
                await asyncio.sleep(0.001)
    async with app.connected():
        assert await waiting() == 0


async def test_many_events_of_one_key_stay_out_of_the_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The window is full of them and their handler is quick: they only seem to wait behind one that is stuck."""
    app = App("shop", broker=f"sqlite:///{tmp_path}/stentor.db")
    stored = 0
    done = asyncio.Event()
    store = Parking.store

    @app.on(Keyed)
    async def one(event: Keyed) -> None:
        if event.n == 4999:
            done.set()

    def counted(self: Parking, *args: Any) -> None:
        nonlocal stored
        stored += 1
        store(self, *args)

    monkeypatch.setattr(Parking, "store", counted)
    async with app.connected():
        await app.publish([Keyed(n=n) for n in range(5000)])
    async with app, asyncio.timeout(60):
        await done.wait()
    assert stored == 0


async def test_what_waited_behind_a_stuck_key_begins_without_a_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each record is a write to disk that the next event of the key would wait for."""
    app = App("shop", broker=f"sqlite:///{tmp_path}/stentor.db")
    open_, done = asyncio.Event(), asyncio.Event()
    stored = begun = 0
    seen: list[int] = []
    add = Worker.add

    @app.on(Keyed)
    async def one(event: Keyed) -> None:
        if event.n == 0:
            await open_.wait()
        seen.append(event.n)
        if event.n == 2999:
            done.set()

    def counted(self: Worker, settlement: Settlement, after: Any) -> None:
        nonlocal stored, begun
        stored += sum(name.startswith("q/") and value is not None for name, value in settlement.records.items())
        begun += sum(name.startswith("a/") and value is not None for name, value in settlement.records.items())
        add(self, settlement, after)

    monkeypatch.setattr(Worker, "add", counted)
    async with app, asyncio.timeout(60):
        await app.publish([Keyed(n=n) for n in range(3000)])
        while stored < 1000:
            await asyncio.sleep(0.01)
        open_.set()
        await done.wait()
    assert seen == list(range(3000))
    assert begun == 0


class Keyed(Event, topic="keyed", key="key", type="com.example.keyed"):
    n: int
    key: str = "the only one"
