"""Bare SQLite as the floor of the sqlite rows: a log table, commits of many rows, and a writer thread.

The table has what any durable log of events needs (topic, key, type, time, headers, body), journal in WAL mode and
synchronous=FULL, so that a commit is on disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from benchmarks.order import PlainOrder, encode

RowValues = tuple[int, int, str, str, str, float, bytes, bytes]
Insert = Callable[[sqlite3.Connection, Sequence[RowValues]], None]

_INTO = "INSERT INTO event (topic_id, slot, id, key, type, ts, headers, body) VALUES "
_VALUES = "(?, ?, ?, ?, ?, ?, ?, ?)"
_LADDER = (100, 20, 5, 1)
_STATEMENTS = {size: _INTO + ", ".join([_VALUES] * size) for size in _LADDER}


def open_log(path: Path, *, wait: float = 30.0) -> sqlite3.Connection:
    """A connection to the log at ``path``, made if it is not there; transactions are explicit."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=wait)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(
        "CREATE TABLE IF NOT EXISTS event (seq INTEGER PRIMARY KEY AUTOINCREMENT, topic_id INTEGER, slot INTEGER,"
        " id TEXT, key TEXT, type TEXT, ts REAL, headers BLOB, body BLOB)"
    )
    db.execute("CREATE INDEX IF NOT EXISTS event_topic ON event (topic_id, seq)")
    return db


def row_of(order: PlainOrder, number: int) -> RowValues:
    """An order as a row of the log."""
    id = f"6ee04c1f0b77d6a3-{number:x}"
    return (1, number % 64, id, order.order_id, "bench.order", time.time(), b'{"source":"/bench"}', encode(order))


def insert_each(db: sqlite3.Connection, rows: Sequence[RowValues]) -> None:
    """Insert with executemany: a step, and a turn of the interpreter lock, for every row."""
    db.executemany(_INTO + _VALUES, rows)


def insert_many(db: sqlite3.Connection, rows: Sequence[RowValues]) -> None:
    """Insert up to a hundred rows a statement, which keeps the interpreter lock from changing hands at every row."""
    at = 0
    for size in _LADDER:
        while len(rows) - at >= size:
            db.execute(_STATEMENTS[size], tuple(chain.from_iterable(rows[at : at + size])))
            at += size


class Writer:
    """A bare writer thread: all rows that wait become one transaction, then their futures are resolved."""

    def __init__(self, db: sqlite3.Connection, insert: Insert) -> None:
        self._db = db
        self._insert = insert
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[RowValues, asyncio.Future[int]]] = []
        self._wake = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def publish(self, row: RowValues) -> asyncio.Future[int]:
        """A future of the row's number in the log, resolved when it is on disk."""
        future: asyncio.Future[int] = self._loop.create_future()
        self._waiting.append((row, future))
        self._wake.set()
        return future

    def close(self) -> None:
        self._stop = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            batch = self._waiting[:]
            del self._waiting[: len(batch)]
            if batch:
                self._db.execute("BEGIN IMMEDIATE")
                self._insert(self._db, [row for row, _ in batch])
                (last,) = self._db.execute("SELECT last_insert_rowid()").fetchone()
                self._db.execute("COMMIT")
                futures = [future for _, future in batch]
                self._loop.call_soon_threadsafe(self._resolve, futures, last - len(batch) + 1)
            elif self._stop:
                return

    @staticmethod
    def _resolve(futures: Sequence[asyncio.Future[int]], first: int) -> None:
        for number, future in enumerate(futures, first):
            future.set_result(number)
