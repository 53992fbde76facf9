"""What is said of the arrivals to come, against series whose making is known."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from stentor.capacity import Forecast, binned, forecast_errors
from stentor.errors import DefinitionError

HOUR = 3600
MONDAY = datetime(2026, 6, 1, tzinfo=UTC)


def expected(at: float) -> float:
    """Events an hour: busy by day, quiet at the weekend."""
    moment = datetime.fromtimestamp(at, UTC)
    by_day = 60 + 50 * math.sin((moment.hour - 8) / 24 * 2 * math.pi)
    return by_day * (0.4 if moment.weekday() >= 5 else 1.0)


def series(weeks: int, level: float = 1.0, start: datetime = MONDAY) -> list[tuple[float, int]]:
    dice = random.Random(3)
    starts = [(start + timedelta(hours=n)).timestamp() for n in range(weeks * 168)]
    return [(at, max(0, round(dice.gauss(level * expected(at), math.sqrt(level * expected(at)))))) for at in starts]


@pytest.mark.parametrize(("ahead", "ratio"), [(1, 0.8), (6, 0.25), (24, 0.6)])
def test_it_is_closer_than_that_all_stays_as_it_is(ahead: int, ratio: float) -> None:
    ours, theirs = forecast_errors(series(10), ahead, warm=4 * 168)
    assert ours < ratio * theirs


def test_it_is_nearly_as_close_as_chance_allows() -> None:
    """No forecast can be closer than the noise around what is truly expected."""
    ours, _ = forecast_errors(series(12), 1, warm=4 * 168)
    bins = series(12)[4 * 168 :]
    least = sum(abs(count - expected(at)) for at, count in bins) / len(bins) / HOUR
    assert ours < 1.35 * least


def test_a_busier_day_is_followed_and_forgotten_further_ahead() -> None:
    usual, busy = Forecast(), Forecast()
    for at, count in series(6):
        usual.add(at, count)
        busy.add(at, count)
    day = series(1, start=MONDAY + timedelta(weeks=6))[:18]
    for at, count in day:
        usual.add(at, count)
        busy.add(at, 2 * count)
    soon, late = day[-1][0] + HOUR, day[-1][0] + 36 * HOUR
    assert busy.rate(soon) > 1.5 * usual.rate(soon)
    assert busy.rate(late) == pytest.approx(usual.rate(late), rel=0.1)


def test_a_day_that_was_never_seen_is_taken_from_the_others() -> None:
    forecast = Forecast()
    for at, count in series(1)[: 3 * 24]:
        forecast.add(at, count)
    noon = (MONDAY + timedelta(days=3, hours=14)).timestamp()
    assert forecast.rate(noon) * HOUR == pytest.approx(expected(noon), rel=0.35)


def test_the_clock_of_those_who_make_the_events_counts() -> None:
    """In the week in which clocks go forward the morning comes an hour earlier, by UTC."""
    zone = ZoneInfo("Europe/Berlin")
    forecast = Forecast(zone=zone)
    at = datetime(2026, 3, 1, tzinfo=zone)
    while at < datetime(2026, 3, 29, tzinfo=zone):
        forecast.add(at.timestamp(), 100 if at.astimezone(zone).hour == 8 else 0)
        at = (at.astimezone(UTC) + timedelta(hours=1)).astimezone(zone)
    eight = datetime(2026, 3, 30, 8, tzinfo=zone)
    assert forecast.rate(eight.timestamp()) > 10 * forecast.rate(eight.timestamp() + HOUR)


def test_times_become_bins() -> None:
    whole = [0.0, 10.0, HOUR + 1.0, 3 * HOUR + 2.0, 3 * HOUR + 3.0, 4 * HOUR]
    assert binned(whole, HOUR) == [(HOUR, 1), (2 * HOUR, 0), (3 * HOUR, 2)]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(DefinitionError, match="time 3 is before the one ahead of it"):
        binned([1.0, 5.0, 4.0])
    with pytest.raises(DefinitionError, match="whole seconds that divide a day, not 7000"):
        Forecast(7000)
    forecast = Forecast()
    forecast.add(0.0, 1)
    with pytest.raises(DefinitionError, match="3600 was next, not 7200"):
        forecast.add(7200.0, 1)
    with pytest.raises(DefinitionError, match="cannot be below 0, as -1 is"):
        forecast.add(3600.0, -1)
    with pytest.raises(DefinitionError, match="3 bins are too few"):
        forecast_errors(series(1)[:3], 4)


def test_the_first_bins_are_no_rush_without_measure() -> None:
    forecast = Forecast(HOUR)
    for hour in range(3):
        forecast.add(MONDAY.timestamp() + hour * HOUR, 3600)
        assert forecast.rate(MONDAY.timestamp() + (hour + 1) * HOUR) == pytest.approx(1.0, rel=0.01)
