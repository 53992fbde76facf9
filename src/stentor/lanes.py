"""Lanes: one key's queue in a worker, and what the journal keeps of it.

The journal of a partition holds, by name:

- ``q/<offset>[~n]/<key>`` an event that left the log: it failed and waits for its retry, or waits behind one that did,
  or runs for long. ``~n`` tells redriven copies of one offset apart.
- ``a/<offset>[~n]`` starts of that event whose end nobody saw.
- ``p/<offset>[~n]`` the progress that a long handler recorded.
- ``k/<key>`` the key is held until the dead letter named there, after its offset, is redriven or dropped.
- ``d/<dead letter id>`` what became of a dead letter.
- ``m/...`` marks of outsiders.
- ``s/...`` positions of sources and timers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from stentor.message import Delivery, ErrorRecord, Message, Partition


class Parked(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event in the journal: how often it failed and how, and when it runs again (seconds since the epoch).

    ``waits`` marks an event of a newer version, which only a newer program can read; ``replay`` is its delivery's.
    """

    message: Message
    failures: int = 0
    errors: list[ErrorRecord] = []
    due: float = 0.0
    waits: bool = False
    replay: str = ""

    def encode(self) -> bytes:
        return _encode(self)


_encode = msgspec.msgpack.Encoder().encode
decode_parked = msgspec.msgpack.Decoder(Parked).decode


class Try:
    """What is known of earlier attempts of a delivery; a delivery without one is at its first, in the log."""

    __slots__ = ("errors", "failures", "fresh", "name", "started", "starts", "state", "stored")

    def __init__(self, name: str, *, stored: str = "", failures: int = 0, starts: int = 0, fresh: bool = False) -> None:
        self.name = name
        """``<offset>[~n]``"""
        self.stored = stored
        """Its ``q/`` name when it is in the journal, else empty."""
        self.failures = failures
        self.starts = starts
        self.fresh = fresh
        """It has never begun: as for what comes first from the log, its start is not recorded."""
        self.started = False
        """The running attempt's own start is recorded."""
        self.errors: list[ErrorRecord] = []
        self.state: bytes | None = None

    @property
    def before(self) -> int:
        """Attempts that ended, or of which nobody saw the end."""
        return self.failures + self.starts


class Lane:
    """The events of one key, one at a time.

    ``head`` runs or is next, ``rest`` waits in memory, ``stored`` behind it in the journal (names, in order). What a
    key has in the journal always precedes what it has unacked in the log: the next owner runs the journal's first.
    """

    __slots__ = ("busy", "due", "ending", "head", "held", "key", "loading", "rest", "share", "since", "stored")

    def __init__(self, share: Share, key: str | None, head: Delivery | None) -> None:
        self.share = share
        self.key = key
        self.head = head
        self.rest: deque[Delivery] | None = None
        self.stored: deque[str] | None = None
        self.busy = False
        """The head runs, or its outputs are not yet durable."""
        self.ending = False
        """The head has run; its outputs or its dead letter are on their way."""
        self.held = False
        """Nothing runs until a dead letter is redriven or dropped."""
        self.loading = False
        self.due = 0.0
        """When the first stored event runs again; 0: now."""
        self.since = 0.0
        """When the head began to run (monotonic)."""


class Share:
    """What a worker holds of one partition it owns."""

    __slots__ = ("anonymous", "duties", "flying", "fresh", "gone", "idle", "lanes", "partition", "running", "tries")

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.lanes: dict[str, Lane] = {}
        self.anonymous: set[Lane] = set()
        """Lanes of events without a key that are in the journal."""
        self.tries: dict[int, Try] = {}
        self.fresh: set[str] = set()
        """Names of stored events that have never begun: only what this owner has stored can be known so."""
        self.flying: set[int] = set()
        """Offsets of deliveries of the log that are not settled."""
        self.running = 0
        self.gone = False
        """Given up or lost: nothing more starts."""
        self.idle: asyncio.Future[None] | None = None
        """Resolved when nothing of it runs or waits for its settle."""
        self.duties: list[asyncio.Task[Any]] = []

    @property
    def inflight(self) -> int:
        """Deliveries of the log that are not settled."""
        return len(self.flying)


def stored_name(offset: int, suffix: str, key: str | None) -> str:
    """The journal name of a parked event."""
    return f"q/{offset:020d}{suffix}/{key}" if key is not None else f"q/{offset:020d}{suffix}"


def split_stored(name: str) -> tuple[str, str | None]:
    """``<offset>[~n]`` and the key of a ``q/`` name."""
    place, slash, key = name[2:].partition("/")
    return place, key if slash else None


def offset_of(place: str) -> int:
    """The offset in ``<offset>[~n]``."""
    return int(place[:20])


def insert_sorted(stored: deque[str] | None, names: Sequence[str]) -> deque[str]:
    """``stored`` with more names (in order themselves), in order of offset."""
    if not stored:
        return deque(names)
    if names and names[0] > stored[-1]:  # the usual case: later events of the key
        stored.extend(names)
        return stored
    return deque(sorted({*stored, *names}))
