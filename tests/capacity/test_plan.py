"""Predictions against an independent simulator, and the answers to what people ask."""

import math
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from stentor.capacity import (
    Setup,
    Times,
    answer,
    arrivals,
    drain_time,
    fitted,
    lag_after,
    largest_rate,
    limits,
    replay,
    workers_for,
)
from stentor.capacity.plot import draw
from stentor.capacity.queues import stable
from stentor.errors import DefinitionError


def oracle(rate: float, mean: float, servers: int, cv: float, count: int = 60_000) -> dict[str, float]:
    """Latency quantiles of a queue in simpy."""
    import simpy

    chance = random.Random(7)
    environment = simpy.Environment()
    pool = simpy.Resource(environment, capacity=servers)
    found = []

    def event() -> Generator[Any, Any, Any]:
        came = environment.now
        with pool.request() as turn:
            yield turn
            yield environment.timeout(chance.gammavariate(1 / cv**2, mean * cv**2) if cv else mean)
        found.append(environment.now - came)

    def source() -> Generator[Any, Any, Any]:
        for _ in range(count):
            yield environment.timeout(chance.expovariate(rate))
            environment.process(event())

    environment.process(source())
    environment.run()
    found.sort()
    return {f"p{q}": found[len(found) * q // 100] for q in (50, 95, 99)}


@pytest.mark.parametrize(
    ("rate", "servers", "cv"), [(70, 1, 1.0), (700, 10, 1.0), (700, 10, 0.5), (1300, 16, 0.0), (60, 1, 0.5)]
)
def test_latency_is_that_of_an_independent_simulator(rate: float, servers: int, cv: float) -> None:
    truth = oracle(rate, 0.01, servers, cv)
    found = answer(Setup(rate=rate, service=fitted(0.01, cv), concurrency=servers))
    assert found.simulated is not None
    assert found.closed is not None
    for name, value in truth.items():
        assert found.simulated[name] == pytest.approx(value, rel=0.10), name
    for name in ("p95", "p99"):
        assert found.closed[name] == pytest.approx(truth[name], rel=0.15), name


def test_throughput_is_the_least_of_its_bounds() -> None:
    setup = Setup(rate=5000, service=[0.02], concurrency=64, hot=0.01, ceiling=4000, source=10_000, broker=9_000)
    assert [limit.name for limit in limits(setup)] == ["handlers", "process", "hot key", "broker", "source"]
    found = answer(setup)
    assert found.throughput == pytest.approx(3200)
    assert found.grows == pytest.approx(1800)
    assert found.closed is found.simulated is None
    assert "the backlog grows by 1,800.0 events/s" in found.notes[0]


def test_more_workers_than_partitions_stand_by() -> None:
    setup = Setup(rate=100, service=[0.02], concurrency=1, workers=5, partitions=2)
    assert limits(setup)[0].rate == pytest.approx(100)
    assert "3 of 5 workers stand by" in " ".join(answer(setup).notes)


def test_a_key_runs_one_at_a_time_and_the_others_overtake() -> None:
    times = Times(at=[0, 0, 0, 0], service=[1, 1, 1, 1], keys=["a", "a", "a", "b"])
    found = replay(times, 2, partitions=1)
    assert sorted(found.latencies) == [1, 1, 2, 3]
    assert replay(Times(at=[0, 0, 0, 0], service=[1, 1, 1, 1]), 2).latencies == [1, 1, 2, 2]


def test_overhead_is_the_most_a_process_takes() -> None:
    times = arrivals(5000, [1e-6], 20_000)
    assert replay(times, 64, overhead=1e-3).throughput == pytest.approx(1000, rel=0.01)
    assert replay(times, 64, workers=2, overhead=1e-3).throughput == pytest.approx(2000, rel=0.01)


def test_both_ways_of_replay_agree() -> None:
    times = arrivals(700, fitted(0.01, 1), 50_000)
    keyed = Times(at=times.at, service=times.service, keys=[str(n) for n in range(50_000)])
    assert replay(keyed, 10).quantile(0.99) == pytest.approx(replay(times, 10).quantile(0.99))


def test_workers_for_is_the_fewest() -> None:
    setup = Setup(rate=1000, service=fitted(0.02, 1), concurrency=8)
    workers = workers_for(setup, 0.15)
    assert workers is not None
    for count, holds in ((workers, True), (workers - 1, False)):
        found = answer(Setup(rate=1000, service=fitted(0.02, 1), concurrency=8, workers=count)).simulated
        assert (found is not None and found["p99"] <= 0.15) == holds
    assert workers_for(setup, 0.01) is None  # one event alone takes longer


def test_largest_rate_holds_its_p99() -> None:
    setup = Setup(rate=1, service=fitted(0.01, 1), concurrency=1)
    rate = largest_rate(setup, 0.1)
    exact = 100 - math.log(100) / 0.1  # M/M/1: p99 = ln 100 / (μ - λ)
    assert rate == pytest.approx(exact, rel=0.06)
    assert largest_rate(setup, 0.001) == 0


def test_backlog_and_outage() -> None:
    setup = Setup(rate=500, service=[0.02], concurrency=16)
    assert drain_time(setup, 3000) == pytest.approx(10)
    waiting, left = lag_after(setup, 60)
    assert waiting == pytest.approx(30_000)
    assert left == pytest.approx(100)
    assert drain_time(Setup(rate=800, service=[0.02], concurrency=16), 1) == math.inf


def test_a_load_of_exactly_what_it_carries_has_no_percentile_and_nothing_that_grows() -> None:
    found = answer(Setup(rate=800, service=[0.02], concurrency=16))
    assert (found.closed, found.simulated, found.grows) == (None, None, 0)
    assert found.notes[0] == (
        "the load is exactly what it carries: a backlog, once there, is never worked off; no percentile exists"
    )
    with pytest.raises(ValueError, match="utilisation is 1: a backlog is never worked off and no percentile"):
        stable(800, 0.02, 16)


@pytest.mark.parametrize("backlog", [-5, math.nan, math.inf])
def test_a_backlog_is_a_number_of_events(backlog: float) -> None:
    with pytest.raises(DefinitionError, match="a backlog is 0 events or more, not"):
        drain_time(Setup(rate=1, service=[0.1]), backlog)


def test_known_weak_zones_are_said() -> None:
    assert "one lane" in " ".join(answer(Setup(rate=10, service=fitted(0.01, 2), concurrency=1)).notes)
    assert "bursts" in " ".join(answer(Setup(rate=10, service=[0.01], concurrency=4, arrival_cv=3)).notes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0},
        {"rate": -1},
        {"concurrency": 0},
        {"hot": 1.5},
        {"service": []},
        {"service": [0]},
        {"ceiling": 0},
        {"arrival_cv": -1},
        {"arrival_cv": math.nan},
    ],
)
def test_bad_numbers_are_refused(wrong: dict[str, object]) -> None:
    settings: dict[str, object] = {"rate": 1.0, "service": [1.0], **wrong}
    with pytest.raises(DefinitionError):
        Setup(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_is_drawn(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"knee{suffix}"
    draw(Setup(rate=500, service=fitted(0.02, 1), concurrency=16), target)
    head = target.read_bytes()[:200]
    assert b"svg" in head or head.startswith(b"\x89PNG")


def test_a_plot_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"\.svg"):
        draw(Setup(rate=1, service=[0.1]), tmp_path / "knee.txt")
