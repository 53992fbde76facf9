"""λ in the hours to come: what this time of the week brings, times how busy it is now.

A profile by time of week, learned as a slow mean over the weeks, is scaled by a level: what came in the last bins over
what the profile expected of them. The further ahead, the less the level of now counts. It is the multiplicative form of
exponential smoothing with a season (Winters 1960, "Forecasting sales by exponentially weighted moving averages",
Management Science 6), with two seasons in one: a time of the week that was never seen is taken from the time of day.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, tzinfo

from stentor.errors import DefinitionError

DAY = 86_400
WEEK = 7 * DAY
LEARNING = 0.3
"""The part of a week's news that goes into the profile."""
FOLLOWING = 0.25
"""The part of a bin's news that goes into the level."""
LASTING = 6 * 3600.0
"""Seconds ahead at which the level of now counts by 1/e."""


class Forecast:
    """Learns arrivals bin by bin and says the rate of a time to come.

    ``bin``: seconds, a divisor of a day. ``zone``: where the days of those who make the events begin; their clock is
    set twice a year, and the profile with it.

    Raises:
        DefinitionError: the bin makes no sense.
    """

    def __init__(self, bin: int = 3600, zone: tzinfo = UTC) -> None:
        if type(bin) is not int or not 0 < bin <= DAY or DAY % bin:
            raise DefinitionError(f"bin must be whole seconds that divide a day, not {bin!r}")
        self.bin = bin
        self._zone = zone
        self._weekly: dict[int, float] = {}
        self._daily: dict[int, float] = {}
        self._expected = 0.0
        self._came = 0.0
        self._mean = 0.0
        self._seen = 0
        self._at = 0.0

    def _slot(self, at: float) -> int:
        moment = datetime.fromtimestamp(at, self._zone)
        return (moment.weekday() * DAY + moment.hour * 3600 + moment.minute * 60 + moment.second) // self.bin

    def _profile(self, slot: int) -> float:
        daily = self._daily.get(slot % (DAY // self.bin), self._mean)
        return self._weekly.get(slot, daily)

    def add(self, start: float, count: int) -> None:
        """``count`` events came in the bin that began at ``start`` (seconds since the epoch); bins come in order.

        Raises:
            DefinitionError: the bin does not follow the last one, or the count is below 0.
        """
        if self._seen and start != self._at + self.bin:
            raise DefinitionError(f"bins come one after the other: {self._at + self.bin:.0f} was next, not {start:.0f}")
        if count < 0:
            raise DefinitionError(f"a count cannot be below 0, as {count} is")
        slot = self._slot(start)
        expected = self._profile(slot) if self._seen else float(count)  # else the first bin is a rush without measure
        self._expected += FOLLOWING * (expected - self._expected)
        self._came += FOLLOWING * (count - self._came)
        day = slot % (DAY // self.bin)
        self._weekly[slot] = _learned(self._weekly.get(slot, self._daily.get(day)), count)
        self._daily[day] = _learned(self._daily.get(day), count)
        self._seen += 1
        self._mean += (count - self._mean) / min(self._seen, WEEK // self.bin)
        self._at = start

    def rate(self, at: float) -> float:
        """The expected arrivals a second at a time (seconds since the epoch) after the last bin."""
        ahead = max(0.0, at - self._at - self.bin)
        level = (self._came + 1) / (self._expected + 1)  # one event more, so that an empty night says little
        weight = math.exp(-ahead / LASTING)
        return self._profile(self._slot(at)) * (1 + (level - 1) * weight) / self.bin


def _learned(known: float | None, count: float) -> float:
    return count if known is None else known + LEARNING * (count - known)


def binned(times: Iterable[float], bin: int = 3600) -> list[tuple[float, int]]:
    """The whole bins (start, count) of event times in seconds since the epoch, empty ones between them included.

    The first and the last one are left out: what was recorded of them may be a part.

    Raises:
        DefinitionError: a time is before the one ahead of it.
    """
    counts: list[tuple[float, int]] = []
    last = -float("inf")
    for number, at in enumerate(times):
        if at < last:
            raise DefinitionError(f"time {number + 1} is before the one ahead of it: {at} after {last}; sort them")
        last = at
        start = at // bin * bin
        while counts and counts[-1][0] < start:
            counts.append((counts[-1][0] + bin, 0))
        if not counts:
            counts.append((start, 0))
        counts[-1] = (start, counts[-1][1] + 1)
    return counts[1:-1]


def forecast_errors(
    bins: Sequence[tuple[float, int]], horizon: int, *, warm: int = 0, zone: tzinfo = UTC
) -> tuple[float, float]:
    """Mean absolute errors, in events a second, of the forecast ``horizon`` bins ahead and of plain persistence.

    Persistence says that it stays as it was in the last bin. The first ``warm`` bins are learned and not judged.

    Raises:
        DefinitionError: there are too few bins.
    """
    if len(bins) <= warm + horizon or horizon < 1:
        raise DefinitionError(f"{len(bins)} bins are too few for {warm} to learn and {horizon} ahead")
    width = round(bins[1][0] - bins[0][0])
    forecast = Forecast(width, zone)
    ours = theirs = 0.0
    judged = 0
    for place, (start, count) in enumerate(bins[:-horizon]):
        forecast.add(start, count)
        if place + 1 >= warm:
            then, came = bins[place + horizon]
            ours += abs(forecast.rate(then) * width - came)
            theirs += abs(count - came)
            judged += 1
    return ours / judged / width, theirs / judged / width
