"""Time as a source: nominal firing times of ``every`` and ``cron``, and the duty that publishes them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from stentor.clock import Duration, iso, seconds
from stentor.context import FIRING, Firing
from stentor.errors import DefinitionError
from stentor.message import Message
from stentor.plan import Duties

Missed = Literal["once", "skip", "all"]
ALL_LIMIT = 10_000
"""Most missed firings that ``missed="all"`` makes up for at once."""


class Every:
    """Multiples of a period since the epoch, so that every process and every restart agrees on them."""

    def __init__(self, period: Duration) -> None:
        self.period = seconds(period, "every")
        if self.period < 0.01:
            raise DefinitionError(f"every: {period!r} is too short; the least is 10 ms")

    def after(self, moment: float) -> float:
        """The first firing time after ``moment`` (seconds since the epoch)."""
        # In whole microseconds: with floats a firing time could follow itself, without end.
        period = round(self.period * 1e6)
        return (round(moment * 1e6) // period + 1) * period / 1e6


class Cron:
    """A cron expression of five (or six, with seconds) fields in a time zone."""

    def __init__(self, expression: str, tz: str | ZoneInfo) -> None:
        from cronsim import CronSim, CronSimError  # imported where used: most programs have no cron

        try:
            self.zone = tz if isinstance(tz, ZoneInfo) else ZoneInfo(tz)
        except (ZoneInfoNotFoundError, ValueError):
            raise DefinitionError(f"cron: {tz!r} is no time zone; write for example 'Europe/Berlin'") from None
        self.expression = expression
        try:
            CronSim(expression, datetime.now(self.zone))
        except CronSimError as error:
            raise DefinitionError(f"cron: {expression!r} is no cron expression: {error}") from None
        self._sim = CronSim

    def after(self, moment: float) -> float:
        """The first firing time after ``moment`` (seconds since the epoch)."""
        return next(self._sim(self.expression, datetime.fromtimestamp(moment, self.zone))).timestamp()


class Timer:
    """A schedule with the name of its handler and what to do about firings that were missed."""

    __slots__ = ("missed", "name", "schedule")

    def __init__(self, name: str, schedule: Every | Cron, missed: Missed) -> None:
        if missed not in ("once", "skip", "all"):
            raise DefinitionError(f'{name}: missed must be "once", "skip" or "all", not {missed!r}')
        self.name = name
        self.schedule = schedule
        self.missed: Missed = missed

    def due(self, last: float, now: float) -> list[tuple[float, int]]:
        """Firings (time, how many missed before it) between the last one and now."""
        times = []
        moment = self.schedule.after(last)
        dropped = 0
        while moment <= now:
            times.append(moment)
            if len(times) > ALL_LIMIT:
                times.pop(0)
                dropped += 1
            moment = self.schedule.after(moment)
        if not times:
            return []
        if self.missed == "all":
            return [(time, 0) for time in times]
        fresh = now - times[-1] < 1.0
        if self.missed == "skip":
            return [(times[-1], 0)] if fresh else []
        return [(times[-1], len(times) - 1 + dropped)]


def timer_topic(group: str) -> str:
    """The topic on which a group's firings travel."""
    return f"stentor.timer.{group}"


class TimerDuty:
    """Publishes the firings of a group's timers; run by the owner of partition 0 of its timer topic."""

    def __init__(self, group: str, timers: Sequence[Timer]) -> None:
        self._group = group
        self._timers = timers

    async def __call__(self, duties: Duties) -> None:
        last: dict[str, float] = {}
        for timer in self._timers:
            value = await duties.read(f"timer/{timer.name}")
            if value is None:
                last[timer.name] = duties.clock.now()
                await duties.write(f"timer/{timer.name}", repr(last[timer.name]).encode())
            else:
                last[timer.name] = float(value)
        while True:
            now = duties.clock.now()
            for timer in self._timers:
                firings = timer.due(last[timer.name], now)
                if firings:
                    last[timer.name] = firings[-1][0]
                    outputs = [self._message(timer, scheduled, missed, now) for scheduled, missed in firings]
                    await duties.write(f"timer/{timer.name}", repr(last[timer.name]).encode(), outputs)
                elif timer.missed == "skip" and timer.schedule.after(last[timer.name]) <= now:
                    last[timer.name] = now
            nearest = min(timer.schedule.after(last[timer.name]) for timer in self._timers)
            await duties.clock.sleep_until(nearest)

    def _message(self, timer: Timer, scheduled: float, missed: int, now: float) -> Message:
        firing = Firing(
            at=datetime.fromtimestamp(now, UTC), scheduled=datetime.fromtimestamp(scheduled, UTC), missed=missed
        )
        return Message(
            id=f"{self._group}/{timer.name}@{iso(scheduled)}", source=f"/{self._group}", type=f"{FIRING}.{timer.name}",
            topic=timer_topic(self._group), key=timer.name, data=msgspec.json.encode(firing), time=iso(scheduled),
            datacontenttype="application/json",
        )  # fmt: skip
