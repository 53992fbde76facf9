"""When events come and how long they take: recorded ones, or modelled by mean and variation."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, fmean, pstdev
from typing import Any

from msgspec import Struct

from stentor.clock import parse_iso
from stentor.errors import DefinitionError
from stentor.observe.text import short_time, span

POINTS = 1000
FEW = 20
"""Events of which no gap is called a hole."""
_METRICS = re.compile(r"#\s*(HELP|TYPE|UNIT|EOF)\b|[a-zA-Z_:][\w:]*(\{.*\})? +[-+\d.NI]")
"""A line of the text that /metrics serves."""
_normal = NormalDist().inv_cdf


class Times(Struct, frozen=True, kw_only=True):
    """Events in order of arrival: seconds since the first one, seconds of service, and their keys if known."""

    at: Sequence[float]
    service: Sequence[float]
    keys: Sequence[str | None] = ()

    @property
    def rate(self) -> float:
        """λ: arrivals a second."""
        return (len(self.at) - 1) / self.at[-1] if len(self.at) > 1 and self.at[-1] > 0 else 0.0

    @property
    def arrival_cv(self) -> float:
        """The coefficient of variation of the gaps between arrivals: 0 for a clock, 1 for Poisson, more for bursts."""
        gaps = [later - earlier for earlier, later in zip(self.at, self.at[1:], strict=False)]
        return pstdev(gaps) / fmean(gaps) if gaps and self.at[-1] > 0 else 0.0

    @property
    def hottest(self) -> float:
        """The share of the events that have the commonest key; 0 without keys."""
        counts: dict[str, int] = {}
        for key in self.keys:
            if key is not None:
                counts[key] = counts.get(key, 0) + 1
        return max(counts.values(), default=0) / len(self.at)


def fitted(mean: float, cv: float, count: int = POINTS) -> list[float]:
    """``count`` equally likely durations, ascending, with this mean in seconds and coefficient of variation.

    Up to a cv of 1 a gamma distribution (its quantiles by Wilson and Hilferty, 1931; at 1 the exponential, exactly),
    above it two exponentials with balanced means: the usual fits to two moments (Whitt, 1982).

    Raises:
        DefinitionError: The mean is not positive, or the cv is negative.
    """
    if not (mean > 0 and cv >= 0 and math.isfinite(mean + cv)):
        raise DefinitionError(f"a service time needs a mean above 0 and a cv of 0 or more, not {mean} and {cv}")
    chances = [(n + 0.5) / count for n in range(count)]
    if cv == 0:
        return [mean] * count
    if cv == 1:
        found = [-math.log1p(-p) for p in chances]
    elif cv < 1:
        shape = 1 / cv**2
        found = [max(1e-3, 1 - 1 / (9 * shape) + _normal(p) / (3 * math.sqrt(shape))) ** 3 for p in chances]
    else:
        quick = (1 + math.sqrt((cv**2 - 1) / (cv**2 + 1))) / 2
        rates = (2 * quick, 2 * (1 - quick))
        found = [_mixed(p, quick, rates) for p in chances]
    scale = mean / fmean(found)
    return [value * scale for value in found]


def _mixed(chance: float, quick: float, rates: tuple[float, float]) -> float:
    """The quantile of a mixture of two exponentials, by bisection."""
    low, high = 0.0, -math.log1p(-chance) / min(rates)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if 1 - quick * math.exp(-rates[0] * middle) - (1 - quick) * math.exp(-rates[1] * middle) < chance:
            low = middle
        else:
            high = middle
    return high


def arrivals(rate: float, service: Sequence[float], count: int, *, cv: float = 1.0, hot: float = 0.0) -> Times:
    """``count`` modelled events at ``rate`` a second whose gaps vary by ``cv``; the same ones every time.

    ``hot`` is the share of events that have one and the same key; the others have keys of their own.

    Raises:
        DefinitionError: The rate is not positive.
    """
    if not rate > 0:
        raise DefinitionError(f"an arrival rate has to be above 0, not {rate}")
    chance = random.Random(42)  # noqa: S311  a model, and it is to say the same twice
    gaps = [1 / rate] * count
    if cv == 1:
        gaps = [chance.expovariate(rate) for _ in range(count)]
    elif cv > 0:
        gaps = chance.choices(fitted(1 / rate, cv), k=count)
    at, now = [], 0.0
    for gap in gaps:
        at.append(now)
        now += gap
    keys = ["hot" if chance.random() < hot else None for _ in range(count)] if hot else []
    return Times(at=at, service=chance.choices(service, k=count), keys=keys)


def recorded(path: Path, *, service: bool = True, gaps: bool = False) -> Times:
    """Events from a file: CSV with a heading, or JSON Lines, with ``time``, ``service`` in seconds, and ``key`` or not.

    ``time`` is in seconds since any moment, or RFC 3339. Rows are in order of time. ``service=False`` asks for no
    service times, and gives none. A hole in it, such as a recorder leaves that was off, would make every figure wrong,
    and is refused; ``gaps=True`` takes it.

    Raises:
        DefinitionError: The file is not like that, or has a hole; the message names the line and what is wrong with it.
    """
    at: list[float] = []
    services: list[float] = []
    keys: list[str | None] = []
    lines: list[int] = []
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        now = _number(row, "time", where)
        if service:
            took = _number(row, "service", where)
            if took <= 0:
                raise DefinitionError(f"{where}: a service time has to be above 0, not {took:g}")
            services.append(took)
        if at and now < at[-1]:
            raise DefinitionError(f"{where}: the time goes back from {at[-1]:g} to {now:g}; sort the file by time")
        at.append(now)
        lines.append(line)
        keys.append(str(row["key"]) if row.get("key") not in (None, "") else None)
    if len(at) < 2:
        raise DefinitionError(f"{path}: {len(at)} events are too few; a rate needs two at least")
    if at[-1] == at[0]:
        raise DefinitionError(f"{path}: all events have the same time, so there is no rate")
    hole = None if gaps else _hole(at)
    if hole is not None:
        after, usual = hole
        long = span(at[after] - at[after - 1])
        raise DefinitionError(
            f"{path}, line {lines[after]}: nothing comes for {long} before it, where else an event "
            f"comes every {short_time(usual)}; cut the file there, or keep it with --keep-gaps"
        )
    return Times(at=[now - at[0] for now in at], service=services, keys=keys if any(keys) else ())


def _hole(at: Sequence[float]) -> tuple[int, float] | None:
    """The event before which nothing came for longer than bunches and nights explain, and the usual gap."""
    if len(at) < FEW:
        return None
    gaps = [later - earlier for earlier, later in pairwise(at)]
    long, whole = max(gaps), at[-1] - at[0]
    usual = fmean([gap for gap in gaps if gap <= whole / 10] or [0.0])  # a second hole is not usual either
    found = (long > whole / 2 and long > 20 * usual) or (long > whole / 10 and long > 1000 * usual)
    return (gaps.index(long) + 1, usual) if found else None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DefinitionError(f"{path}: {error}") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        why = f"no JSON: {error.msg}"
        if _METRICS.match(line):
            why = "it looks like metrics of Prometheus, without single events; give the --url of a running program"
        raise DefinitionError(
            f"{where}: {why}; a file of events is CSV (named .csv) or has a JSON object a line, each with a time"
        ) from None
    if not isinstance(found, dict):
        raise DefinitionError(f"{where}: a JSON object is wanted")
    return found


def _number(row: dict[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if value in (None, ""):
        raise DefinitionError(f"{where}: there is no {name!r}, which each event needs")
    try:
        found = float(value)
    except (TypeError, ValueError):
        try:
            found = parse_iso(str(value)) if name == "time" else math.nan
        except ValueError:
            found = math.nan
    if not math.isfinite(found) or found < 0:
        raise DefinitionError(f"{where}: {name} is {value!r}; it has to be a number of seconds that is not negative")
    return found
