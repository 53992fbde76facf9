"""``concurrency="auto"`` finds the knee of what a handler calls: simulated services first, then a real worker."""

import asyncio
import statistics
from typing import Any

import pytest

from benchmarks.limiter_model import KINDS, PHASES, phases
from stentor import App, Event, Group
from stentor.errors import DefinitionError
from stentor.limiter import FIRST, MOST, Limiter


class Job(Event, topic="jobs"):
    n: int


@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_knee_and_stays_there_as_the_service_changes(kind: str) -> None:
    found = phases(kind, seconds=4, seed=1)
    assert set(found) == set(PHASES)
    assert statistics.median(one.throughput for one in found.values()) > 0.85
    assert min(one.throughput for one in found.values()) > 0.6
    assert all(one.limit < 8 * one.room for one in found.values())


def test_a_service_without_a_knee_gets_all_that_is_allowed() -> None:
    now = 0.0
    limiter = Limiter(lambda: now)
    while limiter.limit < MOST and now < 60:
        for _ in range(limiter.limit):
            now += 0.01 / limiter.limit
            limiter.full = True
            limiter.ended(now - 0.01)
    assert limiter.limit == MOST


def test_a_load_that_never_fills_the_limit_does_not_move_it() -> None:
    now = 0.0
    limiter = Limiter(lambda: now)
    for _ in range(1000):
        now += 0.02
        limiter.ended(now - 0.01)
    assert limiter.limit == FIRST


async def test_a_worker_runs_as_many_handlers_as_a_bounded_pool_can_serve() -> None:
    """Eight connections of 5 ms each: neither three handlers at once nor hundreds."""
    app = App("site", broker="memory://")
    pool = asyncio.Semaphore(8)
    done = 0

    @app.on(Job, group=Group("work", concurrency="auto"))
    async def work(job: Job) -> None:
        nonlocal done
        async with pool:
            await asyncio.sleep(0.005)
        done += 1

    async with app, asyncio.timeout(60):
        await app.publish([Job(n=n) for n in range(4000)])
        limits = []
        worker = the_worker(app)
        while done < 4000:
            await asyncio.sleep(0.05)
            if done > 1500:
                limits.append(worker.most)
        assert 6 <= statistics.median(limits) <= 24, limits
        assert worker.running == 0


async def test_events_on_their_way_to_a_runner_do_not_fill_the_limit() -> None:
    """Three events at once are no reason for more than four handlers, though one ends before the others begin."""
    app = App("shop")
    left = 0
    done = asyncio.Event()

    @app.on(Job, group=Group("work", concurrency="auto"))
    async def work(job: Job) -> None:
        nonlocal left
        await asyncio.sleep(0)
        left -= 1
        if not left:
            done.set()

    async with app.running(url="memory://", new_groups=True):
        for n in range(0, 1500, 3):
            left = 3
            done.clear()
            await app.publish([Job(n=n), Job(n=n + 1), Job(n=n + 2)])
            await done.wait()
        assert the_worker(app).most <= FIRST


def test_nothing_but_a_number_or_auto() -> None:
    wrong: Any
    for wrong in ("many", 0, 1.5, None, True):
        with pytest.raises(DefinitionError, match='whole number from 1 or "auto"'):
            Group("work", concurrency=wrong)


def the_worker(app: App) -> Any:
    assert app.program is not None
    [found] = app.program.workers
    return found
