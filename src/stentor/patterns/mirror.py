"""A mirror: topics copied from one broker to another, and in the end what is delayed and what groups have.

It reads the source as a group of its own, so that nothing is trimmed before it is copied, and notes at the target how
far it came, in one settlement with what it copied (its group there owns that note, so that two mirrors cannot mix).
Where the target is not atomic, that note may lag behind by one settlement after a crash: the target's deduplication by
source and id, or a look at what it stored last, leaves out what is there already.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from stentor.broker import Broker, GroupInfo
from stentor.errors import LeaseLost, PublishUnknown, StentorError, Unavailable, UnknownTopic, Unsupported
from stentor.event import Topic
from stentor.message import Delivery, Message, Outcome, Settlement, dead_topic, new_id
from stentor.patterns.handover import hand_over
from stentor.patterns.member import Member, MirrorError, identity
from stentor.subscription import Subscription

log = logging.getLogger("stentor.mirror")

INTERNAL = "stentor."
NAME = "stentor.mirror"
CHUNK = 500
"""Events that are copied in one settlement."""
OVERLAP = 60.0
"""Seconds before the last note from which a target without deduplication is looked at: more than its clock is off."""


class Mirror:
    """Copies ``topics`` (all, if none are named) between two open brokers; an async context manager.

    ``groups=False`` leaves the groups out, with their places and dead letters. ``name`` tells several mirrors of one
    source apart.

    Raises:
        UnknownTopic: the source has no such topic.
        MirrorError: another mirror of this name runs, or the target is not the one that was copied to before.
    """

    def __init__(
        self, source: Broker, target: Broker, topics: Sequence[str] = (), *, groups: bool = True, name: str = ""
    ) -> None:
        self.source = source
        self.target = target
        self.group = f"{NAME}.{name}" if name else NAME
        self.copied = 0
        """Events and delayed events stored at the target by this object."""
        self.topics: list[str] = list(topics)
        self.groups: list[GroupInfo] = []
        self.progress: Callable[[int], None] = lambda _: None
        """Called with ``copied`` whenever it grew."""
        self._with_groups = groups
        self._records: dict[str, bytes] = {}
        """The note at the target: places by ``at/<topic>/<index>``, delayed events by ``d/<id>``, groups by ``g/``."""
        self._stored: set[int] = set()
        """What a target without deduplication stored after the last note."""

    async def __aenter__(self) -> Self:
        await self._declare()
        self._reader = await Member(self.source, self._subscription(self.source_topics)).join()
        try:
            self._writer = await Member(self.target, self._subscription([])).join()
            try:
                await self._recall()
            except BaseException:
                await self._writer.leave()
                raise
        except BaseException:
            await self._reader.leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in (self._writer, self._reader):
            try:
                await member.leave()
            except StentorError as trouble:
                log.warning("%s", trouble)

    def _subscription(self, topics: Sequence[str]) -> Subscription:
        return Subscription(group=self.group, topics=(self.group, *topics), app=NAME, single=True)

    # ---- before anything is copied ----------------------------------------------------------------------------------

    async def _declare(self) -> None:
        """Choose topics and groups; make them at the target first, so that no group misses what is copied."""
        known = [topic.name for topic in await self.source.admin.topics()]
        missing = [topic for topic in self.topics if topic not in known]
        if missing:
            shown = ", ".join(name for name in known if not name.startswith(INTERNAL))
            raise UnknownTopic(f"no topic {', '.join(missing)} on {self.source}; there are {shown or 'none'}")
        infos = [g for g in await self.source.admin.groups() if "#" not in g.name and g.app != NAME]
        chosen = self.topics or [name for name in known if not name.startswith(INTERNAL)]
        if self._with_groups:
            self.groups = [g for g in infos if not self.topics or set(g.topics) & set(chosen)]
            own = {topic for group in self.groups for topic in group.topics if topic.startswith(INTERNAL)}
            chosen = [*chosen, *sorted(own)]
        self.topics = self.source_topics = list(dict.fromkeys(chosen))
        there = {topic.name for topic in await self.target.admin.topics()}
        wanted = [self.group, *self.topics, *(dead_topic(group.name) for group in self.groups)]
        have = {group.name: group for group in await self.target.admin.groups()}
        self._fresh = [group.name for group in self.groups if group.name not in have]
        subscriptions = [
            Subscription(group=g.name, topics=tuple(t for t in g.topics if t in self.topics), app=g.app)
            for g in self.groups
            if g.name in self._fresh
        ]
        topics = [Topic(name, partitions=1) if name == self.group else Topic(name) for name in wanted]
        await self.target.declare([t for t in topics if t.name not in there], [*subscriptions, self._subscription([])])
        await self.source.declare(
            [Topic(self.group, partitions=1)] if self.group not in known else [],
            [self._subscription(self.source_topics)],
        )

    async def _recall(self) -> None:
        """What earlier runs noted. A run is known by a token on both sides, so that offsets are never mixed up."""
        ours = await self._reader.own(self.group)
        theirs = await self._writer.own(self.group)
        token = (await self._reader.consumer.read(ours, ["s/run"])).get("s/run", b"").decode()
        names = await self._writer.consumer.names(theirs)
        self._records = await self._writer.consumer.read(theirs, names)
        if token and f"run/{token}" not in self._records:
            raise MirrorError(
                f"{self.source} was mirrored before, and not to {self.target}: give this mirror a --name of its own, "
                f"or begin anew with: stentor groups drop {self.group} --broker {self.source}"
            )
        if not token:
            token = new_id()
            await self._store([], {f"run/{token}": b""})
            settled = Settlement(ours, 0, Outcome.NONE, (), {"s/run": token.encode()})
            for failure in await self._reader.consumer.settle([settled]):
                raise failure.error
        self._token = token
        await self._store([], {f"g/{name}": None for name in self._fresh if f"g/{name}" in self._records})
        await self._look()

    async def _look(self) -> None:
        """See what a target that does not recognise repetitions has stored since the last note."""
        noted = self._records.get("t")
        if self.target.features.dedupe or noted is None:
            return
        since = datetime.fromtimestamp(float(noted) - OVERLAP, UTC)
        for topic in self.topics:
            async for _, message in self.target.browse(topic, since, follow=False):
                self._stored.add(identity(message))
        self._stored |= {identity(message) for message in await self._waiting(self.target)}

    @staticmethod
    async def _waiting(broker: Broker) -> list[Message]:
        try:
            return await broker.admin.delayed()
        except Unsupported:
            return []

    # ---- copying ----------------------------------------------------------------------------------------------------

    async def copy(self, *, follow: asyncio.Event | None = None) -> None:
        """Copy what the topics hold and was not copied yet; with ``follow`` also what comes, until it is set.

        It survives a broker that is away for a while. Raises TooLarge and other errors that waiting does not mend.
        """
        while follow is None or not follow.is_set():
            try:
                found = await self._reader.consumer.fetch(CHUNK, 0.1 if follow is None else 0.5)
                if not found and follow is None and not await self.behind():
                    return
            except Unavailable as error:
                await self._pause(error)
                continue
            if found:
                await self._pass_on(found)

    async def behind(self) -> int:
        """How many events of the source are not copied yet."""
        return sum(lag.events for lag in await self.source.admin.lag() if lag.group == self.group)

    async def _pass_on(self, found: Sequence[Delivery]) -> None:
        outputs: list[Message] = []
        records: dict[str, bytes | None] = {}
        for delivery in found:
            topic, index = delivery.partition.topic, delivery.partition.index
            place = f"at/{self._token}/{topic}/{index}"
            if topic == self.group or delivery.offset < int(records.get(place) or self._records.get(place, b"0")):
                continue
            records[place] = str(delivery.offset + 1).encode()
            number = identity(delivery.message)
            if f"d/{number:x}" in self._records:  # it was copied while it waited for its time
                records[f"d/{number:x}"] = None
            elif number not in self._stored:
                outputs.append(delivery.message)
        await self._store(outputs, records)
        done = [Settlement(delivery.partition, delivery.offset) for delivery in found]
        while True:
            try:
                await self._reader.consumer.settle(done)  # what is lost meanwhile comes again, and is known then
                return
            except Unavailable as error:
                await self._pause(error)

    async def _store(self, outputs: Sequence[Message], records: dict[str, bytes | None]) -> None:
        """Store events and notes at the target, in one settlement; again until it is done."""
        if not outputs and not records:
            return
        if not self.target.features.dedupe:
            records["t"] = repr(datetime.now(UTC).timestamp()).encode()
        while True:
            partition = await self._writer.own(self.group)
            try:
                failures = await self._writer.consumer.settle(
                    [Settlement(partition, 0, Outcome.NONE, outputs, records)]
                )
                if not failures:
                    break
                if not isinstance(failures[0].error, LeaseLost):
                    raise failures[0].error
                await self._pause(failures[0].error)
            except (Unavailable, PublishUnknown) as error:
                await self._pause(error)
                await self._look()
                outputs = [message for message in outputs if identity(message) not in self._stored]
        self._records |= {name: value for name, value in records.items() if value is not None}
        for name in [name for name, value in records.items() if value is None]:
            self._records.pop(name, None)
        self.copied += len(outputs)
        self.progress(self.copied)

    @staticmethod
    async def _pause(error: StentorError) -> None:
        log.warning("%s; trying again", error)
        await asyncio.sleep(0.5)

    # ---- the end ----------------------------------------------------------------------------------------------------

    async def finish(self) -> list[str]:
        """Copy the rest, what is delayed, and what the groups have; the groups that were taken over now.

        The groups' workers must have stopped. What is still published at the source meanwhile is left to another run.

        Raises:
            MirrorError: a group's workers run, or it has something that cannot be moved.
            Unsupported: the source cannot list its delayed events.
        """
        await self.copy()
        await self._copy_delayed()
        await self.copy()  # what fell due while it was listed
        moved = []
        for group in self.groups:
            state = self._records.get(f"g/{group.name}", b"")
            if state != b"done":
                topics = [topic for topic in group.topics if topic in self.topics]
                await hand_over(self, group, topics, begun=state == b"begun")
                await self._store([], {f"g/{group.name}": b"done"})
                moved.append(group.name)
        return moved

    async def _copy_delayed(self) -> None:
        waiting = [m for m in await self.source.admin.delayed() if m.topic in self.topics]
        fresh = [message for message in waiting if f"d/{identity(message):x}" not in self._records]
        for start in range(0, len(fresh), CHUNK):
            part = fresh[start : start + CHUNK]
            await self._store(
                [message for message in part if identity(message) not in self._stored],
                {f"d/{identity(message):x}": b"" for message in part},
            )

    async def begin(self, group: str, letters: Sequence[Message]) -> None:
        """Store a group's dead letters, and note that all of it but its place is there."""
        for start in range(0, len(letters), CHUNK):
            await self._store(letters[start : start + CHUNK], {})
        await self._store([], {f"g/{group}": b"begun"})
