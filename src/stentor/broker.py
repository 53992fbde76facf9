"""The contract between Stentor and a message queue: read this first when writing a broker.

A broker is a log of messages per topic, split into partitions by key. A group reads every topic it subscribes to;
each of its partitions has one owner at a time, fenced by an epoch. Beside the log, each group x partition has a
journal: a small durable map of names to bytes that only the owner writes (marks excepted, which outsiders leave for
the owner).
Retry, delay between attempts, dead letters, redrive and cron are built on these by the worker, once for all brokers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from typing import Literal, Protocol

from msgspec import Struct

from stentor.event import Topic
from stentor.message import Delivery, Failure, Lag, Mark, Message, Partition, Receipt, Settlement
from stentor.subscription import Subscription

Durable = Literal["process", "host", "replica"]
"""What a confirmed event survives: nothing but the process itself, the host's crash, or the loss of a replica."""

FETCH_BYTES = 16 * 1024 * 1024
"""A fetch hands out nothing more once its deliveries have reached so many bytes of data."""

Verdict = Literal["ok", "warn", "fail"]

Start = Literal["earliest", "latest"] | datetime | int
"""A place in a topic: its ends, a time, or an offset (the first one wanted)."""


class Features(Struct, frozen=True, kw_only=True):
    """What a broker states of itself; each False is refused with ``Unsupported`` when a program asks for it."""

    name: str
    durable: Durable
    shared: bool
    """Other processes see the same topics and groups."""
    atomic: bool
    """A settlement's outputs, records and ack happen together; else in this order."""
    dedupe: bool
    """A second publish of the same source and id within the window is not stored."""
    replay: bool
    cancel: bool
    browse: bool
    restart: bool = True
    """Its content outlives a restart of the broker."""
    placed: bool = True
    """Receipts say the position; else it is None, and only browsing tells."""
    one_order: bool = True
    """Positions of a topic are all comparable; else only those of one of its partitions."""
    max_bytes: int = 8 * 1024 * 1024
    """The largest message: attributes and data together."""


class Finding(Struct, frozen=True):
    """One thing that was looked at, what was found, and what to do about it."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


class Owner(Protocol):
    """The worker's side of ownership; a consumer calls it."""

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        """These are owned now; nothing of them is fetched before this returns."""
        ...

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        """Give these up: returns when what runs of them has ended and is settled."""
        ...

    def lost(self, partitions: Sequence[Partition]) -> None:
        """These are gone without warning: whatever is settled for them is refused."""
        ...


class Consumer(Protocol):
    """One group's member in this process."""

    @property
    def until(self) -> float:
        """By ``time.monotonic``: what is owned now is nobody else's before. Past it nothing begins until ``sure``."""
        ...

    async def sure(self) -> None:
        """Back when it is known again what is owned, and what is not was lost. Cancelling it is safe."""
        ...

    async def start(self) -> None:
        """Join the group: from now on partitions are assigned."""
        ...

    async def fetch(self, limit: int, wait: float) -> Sequence[Delivery]:
        """Up to ``limit`` further deliveries, of FETCH_BYTES together, waiting up to ``wait`` seconds for the first.

        The unsettled events of a partition come in publish order, each once per ownership; after a takeover those that
        the last owner left unsettled come first. Cancelling it loses nothing.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Failure]:
        """Carry out settlements, in order; each as a whole or not at all, and returned as a Failure if not.

        Outputs and records are durable no later than the ack; of a failed one nothing is stored where
        ``features.atomic``, elsewhere outputs may be, and their derived ids make a repetition safe. A partition that is
        no longer owned fails with LeaseLost.
        Raises ``Unavailable`` when nothing is known to be done; settling again is then safe.
        """
        ...

    async def names(self, partition: Partition) -> list[str]:
        """The names in the partition's journal, marks excepted, sorted."""
        ...

    async def read(self, partition: Partition, names: Sequence[str]) -> dict[str, bytes]:
        """Values from the journal; names that are not there are left out."""
        ...

    async def marks(self) -> Sequence[Mark]:
        """Marks that outsiders left for the owned partitions; removed by a record of None under their name."""
        ...

    async def close(self) -> None:
        """Give back what is owned, in order, at no attempt."""
        ...


class GroupInfo(Struct, frozen=True):
    """A declared group: its name, the app that declared it, its topics and the members alive now."""

    name: str
    app: str
    topics: tuple[str, ...]
    members: int


class TopicInfo(Struct, frozen=True):
    """A declared topic: events held, bytes held (None where unknown), and the times of the oldest and newest."""

    name: str
    events: int
    bytes: int | None
    oldest: float | None
    newest: float | None


class Admin(Protocol):
    """What operators ask of a broker; nothing here needs a running worker."""

    async def topics(self) -> list[TopicInfo]: ...

    async def groups(self) -> list[GroupInfo]: ...

    async def lag(self) -> list[Lag]: ...

    async def rename_group(self, old: str, new: str) -> None:
        """Raises UnknownGroup, or BrokerError when ``new`` exists."""
        ...

    async def drop_group(self, name: str) -> None:
        """Forget a group, its place and its journal; its dead letters stay. Raises UnknownGroup."""
        ...

    async def replay(self, group: str, start: Start, topics: Sequence[str] = ()) -> int:
        """Set a group back (or forward) to ``start``; returns how many events it will see again."""
        ...

    async def cancel(self, id: str) -> bool:
        """Drop a delayed event that has not fallen due; False if there is none."""
        ...

    async def delayed(self) -> list[Message]:
        """The events that wait for their ``due``, the next one first; those that just fall due may be among them.

        Raises Unsupported where the server cannot list them.
        """
        ...

    async def journal(self, group: str, topic: str, partition: int, prefix: str) -> dict[str, bytes]:
        """A partition's journal as an outsider reads it: the names that start with ``prefix``, marks included."""
        ...

    async def mark(self, group: str, topic: str, partition: int, name: str, value: bytes) -> None:
        """Leave a mark for the owner of a partition; returns when it is durable."""
        ...


class Broker(Protocol):
    """A message queue. Its constructor takes a BrokerUrl and a Clock, and connects to nothing."""

    features: Features

    @property
    def admin(self) -> Admin: ...

    async def open(self) -> None:
        """Connect. Raises AuthenticationFailed, StorageUnusable or Unavailable."""
        ...

    async def close(self) -> None: ...

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        """Make topics and groups, with the groups' start positions, where they are not there yet."""
        ...

    async def publish(self, messages: Sequence[Message]) -> Sequence[Receipt]:
        """Store messages durably, in order per key; those with ``due`` appear when it has come.

        All or none where ``features.atomic``. Elsewhere PublishUnknown names those that are not known to be stored, and
        no message of a key is sent before the one ahead of it is confirmed, so that none can be overtaken.
        Raises UnknownTopic, TooLarge, StorageFull, Unavailable (not stored), PublishUnknown (maybe stored).
        """
        ...

    async def subscribe(self, subscription: Subscription, owner: Owner) -> Consumer:
        """A consumer for a declared group, not yet a member. Raises UnknownGroup."""
        ...

    def browse(self, topic: str, start: Start, *, follow: bool) -> AsyncIterator[tuple[int, Message]]:
        """Messages of a topic with their offsets, without a group; ``follow`` goes on waiting for new ones."""
        ...

    async def health(self) -> str | None:
        """None when all is well, else one line that says what is not."""
        ...

    async def review(self) -> list[Finding]:
        """What the server's settings, its room and its clock mean for what the broker promises.

        Raises Unavailable.
        """
        ...


_LEVEL: dict[Durable, int] = {"process": 0, "host": 1, "replica": 2}


def weakest(levels: Iterable[Durable]) -> Durable:
    """The lowest of some durability levels."""
    return min(levels, key=_LEVEL.__getitem__)


def weaker(has: Durable, wants: Durable) -> bool:
    """Whether one durability level is below another."""
    return _LEVEL[has] < _LEVEL[wants]
