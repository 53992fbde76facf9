"""``concurrency="auto"``: how many handlers of a group run at once, found by their own times.

Little's law (1961) says N = X * R: calls under way = throughput * time of each. Below the knee of what is called, more
calls at once give more throughput in the same time; beyond it they only wait there, so the time grows and the
throughput does not. The limiter looks at the mean time R of the calls of a window:

- not longer than the base time R0, within what chance allows (a share, and the standard error): more at once;
- longer ("hot"): a cut to N * R0 / R, which is X * R0, all that the throughput needs without waiting;
- a cut that made calls no quicker is undone: what is called has become slower, and that is the base from now on.

Only calls that began after the last change count, and only while the limit was what held events back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

FIRST = 4
MOST = 512
WINDOW = 0.05
"""Seconds that a window has at least."""
TOLERANCE = 0.15
"""The share by which calls may take longer than the base before they count as hot, chance aside."""
STEP = 1.1
HEADROOM = 1.15
"""By so much a cut stays above what the throughput needs on average, as calls come and end at random."""
DEEPEST = 0.25
"""A cut leaves this share at least."""
LOOK = 24
BELOW = 0.75
"""Each window of so many lies below the knee, to look at the base time; and the next, as long as calls get quicker."""


class Limiter:
    """The limit of one group in one process; ``limit`` is a whole number from 1 to ``MOST``."""

    __slots__ = (
        "_age", "_back", "_base", "_before", "_changed", "_count", "_grown", "_monotonic", "_squares", "_starting",
        "_total", "full", "limit",
    )  # fmt: skip

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self.limit = FIRST
        self.full = False
        """Something was ready and had to wait for the limit, in this window; the worker says so."""
        self._base: float | None = None
        self._before: tuple[int, float] | None = None
        """The limit and mean time before the cut whose effect is being looked at."""
        self._starting = True
        self._grown = 0
        self._age = 0
        """Windows since the last look below the knee."""
        self._back = 0
        """The limit to come back to from a look; 0 while there is none."""
        self._begin()

    def _begin(self) -> None:
        self._changed = self._monotonic()
        self._count = 0
        self._total = self._squares = 0.0
        self.full = False

    def ended(self, began: float) -> None:
        """A call that began at ``began`` (monotonic seconds) has ended: ``limit`` may change."""
        if began < self._changed:
            return
        now = self._monotonic()
        took = now - began
        self._count += 1
        self._total += took
        self._squares += took * took
        if self._count < max(24, 2 * self.limit) or now - self._changed < WINDOW:
            return
        mean = self._total / self._count
        error = math.sqrt(max(0.0, self._squares / self._count - mean * mean) / self._count) / max(mean, 1e-9)
        self.limit = max(1, min(MOST, self._next(mean, error)))
        self._begin()

    def _next(self, mean: float, error: float) -> int:
        """The limit after a window with this mean time and relative standard error."""
        limit = self.limit
        base = mean if self._base is None else self._base
        earlier, self._before = self._before, None
        back, self._back = self._back, 0
        quicker = mean < base * (1 - error - TOLERANCE / 2)
        self._age += 1
        if quicker:
            base = mean
        elif back:  # nothing waited there, so this is what calls take
            base += (mean - base) / 2
        self._base = base
        if back and not quicker:
            return back
        if back or (self._age >= LOOK and limit > 1 and self.full):
            self._age = 0
            self._back = math.ceil(limit * min(1.0, base / mean) * HEADROOM)
            return math.floor(limit * min(1.0, base / mean) * BELOW)
        if mean > base * (1 + TOLERANCE + error):
            self._starting, self._grown = False, 0
            if earlier is not None and earlier[1] - mean < (earlier[1] - base) / 3:
                self._base = mean
                self._age = max(self._age, LOOK - 4)
                return earlier[0]
            self._before = (limit, mean)
            return min(limit - 1, math.ceil(limit * max(DEEPEST, base / mean) * HEADROOM))
        if not self.full:
            return limit
        self._grown += 1
        if self._starting:
            return 2 * limit
        return math.ceil(limit * min(2.0, STEP ** max(1, self._grown - 2)))
