"""What will come in while a new process starts: a forecast that learns as it watches, used once it has earned it.

For each bin it says before what will come, and so does plain persistence: as much as in the bin before. Who was closer,
on average of the last day, is known; until a day was seen, or while persistence is closer, there is no forecast.
"""

from __future__ import annotations

import logging

from stentor.capacity.forecast import DAY, Forecast
from stentor.observe.text import per_second, span

log = logging.getLogger("stentor.scaler")
BINS = (60, 120, 300, 600, 900, 1800, 3600)
"""Seconds."""


class Ahead:
    """The arrivals of a group within ``ahead`` seconds (at most an hour) from now on."""

    def __init__(self, group: str, ahead: float) -> None:
        self.bin = next(bin for bin in BINS if bin >= ahead)
        self._group = group
        self._forecast = Forecast(self.bin)
        self._begin: float | None = None
        """Of the bin that is being filled."""
        self._came = 0.0
        self._seen = 0.0
        """Seconds of it."""
        self._said: tuple[float, float] | None = None
        """What the forecast and persistence said of it."""
        self._judged = 0
        self.errors = (0.0, 0.0)
        """Mean absolute ones of the forecast and of persistence, in events a second."""

    @property
    def earned(self) -> bool:
        """Whether the forecast was closer than persistence, for a day at least."""
        return self._judged >= DAY // self.bin and self.errors[0] < self.errors[1]

    def saw(self, until: float, seconds: float, rate: float) -> None:
        """``rate`` events a second came for some seconds, until a time (since the epoch) after the last call's."""
        at = until - seconds
        if self._begin is None:
            self._begin = (at // self.bin + 1) * self.bin  # the first whole one
        at = max(at, self._begin)
        while at < until:
            end = self._begin + self.bin
            if at >= end:
                self._close()
                continue
            part = min(until, end) - at
            self._came += part * rate
            self._seen += part
            at += part

    def _close(self) -> None:
        """A bin is over. What was seen of half of it stands for all; of less, it is taken as it was foreseen."""
        assert self._begin is not None
        if self._seen >= self.bin / 2:
            rate = self._came / self._seen
            if self._said is not None:
                self._judged += 1
                weight = 1 / min(self._judged, DAY // self.bin)
                ours, theirs = (abs(said - rate) for said in self._said)
                mean = self.errors
                self.errors = mean[0] + weight * (ours - mean[0]), mean[1] + weight * (theirs - mean[1])
                if self._judged % (DAY // self.bin) == 0:
                    self._tell()
        else:
            rate = self._forecast.rate(self._begin)
        self._forecast.add(self._begin, round(rate * self.bin))
        self._begin += self.bin
        self._came = self._seen = 0.0
        self._said = self._forecast.rate(self._begin), rate

    def _tell(self) -> None:
        ours, theirs = map(per_second, self.errors)
        log.info(
            "%s: what comes within %s is foreseen with an error of %s, by persistence of %s; the forecast is %s",
            self._group, span(self.bin), ours, theirs, "used" if self.earned else "not used",
        )  # fmt: skip

    def rate(self, now: float) -> float | None:
        """The events a second to expect at the end of the time ahead; None while the forecast has not earned it."""
        return self._forecast.rate(now + self.bin) if self.earned else None
