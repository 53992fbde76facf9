"""Whether two brokers hold the same events: by id and content, and for each key in the same order."""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import Struct

from stentor.broker import Broker
from stentor.errors import UnknownTopic
from stentor.message import Message, dead_topic, decode_dead_letter
from stentor.patterns.member import identity


class Comparison(Struct, frozen=True, kw_only=True):
    """A topic of the source beside that of the target; ``same`` when nothing is missing, doubled, changed or moved.

    ``events`` and ``keys`` are those of the source, ``extra`` counts events that only the target has.
    """

    topic: str
    events: int
    keys: int
    missing: int
    doubled: int
    changed: int
    moved: int
    """Keys whose events are in another order."""
    extra: int
    delayed: int = 0

    @property
    def same(self) -> bool:
        return not (self.missing or self.doubled or self.changed or self.moved)


def content(message: Message) -> int:
    """All of a message but when it falls due, in 64 bits."""
    extensions = sorted(message.extensions.items())
    body = message.data
    if message.topic.startswith(dead_topic("")):  # a dead letter names its place, which is another at the target
        body = msgspec.structs.replace(decode_dead_letter(body), partition=0, offset=0).encode()
    parts = (
        message.source, message.id, message.type, message.key, message.time, message.subject, message.datacontenttype,
        message.dataschema, extensions, body,
    )  # fmt: skip
    return int.from_bytes(hashlib.blake2b(msgspec.msgpack.encode(parts), digest_size=8).digest(), "big")


class _Side:
    """A topic as one broker holds it: first occurrences by identity, a running digest by key."""

    def __init__(self) -> None:
        self.contents: dict[int, int] = {}
        self.chains: dict[str, int] = {}
        self.doubled = 0

    async def read(self, broker: Broker, topic: str, only: dict[int, int] | None = None) -> _Side:
        try:
            async for _, message in broker.browse(topic, "earliest", follow=False):
                number = identity(message)
                if number in self.contents:
                    self.doubled += 1
                    continue
                self.contents[number] = content(message)
                if message.key is not None and (only is None or number in only):
                    self.chains[message.key] = hash((self.chains.get(message.key, 0), number))
        except UnknownTopic:
            pass
        return self


async def _waiting(broker: Broker, topic: str) -> dict[int, int]:
    return {identity(m): content(m) for m in await broker.admin.delayed() if m.topic == topic}


async def compare(source: Broker, target: Broker, topic: str) -> Comparison:
    """Compare what a topic holds on two brokers, its delayed events among it.

    Some 200 bytes of memory an event. A delayed event is there if it waits at the target or has fallen due.
    """
    # What waits is read before what is there: one that falls due meanwhile is seen twice, and never not at all.
    waiting, there = await _waiting(source, topic), await _waiting(target, topic)
    ours = await _Side().read(source, topic)
    theirs = await _Side().read(target, topic, ours.contents)
    both = there.keys() & theirs.contents.keys()
    if both:
        both &= (await _waiting(target, topic)).keys()
    wanted, have = waiting | ours.contents, there | theirs.contents
    missing = [number for number in wanted if number not in have]
    return Comparison(
        topic=topic,
        events=len(ours.contents),
        keys=len(ours.chains),
        missing=len(missing),
        doubled=max(0, theirs.doubled - ours.doubled) + len(both),
        changed=sum(number in have and have[number] != value for number, value in wanted.items()),
        moved=0 if missing else sum(theirs.chains.get(key) != chain for key, chain in ours.chains.items()),
        extra=sum(number not in wanted for number in have),
        delayed=len(waiting.keys() - ours.contents.keys()),
    )
