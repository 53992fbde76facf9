"""Curves as text: points of Braille, two by four in a character, on a logarithmic axis of times."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from stentor.observe.text import per_second, short_time

HEIGHT = 16
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bits of a Braille character, by column and row."""
_BRAILLE = 0x2800
_MARGIN = 9
"""Characters left of the axis."""


def chart(
    rates: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    uprights: Mapping[str, float],
    points: Mapping[str, tuple[float, float]],
    *,
    most: float,
    width: int,
    paint: Callable[[str, str], str] = lambda _, text: text,
) -> str:
    """Seconds over rates, from 0 to ``most`` events a second.

    ``uprights`` are rates and ``points`` places to mark, each by the one character that shows them. ``paint`` colours a
    text that belongs to one of the names.
    """
    columns = max(20, width - _MARGIN - 6)  # beside the axis and the curves' names
    values = [value for line in lines.values() for value in line]
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05
    flat = max(0.0, 0.8 - (high - low)) / 2  # what hardly differs is to look so
    low, high = low - flat, high + flat

    def across(rate: float) -> float:
        return rate / most * (columns - 0.5)

    def down(seconds: float) -> float:
        return (high - math.log10(seconds)) / (high - low) * HEIGHT

    cells = [[" "] * columns for _ in range(HEIGHT)]
    names: dict[int, str] = {}
    dots: dict[tuple[int, int], int] = {}
    for mark, rate in uprights.items():
        for row in cells:
            row[int(across(rate))] = mark
    for name, line in lines.items():
        for place, bits in _curve([across(rate) for rate in rates], [down(value) for value in line]).items():
            dots[place] = dots.get(place, 0) | bits  # with those of a curve that is there already
            cells[place[0]][place[1]] = paint(name, chr(_BRAILLE | dots[place]))
        end = int(down(line[-1]))
        free = [n for n in range(HEIGHT) if n not in names]
        names[min(free, key=lambda n: abs(n - end))] = paint(name, name)
    for mark, (rate, seconds) in points.items():
        cells[int(down(seconds))][int(across(rate))] = mark
    ticks = {int(down(value)): short_time(value) for value in _times(low, high)}
    rows = [
        f"{ticks.get(n, ''):>{_MARGIN - 2}} {'┤' if n in ticks else '│'}{''.join(row)} {names.get(n, '')}".rstrip()
        for n, row in enumerate(cells)
    ]
    return "\n".join([*rows, *_foot(most, columns)])


def _curve(xs: Sequence[float], ys: Sequence[float]) -> dict[tuple[int, int], int]:
    """The points of a line through these places, as bits by row and column."""
    found: dict[tuple[int, int], int] = {}
    before: int | None = None
    for x in range(math.ceil(xs[0] * 2), math.floor(xs[-1] * 2) + 1):
        n = min(bisect_right(xs, x / 2), len(xs) - 1)
        share = (x / 2 - xs[n - 1]) / (xs[n] - xs[n - 1])
        y = int((ys[n - 1] + share * (ys[n] - ys[n - 1])) * 4)
        last = y if before is None else before
        for point in range(min(y, last), max(y, last) + 1):
            place = (point // 4, x // 2)
            found[place] = found.get(place, 0) | _DOTS[x % 2][point % 4]
        before = y
    return found


def _times(low: float, high: float) -> list[float]:
    """Round times between two powers of ten; few, so that none is on the line of another."""
    found = [10.0**n * step for n in range(math.floor(low), math.ceil(high) + 1) for step in (1, 2, 5)]
    found = [value for value in found if low <= math.log10(value) <= high]
    return found if len(found) <= HEIGHT // 2 else [10.0**n for n in range(math.ceil(low), math.floor(high) + 1)]


def _foot(most: float, columns: int) -> list[str]:
    """The axis of rates, with round ones."""
    step = 10 ** math.floor(math.log10(most / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) <= 6)
    axis, names = ["─"] * columns, [" "] * (columns + _MARGIN)
    for n in range(math.floor(most / step) + 1):
        at = int(n * step / most * (columns - 0.5))
        axis[at] = "┬"
        text = per_second(n * step) if n else "0"
        begin = min(at - len(text) // 2 + (len(text) == 1), columns - len(text))
        names[_MARGIN + begin : _MARGIN + begin + len(text)] = text
    return [" " * (_MARGIN - 1) + "└" + "".join(axis), "".join(names).rstrip()]
