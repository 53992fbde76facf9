"""How far a forecast of arrivals is off, beside plain persistence: a year of flights of New York, hour by hour."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

from benchmarks.measure import Bar, Case, Figures, Results, Row
from examples.flights.record import Timeline, find_record
from stentor.capacity import binned, forecast_errors

WARM = 28 * 24
"""Hours that are learned before any is judged."""
AHEAD = {"5 min ahead": (300, 1), "1 h ahead": (3600, 1), "4 h ahead": (3600, 4), "24 h ahead": (3600, 24)}
"""Seconds of a bin, and how many bins; the first is what ``stentor scaler`` asks for."""


def arrivals(bin: int, bins: int, _: Path) -> Figures:
    """Mean absolute errors in events an hour; ``part`` is that of the forecast as a part of that of persistence."""
    times = (event.at.timestamp() for event in Timeline(find_record()).events())
    warm = WARM * 3600 // bin
    ours, theirs = forecast_errors(binned(times, bin), bins, warm=warm, zone=ZoneInfo("America/New_York"))
    return {"part": ours / theirs, "forecast": ours * 3600, "persistence": theirs * 3600}


def bars(results: Results) -> list[Bar]:
    return [Bar(f"of persistence, {name}", results.values(name, "part"), 1, at_least=False) for name in AHEAD]


ROW = Row(
    name="forecast",
    title="errors of a forecast of arrivals, beside plain persistence",
    cases=[
        Case(name, partial(arrivals, *what), note="flights of 2013, the first 28 days learned")
        for name, what in AHEAD.items()
    ],
    columns={"part": "of persistence", "forecast": "forecast, events/h", "persistence": "persistence, events/h"},
    base="1 h ahead",
    bars=bars,
)
