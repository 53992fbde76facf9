"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any


class VirtualTimer:
    """What ``VirtualClock.call_later`` returns."""

    __slots__ = ("callback", "cancelled", "due")

    def __init__(self, due: float, callback: Callable[[], Any]) -> None:
        self.due = due
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class VirtualClock:
    """A ``stentor.clock.Clock`` whose time moves only by ``move``; the harness moves it from timer to timer.

    It starts at ``start``, by default the current second of the machine's clock.
    """

    def __init__(self, start: datetime | None = None) -> None:
        moment = start or datetime.now(UTC).replace(microsecond=0)
        if moment.tzinfo is None:
            raise ValueError(f"start={start!r} has no time zone; give it a tzinfo")
        self._start = self._now = moment.timestamp()
        self._timers: list[tuple[float, int, VirtualTimer]] = []
        self._order = itertools.count()
        self._pauses: list[asyncio.Future[None]] = []

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._now - self._start

    def call_later(self, delay: float, callback: Callable[[], Any]) -> VirtualTimer:
        timer = VirtualTimer(self._now + max(delay, 0.0), callback)
        heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    async def sleep(self, delay: float) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_later(delay, lambda: None if done.done() else done.set_result(None))
        try:
            await done
        finally:
            timer.cancel()

    async def sleep_until(self, moment: float) -> None:
        if moment > self._now:
            await self.sleep(moment - self._now)

    async def pause(self, delay: float) -> None:  # noqa: ARG002 - housekeeping runs whenever the test lets work settle
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pauses.append(done)
        await done

    @asynccontextmanager
    async def timeout(self, delay: float) -> AsyncIterator[asyncio.Timeout]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as scope:
            timer = self.call_later(delay, lambda: scope.reschedule(loop.time()))
            try:
                yield scope
            finally:
                timer.cancel()

    # ---- for the harness ------------------------------------------------------------------------------------------

    @property
    def next(self) -> float | None:
        """When the first timer falls due; None when there is none."""
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def move(self, moment: float) -> None:
        """Set the time to ``moment`` (in microseconds' steps, never back) and fire what falls due by then, in order."""
        # Whole microseconds: three steps of 0.1 s end where one of 0.3 s does.
        self._now = max(self._now, round(moment, 6))
        # A timer may be due a fraction of a microsecond behind the rounded moment: it fires now, at its own time.
        while (due := self.next) is not None and due <= self._now + 1e-6:
            self._now = max(self._now, due)
            heapq.heappop(self._timers)[2].callback()

    def end_pauses(self) -> None:
        """Let housekeeping run a round."""
        pauses, self._pauses = self._pauses, []
        for done in pauses:
            if not done.done():
                done.set_result(None)
