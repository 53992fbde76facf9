"""Rates: so many events begin in a time, of a group and of a key, and nothing is lost or out of order by it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from stentor import App, Batch, Event, Group
from stentor.clock import per_second
from stentor.errors import DefinitionError
from stentor.testing import harness


class Job(Event, topic="jobs", key="key", type="test.rate.job"):
    key: str
    n: int


def jobs(keys: int, count: int) -> list[Job]:
    return [Job(key=f"k{key}", n=n) for n in range(count) for key in range(keys)]


def app_with(group: Group, seen: list[Job], batch: int = 0) -> App:
    app = App("rates")
    if batch:

        @group.on(Job, batch=Batch(size=batch))
        async def work(some: list[Job]) -> None:
            seen.extend(some)

    else:

        @group.on(Job)
        async def single(job: Job) -> None:
            seen.append(job)

    app.add(group)
    return app


@pytest.mark.parametrize(("rate", "burst"), [("10/s", 1), ("600/m", 1), ("50/s", 5)])
async def test_a_group_begins_so_many_in_a_time(rate: str, burst: int) -> None:
    seen: list[Job] = []
    async with harness(app_with(Group("work", rate=rate), seen)) as t:
        await t.publish(jobs(100, 1))
        await t.settled()
        assert len(seen) == 1
        for second in (1, 2, 3):
            await t.advance("1s")
            assert len(seen) == pytest.approx(min(100, 1 + second * per_second(rate)), abs=2)
        await t.advance("1h")
        assert len(seen) == 100
        before = len(seen)
        await t.publish(jobs(100, 1))  # after a time without events a few begin at once, not all that could have
        await t.settled()
        assert len(seen) - before <= burst + 1


async def test_a_key_begins_so_many_in_a_time_and_others_go_on() -> None:
    seen: list[Job] = []
    async with harness(app_with(Group("work", key_rate="1/s"), seen)) as t:
        await t.publish(jobs(3, 4))
        await t.settled()
        assert [(job.key, job.n) for job in seen] == [("k0", 0), ("k1", 0), ("k2", 0)]
        for n in (1, 2, 3):
            await t.advance("1s")
            assert sorted((job.key, job.n) for job in seen[3 * n :]) == [(f"k{key}", n) for key in range(3)]
        await t.publish(Job(key="new", n=0))
        await t.settled()
        assert seen[-1].key == "new"


async def test_batches_keep_a_rate_too() -> None:
    seen: list[Job] = []
    async with harness(app_with(Group("work", rate="10/s"), seen, batch=5)) as t:
        await t.publish(jobs(50, 1))
        await t.settled()
        assert len(seen) <= 5
        await t.advance("2s")
        assert 15 <= len(seen) <= 25
        await t.advance("10s")
        assert len(seen) == 50


async def test_a_rate_beside_a_concurrency_that_finds_itself() -> None:
    seen: list[Job] = []
    async with harness(app_with(Group("work", rate="10/s", concurrency="auto"), seen)) as t:
        await t.publish(jobs(30, 1))
        await t.advance("1s")
        assert 10 <= len(seen) <= 12
        await t.advance("5s")
        assert len(seen) == 30


async def test_more_events_than_the_window_holds_wait_and_come_in_order() -> None:
    seen: list[Job] = []
    async with harness(app_with(Group("work", rate="1000/s"), seen)) as t:
        await t.publish(jobs(7, 400))
        await t.advance("1s")
        assert 900 <= len(seen) <= 1200
        await t.advance("1m")
        assert len(seen) == 2800
        for key in range(7):
            assert [job.n for job in seen if job.key == f"k{key}"] == list(range(400))


async def test_processes_share_a_rate(tmp_path: Path) -> None:
    """By the real clock, as two programs have one each: together they stay below it."""
    url = f"sqlite:///{tmp_path}/events.db?lease=1&beat=0.25"
    seen: list[float] = []

    def app() -> App:
        made = App("rates", broker=url)
        group = Group("work", rate="40/s")

        @group.on(Job)
        async def work(job: Job) -> None:
            seen.append(time.monotonic())

        made.add(group)
        return made

    async with app() as one, app() as two:
        programs = [app.program for app in (one, two)]
        paces = [worker.pace for program in programs if program is not None for worker in program.workers]
        async with asyncio.timeout(60):
            while [pace._mine for pace in paces if pace is not None] != [20, 20]:
                await asyncio.sleep(0.05)
        await one.publish(jobs(500, 1))
        begun = time.monotonic()
        async with asyncio.timeout(60):
            while len(seen) < 60:
                await asyncio.sleep(0.02)
        assert len(seen) <= 40 * (time.monotonic() - begun) + 10


def test_what_is_no_rate_is_refused() -> None:
    assert (per_second("100/s"), per_second("30/m"), per_second("1.5/h")) == (100.0, 0.5, 1.5 / 3600)
    for text in ("100", "0/s", "-1/s", "1/x", "a/s", ""):
        with pytest.raises(DefinitionError, match=r"group work: rate: .* is no rate"):
            Group("work", rate=text)
    with pytest.raises(DefinitionError, match='key_rate needs ordering="key"'):
        Group("work", key_rate="1/s", ordering="none")
