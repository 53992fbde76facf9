"""What operators ask of a server broker, and its housekeeping; nothing here needs a running worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from stentor.broker import GroupInfo, Start, TopicInfo
from stentor.brokers.heartbeat import members_of
from stentor.brokers.log_consumer import Ownership, Place, decode_ownership, decode_place, encode
from stentor.brokers.staging import DELAY_GROUP, DELAY_TOPIC
from stentor.brokers.storage import GroupRecord, TopicRecord, Write
from stentor.errors import BrokerError, StentorError, UnknownTopic
from stentor.message import Lag, Message, dead_topic, new_id

if TYPE_CHECKING:
    from stentor.brokers.log import LogBroker

_TRIES = 100
"""Rounds of compare-and-set against owners that settle meanwhile."""


def _timer_topic(group: str) -> str:
    return f"stentor.timer.{group}"


def _source_topic(group: str) -> str:
    return f"stentor.source.{group}"


class LogAdmin:
    """The administration of a server, within the broker's namespace."""

    def __init__(self, broker: LogBroker) -> None:
        self._broker = broker

    async def topics(self) -> list[TopicInfo]:
        topics, _ = await self._broker.records()
        found = []
        for name, record in topics.items():
            if name == DELAY_TOPIC:
                continue
            partitions = range(record.partitions)
            bounds = await self._broker.bounds(record.stored, partitions)
            held = await self._broker.pending(
                [(record.stored, index, first) for index, (first, _) in zip(partitions, bounds, strict=True)]
            )
            oldest = min((time for _, time in held if time is not None), default=None)
            newest = None
            for index, (first, end) in zip(partitions, bounds, strict=True):
                if end > first:
                    last = await self._broker.page(record.stored, index, end - 1, 1)
                    newest = max(newest or 0.0, last[-1].time) if last else newest
            found.append(TopicInfo(name, sum(count for count, _ in held), None, oldest, newest))
        return found

    async def groups(self) -> list[GroupInfo]:
        _, groups = await self._broker.records()
        living = list(members_of(await self._broker.leases()).values())
        return [
            GroupInfo(name, record.app, record.topics, living.count(record.id))
            for name, record in groups.items()
            if name != DELAY_GROUP
        ]

    async def lag(self) -> list[Lag]:
        broker = self._broker
        now = broker.clock.now()
        topics, groups = await broker.records()
        living = list(members_of(await broker.leases()).values())
        cells = [
            (name, topic, index, broker.space(record.id, topic, index))
            for name, record in groups.items()
            if name != DELAY_GROUP
            for topic in record.topics
            if topic in topics
            for index in range(topics[topic].partitions)
        ]
        places = [
            Place(0) if value is None else decode_place(value)
            for value in await broker.get([(space, "!place") for *_, space in cells])
        ]
        pending = await broker.pending(
            [
                (topics[topic].stored, index, place.prefix)
                for (_, topic, index, _), place in zip(cells, places, strict=True)
            ]
        )
        names = await asyncio.gather(*(broker.names(space) for *_, space in cells))
        found: dict[tuple[str, str], Lag] = {}
        for (name, topic, _, _), place, (count, oldest), entries in zip(cells, places, pending, names, strict=True):
            events = max(0, count - len(place.done))
            age = max(0.0, now - oldest) if events and oldest is not None else 0.0
            parked = sum(entry.startswith("q/") for entry in entries)
            old = found.get((name, topic), Lag(name, topic, 0, 0.0, 0, living.count(groups[name].id)))
            found[name, topic] = msgspec.structs.replace(
                old, events=old.events + events, seconds=max(old.seconds, age), parked=old.parked + parked
            )
        return list(found.values())

    # ---- changes ----------------------------------------------------------------------------------------------------

    async def rename_group(self, old: str, new: str) -> None:
        broker = self._broker
        topics, groups = await broker.records()
        record = await broker.group(old)
        if new in groups:
            raise BrokerError(f"group {new!r} exists already")
        changes: dict[str, bytes | None] = {f"g/{old}": None}
        moved = record.topics
        for home in (dead_topic, _timer_topic, _source_topic):
            if home(old) in topics and home(new) not in topics:
                changes |= {f"t/{home(old)}": None, f"t/{home(new)}": encode(topics[home(old)])}
                if home(old) in moved:
                    await self._move_places(record.id, home(old), home(new), topics[home(old)])
                    moved = tuple(home(new) if topic == home(old) else topic for topic in moved)
        changes[f"g/{new}"] = encode(msgspec.structs.replace(record, topics=moved))
        if not (await broker.write([Write(broker.meta, (f"g/{old}", encode(record)), changes)]))[0]:
            raise BrokerError(f"group {old!r} was changed at the same time; try again")

    async def _move_places(self, group: str, old: str, new: str, record: TopicRecord) -> None:
        """A group's own topic is renamed with it: what it has there goes along."""
        for index in range(record.partitions):
            source = self._broker.space(group, old, index)
            names = await self._broker.names(source)
            values = await self._broker.get([(source, name) for name in names])
            target = self._broker.space(group, new, index)
            await self._broker.write([Write(target, ("!owner", None), dict(zip(names, values, strict=True)))])
            await self._broker.forget([source])

    async def drop_group(self, name: str) -> None:
        record = await self._broker.group(name)
        members = list(members_of(await self._broker.leases()).values()).count(record.id)
        if members:
            raise BrokerError(f"group {name!r} has {members} running members; stop them first")
        await self._drop(name, record)

    async def _drop(self, name: str, record: GroupRecord) -> None:
        if await self._broker.change(f"g/{name}", record, None):
            await self.forget_places(record.id, record.topics)

    async def forget_places(self, group: str, topics: Sequence[str]) -> None:
        """Remove what a group has in topics."""
        known, _ = await self._broker.records()
        spaces = [
            self._broker.space(group, topic, index)
            for topic in topics
            if topic in known
            for index in range(known[topic].partitions)
        ]
        if spaces:
            await self._broker.forget(spaces)

    async def replay(self, group: str, start: Start, topics: Sequence[str] = ()) -> int:
        broker = self._broker
        record = await broker.group(group)
        replay = f"{group}@{new_id()}"
        for topic in topics:
            if topic not in record.topics:
                raise UnknownTopic(f"group {group!r} does not read topic {topic!r}")
        count = 0
        for topic in topics or record.topics:
            known = await broker.topic(topic)
            offsets = await broker.starts(known, start)
            for index, offset in enumerate(offsets):
                await self._rewind(broker.space(record.id, topic, index), offset, replay)
            held = await broker.pending([(known.stored, index, offset) for index, offset in enumerate(offsets)])
            count += sum(events for events, _ in held)
        for consumer in broker.consumers:
            if consumer.group == record.id:
                await consumer.balance()
        return count

    async def _rewind(self, space: str, offset: int, replay: str) -> None:
        """Set a place back under a new epoch without an owner: what runs of the old one can no longer settle."""
        for _ in range(_TRIES):
            [owner, stored] = await self._broker.get([(space, "!owner"), (space, "!place")])
            if owner is None or stored is None:
                return
            was, place = decode_ownership(owner), decode_place(stored)
            # The old owner is refused first, so that what is read now is what counts.
            cut = encode(Ownership(was.epoch + 1))
            if not (await self._broker.write([Write(space, ("!owner", owner), {"!owner": cut})]))[0]:
                continue
            names = await self._broker.names(space)
            held = [name for name in names if name.startswith("k/")]
            values = dict(zip(held, await self._broker.get([(space, name) for name in held]), strict=True))
            changes: dict[str, bytes | None] = {
                name: None for name in names if name[:2] in ("q/", "a/", "p/") and int(name[2:22]) >= offset
            }
            changes |= {name: None for name, value in values.items() if value and int(value[:20]) >= offset}
            [stored] = await self._broker.get([(space, "!place")])
            place = place if stored is None else decode_place(stored)
            reached = max([place.prefix, offset, *(done + 1 for done in place.done)])
            changes["!place"] = encode(Place(offset, [], replay, reached))
            changes["!owner"] = encode(Ownership(was.epoch + 2))
            if (await self._broker.write([Write(space, ("!owner", cut), changes)]))[0]:
                return
        raise BrokerError(f"the replay of {space} met too many changes of owner; try again")

    async def cancel(self, id: str) -> bool:
        if self._broker.native_delay:
            return await self._broker.withdraw(id)
        return await self._broker.staging.cancel(id)

    async def delayed(self) -> list[Message]:
        if self._broker.native_delay:
            return await self._broker.waiting()
        return await self._broker.staging.waiting()

    async def journal(self, group: str, topic: str, partition: int, prefix: str) -> dict[str, bytes]:
        record = await self._broker.group(group)
        await self._broker.topic(topic)
        space = self._broker.space(record.id, topic, partition)
        names = sorted(n for n in await self._broker.names(space) if n.startswith(prefix) and not n.startswith("!"))
        values = await self._broker.get([(space, name) for name in names])
        return {name: value for name, value in zip(names, values, strict=True) if value is not None}

    async def mark(self, group: str, topic: str, partition: int, name: str, value: bytes) -> None:
        """Write a mark, and change the count by which owners see that there is one."""
        record = await self._broker.group(group)
        space = self._broker.space(record.id, topic, partition)
        for _ in range(_TRIES):
            [count] = await self._broker.get([(space, "!marks")])
            changes: dict[str, bytes | None] = {name: value, "!marks": new_id().encode()}
            if (await self._broker.write([Write(space, ("!marks", count), changes)]))[0]:
                return
        raise BrokerError("too many marks at the same time; try again")

    # ---- housekeeping -----------------------------------------------------------------------------------------------

    async def keep_house(self, every: float) -> None:
        """Once in ``every`` seconds, of all processes together: drop what is settled everywhere and past its
        retention, and the places of broadcast instances that are gone for too long.
        """
        broker = self._broker
        now = broker.clock.now()
        [last] = await broker.get([(broker.meta, "cleaned")])
        if last is not None and 0 <= now - float(last) < every:
            return
        if not (await broker.write([Write(broker.meta, ("cleaned", last), {"cleaned": str(now).encode()})]))[0]:
            return
        topics, groups = await broker.records()
        living = set(members_of(await broker.leases()).values())
        for name, group in groups.items():
            if group.expires and group.id in living:
                if now - group.touched > group.expires / 10:
                    await broker.change(f"g/{name}", group, msgspec.structs.replace(group, touched=now))
            elif group.expires and group.touched + group.expires < now:
                await self._drop(name, group)
        for name, topic in topics.items():
            if broker.trims and not name.startswith("stentor.dead."):  # dead letters stay until an operator drops them
                await self._trim(name, topic, groups, now)

    async def _trim(self, name: str, topic: TopicRecord, groups: dict[str, GroupRecord], now: float) -> None:
        broker = self._broker
        age = broker.retention if topic.retention is None else topic.retention
        limits = await broker.find(topic.stored, range(topic.partitions), now - age)
        readers = [group.id for group in groups.values() if name in group.topics]
        for index, limit in enumerate(limits):
            places = await broker.get([(broker.space(group, name, index), "!place") for group in readers])
            if any(place is None for place in places):
                continue  # a group is being declared
            low = min([limit, *(decode_place(place).prefix for place in places if place is not None)])
            try:
                await broker.trim(topic.stored, index, low)
            except StentorError:
                continue
