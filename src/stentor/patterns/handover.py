"""A group moved to another broker: its place, what it parked, its dead letters, holds, timers and sources.

A mirror copied the events first. The group is read at the source, and written at the target, as by its only worker:
what the source does not deliver any more is acked at the target, and the journal's names are turned into the offsets
and partitions that the events have there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from stentor.broker import Broker, GroupInfo
from stentor.errors import UnknownTopic
from stentor.lanes import decode_parked, offset_of, split_stored, stored_name
from stentor.message import DeadLetter, Message, Outcome, Partition, Settlement, dead_topic, decode_dead_letter
from stentor.parking import decode_wish, encode_wish
from stentor.patterns.member import Member, MirrorError, alone, identity
from stentor.subscription import Slots, Subscription

if TYPE_CHECKING:
    from stentor.patterns.mirror import Mirror

TOGETHER = 500
AFTER = 2**62
"""Offsets from here on stand for events that the log holds no more and whose order against the log does not count."""

Event = tuple[str, int]
"""A topic, and the identity of a message there."""
T = TypeVar("T")
Spot = tuple[Partition, int]


class Standing:
    """What a group has at the source."""

    def __init__(self) -> None:
        self.todo: set[Event] = set()
        """What is not settled."""
        self.journal: list[tuple[str, int, str, bytes]] = []
        """Topic, partition, name and value."""
        self.marks: list[tuple[str, bytes]] = []
        self.letters: list[Message] = []
        self.places: dict[tuple[str, int, int], Event] = {}
        """By topic, partition and offset: unsettled events that the journal speaks of."""


async def hand_over(mirror: Mirror, group: GroupInfo, topics: list[str], *, begun: bool) -> None:
    """Move a group; ``begun``: an earlier run wrote all but the acks. Raises MirrorError."""
    await alone(mirror.source, group.name)
    await alone(mirror.target, group.name)
    # In this order: what comes in between (a delayed event that falls due) is then not taken for settled.
    known = {topic: {identity(m) async for m in _browse(mirror.source, topic)} for topic in topics}
    standing = await _read(mirror.source, group, topics)
    member = await Member(mirror.target, await _subscription(mirror.target, group, topics)).join()
    try:
        await _write(mirror, member, group.name, standing, known, begun=begun)
    finally:
        await member.leave()


async def _browse(broker: Broker, topic: str) -> AsyncIterator[Message]:
    try:
        async for _, message in broker.browse(topic, "earliest", follow=False):
            yield message
    except UnknownTopic:
        return


async def _subscription(target: Broker, group: GroupInfo, topics: list[str]) -> Subscription:
    [info] = [info for info in await target.admin.groups() if info.name == group.name]
    missing = [topic for topic in topics if topic not in info.topics]
    if missing:
        raise MirrorError(
            f"group {group.name} does not read {', '.join(missing)} on {target}; declare the same app there"
        )
    return Subscription(group=group.name, topics=info.topics, app=group.app)


# ---- the source -----------------------------------------------------------------------------------------------------


async def _read(source: Broker, group: GroupInfo, topics: list[str]) -> Standing:
    standing = Standing()
    member = await Member(source, Subscription(group=group.name, topics=group.topics, app=group.app)).join()
    try:
        for (topic, index), partition in sorted(member.partitions.items()):
            names = await member.consumer.names(partition)
            values = await member.consumer.read(partition, names)
            if topic in topics:
                standing.journal += [(topic, index, name, value) for name, value in values.items()]
        parked = sum(name.startswith("q/") for _, _, name, _ in standing.journal)
        said = sum(lag.parked for lag in await source.admin.lag() if lag.group == group.name and lag.topic in topics)
        if parked != said:
            raise MirrorError(f"{source} says that {group.name} has parked {said:,} events, and shows {parked:,}")
        tried = {(topic, index, offset_of(n[2:])) for topic, index, n, _ in standing.journal if n[:2] in ("a/", "p/")}
        async for partition, offset, replay, message in member.unsettled():
            if partition.topic in topics:
                if replay:
                    raise MirrorError(f"group {group.name} is in the middle of a replay on {source}; let it end first")
                event = (partition.topic, identity(message))
                standing.todo.add(event)
                if (partition.topic, partition.index, offset) in tried:
                    standing.places[partition.topic, partition.index, offset] = event
        standing.marks = [(m.name, m.value) for m in await member.consumer.marks() if m.partition.topic in topics]
    finally:
        await member.leave()
    letters = [message async for message in _browse(source, dead_topic(group.name))]
    standing.letters = [message for message in letters if decode_dead_letter(message.data).message.topic in topics]
    return standing


# ---- the target -----------------------------------------------------------------------------------------------------


async def _write(
    mirror: Mirror, member: Member, group: str, standing: Standing, known: dict[str, set[int]], *, begun: bool
) -> None:
    letters = [decode_dead_letter(message.data) for message in standing.letters]
    parked = [(topic, decode_parked(value)) for topic, _, name, value in standing.journal if name.startswith("q/")]
    asked = standing.todo | {(topic, identity(entry.message)) for topic, entry in parked}
    asked |= {(letter.message.topic, identity(letter.message)) for letter in letters}
    spots: dict[Event, Spot] = {}
    acks: list[Settlement] = []
    async for partition, offset, _, message in member.unsettled():
        event = (partition.topic, identity(message))
        if event in asked:
            spots.setdefault(event, (partition, offset))
        # Only what the source has settled: what others published here is not the mirror's.
        if event[1] in known.get(event[0], ()) and event not in standing.todo:
            acks.append(Settlement(partition, offset))
    if not begun:
        missing = standing.todo - spots.keys()
        if missing and not await mirror.behind():
            raise MirrorError(
                f"{mirror.target} does not give {group} {len(missing):,} events that it has still to do: its place "
                f"there is behind them; drop it with: stentor groups drop {group} --broker {mirror.target}"
            )
        translation = _Translation(member, spots)
        moved = [translation.letter(letter) for letter in letters]
        there = {message.id async for message in _browse(mirror.target, dead_topic(group))}
        records = translation.journal(standing, {old.id: new for old, new in zip(letters, moved, strict=True)})
        for partition, entries in records.items():
            await _settle(
                member,
                [
                    Settlement(partition, 0, Outcome.NONE, (), dict(part))
                    for part in _parts(list(entries.items()), TOGETHER)
                ],
            )
        for name, value in standing.marks:
            wish = decode_wish(value)
            letter = translation.letter(wish.letter)
            home = (letter.message.topic, letter.partition)
            await mirror.target.admin.mark(
                group, *home, name, encode_wish(msgspec.structs.replace(wish, letter=letter))
            )
        bodies = [
            msgspec.structs.replace(message, data=letter.encode())
            for message, letter in zip(standing.letters, moved, strict=True)
            if message.id not in there
        ]
        await mirror.begin(group, bodies)
    for part in _parts(acks, TOGETHER):
        await _settle(member, part)


def _parts(items: list[T], size: int) -> Iterable[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


async def _settle(member: Member, settlements: list[Settlement]) -> None:
    for failure in await member.consumer.settle(settlements):
        raise failure.error


class _Translation:
    """From the offsets and partitions of the source to those of the target."""

    def __init__(self, member: Member, spots: dict[Event, Spot]) -> None:
        self._partitions = member.partitions
        self._spots = spots
        counts: dict[str, int] = {}
        for topic, _ in member.partitions:
            counts[topic] = counts.get(topic, 0) + 1
        self._slots = {topic: Slots(count) for topic, count in counts.items()}
        self._made = AFTER

    def home(self, topic: str, key: str | None) -> Partition:
        """The partition of a key at the target."""
        return self._partitions[topic, 0 if key is None else self._slots[topic].of(key)]

    def letter(self, letter: DeadLetter) -> DeadLetter:
        """A dead letter with its place at the target; behind the log, in their order, those of events long trimmed."""
        event = (letter.message.topic, identity(letter.message))
        if event not in self._spots:
            self._spots[event] = self._behind(letter.message)
        partition, offset = self._spots[event]
        return msgspec.structs.replace(letter, partition=partition.index, offset=offset)

    def _behind(self, message: Message) -> Spot:
        self._made += 1
        return self.home(message.topic, message.key), self._made

    def journal(self, standing: Standing, letters: dict[str, DeadLetter]) -> dict[Partition, dict[str, bytes | None]]:
        """The records of each partition at the target."""
        places = {
            (topic, index, f"{offset:020d}"): (self._spots[event][0], f"{self._spots[event][1]:020d}")
            for (topic, index, offset), event in standing.places.items()
            if event in self._spots
        }
        found: dict[Partition, dict[str, bytes | None]] = {}
        # What is parked first: attempts and progress are found by its places.
        for topic, index, name, value in sorted(standing.journal, key=lambda entry: not entry[2].startswith("q/")):
            kind, rest = name[:2], name[2:]
            if kind == "q/":
                place, key = split_stored(name)
                partition, offset = self._parked(topic, key, decode_parked(value).message)
                places[topic, index, place] = (partition, f"{offset:020d}{place[20:]}")
                found.setdefault(partition, {})[stored_name(offset, place[20:], key)] = value
            elif kind in ("a/", "p/"):
                if (topic, index, rest) in places:
                    partition, place = places[topic, index, rest]
                    found.setdefault(partition, {})[kind + place] = value
            elif kind == "k/":
                held = self._held(topic, rest, letters[value[21:].decode()])
                found.setdefault(self.home(topic, rest), {})[name] = held
            elif kind == "d/":
                if rest in letters:
                    found.setdefault(self._partitions[topic, letters[rest].partition], {})[name] = value
            elif kind == "s/":
                found.setdefault(self._partitions[topic, 0], {})[name] = value
            else:
                raise MirrorError(f"this version does not know {name} in the journal of {topic}")
        return found

    def _parked(self, topic: str, key: str | None, message: Message) -> Spot:
        spot = self._spots.get((topic, identity(message)))
        if spot is None and key is not None:
            raise MirrorError(
                f"{message.id} of key {key} is parked, but {topic} holds it no more (retention), so that its order is "
                "not known; let it end at the source, then move (see stentor lag and stentor dead)"
            )
        return spot or self._behind(message)

    @staticmethod
    def _held(topic: str, key: str, letter: DeadLetter) -> bytes:
        if letter.offset >= AFTER:
            raise MirrorError(
                f"key {key} is held for dead letter {letter.id}, but {topic} holds its event no more (retention), so "
                "that its order is not known; redrive or drop it at the source, then move"
            )
        return f"{letter.offset:020d} {letter.id}".encode()
