"""What log brokers share: the settled prefix of each partition, and the scan that hands its events out once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from stentor.message import Partition

SUSPECTS = 1024
"""After an owner died, so many events of a partition may have been started by it: a worker's window."""


class Track:
    """The place of a group in one owned partition.

    All offsets below ``prefix`` are settled, those in ``done`` too; ``next`` is the first not handed out. ``suspects``
    counts the deliveries that a dead owner may have begun, as far as ``known``, the log's end at the takeover.
    """

    __slots__ = (
        "done",
        "known",
        "moved",
        "next",
        "outstanding",
        "partition",
        "prefix",
        "replay",
        "replay_until",
        "suspects",
    )

    def __init__(
        self,
        partition: Partition,
        prefix: int,
        done: Iterable[int] = (),
        *,
        known: int = 0,
        replay: str = "",
        replay_until: int = 0,
    ) -> None:
        self.partition = partition
        self.prefix = prefix
        self.done = set(done)
        self.next = prefix
        self.outstanding: deque[int] = deque()
        self.moved = False
        """Something was settled since the place was last stored."""
        self.known = known
        self.suspects = 0 if partition.clean else SUSPECTS
        self.replay = replay
        self.replay_until = replay_until

    def take(self, offset: int) -> bool:
        """Hand out an offset; False if it was handed out or settled before."""
        if offset < self.next:
            return False
        self.next = offset + 1
        self.outstanding.append(offset)
        if self.done and offset in self.done:
            self._advance()
            return False
        return True

    def seen(self, offset: int) -> bool:
        """Whether a dead owner may have begun this delivery."""
        if self.suspects == 0:
            return False
        self.suspects -= 1
        return offset < self.known

    def settle(self, offset: int) -> None:
        """Note that an offset is done; repeating it changes nothing."""
        if offset < self.prefix:
            return
        self.moved = True
        outstanding = self.outstanding
        if outstanding and outstanding[0] == offset:
            outstanding.popleft()
            if outstanding:
                if self.done:
                    self._advance()
                else:
                    self.prefix = outstanding[0]
            else:
                self.prefix = self.next
                if self.done:  # what an earlier owner did further on, and nothing that the log has lost
                    self.done = {done for done in self.done if done >= self.next}
        else:
            self.done.add(offset)

    def with_settled(self, offsets: Iterable[int]) -> tuple[int, set[int]]:
        """The prefix, and what is done behind it, if these were settled, too."""
        done = self.done.union(offsets)
        prefix = next((offset for offset in self.outstanding if offset not in done), self.next)
        return prefix, {offset for offset in done if offset >= prefix}

    def _advance(self) -> None:
        outstanding, done = self.outstanding, self.done
        while outstanding and outstanding[0] in done:
            done.discard(outstanding.popleft())
        prefix = outstanding[0] if outstanding else self.next
        if prefix != self.prefix:
            self.prefix = prefix
            self.moved = True


def quota(members: list[str], me: str, count: int, *, single: bool = False) -> int:
    """How many of ``count`` partitions a member should own: an equal share, the rest to the first by name."""
    ranked = sorted(members)
    rank = ranked.index(me)
    if single:
        return count if rank == 0 else 0
    return count // len(ranked) + (1 if rank < count % len(ranked) else 0)
