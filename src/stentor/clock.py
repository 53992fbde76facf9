"""Time: durations as people write them, and the one clock that the rest of Stentor asks."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from stentor.errors import DefinitionError

Duration = str | timedelta
"""A length of time: ``"200ms"``, ``"30s"``, ``"5m"``, ``"12h"``, ``"30d"``, or a timedelta."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d|w)")


def seconds(duration: Duration, what: str = "duration") -> float:
    """The seconds in a duration such as ``"200ms"``, ``"1h30m"`` or a timedelta.

    Raises:
        DefinitionError: it is no duration, or negative; ``what`` names it in the message.
    """
    if isinstance(duration, timedelta):
        total = duration.total_seconds()
        if total < 0:
            raise DefinitionError(f"{what}: {duration!r} is negative")
        return total
    if isinstance(duration, str):
        text = duration.strip()
        parts = _DURATION.findall(text)
        if parts and "".join(number + unit for number, unit in parts) == text:
            return sum(float(number) * _UNITS[unit] for number, unit in parts)
    raise DefinitionError(f'{what}: {duration!r} is no duration; write "200ms", "30s", "5m", "30d" or a timedelta')


_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)/(s|m|h|d)")


def per_second(rate: str, what: str = "rate") -> float:
    """The events a second in a rate such as ``"100/s"``, ``"5/m"`` or ``"2.5/h"``.

    Raises:
        DefinitionError: it is no rate, or none may ever begin; ``what`` names it in the message.
    """
    found = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if found is None or not float(found[1]):
        raise DefinitionError(f'{what}: {rate!r} is no rate; write "100/s", "5/m" or "1000/h"')
    return float(found[1]) / _UNITS[found[2]]


def iso(timestamp: float) -> str:
    """RFC 3339 text, in UTC with microseconds, of seconds since the epoch."""
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def parse_iso(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time; raises ValueError when it is none or has no zone."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment.timestamp()


class Timer(Protocol):
    """What ``Clock.call_later`` returns."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Wall time and timers; the test harness has one that moves only when told to."""

    def now(self) -> float:
        """Wall time, seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        ...

    def call_later(self, delay: float, callback: Callable[[], Any]) -> Timer: ...

    async def sleep(self, delay: float) -> None: ...

    async def sleep_until(self, moment: float) -> None:
        """Returns once ``now()`` has reached ``moment``, also when the wall clock is set meanwhile."""
        ...

    async def pause(self, delay: float) -> None:
        """``sleep`` between rounds of housekeeping, of which a clock that jumps may leave out the superfluous ones."""
        ...

    def timeout(self, delay: float) -> AbstractAsyncContextManager[Any]:
        """Cancels its body after ``delay`` seconds and raises TimeoutError, as asyncio.timeout does."""
        ...


class SystemClock:
    """The machine's clock and the running event loop's timers."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[[], Any]) -> Timer:
        return asyncio.get_running_loop().call_later(delay, callback)

    async def sleep(self, delay: float) -> None:
        await asyncio.sleep(delay)

    async def sleep_until(self, moment: float) -> None:
        # In short steps: a wall clock that is set forward must not delay what is due by it.
        while (left := moment - time.time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left, 60.0))

    async def pause(self, delay: float) -> None:
        await asyncio.sleep(delay)

    def timeout(self, delay: float) -> AbstractAsyncContextManager[Any]:
        return asyncio.timeout(delay)
