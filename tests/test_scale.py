"""When workers come and go: the decision as a table, and what it does with a load for an hour."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from stentor.histogram import Histogram
from stentor.message import Lag
from stentor.scaling.need import Need, Scale, decide, look, need


@pytest.mark.parametrize(
    ("needs", "workers", "wanted"),
    [
        ([], 2, 2),
        ([9.0], 2, 2),  # one look may be chance
        ([9.0, 0.1], 2, 2),
        ([2.1, 2.2], 2, 3),
        ([2.0, 2.0], 2, 2),
        ([5.0, 3.5], 2, 4),  # the lower one of both
        ([90.0, 90.0], 2, 8),  # no more than the upper bound
        ([9.0, 9.0], 8, 8),
        ([9.0, 1.0, 9.0, 1.0], 2, 2),  # bursts: neither grown nor shrunk
        ([0.0] * 5, 4, 4),  # 8 s of quiet are no cooldown
        ([0.0] * 6, 4, 2),  # at most half go at once
        ([0.0] * 6, 3, 2),
        ([0.0] * 6, 2, 1),
        ([0.0] * 6, 1, 1),  # the lower bound
        ([1.6] * 6, 3, 2),
        ([1.7] * 6, 3, 3),  # two would have too little room
        ([0.0] * 3 + [2.9] + [0.0] * 3, 4, 4),  # the most that was needed counts
        ([0.0] * 3 + [2.2] + [0.0] * 3, 4, 3),
    ],
)
def test_the_decision(needs: list[float], workers: int, wanted: int) -> None:
    found = [Need(2.0 * place, amount, "") for place, amount in enumerate(needs)]
    assert decide(found, workers, least=1, most=8, cooldown=10.0) == wanted


def run(scale: Scale, hours: float, needed: Any, workers: int = 1) -> list[tuple[float, int]]:
    """When their number changed, and what it became; ``needed`` tells the need at a time for a number of workers."""
    changes = []
    for place in range(int(hours * 1800)):
        moment = 2.0 * place
        count, _ = scale.look(Need(moment, needed(moment, workers), ""), workers)
        if count != workers:
            changes.append((moment, count))
            workers = count
    return changes


@pytest.mark.parametrize("cores", [0.05, 0.3, 0.6, 0.69, 0.72, 1.0, 1.35, 1.45, 2.0, 2.7, 2.9, 3.6])
def test_a_steady_load_finds_its_number_and_keeps_it(cores: float) -> None:
    noise = random.Random(1)
    changes = run(Scale(1, 8, 60.0), 2, lambda _, workers: min(workers, cores * noise.uniform(0.85, 1.15)) / 0.7)
    numbers = [count for _, count in changes]
    assert numbers == sorted(numbers), "they only come"
    assert all(moment < 3600 for moment, _ in changes), "... and then nothing changes"
    assert (numbers[-1] if numbers else 1) >= cores


def test_a_need_that_shows_only_in_the_backlog_makes_the_cooldown_longer() -> None:
    """Handlers that block the event loop, say: neither cores nor handlers look busy, but two are too few."""
    behind = 0.0

    def needed(moment: float, workers: int) -> float:
        nonlocal behind
        behind = max(0.0, behind + (0.2 if workers < 3 else -1) * 2.0)
        return workers * min(behind / 10, 2.0) if behind else 0.0

    changes = run(Scale(1, 8, 60.0), 8, needed)
    went = [moment for (_, before), (moment, after) in itertools.pairwise(changes) if after < before]
    gaps = [after - before for before, after in itertools.pairwise(went)]
    assert gaps[-1] > 1800
    assert len(changes) < 50


def test_a_load_that_comes_once_an_hour_is_followed() -> None:
    changes = run(Scale(1, 4, 60.0), 3, lambda moment, workers: 3.2 if moment % 3600 < 600 else 0.1)
    assert [count for _, count in changes] == [4, 2, 1] * 3


def figures(pid: int, cpu: float, handled: int, **changes: Any) -> dict[str, Any]:
    """What one process tells, with a handler that takes 20 ms."""
    empty = Histogram().to_dict()
    group = {
        "group": "g", "name": "g", "shared": True, "concurrency": 2, "running": 1, "partitions": 8, "held": None,
        "counts": {"handled": handled, "dead": 0, "skipped": 0, "retried": 0},
        "service": Histogram([0.02] * handled).to_dict(), "waiting": empty, "settling": empty, "keys": {}, "keyed": 0,
    }  # fmt: skip
    return {"worker": pid, "pid": pid, "cpu": cpu, "groups": [{**group, **changes}], "sources": []}


@pytest.mark.parametrize(
    ("cpu", "handled", "events", "age", "silent", "changes", "workers", "why"),
    [
        (0.1, 0, 0, 0.0, 0, {}, 0.1 / 10 / 0.7, "cores"),
        (9.8, 10, 0, 0.0, 0, {}, 1.4, "they use 0.98 cores"),
        (1.0, 1050, 0, 0.0, 0, {}, 105 * 0.02 / (2 * 0.7), "g: λ 105/s, X 105/s, ρ 0.52"),
        (1.0, 10, 1000, 15.0, 0, {}, 3.0, "the oldest event of g waits for 15 s"),
        (1.0, 10, 1000, 90.0, 0, {}, 4.0, "oldest"),  # at most twice as many at once
        (1.0, 10, 1000, 90.0, 0, {"held": "the bank is away"}, 101 * 0.02 / 1.4, "λ"),
        (1.0, 10, 1, 90.0, 0, {}, 0.1 / 0.7, "cores"),  # one event, which runs: nothing waits
        (1.0, 5000, 1000, 90.0, 0, {"shared": False}, 0.1 / 0.7, "cores"),  # broadcast: more workers bring nothing
        (1.0, 10, 0, 0.0, 1, {}, 1.1 / 0.7, "they use 1.1 cores"),  # one that does not answer counts as busy
    ],
)
def test_what_is_needed(
    cpu: float, handled: int, events: int, age: float, silent: int, changes: dict[str, Any], workers: float, why: str
) -> None:
    lags = [Lag(group="g", topic="t", events=events, seconds=age, parked=0, members=9)]
    before = look(100.0, [figures(7, 5.0, 0, **changes)], [], 2, 0)
    started = figures(8, 60.0, 5000, **changes)  # what it did before it first answered is no load of this time
    after = look(110.0, [figures(7, 5.0 + cpu, handled, **changes), started], lags, 2, silent)
    found = need(before, after, target=10.0)
    assert found.workers == pytest.approx(workers, rel=0.02)
    assert why in found.why
