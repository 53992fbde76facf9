"""The words that the engine and the server brokers share: what is stored, what is written, what is declared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

from stentor.brokers.track import Track
from stentor.errors import Unavailable
from stentor.message import Message, Partition

DUPLICATE = -1
"""What ``append`` answers for a message whose source and id are stored already."""


UNPLACED = -2
"""What ``append`` answers for a stored message where the server does not tell its offset (``features.placed``)."""


class ShutOut(Unavailable):
    """It is not known what became of a member's settlements, or others took over: it owns nothing any more."""


class Entry(NamedTuple):
    """A message ready to be appended; ``due`` is 0 unless the server is to hold it back."""

    topic: str
    partition: int
    body: bytes
    message: Message
    due: float = 0.0


class Stored(NamedTuple):
    """A message as a partition holds it: its offset and when it was stored, in seconds since the epoch."""

    offset: int
    time: float
    message: Message


class Write(Struct):
    """Changes of one space, carried out as one step if its entry ``fence[0]`` is ``fence[1]`` (None: is not there).

    A change to None removes an entry. ``outputs`` are appended in the same step; only where ``features.atomic``.
    """

    space: str
    fence: tuple[str, bytes | None]
    changes: dict[str, bytes | None]
    outputs: Sequence[Entry] = ()


class TopicRecord(Struct, frozen=True, array_like=True):
    """A declared topic: its name on the server (which a rename does not change), partitions, retention in seconds."""

    stored: str
    partitions: int
    retention: float | None = None


class GroupRecord(Struct, frozen=True, array_like=True):
    """A declared group; ``id`` names its spaces, ``touched`` is when a member was last seen (broadcast instances)."""

    id: str
    app: str
    topics: tuple[str, ...]
    single: bool = False
    expires: float = 0.0
    touched: float = 0.0


class Held:
    """A partition that a member owns."""

    __slots__ = ("fence", "marked", "name", "space", "stored", "track")

    def __init__(self, name: str, stored: str, space: str, track: Track, fence: bytes) -> None:
        self.name = name
        self.stored = stored
        """The topic's name on the server."""
        self.space = space
        self.track = track
        self.fence = fence
        self.marked: bytes | None = b"?"
        """The count of marks as of when they were last looked at."""

    @property
    def partition(self) -> Partition:
        return self.track.partition

    @property
    def index(self) -> int:
        return self.track.partition.index


class Reader(Protocol):
    """What a consumer reads its partitions with; it has a connection of its own."""

    def seek(self, held: Held, offset: int) -> None:
        """Read a partition from an offset on, from now."""
        ...

    def drop(self, held: Held) -> None:
        """Read a partition no more; what is buffered of it is not handed out."""
        ...

    async def read(self, limit: int, wait: float) -> Sequence[tuple[Held, int, Message]]:
        """Up to ``limit`` messages in order of their partitions, waiting up to ``wait`` seconds for the first.

        Cancelling it loses nothing. Raises Unavailable.
        """
        ...

    async def close(self) -> None: ...
