"""Workers that come and go with the load, and figures of all of them at one place: real processes on one file."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from stentor import App, Event
from tests.cli.conftest import PATIENCE, Running, Stentor

WORK = """
import asyncio
import os
from stentor import App, Event, Group

class Job(Event, topic="jobs", key="lane", type="work.job"):
    lane: str
    number: int

app = App("work")
jobs = Group("jobs", concurrency=1)

@jobs.on(Job)
async def work(job: Job) -> None:
    await asyncio.sleep(0.05)
    with open("done", "ab", 0) as file:
        file.write(f"{job.lane} {job.number} {os.getpid()}\\n".encode())

app.add(jobs)
"""


class Job(Event, topic="jobs", key="lane", type="work.job"):
    lane: str
    number: int


def job(number: int) -> Job:
    return Job(lane=f"lane-{number % 20}", number=number)


@pytest.fixture
def work(command: Stentor) -> Stentor:
    (command.folder / "work.py").write_text(WORK)
    return command


def done(folder: Path) -> list[tuple[str, int]]:
    """Lane and number of what was handled, in order."""
    path = folder / "done"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(lane, int(number)) for lane, number, _ in map(str.split, lines)]


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE:g} s: {what}"
        await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_workers_come_for_a_backlog_and_go_when_it_is_quiet(work: Stentor) -> None:
    app = App("work", broker=f"sqlite:///{work.folder}/stentor.db")
    running = work.start("run", "work", "--workers", "1..3", "--lag", "500ms", "--cooldown", "3s")
    await asyncio.to_thread(running.until, "ready")
    async with app.connected():
        count = 400
        await app.publish([job(number) for number in range(count)])
        grown = asyncio.create_task(asyncio.to_thread(running.until, "from 1 to 2 workers: the oldest event of jobs"))
        await grown
        shrunk = asyncio.create_task(asyncio.to_thread(running.until, "to 1 worker: for 3"))
        while not shrunk.done():  # a little load goes on, so that those who go have something in hand
            await app.publish(job(count))
            count += 1
            await asyncio.wait([shrunk], timeout=0.1)
        await shrunk
        await asyncio.to_thread(running.until, "has left")
    await until(lambda: len(done(work.folder)) >= count, "all jobs are done")
    running.send(signal.SIGTERM)
    assert await asyncio.to_thread(running.end) == 0
    found = done(work.folder)
    assert sorted(number for _, number in found) == list(range(count)), "nothing is lost, and nothing done twice"
    lanes: dict[str, list[int]] = {}
    for lane, number in found:
        lanes.setdefault(lane, []).append(number)
    assert all(numbers == sorted(numbers) for numbers in lanes.values())
    assert sum("stopped after" in line for line in running.lines) >= 2


@pytest.mark.slow
async def test_a_worker_that_is_killed_is_replaced_and_loses_nothing(work: Stentor) -> None:
    app = App("work", broker=f"sqlite:///{work.folder}/stentor.db")
    running = work.start("run", "work", "--workers", "2..3", "--lag", "1h")
    pids = {await asyncio.to_thread(ready, running) for _ in range(2)}
    async with app.connected():
        await app.publish([job(number) for number in range(200)])
    await until(lambda: len(done(work.folder)) > 20, "they work")
    os.kill(max(pids), signal.SIGKILL)
    await asyncio.to_thread(running.until, "ended with SIGKILL; again in 0.5 s")
    assert await asyncio.to_thread(ready, running) not in pids
    await until(lambda: {number for _, number in done(work.folder)} == set(range(200)), "all jobs are done")
    running.send(signal.SIGTERM)
    assert await asyncio.to_thread(running.end) == 0
    assert not any(" from " in line for line in running.lines), "nobody came or went"


def test_workers_need_a_broker_that_they_can_share(work: Stentor) -> None:
    text = work("run", "work", "--broker", "memory://", "--workers", "1..4", code=3)
    assert "memory:// lives inside one process, so --workers 1..4 cannot share it" in text


@pytest.mark.parametrize("workers", ["0", "4..2", "0..3", "many", "1..", "..", "1..5000", "-1"])
def test_bounds_that_make_no_sense_are_told(work: Stentor, workers: str) -> None:
    assert "workers" in work("run", "work", "--workers", workers, code=2)


def ready(running: Running) -> int:
    found = re.search(r"pid (\d+)", running.until("ready after"))
    assert found is not None
    return int(found[1])


@pytest.mark.slow
async def test_one_address_tells_the_figures_of_all_workers(work: Stentor) -> None:
    app = App("work", broker=f"sqlite:///{work.folder}/stentor.db")
    running = work.start("run", "work", "--workers", "2", "--http", "127.0.0.1:0")
    found = re.search(r"http://\S+", await asyncio.to_thread(running.until, "listens on"))
    assert found is not None
    pids = {await asyncio.to_thread(ready, running) for _ in range(2)}
    async with httpx.AsyncClient(base_url=found[0], timeout=PATIENCE) as client:

        async def state(path: str = "/readyz") -> tuple[int, list[str]]:
            answer = await client.get(path)
            states = {one["worker"]: one["state"] for one in answer.json()["workers"]}
            return answer.status_code, [f"{worker} {state}" for worker, state in sorted(states.items())]

        async def reaches(path: str, status: int, states: list[str]) -> None:
            end = time.monotonic() + PATIENCE
            while (seen := await state(path)) != (status, states):
                assert time.monotonic() < end, seen

        await reaches("/readyz", 200, ["1 ready", "2 ready"])
        async with app.connected():
            await app.publish([job(number) for number in range(60)])
        await until(lambda: len(done(work.folder)) == 60, "all jobs are done")

        async def handled() -> dict[str, float]:
            text = (await client.get("/metrics")).text
            told = re.findall(r'^stentor_handled_total\{group="jobs",worker="(\d)"\} (\S+)$', text, re.MULTILINE)
            assert 'stentor_worker_up{worker="2"} 1.0' in text
            return {worker: float(value) for worker, value in told}

        end = time.monotonic() + PATIENCE
        while sum((counts := await handled()).values()) < 60:  # a handler's end is counted once it is settled
            assert time.monotonic() < end, counts
        assert sum(counts.values()) == 60
        assert set(counts) == {"1", "2"}
        assert all(counts.values()), "both of them worked"
        groups = (await client.get("/flow")).json()["groups"]
        assert {group["worker"] for group in groups} == {1, 2}
        assert {group["pid"] for group in groups} == pids
        assert sum(group["service"]["count"] for group in groups) == 60
        answer = await asyncio.to_thread(work, "top", found[0], "--interval", "200ms", "--count", "1", "--json")
        assert json.loads(answer)["processes"] == 2

        second = next(group["pid"] for group in groups if group["worker"] == 2)
        os.kill(second, signal.SIGSTOP)
        try:
            await reaches("/readyz", 503, ["1 ready", "2 silent"])
            assert (await client.get("/readyz")).json()["reasons"][0] == "worker 2 does not answer"
            await reaches("/healthz", 200, ["1 ready", "2 silent"])
            assert 'stentor_worker_up{worker="2"} 0.0' in (await client.get("/metrics")).text
            assert {group["worker"] for group in (await client.get("/flow")).json()["groups"]} == {1}
        finally:
            os.kill(second, signal.SIGCONT)
        await reaches("/readyz", 200, ["1 ready", "2 ready"])
    running.send(signal.SIGTERM)
    assert await asyncio.to_thread(running.end) == 0
