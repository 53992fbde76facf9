"""Delays for servers that have none: a topic of waiting messages, whose owner keeps them in its journal until due.

The journal's names are ``d/<due>/<id>``, so that only names are in memory. What falls due is stored in its topic and
its name removed in one settlement; after a crash between the two it is stored again under the same id.

Who cancels leaves the mark ``m/cancel/<id>``. Before the owner looks for marks it writes into ``!due`` up to when it
lets messages fall, and a mark is written only while that stands before the message's time: so it comes before the look,
or it is refused, and what was cancelled never falls.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stentor.brokers.log_consumer import LogConsumer, Place, decode_place
from stentor.brokers.storage import Write
from stentor.brokers.wire import delayed_until, unpack_delayed, unpack_waiting
from stentor.errors import StentorError, UnknownGroup, UnknownTopic
from stentor.event import Topic
from stentor.message import Delivery, Message, Outcome, Partition, Settlement, new_id
from stentor.subscription import Subscription

if TYPE_CHECKING:
    from stentor.brokers.log import LogBroker

DELAY_TOPIC = "stentor.delay"
DELAY_GROUP = "stentor.delay"
FALL = 500
"""Messages that fall due in one settlement."""
DUE = "!due"
"""The entry that says up to when, in milliseconds, the owner has let messages fall, or is about to."""


def _name(due: float, id: str) -> str:
    return f"d/{round(due * 1000):015d}/{id}"


def _due(name: str) -> int:
    return int(name[2:17])


class Staging:
    """The part of one process in holding delayed messages back: at most one process owns the topic at a time."""

    def __init__(self, broker: LogBroker) -> None:
        self._broker = broker
        self.topic = ""
        """The name of the waiting messages' topic on the server, once it is declared."""
        self._consumer: LogConsumer | None = None
        self._partition: Partition | None = None
        self._waiting: list[str] = []
        """A heap of names."""
        self._due = 0
        self._running: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> str:
        """Declare the topic and take part in holding it; its name on the server."""
        async with self._starting:
            if self._running is None:
                subscription = Subscription(group=DELAY_GROUP, topics=(DELAY_TOPIC,), single=True)
                await self._broker.declare([Topic(DELAY_TOPIC, partitions=1)], [subscription])
                self.topic = (await self._broker.topic(DELAY_TOPIC)).stored
                self._consumer = await self._broker.subscribe(subscription, self)
                await self._consumer.start()
                self._running = asyncio.create_task(self._run(self._consumer), name="stentor delays")
        return self.topic

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None
        if self._consumer is not None:
            with contextlib.suppress(StentorError):
                await self._consumer.close()
            self._consumer = None
        self.topic = ""

    # ---- ownership: called by the consumer --------------------------------------------------------------------------

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        assert self._consumer is not None
        [partition] = partitions
        self._waiting = [name for name in await self._consumer.names(partition) if name.startswith("d/")]
        heapq.heapify(self._waiting)
        self._due = int((await self._consumer.read(partition, [DUE])).get(DUE) or 0)
        self._partition = partition

    async def revoked(self, partitions: Sequence[Partition]) -> None:  # noqa: ARG002
        self._partition = None
        self._waiting = []

    def lost(self, partitions: Sequence[Partition]) -> None:  # noqa: ARG002
        self._partition = None
        self._waiting = []

    # ---- what waits -------------------------------------------------------------------------------------------------

    async def _run(self, consumer: LogConsumer) -> None:
        broker = self._broker
        unsettled: list[Delivery] = []
        while True:
            try:
                if unsettled:
                    await self._keep(consumer, unsettled)
                    unsettled = []
                now = broker.clock.now()
                while self._waiting and _due(self._waiting[0]) <= now * 1000:
                    await self._fall(consumer, int(now * 1000))
                wait = 0.5
                if self._waiting:
                    wait = min(wait, max(0.001, _due(self._waiting[0]) / 1000 - now))
                unsettled = list(await consumer.fetch(FALL, wait))
            except StentorError:
                await broker.clock.sleep(0.2)

    async def _keep(self, consumer: LogConsumer, deliveries: Sequence[Delivery]) -> None:
        """Move new messages into the journal."""
        settlements, names = [], []
        for delivery in deliveries:
            body = delivery.message.data
            names.append(_name(*delayed_until(body)))
            settlements.append(Settlement(delivery.partition, delivery.offset, Outcome.ACK, (), {names[-1]: body}))
        failures = await consumer.settle(settlements)
        failed = {id(failure.settlement) for failure in failures}
        for settlement, name in zip(settlements, names, strict=True):
            if id(settlement) not in failed:
                heapq.heappush(self._waiting, name)

    async def _fall(self, consumer: LogConsumer, now: int) -> None:
        """Let what is due appear in its topic, except for what was cancelled."""
        partition = self._partition
        if partition is None:
            return
        self._due = max(self._due, now)
        claim: dict[str, bytes | None] = {DUE: str(self._due).encode()}
        for failure in await consumer.settle([Settlement(partition, 0, Outcome.NONE, (), claim)]):
            raise failure.error
        marks = await consumer.marks()
        cancelled = {mark.name.removeprefix("m/cancel/") for mark in marks}
        due: list[str] = []
        while self._waiting and len(due) < FALL and _due(self._waiting[0]) <= now:
            due.append(heapq.heappop(self._waiting))
        try:
            bodies = await consumer.read(partition, due)
            settlements = []
            for name in due:
                body = bodies.get(name)
                records: dict[str, bytes | None] = {name: None}
                outputs: tuple[Message, ...] = ()
                id = name[18:]
                if id in cancelled:
                    records[f"m/cancel/{id}"] = None
                elif body is not None:
                    outputs = (unpack_delayed(body),)
                settlements.append(Settlement(partition, 0, Outcome.NONE, outputs, records))
            failures = await consumer.settle(settlements)
        except StentorError:
            if self._partition is partition:
                for name in due:
                    heapq.heappush(self._waiting, name)
            raise
        for failure in failures:
            if self._partition is partition:
                for name in failure.settlement.records:
                    if name.startswith("d/"):
                        heapq.heappush(self._waiting, name)
        if failures:
            raise failures[0].error

    async def _arriving(self, space: str, stored: str) -> dict[str, bytes]:
        """The bodies, by name, that the owner has not moved into the journal yet.

        Whoever looks into both asks this first: what slips from one into the other meanwhile is then seen in the
        journal, and asked the other way round it would be seen in neither.
        """
        [place] = await self._broker.get([(space, "!place")])
        known = Place(0) if place is None else decode_place(place)
        found: dict[str, bytes] = {}
        offset = known.prefix
        while arriving := await self._broker.page(stored, 0, offset, FALL):
            bodies = [item.message.data for item in arriving if item.offset not in known.done]
            found |= {_name(*delayed_until(body)): body for body in bodies}
            offset = arriving[-1].offset + 1
        return found

    async def waiting(self) -> list[Message]:
        """What waits, the next one first."""
        broker = self._broker
        try:
            space = broker.space((await broker.group(DELAY_GROUP)).id, DELAY_TOPIC, 0)
            stored = (await broker.topic(DELAY_TOPIC)).stored
        except (UnknownGroup, UnknownTopic):
            return []
        found = await self._arriving(space, stored)
        names = await broker.names(space)
        held = [name for name in names if name.startswith("d/")]
        values = await broker.get([(space, name) for name in held])
        found |= {name: value for name, value in zip(held, values, strict=True) if value is not None}
        cancelled = {name.removeprefix("m/cancel/") for name in names if name.startswith("m/cancel/")}
        return [unpack_waiting(found[name]) for name in sorted(found) if name[18:] not in cancelled]

    async def cancel(self, id: str) -> bool:
        """Mark a waiting message as not wanted; False if none of that id waits, or it is about to fall due."""
        broker = self._broker
        stored = await self.start()
        space = broker.space((await broker.group(DELAY_GROUP)).id, DELAY_TOPIC, 0)
        mark = f"m/cancel/{id}"
        while True:
            [due] = await broker.get([(space, DUE)])
            arriving = await self._arriving(space, stored)
            names = await broker.names(space)
            if mark in names:
                return False
            held = [name for name in names if name.startswith("d/") and name[18:] == id]
            if any(_due(name) <= int(due or 0) for name in held):
                return False
            if held:
                written = await broker.write([Write(space, (DUE, due), {mark: b"", "!marks": new_id().encode()})])
                if written[0]:
                    return True
            elif all(name[18:] != id for name in arriving):
                return False
            else:
                await broker.clock.sleep(0.05)  # its owner is about to move it into the journal
