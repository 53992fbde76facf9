"""What is shown: bars on a terminal, plain lines elsewhere, and a summary at the end."""

import time
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.flights.figures import Delays, Figures

LINE = 5.0
"""Seconds between plain lines."""


class Screen:
    """Shows how far a run is, from the totals that it is told now and then; a context manager."""

    def __init__(self, console: Console, events: int, cancelled: int) -> None:
        self._console = console
        self._events = events
        self._begin = self._line = time.monotonic()
        self._first: int | None = None
        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[note]}"), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._published = self._bars.add_task("published", total=events, note="")
        self._counted = self._bars.add_task("counted", total=events, note="")
        self._weather = self._bars.add_task("weather", total=cancelled, note="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def show(self, *, published: int, counted: int, asked: int, retries: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = counted
        rate = (counted - self._first) / max(now - self._begin, 0.1)
        self._bars.update(self._published, completed=published)
        self._bars.update(self._counted, completed=counted, note=f"{rate:,.0f}/s")
        self._bars.update(self._weather, completed=asked, note=f"{retries:,} retries")
        if not self._console.is_terminal and now - self._line >= LINE:
            self._line = now
            self._console.print(
                f"{now - self._begin:4.0f} s: {published:,} of {self._events:,} events published, {counted:,} counted "
                f"({rate:,.0f}/s), weather of {asked:,} cancelled flights ({retries:,} retries)",
                soft_wrap=True,
            )


def show_summary(console: Console, found: Figures, expected: Figures) -> None:
    """Print the figures that the events gave, beside those of the plain pass."""
    rows = [
        ("flights", f"{found.total().flights:,}", f"{expected.total().flights:,}"),
        ("cancelled", f"{found.total().cancelled:,}", f"{expected.total().cancelled:,}"),
        ("departures", f"{found.total().departures:,}", f"{expected.total().departures:,}"),
        ("mean departure delay, min", *(f"{f.total().mean_departure:.3f}" for f in (found, expected))),
        ("arrivals", f"{found.total().arrivals:,}", f"{expected.total().arrivals:,}"),
        ("mean arrival delay, min", *(f"{f.total().mean_arrival:.3f}" for f in (found, expected))),
        ("aircraft", f"{len(found.longest):,}", f"{len(expected.longest):,}"),
        ("longest late run", *(f"{max(f.longest.values(), default=0)}" for f in (found, expected))),
        ("cancelled in bad weather", *(f"{f.bad:,} of {f.asked:,}" for f in (found, expected))),
    ]
    totals = _table("The year", "", "by events", "by a plain pass")
    for name, mine, plain in rows:
        totals.add_row(name, mine, plain, style=None if mine == plain else "bold red")
    console.print(totals)
    for title, places in (("Airline", found.by_carrier()), ("Airport", found.by_origin())):
        table = _table(None, title, "flights", "cancelled", "mean departure delay, min", "mean arrival delay, min")
        for name, delays in places:
            table.add_row(name, *_cells(delays))
        console.print(table)
    latest = sorted(found.longest.items(), key=lambda run: (-run[1], run[0]))[:5]
    console.print("Longest runs of late departures: " + ", ".join(f"{tail} {run}" for tail, run in latest))


def _cells(delays: Delays) -> list[str]:
    share = delays.cancelled / max(1, delays.flights)
    return [f"{delays.flights:,}", f"{share:.1%}", f"{delays.mean_departure:.1f}", f"{delays.mean_arrival:.1f}"]


def _table(title: str | None, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
