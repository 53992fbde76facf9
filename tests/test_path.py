"""One event's way through Stentor stays short: few frames above the handler, few functions an event."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import FrameType

import pytest

import stentor
from stentor import App, Event
from stentor.testing import harness

FRAMES = 3
FUNCTIONS = 20
PACKAGE = str(Path(stentor.__file__).parent)


class Step(Event, topic="steps", key="of"):
    """One of many."""

    of: str


async def test_few_frames_stand_above_the_handler() -> None:
    """Between the event loop and the user's function there are at most three frames of Stentor."""
    app = App("path")
    stacks: list[list[str]] = []

    @app.on(Step)
    async def handle(step: Step) -> None:
        stacks.append([frame.name for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)])

    async with harness(app) as t:
        await t.publish(Step(of="a"))
        await t.settled()
    assert len(stacks) == 1
    assert len(stacks[0]) <= FRAMES, stacks


@pytest.mark.parametrize("events", [1000])
async def test_few_functions_run_for_an_event(events: int) -> None:
    """From publish to the settled ack, an event takes at most twenty of Stentor's functions."""
    app = App("path", broker="memory://")
    seen = 0

    @app.on(Step)
    async def handle(step: Step) -> None:
        nonlocal seen
        seen += 1

    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"] += 1

    steps = [Step(of=f"key {n % 50}") for n in range(events)]
    async with app:
        assert app.program is not None
        (worker,) = app.program.workers
        await app.publish(Step(of="a"))
        async with asyncio.timeout(60):
            while seen < 1 or worker.unsettled:
                await asyncio.sleep(0)
            sys.setprofile(count)
            try:
                await app.publish(steps)
                while seen < events + 1 or worker.unsettled:
                    await asyncio.sleep(0)
            finally:
                sys.setprofile(None)
    for_each = {name for name, number in calls.items() if number >= events // 2 and "unsettled" not in name}
    assert {"catalog.Catalog.encode", "worker.Worker.end"} <= for_each
    assert len(for_each) <= FUNCTIONS, "\n".join(sorted(for_each))


async def test_handlers_that_never_wait_leave_the_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long handlers compute, heartbeats, settlements and the rest of the program get their turn."""
    app = App("path", broker="memory://")
    loop = asyncio.get_running_loop()
    computed, real = 0.0, loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + computed)
    turns: list[float] = []

    @app.on(Step)
    async def handle(step: Step) -> None:
        nonlocal computed
        computed += 0.004

    async with app:
        await app.publish([Step(of=f"key {n}") for n in range(100)])
        async with asyncio.timeout(60):
            while computed < 0.39:
                turns.append(computed)
                await asyncio.sleep(0)
    stretches = [after - before for before, after in pairwise([*turns, computed])]
    assert max(stretches) < 0.03, stretches
