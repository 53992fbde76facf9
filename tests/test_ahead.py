"""What a scaler foresees: nothing at first, then what the time of day brings, while it is closer than persistence."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable

import pytest

from stentor.scaling.ahead import Ahead
from stentor.scaling.keda import Scaler, wanted

DAY = 86_400.0


def watch(ahead: Ahead, begin: float, end: float, load: Callable[[float], float], every: float = 47.0) -> None:
    """Readings at odd times, as they come from questions."""
    at = begin
    while at + every <= end:
        at += every
        ahead.saw(at, every, load(at))


def daily(at: float) -> float:
    """Quiet nights, and a start of work that comes at once: 20 events a second at noon."""
    return 1.0 if at % DAY < DAY / 3 else 11 - 9 * math.cos((at % DAY - DAY / 3) / DAY * 3 * math.pi)


def test_it_learns_for_a_day_and_then_sees_the_morning_come(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stentor.scaler")
    ahead = Ahead("shop.charge", 300.0)
    watch(ahead, 0.0, 0.9 * DAY, daily)
    assert ahead.rate(0.9 * DAY) is None
    assert not caplog.messages
    watch(ahead, 0.9 * DAY, 8 * DAY, daily)
    assert ahead.earned
    assert ahead.errors[0] < 0.5 * ahead.errors[1]
    [*_, last] = caplog.messages
    assert "shop.charge: what comes within 5 min is foreseen with an error of " in last
    assert last.endswith("; the forecast is used")
    watch(ahead, 8 * DAY, 8 * DAY + DAY * 0.45 - 600, daily)
    now = 8 * DAY + DAY * 0.45 - 600
    assert ahead.rate(now) == pytest.approx(daily(now + 300), rel=0.1)


def test_where_persistence_is_closer_it_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stentor.scaler")
    chance = random.Random(1)
    levels = [10.0]
    for _ in range(4 * 24):
        levels.append(max(0.1, levels[-1] * chance.choice((0.5, 2.0)) if chance.random() < 0.3 else levels[-1]))
    ahead = Ahead("g", 300.0)
    watch(ahead, 0.0, 4 * DAY, lambda at: levels[int(at // 3600)])  # it jumps by chance, and stays for hours
    assert ahead.rate(4 * DAY) is None
    assert ahead.errors[0] > ahead.errors[1]
    assert caplog.messages[-1].endswith("; the forecast is not used")


def test_a_time_that_nobody_watched_is_no_news() -> None:
    ahead = Ahead("g", 60.0)
    watch(ahead, 0.0, 2 * DAY, daily)
    ahead.saw(2.5 * DAY, 1.0, 1e9)  # a second of a minute says nothing of the minute
    errors = ahead.errors
    ahead.saw(2.5 * DAY + 120, 1.0, daily(2.5 * DAY))
    assert ahead.errors == errors
    watch(ahead, 2.5 * DAY + 120, 3 * DAY, daily)
    assert ahead.rate(3 * DAY) == pytest.approx(daily(60), abs=0.5)


@pytest.mark.parametrize(("seconds", "bin"), [(1, 60), (60, 60), (61, 120), (3600, 3600)])
def test_a_bin_is_as_long_as_a_start_takes(seconds: float, bin: int) -> None:
    assert Ahead("g", seconds).bin == bin


def test_triggers_that_ask_for_the_same_share_what_was_learned() -> None:
    scaler = Scaler(None)  # type: ignore[arg-type]  # no question is asked
    one = wanted({"group": "g", "url": "http://pods", "ahead": "5m"})
    other = wanted({"group": "g", "url": "http://pods", "ahead": "1m", "busy": "0.5"})
    assert scaler.ahead(one) is scaler.ahead(one)
    assert scaler.ahead(one) is not scaler.ahead(other)
