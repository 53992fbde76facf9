"""The closed forms against tables, limits and each other."""

import math

import pytest

from stentor.capacity.queues import (
    allen_cunneen_wait,
    erlang_b,
    erlang_c,
    kingman_wait,
    latency_quantile,
    little,
    mmc_wait,
    utilisation,
)
from stentor.capacity.times import fitted


@pytest.mark.parametrize(
    ("load", "servers", "blocked"), [(1, 1, 0.5), (2, 2, 0.4), (5, 10, 0.018385), (100, 100, 0.075700)]
)
def test_erlang_b_is_that_of_the_tables(load: float, servers: int, blocked: float) -> None:
    assert erlang_b(load, servers) == pytest.approx(blocked, rel=1e-4)


def test_erlang_c_by_hand() -> None:
    assert erlang_c(0.8, 1) == pytest.approx(0.8)  # M/M/1: the chance of a busy server is its utilisation
    assert erlang_c(1.0, 2) == pytest.approx(1 / 3)
    assert erlang_c(3.0, 2) == 1.0


def test_one_server_is_mm1() -> None:
    assert mmc_wait(80, 0.01) == pytest.approx(0.8 / (1 - 0.8) * 0.01)
    assert kingman_wait(80, 0.01, 1, 1) == pytest.approx(mmc_wait(80, 0.01))
    assert allen_cunneen_wait(80, 0.01, 1, 1, 1) == pytest.approx(mmc_wait(80, 0.01))


def test_constant_service_waits_half_as_long() -> None:
    assert allen_cunneen_wait(80, 0.01, 1, 1, 0) == pytest.approx(mmc_wait(80, 0.01) / 2)  # Pollaczek-Khinchine


def test_little_and_utilisation() -> None:
    assert little(100, 0.05) == pytest.approx(5)
    assert utilisation(100, 0.05, 10) == pytest.approx(0.5)


def test_quantiles_of_mm1_are_exponential() -> None:
    services = fitted(0.01, 1)
    for q in (0.5, 0.95, 0.99):
        exact = -math.log(1 - q) * 0.01 / (1 - 0.8)
        assert latency_quantile(q, 80, services, 1, 1, 1) == pytest.approx(exact, rel=0.01)


def test_overload_says_how_fast_the_backlog_grows() -> None:
    with pytest.raises(ValueError, match=r"utilisation is 1\.50: the backlog grows by 50\.0 events/s"):
        mmc_wait(150, 0.01)
    with pytest.raises(ValueError, match="a backlog is never worked off"):
        latency_quantile(0.99, 100, [0.01], 1, 1, 1)
