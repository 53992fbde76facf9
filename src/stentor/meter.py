"""What a worker measures of its group: how long events take and wait, which keys are hot, how fast it settles.

At most about ``SAMPLES`` events a second are looked at closely, and each stands for as many as went by since the last.
So a short handler pays next to nothing (``python3 tasks.py bench meter``), and every event of a slow one counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from stentor.clock import Clock, parse_iso
from stentor.histogram import Histogram
from stentor.message import Message

SAMPLES = 200
"""Events a second that are looked at, about; below that all are."""
ROUND = 32
"""After so many samples it may look at fewer; once a second at more."""
MOST = 4096
KEYS = 64

_gap = random.Random().randrange  # noqa: S311  no secret hangs on it


class HotKeys:
    """The commonest keys in bounded room: the Space-Saving sketch (Metwally, Agrawal, El Abbadi, ICDT 2005).

    ``counts`` has for each key how often it was seen for sure. A key that has more than 1 / ``KEYS`` of all is there.
    """

    __slots__ = ("_missed", "counts", "total")

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._missed: dict[str, int] = {}
        """How often a key may have been seen before it got its place."""
        self.total = 0

    def add(self, key: str, count: int = 1) -> None:
        """See a key ``count`` times."""
        counts, missed = self.counts, self._missed
        self.total += count
        if key not in counts and len(counts) >= KEYS:
            rarest = min(counts, key=lambda one: counts[one] + missed[one])
            missed[key] = counts.pop(rarest) + missed.pop(rarest)
        counts[key] = counts.get(key, 0) + count
        missed.setdefault(key, 0)

    def top(self, count: int = 5) -> list[tuple[str, int]]:
        """The commonest keys, with how often each was seen."""
        return sorted(self.counts.items(), key=lambda one: -one[1])[:count]

    @property
    def share(self) -> float:
        """That of the commonest key, 0 to 1."""
        return max(self.counts.values()) / self.total if self.total else 0.0


class Meter:
    """The measurements of one group in this process; all times are in seconds, and all that is counted only grows."""

    __slots__ = (
        "_clock", "_events", "_looked", "_monotonic", "_since", "every", "keys", "left", "service", "settled",
        "settling", "waiting",
    )  # fmt: skip

    def __init__(self, clock: Clock, monotonic: Callable[[], float]) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self.service = Histogram()
        """What a handler took; its total is the time for which handlers were busy."""
        self.waiting = Histogram()
        """From an event's own time to the begin of its handler: by two clocks where the publisher is another host."""
        self.settling = Histogram()
        """What the broker took for a batch of settlements."""
        self.settled = 0
        """Settlements in those batches."""
        self.keys = HotKeys()
        self.every = 1
        """A sample stands for so many events."""
        self.left = 1
        """So many events until the next sample; the worker counts it down."""
        self._looked = 0
        self._events = 0
        self._since = monotonic()

    def took(self, since: float, message: Message, count: int = 1) -> None:
        """A sample: a handler began at ``since`` (monotonic) and has ended now, with ``count`` events in one call."""
        now = self._monotonic()
        weight = self.every * count
        self.service.add((now - since) / count, weight)
        if message.time is not None:
            try:
                published = parse_iso(message.time)
            except ValueError:  # a publisher of another make need not write RFC 3339
                pass
            else:
                self.waiting.add(max(0.0, self._clock.now() - (now - since) - published), weight)
        if message.key is not None:
            self.keys.add(message.key, weight)
        self._looked += 1
        if self._looked == ROUND:  # within a second there may be a thousand times as many as before
            rate = ROUND * self.every / max(now - self._since, 1e-6)
            self._begin(now, max(self.every, rate / SAMPLES))
        else:
            self.left = 1 if self.every == 1 else _gap(1, 2 * self.every)

    def settle(self, took: float, count: int) -> None:
        """A batch of ``count`` settlements took the broker so many seconds."""
        self.settling.add(took)
        self.settled += count

    def tick(self, events: int) -> None:
        """About once a second: ``events`` have ended since the worker began."""
        now = self._monotonic()
        rate = (events - self._events) / max(now - self._since, 1e-6)
        self._events = events
        if rate < self.every * SAMPLES / 2:
            self._begin(now, rate / SAMPLES)

    def _begin(self, now: float, every: float) -> None:
        self._since = now
        self._looked = 0
        self.every = min(MOST, max(1, round(every)))
        # Gaps vary, so that nothing that recurs with the same period is seen always or never.
        self.left = 1 if self.every == 1 else _gap(1, 2 * self.every)

    def to_dict(self) -> dict[str, object]:
        """As JSON can carry it."""
        return {
            "service": self.service.to_dict(), "waiting": self.waiting.to_dict(), "settling": self.settling.to_dict(),
            "settled": self.settled, "keys": dict(self.keys.top()), "keyed": self.keys.total,
        }  # fmt: skip
