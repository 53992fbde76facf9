"""The ledger: what handlers saw, one line an entry, appended by all processes to one file; and the audit of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

What = Literal["start", "end", "fail", "gone", "published"]


class Entry(Struct, omit_defaults=True):
    """One thing that happened: a handler began, ended or failed; a process is gone (killed or paused)."""

    what: What
    who: str
    key: str = ""
    n: int = 0
    id: str = ""
    attempt: int = 0


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode


class Ledger:
    """A file of entries; its order is that in which they happened, as each is one append."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def close(self) -> None:
        os.close(self._file)

    def write(self, entry: Entry) -> None:
        os.write(self._file, _encode(entry) + b"\n")

    def read(self, what: What | None = None) -> list[Entry]:
        lines = self.path.read_bytes().split(b"\n")[:-1]
        entries = [_decode(line) for line in lines]
        return entries if what is None else [entry for entry in entries if entry.what == what]

    def around(self, event: tuple[str, int], lines: int = 60) -> str:
        """What was written of the event's key before its first end, and of processes that went, one line each."""
        told: list[str] = []
        for entry in self.read():
            if entry.what == "gone" or entry.key == event[0]:
                told.append(f"{entry.who} {entry.what} {entry.key} {entry.n} attempt {entry.attempt}")
            if entry.what == "end" and (entry.key, entry.n) == event:
                break
        return "\n".join(told[-lines:])

    def audit(self, published: Iterable[tuple[str, int]], given_up: Collection[tuple[str, int]] = ()) -> Audit:
        """Compare what was handled with what was published (keys and numbers, in order)."""
        return audit(self.read(), published, given_up)


class Audit(Struct):
    """What a ledger says: the first three must be empty, duplicates are counted."""

    lost: list[tuple[str, int]]
    """Published, not given up, never handled to success."""
    disorder: list[tuple[str, int]]
    """Handled for the first time after a later one of the key."""
    overlaps: list[tuple[str, int]]
    """Begun, in a process that was never paused, while another of the key ran in such a one."""
    duplicates: int
    """Handled to success once more."""
    burnt: int
    """Begun at a later attempt than the first."""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.disorder or self.overlaps)


def audit(
    entries: Iterable[Entry], published: Iterable[tuple[str, int]], given_up: Collection[tuple[str, int]] = ()
) -> Audit:
    """The audit of some entries."""
    published = list(published)
    place = {event: index for index, event in enumerate(published)}
    ends: Counter[tuple[str, int]] = Counter()
    last: dict[str, int] = {}
    running: dict[str, str] = {}
    gone: set[str] = set()
    found = Audit([], [], [], 0, 0)
    for entry in entries:
        event = (entry.key, entry.n)
        if entry.what == "gone":
            gone.add(entry.who)
        elif entry.what == "start":
            # What a paused process begins before it notices that its lease is over is rule 4's stated exception.
            if entry.who not in gone:
                if entry.key in running and running[entry.key] not in gone:
                    found.overlaps.append(event)
                running[entry.key] = entry.who
            found.burnt += entry.attempt > 1
        elif entry.what in ("end", "fail"):
            if running.get(entry.key) == entry.who:
                del running[entry.key]
            if entry.what == "end":
                ends[event] += 1
                if ends[event] == 1:
                    if place[event] < last.get(entry.key, -1):
                        found.disorder.append(event)
                    last[entry.key] = max(place[event], last.get(entry.key, -1))
    found.lost = [event for event in published if not ends[event] and event not in given_up]
    found.duplicates = sum(count - 1 for count in ends.values() if count)
    return found
