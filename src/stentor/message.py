"""The wire side of an event: the message, its delivery to a group, and how that delivery ends.

A message is a CloudEvent (https://github.com/cloudevents/spec, 1.0.2): the required and optional context attributes
have fields of their own, extensions are kept as they came, known or not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from itertools import count
from secrets import token_hex

import msgspec
from msgspec import Struct

from stentor.errors import StentorError

Attribute = str | int | bool
"""A value of a CloudEvents extension (Boolean, Integer, String; times and URIs are strings, Binary is Base64 text)."""


class Message(Struct, gc=False, kw_only=True, omit_defaults=True):
    """One CloudEvent on its way, with the topic and key that route it.

    ``key`` is the CloudEvents extension ``partitionkey``; ``time`` is RFC 3339 text, kept as it came; ``due`` is
    seconds since the epoch for a delayed event, else 0. ``fresh`` says that the id was made for this very publish, so
    that the broker need not look for an earlier one.
    """

    id: str
    source: str
    type: str
    topic: str
    data: bytes
    key: str | None = None
    time: str | None = None
    subject: str | None = None
    datacontenttype: str | None = None
    dataschema: str | None = None
    extensions: dict[str, Attribute] = {}
    due: float = 0.0
    fresh: bool = False

    @property
    def version(self) -> int:
        """The version of the event's shape; 1 unless the extension ``schemaversion`` says otherwise."""
        return int(self.extensions.get("schemaversion", 1))

    def attributes(self) -> dict[str, Attribute]:
        """All CloudEvents context attributes and extensions, as a filter or an HTTP header sees them."""
        found: dict[str, Attribute] = {"specversion": "1.0", "id": self.id, "source": self.source, "type": self.type}
        for name in ("time", "subject", "datacontenttype", "dataschema"):
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        if self.key is not None:
            found["partitionkey"] = self.key
        found.update(self.extensions)
        return found


class Partition:
    """A share of a topic that one process owns for a while: the topic, its index, and the epoch that fences it.

    One object stands for one period of ownership; it is compared by identity.
    """

    __slots__ = ("clean", "epoch", "index", "topic")

    def __init__(self, topic: str, index: int, epoch: int, *, clean: bool = True) -> None:
        self.topic = topic
        self.index = index
        self.epoch = epoch
        self.clean = clean
        """False when the last owner died, so that it may have started what is delivered now."""

    def __repr__(self) -> str:
        return f"{self.topic}[{self.index}]@{self.epoch}"


class Delivery(Struct, gc=False):
    """A message handed to a group: where it stands, and whether an earlier owner may have seen it.

    ``offset`` orders the events of a partition and names this one for every owner to come.
    ``replay`` is the id of the replay that it belongs to, or empty.
    """

    message: Message
    partition: Partition
    offset: int
    redelivered: bool = False
    replay: str = ""


class Outcome(Enum):
    """How a delivery ends for the broker."""

    ACK = "ack"
    """Done with (handled, skipped, dead, or taken over by the journal): the broker may forget it for this group."""
    NONE = "none"
    """Not a delivery of the log: only outputs and records are written, under the partition's epoch."""


class Settlement(Struct, gc=False):
    """The end of one delivery: what it publishes and what the journal remembers, then the ack; all or nothing.

    ``records`` maps journal names of ``partition`` to a value, or to None to forget it.
    """

    partition: Partition
    offset: int
    outcome: Outcome = Outcome.ACK
    outputs: Sequence[Message] = ()
    records: dict[str, bytes | None] = {}


class Failure(Struct):
    """A settlement that was not carried out: it is not acked, and on an atomic broker nothing of it is stored."""

    settlement: Settlement
    error: StentorError


class Receipt(Struct, frozen=True):
    """What ``publish`` returns: the event's id, its topic, and its place there.

    The place is None while the event is delayed, and where the broker does not tell it (``features.placed``).
    """

    id: str
    topic: str
    position: int | None
    duplicate: bool = False


class Mark(Struct, frozen=True):
    """A wish of an outsider (the command line) about a partition, applied by its owner: a journal name and value."""

    partition: Partition
    name: str
    value: bytes


class Lag(Struct, frozen=True):
    """What a group has still to do on a topic.

    ``events`` waiting in the log, ``seconds`` age of the oldest of them, ``parked`` in the journal (retrying, or held
    behind one that does), ``members`` processes that share the group now.
    """

    group: str
    topic: str
    events: int
    seconds: float
    parked: int
    members: int


class ErrorRecord(Struct, frozen=True):
    """One failed attempt: seconds since the epoch, the error's class and text, and the end of its traceback."""

    time: float
    type: str
    text: str
    traceback: str = ""


class DeadLetter(Struct, frozen=True, kw_only=True):
    """An event that a group gave up on: the original message, every error, and where it stood."""

    id: str
    group: str
    message: Message
    partition: int
    offset: int
    attempts: int
    reason: str
    time: float
    errors: list[ErrorRecord] = []

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


_dead_letter = msgspec.msgpack.Decoder(DeadLetter)


def decode_dead_letter(data: bytes) -> DeadLetter:
    """The dead letter in the body of a message of a dead-letter topic."""
    return _dead_letter.decode(data)


def dead_topic(group: str) -> str:
    """The topic that holds a group's dead letters."""
    return f"stentor.dead.{group}"


class _Ids:
    """Ids that are unique without asking the kernel each time: 64 random bits a process, then a counter."""

    def __init__(self) -> None:
        self._restart()
        os.register_at_fork(after_in_child=self._restart)

    def _restart(self) -> None:
        self._prefix = token_hex(8)
        self._next = count(1).__next__

    def __call__(self) -> str:
        return f"{self._prefix}-{self._next():x}"


new_id = _Ids()
"""Makes an id for a new event; safe from any thread and after a fork."""
