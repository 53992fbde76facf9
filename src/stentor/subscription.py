"""What a broker must know of a group, and how keys spread over partitions."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Ordering = Literal["key", "none"]
Start = Literal["earliest", "latest"]


class Subscription(Struct, frozen=True, kw_only=True):
    """A group as the broker sees it: its name, the topics it reads, and where it starts.

    ``instance`` names one running instance of a broadcast group, whose place outlives a cut by ``expires`` seconds.
    """

    group: str
    topics: tuple[str, ...]
    app: str = ""
    ordering: Ordering = "key"
    start: Start = "earliest"
    single: bool = False
    """One member owns everything, the others stand by."""
    instance: str = ""
    expires: float = 600.0

    @property
    def name(self) -> str:
        """The name under which the broker keeps the group's place."""
        return f"{self.group}#{self.instance}" if self.instance else self.group


def murmur2(data: bytes) -> int:
    """The 32-bit MurmurHash2 that Kafka's partitioner uses (seed 0x9747b28c), as a non-negative 31-bit number.

    Source: Austin Appleby's MurmurHash2, public domain; seed and sign mask as in Kafka's Utils.murmur2/toPositive.
    """
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    length = len(data)
    h = (0x9747B28C ^ length) & mask
    whole = length & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = h * m & mask ^ k
    if length > whole:
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return (h ^ h >> 15) & 0x7FFFFFFF


class Slots:
    """The partition of each key: ``murmur2(key) % count``; keys seen lately are remembered, as hashing is slow here."""

    __slots__ = ("_known", "_next", "count")
    LIMIT = 200_000

    def __init__(self, count: int) -> None:
        self.count = count
        self._known: dict[str, int] = {}
        self._next = 0

    def of(self, key: str | None) -> int:
        """The partition of ``key``; events without one take turns."""
        if key is None:
            self._next = (self._next + 1) % self.count
            return self._next
        slot = self._known.get(key)
        if slot is None:
            if len(self._known) >= self.LIMIT:
                self._known.clear()
            slot = self._known[key] = murmur2(key.encode("utf-8", "surrogatepass")) % self.count
        return slot
