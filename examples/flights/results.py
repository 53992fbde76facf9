"""The read model: one SQLite file whose numbers are exactly right, although events may come twice.

The broker hands over each event at least once: after a crash, what was handled but not yet acknowledged comes again.
So each transaction that changes a number also writes down which events are in it, in the same file:

* totals, whose events come in no order, note the number of every event that they count;
* the runs of an aircraft, whose events come in order, note the number of the last one;
* a weather report is a row of its own: writing it again changes nothing.

A repetition finds itself noted and is left out; a crash takes back the number and the note together.
"""

import json
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from examples.flights.events import Flight, FlightDeparted, WeatherReported
from examples.flights.figures import LATE, Delays, Figures

SCHEMA = """
CREATE TABLE IF NOT EXISTS counted (number INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS repeated (events INTEGER);
CREATE TABLE IF NOT EXISTS delays (
    carrier TEXT, origin TEXT, cancelled INTEGER, departures INTEGER, departure_minutes INTEGER, arrivals INTEGER,
    arrival_minutes INTEGER, PRIMARY KEY (carrier, origin)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS aircraft (
    tail TEXT PRIMARY KEY, run INTEGER, longest INTEGER, last INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS weather (number INTEGER PRIMARY KEY, origin TEXT, bad INTEGER);
"""
NOTE = "INSERT OR IGNORE INTO counted SELECT value FROM json_each(?) RETURNING number"
ADD = """
INSERT INTO delays VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    cancelled = cancelled + excluded.cancelled,
    departures = departures + excluded.departures, departure_minutes = departure_minutes + excluded.departure_minutes,
    arrivals = arrivals + excluded.arrivals, arrival_minutes = arrival_minutes + excluded.arrival_minutes
"""
EXTEND = """
INSERT INTO aircraft VALUES (:tail, :late, :late, :number) ON CONFLICT DO UPDATE SET
    run = (run + 1) * :late, longest = max(longest, (run + 1) * :late), last = :number
WHERE last < :number
"""


class Results:
    """The file. Its methods block, so they belong into sync handlers, which run in threads."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=60, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # what the broker has forgotten must survive a power cut here too
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        self._db.close()

    def count(self, flights: Sequence[Flight]) -> None:
        """Add flights to the totals of their carrier and airport, each once."""
        with self._lock, self._db as db:  # one transaction: committed at the end, rolled back by any error
            by_number = {flight.number: flight for flight in flights}  # an event may be in one batch twice
            fresh = [number for (number,) in db.execute(NOTE, [json.dumps(list(by_number))])]
            if repeated := len(flights) - len(fresh):
                db.execute("INSERT INTO repeated VALUES (?)", [repeated])
            sums: defaultdict[tuple[str, str], Delays] = defaultdict(Delays)
            for flight in map(by_number.__getitem__, fresh):
                sums[flight.carrier, flight.origin].count(flight)
            db.executemany(ADD, [(*place, *astuple(delays)) for place, delays in sums.items()])

    def extend_runs(self, departures: Sequence[FlightDeparted]) -> None:
        """Lengthen, or end, each aircraft's run of late departures. They must come in order for each aircraft."""
        with self._lock, self._db as db:
            db.executemany(EXTEND, [{"tail": d.tail, "late": d.delay > LATE, "number": d.number} for d in departures])

    def keep_weather(self, reports: Sequence[WeatherReported]) -> None:
        """Keep what the weather was when flights were cancelled."""
        with self._lock, self._db as db:
            db.executemany(
                "INSERT OR REPLACE INTO weather VALUES (?, ?, ?)", [(r.number, r.origin, r.bad) for r in reports]
            )

    @property
    def counted(self) -> int:
        """How many events are in the totals; cheap enough to be asked often."""
        return self._number("SELECT sum(cancelled + departures + arrivals) FROM delays")

    @property
    def asked(self) -> int:
        """How many cancelled flights have their weather."""
        return self._number("SELECT count(*) FROM weather")

    @property
    def repeated(self) -> int:
        """How many events came again and were left out of the totals."""
        return self._number("SELECT sum(events) FROM repeated")

    def _number(self, question: str) -> int:
        with self._lock:
            (found,) = self._db.execute(question).fetchone()
        return int(found or 0)

    def figures(self) -> Figures:
        """All figures as they are now."""
        with self._lock:
            asked, bad = self._db.execute("SELECT count(*), sum(bad) FROM weather").fetchone()
            return Figures(
                {
                    (carrier, origin): Delays(*sums)
                    for carrier, origin, *sums in self._db.execute("SELECT * FROM delays")
                },
                dict(self._db.execute("SELECT tail, longest FROM aircraft")),
                asked,
                bad or 0,
            )
