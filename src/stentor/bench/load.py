"""When events are published in a bench, and which: modelled by a rate, or recorded."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from stentor.capacity.times import arrivals, recorded
from stentor.catalog import Catalog
from stentor.errors import DefinitionError, InvalidEvent

KINDS = {"constant": 0.0, "poisson": 1.0, "bursts": 4.0}
"""The modelled loads, by the coefficient of variation of the gaps between their events."""


class Load(Struct, frozen=True, kw_only=True):
    """The times at which events are to be published, in seconds from the first, ascending."""

    name: str
    at: Sequence[float]
    kind: str = ""
    """One of KINDS; empty for a recorded one."""

    @property
    def rate(self) -> float:
        """λ: events a second."""
        return (len(self.at) - 1) / self.at[-1] if len(self.at) > 1 and self.at[-1] > 0 else 0.0

    def at_rate(self, rate: float, during: float) -> Load:
        """The same kind of load at another rate for ``during`` seconds; a recorded one is repeated to fill them.

        Raises:
            DefinitionError: There would be fewer than two events, or all at one time.
        """
        if self.kind:
            return modelled(self.kind, rate, during)
        if rate * during < 2 or not self.rate:
            raise DefinitionError(f"{self.name}: fewer than two events, or all at one time, at {rate:g}/s")
        factor = self.rate / rate
        length = len(self.at) / rate  # with the gap before it begins again
        at = [n * length + moment * factor for n in range(math.ceil(during / length)) for moment in self.at]
        return Load(name=self.name, at=at[: max(2, bisect_right(at, during))])


def modelled(kind: str, rate: float, during: float) -> Load:
    """A load of one of KINDS at ``rate`` events a second for ``during`` seconds, the same one every time.

    Raises:
        DefinitionError: There is no such kind, or it has fewer than two events.
    """
    if kind not in KINDS:
        raise DefinitionError(f"there is no load {kind!r}; take one of {', '.join(KINDS)}, or a file of recorded times")
    count = int(rate * during)
    if count < 2:
        raise DefinitionError(f"{rate:g} events/s for {during:g} s are {count} events; two are the least")
    at = arrivals(rate, [1.0], count, cv=KINDS[kind]).at
    factor = (count - 1) / rate / at[-1]  # so many in so long, not about: what a short load is off by is no backlog
    at = [moment * factor for moment in at]
    return Load(name=f"{kind} at {rate:,.6g}/s", at=at, kind=kind)


def trace(path: Path, speed: float = 1.0, *, gaps: bool = False) -> Load:
    """A recorded load, ``speed`` times as fast: CSV or JSON Lines with a ``time`` in each row, in order.

    Raises:
        DefinitionError: The file is not like that, or has a hole (unless ``gaps``); the message names the line and
            what is wrong with it.
    """
    times = recorded(path, service=False, gaps=gaps)
    name = f"{path.name} at {speed:g} times its speed" if speed != 1 else path.name
    return Load(name=name, at=[moment / speed for moment in times.at])


def recorded_events(path: Path, catalog: Catalog) -> list[Any]:
    """The events of a file: one JSON object a line with ``type`` and ``data``, as ``stentor tail --json`` prints them.

    Raises:
        DefinitionError: A line is no such event, or the app knows no event of its type.
    """
    found: list[Any] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DefinitionError(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = msgspec.json.decode(line, type=dict[str, Any])
            kind, data = row["type"], row["data"]
        except (msgspec.DecodeError, msgspec.ValidationError, KeyError) as error:
            raise DefinitionError(f"{where}: an event is an object with type and data ({error})") from None
        if catalog.find(kind) is None:
            raise DefinitionError(f"{where}: the app has no event of type {kind!r}")
        try:
            found.append(catalog.named(kind, data, None, None, None))
        except InvalidEvent as error:
            raise DefinitionError(f"{where}: {error}") from None
    if not found:
        raise DefinitionError(f"{path}: there is no event in it")
    return found
