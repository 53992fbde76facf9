"""Each service's own record of what it did, in a file of its own: no service looks into another's."""

import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SCHEMA = """
CREATE TABLE IF NOT EXISTS done (
    place INTEGER PRIMARY KEY AUTOINCREMENT, number INTEGER UNIQUE, customer TEXT, outcome TEXT,
    times INTEGER NOT NULL DEFAULT 1)
"""


class Done(NamedTuple):
    """What became of an order, and how often the service was told to do it."""

    number: int
    customer: str
    outcome: str
    times: int


class Books:
    """The orders that a service has dealt with, in the order in which it did; in $SHOP_FOLDER."""

    def __init__(self, service: str) -> None:
        folder = Path(os.environ.get("SHOP_FOLDER") or ROOT / ".data" / "shop")
        folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / f"{service}.db", isolation_level=None, timeout=30)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(SCHEMA)

    def write(self, number: int, customer: str, outcome: str) -> None:
        """Note an order; one that comes again (after a crash, say) keeps its place and is only counted."""
        self._db.execute(
            "INSERT INTO done (number, customer, outcome) VALUES (?, ?, ?) "
            "ON CONFLICT (number) DO UPDATE SET times = times + 1",
            (number, customer, outcome),
        )

    def count(self) -> int:
        """How many orders were dealt with."""
        (found,) = self._db.execute("SELECT count(*) FROM done").fetchone()
        return int(found)

    def read(self) -> list[Done]:
        """All of them, in their order."""
        rows = self._db.execute("SELECT number, customer, outcome, times FROM done ORDER BY place")
        return [Done(*row) for row in rows]

    def close(self) -> None:
        self._db.close()
