"""A histogram of durations with a bounded relative error, as DDSketch has it (Masson, Rim, Lee, VLDB 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

ACCURACY = 0.01
"""A quantile is at most this share away from the true one."""
_GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
_PER_LOG = 1 / math.log(_GAMMA)
_SMALLEST = 1e-9


class Histogram:
    """Counts of durations in seconds by buckets whose bounds grow by 2 %; what several workers counted adds up."""

    __slots__ = ("buckets", "count", "squares", "total")

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.squares = 0.0
        for value in values:
            self.add(value)

    def add(self, value: float, count: int = 1) -> None:
        """Count a duration in seconds, ``count`` times; below a nanosecond it counts as one."""
        index = math.ceil(math.log(max(value, _SMALLEST)) * _PER_LOG)
        self.buckets[index] = self.buckets.get(index, 0) + count
        self.count += count
        self.total += value * count
        self.squares += value * value * count

    def merge(self, other: Histogram) -> None:
        """Add what another one counted."""
        for index, count in other.buckets.items():
            self.buckets[index] = self.buckets.get(index, 0) + count
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def since(self, earlier: Histogram) -> Histogram:
        """What was counted after ``earlier``, which this one began with."""
        found = Histogram()
        for index, count in self.buckets.items():
            if more := count - earlier.buckets.get(index, 0):
                found.buckets[index] = more
        found.count = self.count - earlier.count
        found.total = self.total - earlier.total
        found.squares = self.squares - earlier.squares
        return found

    def at_most(self, value: float) -> int:
        """How many durations were of at most so many seconds, as exactly as the buckets are."""
        last = math.floor(math.log(value) * _PER_LOG)
        return sum(count for index, count in self.buckets.items() if index <= last)

    @property
    def mean(self) -> float:
        """In seconds; 0 when nothing was counted."""
        return self.total / self.count if self.count else 0.0

    @property
    def cv(self) -> float:
        """The coefficient of variation: standard deviation over mean; 0 when nothing was counted."""
        if not self.total:
            return 0.0
        return math.sqrt(max(0.0, self.squares / self.count / self.mean**2 - 1))

    def quantile(self, q: float) -> float:
        """The duration in seconds below which a share ``q`` (0 to 1) lies; 0 when nothing was counted."""
        rank = q * (self.count - 1)
        seen = 0
        index = 0
        for index in sorted(self.buckets):
            seen += self.buckets[index]
            if seen > rank:
                break
        return 2 * _GAMMA**index / (_GAMMA + 1) if self.buckets else 0.0

    def points(self, count: int = 1000) -> list[float]:
        """``count`` equally likely durations that stand for all that were counted, ascending."""
        if not self.buckets:
            return []
        ordered = sorted(self.buckets.items())
        found = []
        at = 0
        seen = ordered[0][1]
        for n in range(count):
            rank = (n + 0.5) / count * self.count
            while seen < rank and at + 1 < len(ordered):
                at += 1
                seen += ordered[at][1]
            found.append(2 * _GAMMA ** ordered[at][0] / (_GAMMA + 1))
        return found

    def to_dict(self) -> dict[str, object]:
        """As JSON can carry it."""
        return {"count": self.count, "total": self.total, "squares": self.squares, "buckets": dict(self.buckets)}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Histogram:
        """What ``to_dict`` gave, also after a way through JSON.

        Raises:
            ValueError: It is no histogram.
        """
        found = cls()
        try:
            buckets = data["buckets"]
            assert isinstance(buckets, Mapping)
            found.buckets = {int(index): int(count) for index, count in buckets.items()}
            found.count = sum(found.buckets.values())
            found.total, found.squares = float(str(data["total"])), float(str(data["squares"]))
        except (KeyError, TypeError, ValueError, AssertionError):
            raise ValueError("not a histogram: it needs buckets, total and squares") from None
        return found
