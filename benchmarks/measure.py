"""How the benchmarks measure: each case in a process of its own, rounds interleaved (A B C A B C ...), medians.

A case is a function of the row's folder that returns its figures. Ratios are taken within a round, because two cases of
one round saw the same machine; their median counts. Absolute figures of two runs say little about each other.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Figures = Mapping[str, float]
LIMIT = 120
"""Seconds that a round of one case may take."""

_spawn = multiprocessing.get_context("spawn")
_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


# ---- what a row of the table consists of ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One line of a row's table; ``requires`` is what to install for it, ``note`` says what it does."""

    name: str
    run: Callable[[Path], Figures]
    requires: str = ""
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A figure to reach by the median of ``values``, one a round; none when a case that it needs did not run."""

    text: str
    values: Sequence[float]
    limit: float
    at_least: bool

    @property
    def verdict(self) -> str:
        if not self.values:
            return "NOT MEASURED"
        value = statistics.median(self.values)
        holds = value >= self.limit if self.at_least else value <= self.limit
        return "PASS" if holds else "FALLS SHORT"

    def __str__(self) -> str:
        bound = f"{'at least' if self.at_least else 'at most'} {number(self.limit)}"
        return f"{self.verdict:12}  {self.text}: {bound}, measured {spread(self.values)}"


@dataclass(frozen=True)
class Row:
    """One row of the table of figures: its cases, the columns they fill, and the bars.

    The first column is compared with that of the case ``base``. ``prepare`` runs once, before the first round.
    """

    name: str
    title: str
    cases: Sequence[Case]
    columns: Mapping[str, str]
    base: str
    bars: Callable[[Results], list[Bar]]
    prepare: Callable[[Path], Figures] | None = None


@dataclass
class Results:
    """The figures of every round by case, and why a case has none."""

    rounds: dict[str, list[Figures]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def values(self, case: str, key: str) -> list[float]:
        return [figures[key] for figures in self.rounds.get(case, ()) if key in figures]

    def ratios(self, case: str, other: str, key: str, other_key: str = "") -> list[float]:
        """One case's figure divided by another's, round by round."""
        pairs = zip(self.values(case, key), self.values(other, other_key or key), strict=False)
        return [one / two for one, two in pairs if two]


# ---- processes -----------------------------------------------------------------------------------------------------


def pin(core: int) -> None:
    """Stay on one core, where the system lets a process choose."""
    if _cores:
        os.sched_setaffinity(0, {_cores[core % len(_cores)]})


def _quiet() -> None:
    """What every measured process begins with: its end if it hangs, and no log lines."""
    signal.alarm(LIMIT)
    logging.disable(logging.CRITICAL)


def _round(link: Connection, run: Callable[[Path], Figures], folder: Path) -> None:
    _quiet()
    try:
        link.send((dict(run(folder)), ""))
    except ModuleNotFoundError as error:
        link.send((None, f"no module {error.name}"))
    except BaseException:
        text = traceback.format_exc()
        print(text, file=sys.stderr)
        link.send((None, "failed: " + text.strip().splitlines()[-1]))


def in_process(run: Callable[[Path], Figures], folder: Path) -> tuple[Figures | None, str]:
    """The figures of a function run in a fresh process, else why there are none."""
    ours, theirs = _spawn.Pipe()
    process = _spawn.Process(target=_round, args=(theirs, run, folder))
    process.start()
    theirs.close()
    try:
        found: tuple[Figures | None, str] = ours.recv()
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGALRM
        found = None, f"failed: not done after {LIMIT} s" if late else f"failed: exit code {process.exitcode}"
    process.join()
    return found


def _side(link: Connection, core: int, function: Callable[..., Any], args: Sequence[Any]) -> None:
    _quiet()
    pin(core)
    try:
        function(link, *args)
    except BaseException:
        link.send(RuntimeError(traceback.format_exc()))
        raise


class Side:
    """Another process of a case, on a core of its own: ``function(link, *args)``; start it before calling ``pin``."""

    def __init__(self, core: int, function: Callable[..., Any], *args: Any) -> None:
        self.link, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_side, args=(theirs, core, function, args), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> Any:
        """What the other side sends next; raises what it failed with."""
        found = self.link.recv()
        if isinstance(found, RuntimeError):
            raise found
        return found

    def join(self) -> None:
        self._process.join()


def resident(pid: int | None = None) -> float:
    """The resident memory of a process in MiB."""
    pid = pid or os.getpid()
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        found = re.search(r"VmRSS:\s+(\d+)", status.read_text())
        return int(found[1]) / 1024 if found else 0.0
    asked = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(asked.stdout) / 1024


# ---- time and files ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """A stopwatch: the yielded function gives the seconds until the block ended, or until now inside it."""
    start = time.perf_counter()
    end = 0.0
    try:
        yield lambda: (end or time.perf_counter()) - start
    finally:
        end = time.perf_counter()


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def fresh(folder: Path, name: str) -> Path:
    """A path in the row's folder at which nothing is left from an earlier round."""
    for path in folder.glob(f"{name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / name


def fsync_p50(folder: Path) -> float:
    """Microseconds that appending a page and fdatasync take."""
    sync = getattr(os, "fdatasync", os.fsync)
    taken = []
    with (folder / "fsync").open("wb", buffering=0) as file:
        for _ in range(200):
            start = time.perf_counter()
            file.write(b"x" * 4096)
            sync(file.fileno())
            taken.append((time.perf_counter() - start) * 1e6)
    (folder / "fsync").unlink()
    return statistics.median(taken)


def machine(folder: Path) -> dict[str, Any]:
    """What the figures depend on."""
    kind = ""
    mounts = Path("/proc/mounts")
    if mounts.exists():
        entries = [line.split()[1:3] for line in mounts.read_text().splitlines()]
        above = [entry for entry in entries if folder.resolve().is_relative_to(entry[0])]
        kind = max(above, key=lambda entry: len(entry[0]))[1]
    return {
        "cores": len(_cores) or os.cpu_count(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "file_system": kind or "unknown",
        "fsync_p50_us": round(fsync_p50(folder)),
    }


# ---- running and printing ------------------------------------------------------------------------------------------


def run(row: Row, rounds: int, folder: Path) -> Results:
    """Run a row's cases in turn, ``rounds`` times; a case that cannot run is left out from then on."""
    results = Results()
    if row.prepare is not None:
        _progress(f"{row.name}: preparing")
        done, why = in_process(row.prepare, folder)
        if done is None:
            results.missing = {case.name: why for case in row.cases}
            return results
    for turn in range(1, rounds + 1):
        for case in row.cases:
            if case.name in results.missing:
                continue
            _progress(f"{row.name}: round {turn} of {rounds}, {case.name}")
            figures, why = in_process(case.run, folder)
            _note(row, turn, case, figures, why)
            if figures is not None:
                results.rounds.setdefault(case.name, []).append(figures)
            elif why.startswith("no module") and case.requires:
                results.missing[case.name] = f"not installed: pip install {case.requires!r}"
            else:
                results.missing[case.name] = why
    _progress("")
    return results


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _note(row: Row, turn: int, case: Case, figures: Figures | None, why: str) -> None:
    """Where nobody watches: what a long run has found by now, should it not come to its end."""
    if not sys.stderr.isatty():
        found = why or ", ".join(f"{name} {number(value)}" for name, value in (figures or {}).items())
        print(f"{row.name}, round {turn}, {case.name}: {found}", file=sys.stderr, flush=True)


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Median and, where there are several values, min..max."""
    if not values:
        return "-"
    text = number(statistics.median(values))
    return f"{text} ({number(min(values))}..{number(max(values))})" if len(values) > 1 else text


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def table(row: Row, results: Results) -> str:
    """A row's cases as lines: figures, the ratio of the first one to the base case, notes."""
    first = next(iter(row.columns))
    lines = [["", *row.columns.values(), f"ratio to {row.base}", ""]]
    for case in row.cases:
        if case.name in results.missing:
            lines.append([case.name, results.missing[case.name]])
            continue
        figures = [spread(results.values(case.name, key)) for key in row.columns]
        ratio = _median(results.ratios(case.name, row.base, first))
        lines.append([case.name, *figures, "-" if ratio is None else number(ratio), case.note])
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[at]) for line in full) for at in range(len(lines[0]))]
    widths[0] = max(len(line[0]) for line in lines)
    text = []
    for line in lines:
        if line in full:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
            text.append("  ".join([*cells, line[-1]]).rstrip())
        else:
            text.append("  ".join([line[0].ljust(widths[0]), line[1]]))
    return "\n".join(text)


def as_json(row: Row, results: Results, bars: Sequence[Bar]) -> dict[str, Any]:
    """A row's results for a machine: every round's figures, medians, ratios and verdicts."""
    first = next(iter(row.columns))
    return {
        "name": row.name,
        "title": row.title,
        "cases": [
            {
                "name": case.name,
                "error": results.missing.get(case.name),
                "rounds": [dict(figures) for figures in results.rounds.get(case.name, ())],
                "medians": {key: _median(results.values(case.name, key)) for key in row.columns},
                "ratio": _median(results.ratios(case.name, row.base, first)),
            }
            for case in row.cases
        ],
        "bars": [
            {
                "text": bar.text,
                "value": _median(bar.values),
                "limit": bar.limit,
                "at_least": bar.at_least,
                "verdict": bar.verdict,
            }
            for bar in bars
        ],
    }
