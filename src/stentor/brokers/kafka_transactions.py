"""Kafka's transactions: what a handler published and the record that its event is done become visible in one step.

Each member has a producer whose transactions bear the member's name. Who takes over from a member that is gone begins
a producer of that name first: what the other had under way is aborted then, and it can commit no more (KIP-98). So a
record that was committed stands before the takeover, where its fence holds; and a member whose producer was shut out,
or does not know what became of a commit, gives up all it owns before it begins another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException, Producer

from stentor.brokers.kafka_client import ASK_PATIENCE, meet
from stentor.brokers.log_consumer import decode_ownership
from stentor.brokers.logstore import HOLD, LogStore
from stentor.brokers.storage import ShutOut, Write
from stentor.errors import Unavailable
from stentor.message import new_id

if TYPE_CHECKING:
    from stentor.brokers.log_state import Generation

OPEN_FOR = 10.0
"""Seconds after which the server aborts a transaction whose producer is gone, if nobody does before."""

PART = 256 * 1024
"""Bytes of the changes that are recorded in one transaction, where there are several."""
Sent = tuple[str, int, bytes, bytes | None]
"""A message: topic, partition, value, key."""


class Aborted(Exception):
    """Nothing of the transaction is visible, nor will be."""

    def __init__(self, error: KafkaError) -> None:
        super().__init__(error.str())
        self.error = error


class Transactor:
    """A producer of transactions, one after the other. All of it blocks."""

    def __init__(self, settings: Mapping[str, Any], max_bytes: int, name: str) -> None:
        self._producer = Producer(
            {
                **settings, "acks": "all", "transactional.id": name, "linger.ms": 0, "message.max.bytes": max_bytes,
                "transaction.timeout.ms": int(OPEN_FOR * 1000), "delivery.timeout.ms": int(OPEN_FOR * 1000),
                "batch.size": 1024 * 1024, "queue.buffering.max.kbytes": 256 * 1024,
            }
        )  # fmt: skip
        self._met: set[str] = set()
        self._again(self._producer.init_transactions)

    def store(self, messages: Sequence[Sent], headers: list[tuple[str, bytes]]) -> list[int]:
        """Store messages in one transaction; their offsets. Raises Aborted, or ShutOut when nothing is known."""
        offsets = [-1] * len(messages)
        errors: list[KafkaError] = []

        def report(number: int, error: KafkaError | None, message: Any) -> None:
            if error is None:
                offsets[number] = message.offset()
            else:
                errors.append(error)

        producer = self._producer
        try:
            meet(producer, self._met, {topic for topic, *_ in messages})
        except KafkaException as failed:
            raise Aborted(failed.args[0]) from None
        try:
            producer.begin_transaction()
            for number, (topic, index, value, key) in enumerate(messages):
                self._produce(
                    topic, partition=index, value=value, key=key, headers=headers,
                    on_delivery=lambda error, message, number=number: report(number, error, message),
                )  # fmt: skip
            self._again(producer.commit_transaction)
        except KafkaException as failed:
            error: KafkaError = errors[0] if errors else failed.args[0]  # of the message that was refused, if one was
            try:
                self._again(producer.abort_transaction)  # refused when it may have been committed
            except KafkaException as worse:
                raise ShutOut(" ".join(worse.args[0].str().split())) from None
            raise Aborted(error) from None
        return offsets

    def close(self) -> None:
        """Let the producer go, which takes up to a second."""
        del self._producer

    def _produce(self, topic: str, **message: Any) -> None:
        while True:
            try:
                self._producer.produce(topic, **message)
                return
            except BufferError:
                self._producer.poll(0.05)

    @staticmethod
    def _again(step: Any) -> None:
        """A step, repeated while the library says that it may be."""
        deadline = time.monotonic() + OPEN_FOR
        while True:
            try:
                step(ASK_PATIENCE)
                return
            except KafkaException as error:
                reason: KafkaError = error.args[0]
                if not reason.retriable() or reason.code() == KafkaError._CONFLICT or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _parts(writes: Sequence[Write]) -> Iterator[list[Write]]:
    """Writes whose records fit into one message."""
    part: list[Write] = []
    size = 0
    for one in writes:
        cost = sum(len(name) + len(value or b"") for name, value in one.changes.items())
        if part and size + cost > PART:
            yield part
            part, size = [], 0
        part.append(one)
        size += cost
    yield part


class Transactions:
    """Those of a process: of its members, and one for what is published beside them."""

    def __init__(
        self, settings: Mapping[str, Any], max_bytes: int, prefix: str, headers: list[tuple[str, bytes]]
    ) -> None:
        self._make = partial(Transactor, settings, max_bytes)
        self._prefix = prefix
        self._headers = headers
        self._own = new_id()
        self._made: dict[str, Transactor] = {}
        self._shut: dict[str, bytes] = {}
        """By space, the ownership whose member was shut out."""
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        await self.keep(())
        if (own := self._made.pop(self._own, None)) is not None:
            await asyncio.to_thread(own.close)

    async def publish(self, messages: Sequence[Sent]) -> list[int]:
        """Store messages, all or none; their offsets. Raises Aborted, ShutOut or KafkaException."""
        return await self._store(self._own, messages)

    async def write(self, store: LogStore, writes: Sequence[Write]) -> list[bool]:
        """Carry out the writes of one member with what they publish. Raises Aborted, ShutOut or Unavailable."""
        done: list[bool] = []
        for part in _parts(writes):
            try:
                done += await self._write(store, part)
            except (Aborted, Unavailable) as error:
                if done:
                    raise ShutOut(f"a part of it is stored: {error}") from None
                raise
        return done

    async def _write(self, store: LogStore, writes: Sequence[Write]) -> list[bool]:
        fence = writes[0].fence[1]
        assert fence is not None
        member = decode_ownership(fence).member
        await store.calm()
        holds = [store.write(one.space, {HOLD: b"1"}, one.fence) for one in writes]
        stand = list(await asyncio.gather(*holds))
        held = [one for one, ok in zip(writes, stand, strict=True) if ok]
        if not held:
            return stand
        outputs: list[Sent] = [
            (e.topic, e.partition, e.body, None if e.message.key is None else e.message.key.encode(errors="replace"))
            for one in held
            for e in one.outputs
        ]

        async def send(log: Generation, record: bytes) -> None:
            await self._store(member, [*outputs, (log.topic, 0, record, None)])

        try:
            done = await store.carry([(one.space, {**one.changes, HOLD: None}, one.fence) for one in held], send)
        except Aborted:
            await asyncio.gather(*(store.write(one.space, {HOLD: None}, one.fence) for one in held))
            raise
        results = iter(done)
        return [ok and next(results) for ok in stand]

    async def _store(self, name: str, messages: Sequence[Sent]) -> list[int]:
        made = self._made.get(name)
        if made is None:
            if name != self._own:
                raise ShutOut("it has no producer any more")
            made = await self._begin(name)
        work = asyncio.ensure_future(asyncio.to_thread(made.store, messages, self._headers))
        try:
            return await asyncio.shield(work)
        except BaseException as error:
            if not isinstance(error, Aborted):
                self._made.pop(name, None)
                await asyncio.wait([work])  # a thread is not cancelled, and nothing is given up before it has ended
                await asyncio.to_thread(made.close)
            raise

    async def _begin(self, name: str) -> Transactor:
        made = self._made[name] = await asyncio.to_thread(self._make, self._prefix + name)
        return made

    async def keep(self, members: Iterable[str]) -> None:
        """The members that this process has; others have left."""
        gone = [self._made.pop(name) for name in self._made.keys() - {self._own, *members}]
        await asyncio.gather(*(asyncio.to_thread(made.close) for made in gone))

    async def before_claims(self, store: LogStore, spaces: Iterable[str], living: Mapping[str, str], me: str) -> None:
        """Have a producer, as what is claimed from now on may be settled by it; shut out members that are gone.

        Also those of other groups that died in a transaction: until it is aborted nobody reads what stands behind it.
        Raises KafkaException.
        """
        stuck = [space for space in store.spaces() if store.get(space, HOLD)] if store.state.holds else []
        left: list[tuple[str, bytes | None]] = []
        gone: dict[str, dict[str, bytes]] = {}
        for space in {*spaces, *stuck}:
            value = store.get(space, "!owner")
            member = "" if value is None else decode_ownership(value).member
            if value is not None and member and member not in living and self._shut.get(space) != value:
                gone.setdefault(member, {})[space] = value
            if space in stuck and member not in living:
                left.append((space, value))
        async with self._lock:
            if me not in self._made:
                await self._begin(me)
            for member, owned in gone.items():
                await self._shut_out(member)
                self._shut |= owned
        for space, value in left:  # nobody may ever claim it, and no generation would end
            await store.write(space, {HOLD: None}, ("!owner", value))

    async def overrule(self, space: str, value: bytes) -> None:
        """The owner of a space is about to lose it: shut it out, unless that was done. Raises KafkaException."""
        if self._shut.get(space) != value:
            await self._shut_out(decode_ownership(value).member)
            self._shut[space] = value

    async def _shut_out(self, member: str) -> None:
        """Abort what a member has under way, and let it commit no more."""
        await asyncio.to_thread(lambda: self._make(self._prefix + member).close())
