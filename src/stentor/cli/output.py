"""What reading commands print: aligned tables for people, JSON Lines for programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
import msgspec

from stentor.observe.text import span

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table

Row = Sequence[Any]


def is_terminal() -> bool:
    """Whether standard output is a terminal that a person looks at."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def print_json(value: Any) -> None:
    """One JSON object on a line of its own."""
    click.echo(msgspec.json.encode(value).decode())


def console(*, err: bool = False) -> Console:
    """A rich console: coloured and as wide as the terminal, or plain and as wide as its lines."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 10_000)


def make_table(columns: Sequence[str], rows: Iterable[Row]) -> Table:
    """An aligned table. A column name that begins with ">" is set flush right, one with "~" gives way when it is tight.

    Cells are texts, or pairs of a text and a style.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.lstrip(">~"),
            justify="right" if ">" in column else "left",
            no_wrap="~" not in column,
            overflow="ellipsis",
        )
    for row in rows:
        cells = []
        for cell in row:
            text, style = cell if isinstance(cell, tuple) else (cell, "")
            cells.append(Text(printable(str(text)), style=style, no_wrap=True, overflow="ellipsis"))
        table.add_row(*cells)
    return table


def print_table(columns: Sequence[str], rows: Sequence[Row], indent: str = "") -> None:
    """Print a table, see ``make_table``."""
    out = console()
    out.width -= len(indent)
    with out.capture() as capture:
        out.print(make_table(columns, rows))
    click.echo("\n".join(indent + line.rstrip() for line in capture.get().splitlines()))


def printable(text: str) -> str:
    """A text on one line without control characters, which could take over a terminal."""
    return "".join(char if char.isprintable() else "·" for char in " ".join(text.split()))


def ago(timestamp: float | None, now: float) -> str:
    """How long ago a time was, short."""
    return "-" if timestamp is None else f"{span(max(0.0, now - timestamp))} ago"


def size(count: int | None) -> str:
    """A number of bytes, short."""
    if count is None:
        return "-"
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def local(timestamp: float, *, day: bool = True) -> str:
    """A time in the local zone."""
    when = datetime.fromtimestamp(timestamp).astimezone()
    return when.strftime("%Y-%m-%d %H:%M:%S" if day else "%H:%M:%S.%f")[: None if day else 12]


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error while long work runs, only on a terminal; call it with the count so far."""
    if not sys.stderr.isatty() or (total is not None and total < 100):
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console(err=True), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def plural(count: int, word: str) -> str:
    """A number and its noun: 1 event, 2 events, 3,000 dead letters."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
