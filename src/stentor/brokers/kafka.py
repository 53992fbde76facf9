"""The Kafka broker: a Kafka topic for each topic, spaces and leases in topics of one partition.

The client library works in threads of its own and is asked from threads of ours: a ``Sender`` produces and hears of
deliveries, a ``KafkaFeed`` reads partitions, a ``Looker`` reads a few messages at once. Nothing here joins a Kafka
consumer group: see ``docs/decisions`` for why.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from operator import gt
from typing import Any, TypeVar

import msgspec
from confluent_kafka import OFFSET_INVALID, IsolationLevel, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from stentor.broker import Durable, Features, Finding, weakest
from stentor.brokers import findings
from stentor.brokers.kafka_client import ASK_PATIENCE, KafkaFeed, Looker, Sender, client_settings
from stentor.brokers.kafka_transactions import Aborted, Sent, Transactions
from stentor.brokers.log_consumer import decode_ownership
from stentor.brokers.log_state import LogStateBroker, MessageHeart, encode_lease
from stentor.brokers.logstore import HOLD, Dropped
from stentor.brokers.storage import Entry, ShutOut, Stored, TopicRecord, Write
from stentor.brokers.trust import refused, refuses_certificate, trust
from stentor.brokers.wire import CONTENT_TYPE, unpack
from stentor.clock import Clock
from stentor.connect import BrokerUrl, count, switch
from stentor.errors import (
    AuthenticationFailed,
    BrokerError,
    ConfigError,
    PublishUnknown,
    StentorError,
    StorageFull,
    TooLarge,
    Unavailable,
    UnknownTopic,
)

T = TypeVar("T")
OPEN_PATIENCE = 5.0
MARKED_WITHIN = 5.0
"""Seconds in which the leaders hear of a commit; behind a transaction that stays open nobody waits longer."""

log = logging.getLogger("stentor.broker")

_EARLIEST, _LATEST = OffsetSpec.earliest(), OffsetSpec.latest()
_STORED, _COMMITTED = IsolationLevel.READ_UNCOMMITTED, IsolationLevel.READ_COMMITTED
_HEADERS = [("content-type", CONTENT_TYPE.encode())]

_GONE = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}
_REFUSED = {
    KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.UNSUPPORTED_SASL_MECHANISM, KafkaError.ILLEGAL_SASL_STATE,
}  # fmt: skip
_FORBIDDEN = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}  # fmt: skip
_NO_ANSWER = {KafkaError._TIMED_OUT, KafkaError.REQUEST_TIMED_OUT, KafkaError._TRANSPORT, KafkaError.NOT_CONTROLLER}
_MOVING = {KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE}
_NOT_SENT = {KafkaError._PURGE_QUEUE, KafkaError.NOT_ENOUGH_REPLICAS}


class Moving(Unavailable):
    """A partition is led by another node than was asked, or by none yet."""


def _line(error: KafkaError) -> str:
    return " ".join(error.str().split())


def _failure(broker: object, error: KafkaError) -> StentorError:
    """What a refusal of the server means."""
    code, text = error.code(), f"{broker}: {_line(error)}"
    if code in _GONE:
        return UnknownTopic(text)
    if code in _REFUSED:
        return AuthenticationFailed(text)
    if code == KafkaError.MSG_SIZE_TOO_LARGE:
        return TooLarge(text)
    if code == KafkaError.KAFKA_STORAGE_ERROR:
        return StorageFull(text)
    if code in _FORBIDDEN:
        return BrokerError(text)
    return Moving(text) if code in _MOVING else Unavailable(text)


def _end(part: list[Any]) -> None:
    """End a client, and drop it: the library takes up to a second to let one go. Blocks."""
    if not isinstance(part[0], AdminClient):
        part[0].close()
    part.clear()


class KafkaBroker(LogStateBroker):
    """``kafka://[user:password@]host[:9092][,another]``. Kafka 3.9 or newer.

    Options: those of ``LogBroker``, ``tls=1``, ``ca``, ``cert``, ``key`` (files; TLS always verifies the server),
    ``sasl`` (the mechanism for user and password, default SCRAM-SHA-512), ``replicas`` (of the topics that this program
    makes, default: the server's ``default.replication.factor``), ``flush`` (1: the server writes each event to its
    disk before it confirms; default: where there are fewer than three replicas) and ``transactions`` (1: a settlement
    and the events that its handler published are one transaction; for all programs of a namespace alike).
    """

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        super().__init__(url, clock)
        self.tls = tls = trust(url, 9092)
        self._replicas = url.option("replicas", 0, count)
        self._flush_wanted = url.option("flush", None, switch)
        self._settings = client_settings(url, tls)
        self.features = Features(
            name="kafka", durable="host", shared=True, atomic=url.option("transactions", False, switch), dedupe=False,
            replay=True, cancel=True, browse=True, one_order=False,
        )  # fmt: skip
        self._largest = self.features.max_bytes + 64 * 1024
        self._data: Sender | None = None
        self._state: Sender | None = None
        self._admin: AdminClient | None = None
        self._looker: Looker | None = None
        self._trouble: KafkaError | None = None
        self._transactions: Transactions | None = None
        self._trimmed: dict[tuple[str, int], int] = {}

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def native(self) -> Producer:
        """The producer of the confluent-kafka library that events are published with."""
        return self.data.producer

    @property
    def data(self) -> Sender:
        if self._data is None:
            raise Unavailable(f"{self} is not open")
        return self._data

    @property
    def state(self) -> Sender:
        """The sender of what the groups remember, so that it does not wait behind events."""
        if self._state is None:
            raise Unavailable(f"{self} is not open")
        return self._state

    async def connect(self) -> None:
        self._admin = self._make_admin()
        await self._reach()
        await self._learn()
        self._looker = Looker(self._settings)
        self._data = Sender(self._settings, self._largest)
        self._state = Sender(self._settings, self._largest)
        if self.features.atomic:
            self._transactions = Transactions(self._settings, self._largest, self.prefix, _HEADERS)
        await self.open_state()

    async def disconnect(self) -> None:
        await self.close_state()
        if self._transactions is not None:
            await self._transactions.close()
            self._transactions = None
        ending = [[part] for part in (self._data, self._state, self._looker, self._admin) if part is not None]
        self._data = self._state = self._looker = self._admin = None
        await asyncio.gather(*(asyncio.to_thread(_end, part) for part in ending))

    def _failed(self, error: KafkaError) -> None:
        if self._trouble is None or self._trouble.code() not in _REFUSED:
            self._trouble = error

    def _make_admin(self) -> AdminClient:
        return AdminClient({**self._settings, "error_cb": self._failed})

    async def _reach(self) -> None:
        """Until the server answers, or says that it will not. Raises AuthenticationFailed or Unavailable."""
        deadline = time.monotonic() + OPEN_PATIENCE
        self._trouble = None
        while True:
            try:
                await self._metadata(0.5, self.lease_topic)  # of all topics it can be long
                return
            except Unavailable as error:
                trouble = self._trouble
                if trouble is not None and refuses_certificate(_line(trouble)):
                    raise refused(self, _line(trouble)) from None
                if trouble is not None and trouble.code() in _REFUSED:
                    raise _failure(self, trouble) from None
                if time.monotonic() > deadline:
                    why = f": {_line(trouble)}" if trouble is not None else ""
                    raise Unavailable(f"{self} cannot be reached{why}") from error

    async def _metadata(self, patience: float, topic: str | None = None) -> Any:
        admin = self._asked()

        def ask() -> Any:
            try:
                return admin.list_topics(topic, timeout=patience) if topic else admin.list_topics(timeout=patience)
            finally:
                admin.poll(0)  # errors of the connection are told here

        try:
            return await asyncio.to_thread(ask)
        except KafkaException as error:
            raise _failure(self, error.args[0]) from None

    def _asked(self) -> AdminClient:
        if self._admin is None:
            raise Unavailable(f"{self} is not open")
        return self._admin

    async def _learn(self) -> None:
        """What a confirmed event survives here, by the server's settings."""
        nodes = itertools.cycle((await self._metadata(ASK_PATIENCE, self.lease_topic)).brokers)

        async def ask(patience: float) -> int:
            node = ConfigResource(ResourceType.BROKER, str(next(nodes)))
            answer = await self._answer(self._asked().describe_configs([node], request_timeout=patience))
            return int(answer[node]["default.replication.factor"].value)

        try:
            self._replicas = self._replicas or await self._ask(ask)
        except BrokerError as error:  # one may not be allowed to ask
            if isinstance(error, Unavailable):
                raise
            self._replicas = 1
        self._flush_each = self._replicas < 3 if self._flush_wanted is None else self._flush_wanted
        durable: Durable = "replica" if self._replicas >= 3 else "host" if self._flush_each else "process"
        self.features = msgspec.structs.replace(self.features, durable=durable)

    async def survives(self, topics: Sequence[str]) -> Durable:
        async def ask(patience: float) -> dict[Any, Any]:
            asked = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
            return await self._answer(self._asked().describe_configs(asked, request_timeout=patience))

        heard = await asyncio.gather(*(self._metadata(ASK_PATIENCE, topic) for topic in topics))
        levels: set[Durable] = set()
        for place, settings in (await self._ask(ask)).items():
            parts = heard[topics.index(place.name)].topics[place.name].partitions.values()
            copies = min((len(part.replicas) for part in parts), default=0)
            if min(copies, int(settings["min.insync.replicas"].value)) >= 2:  # so many have what is confirmed
                levels.add("replica")
            else:
                flushed = self._flush_wanted is not False and settings["flush.messages"].value == "1"
                levels.add("host" if flushed else "process")
        return weakest(levels)

    async def _answer(self, asked: Mapping[Any, Future[Any]]) -> dict[Any, Any]:
        """What the server answers to each of several questions; the first refusal is raised."""
        futures = [asyncio.wrap_future(future) for future in asked.values()]
        try:
            async with asyncio.timeout(ASK_PATIENCE + 5):
                answers = await asyncio.gather(*futures)
        except TimeoutError:
            raise Unavailable(f"{self} does not answer") from None
        except KafkaException as error:
            await asyncio.wait(futures, timeout=ASK_PATIENCE + 5)
            raise _failure(self, error.args[0]) from None
        return dict(zip(asked, answers, strict=True))

    async def _ask(self, question: Callable[[float], Awaitable[T]], topic: str | None = None) -> T:
        """What is answered to a question, which gets the seconds that it may take and is repeated where need be.

        The client goes by what it heard of a topic, an old leader or that there is none, for a quarter of an hour, and
        waits for a node that died: after a short while it is to hear anew.
        """
        began, wait, patience = time.monotonic(), 0.0, 1.0
        while True:
            try:
                if wait:
                    await asyncio.sleep(wait)
                    heard = await self._metadata(ASK_PATIENCE, topic)
                    if topic is not None and (error := heard.topics[topic].error) is not None:
                        raise _failure(self, error)
                return await question(patience)
            except (UnknownTopic, Unavailable) as failed:  # it was made, moved or cut off just now
                # A busy server answers that it does not lead yet, for as long as it makes other topics.
                longest = (ASK_PATIENCE + 2) * (3 if isinstance(failed, Moving) else 1)
                if time.monotonic() > began + longest or (isinstance(failed, UnknownTopic) and wait > 0.5):
                    raise
            wait = min(1.0, 2 * wait or 0.02)
            patience = min(2 * patience, ASK_PATIENCE)

    async def ping(self) -> None:
        try:
            found = (await self._metadata(3.0, self.lease_topic)).topics[self.lease_topic]
        except Unavailable:
            why = f": {_line(self._trouble)}" if self._trouble is not None else ""
            raise Unavailable(f"{self} does not answer{why}") from None
        if found.error is not None:
            raise _failure(self, found.error)
        for part in found.partitions.values():
            if part.leader < 0:
                raise Unavailable(f"{self}: a partition has no leader now, too many nodes are down")
            if len(part.replicas) >= 3 and len(part.isrs) < 2:
                raise Unavailable(
                    f"{self}: {len(part.isrs)} of {len(part.replicas)} replicas are in step, 2 are needed"
                )
        await self.stores()

    async def review(self) -> list[Finding]:
        heard = await self._metadata(ASK_PATIENCE)
        nodes, known = heard.brokers, heard.topics
        stored = {record.stored for record in (await self.records())[0].values()}
        names = [name for name in known if name in stored or name.startswith(f"{self.prefix}stentor.")]
        parts = [part for name in names for part in known[name].partitions.values()]
        fewest = min(len(part.replicas) for part in parts)
        advice = "kafka-reassign-partitions gives these topics more; replicas=3 those made from now on"
        found = [
            Finding("nodes", "ok", str(len(nodes))),
            Finding("replicas", "ok", str(fewest))
            if fewest >= 3 or len(nodes) < 3
            else Finding("replicas", "warn", f"{fewest}, where {len(nodes)} nodes could keep three", advice),
        ]
        if behind := sum(len(part.isrs) < len(part.replicas) for part in parts):
            text = f"{behind} of {len(parts)} partitions lack one"
            found.append(Finding("in step", "warn", text, "a node is away or slow: see that it comes back"))
        asked = [ConfigResource(ResourceType.TOPIC, name) for name in names]
        answers = await self._answer(self._asked().describe_configs(asked, request_timeout=ASK_PATIENCE))
        wanted = {"unclean.leader.election.enable": "false", "cleanup.policy": "delete", "retention.ms": "-1"}
        if self._flush_each:
            wanted["flush.messages"] = "1"
        if fewest >= 3:
            wanted["min.insync.replicas"] = "2"
        for setting, good in wanted.items():
            others = {
                resource.name: entries[setting].value
                for resource, entries in answers.items()
                if entries[setting].value != good
                and not (setting == "retention.ms" and resource.name == self.lease_topic)
            }
            told = ", ".join(f"{name} has {value}" for name, value in others.items())
            found.append(findings.setting(setting, told or good, [good], "confirmed events can be lost"))
        return found

    # ---- data -------------------------------------------------------------------------------------------------------

    async def make_topic(self, topic: str, partitions: int) -> None:
        await self._make(topic, partitions)

    async def make(self, topic: str, partitions: int = 1, keep: float = -1, *, fewer: bool = False) -> None:
        await self._make(topic, partitions, keep, fewer=fewer)
        await self.state.meet({topic})

    async def _make(self, topic: str, partitions: int, keep: float = -1, *, fewer: bool = False) -> None:
        settings: dict[str, object] = {
            "retention.ms": -1 if keep < 0 else int(keep * 1000), "retention.bytes": -1, "cleanup.policy": "delete",
            "max.message.bytes": self._largest, "message.timestamp.type": "LogAppendTime",
        }  # fmt: skip
        if self._flush_each:
            settings["flush.messages"] = 1
        if self._replicas >= 3:
            settings["min.insync.replicas"] = 2
        replicas = self._replicas
        config = {name: str(value) for name, value in settings.items()}
        deadline = time.monotonic() + ASK_PATIENCE
        while True:
            error = await self._ask(partial(self._create, NewTopic(topic, partitions, replicas, config=config)))
            # Of a node that has begun to answer and is not ready, or of one that is down.
            if error is None or error.code() != KafkaError.INVALID_REPLICATION_FACTOR or time.monotonic() > deadline:
                break
            replicas = self._replicas - (fewer and replicas == self._replicas >= 3)
            await asyncio.sleep(0.1)
        if error is None:
            await self._led(topic)
            return
        if error.code() == KafkaError.TOPIC_EXCEPTION:
            raise ConfigError(f"{self}: topic {topic}: {_line(error)}")
        if error.code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise _failure(self, error)
        found = (await self._metadata(ASK_PATIENCE, topic)).topics[topic]
        if found.partitions and len(found.partitions) != partitions:
            raise self.otherwise(topic, len(found.partitions), partitions)

    async def _led(self, topic: str) -> None:
        """Until the server knows who leads each partition of a topic that was just made: a busy one takes seconds."""
        deadline = time.monotonic() + ASK_PATIENCE
        wait = 0.0
        while True:
            await asyncio.sleep(wait)
            found = (await self._metadata(ASK_PATIENCE, topic)).topics[topic]
            if found.error is None and all(part.leader >= 0 for part in found.partitions.values()):
                return
            if time.monotonic() > deadline:
                raise Unavailable(f"{self}: topic {topic} was made, and has no leaders yet")
            wait = min(1.0, 2 * wait or 0.01)

    async def _create(self, new: NewTopic, patience: float) -> KafkaError | None:
        try:
            [future] = self._asked().create_topics([new], request_timeout=patience).values()
            await asyncio.wrap_future(future)
        except KafkaException as error:
            reason: KafkaError = error.args[0]
            if reason.code() in _NO_ANSWER:
                raise _failure(self, reason) from None
            return reason
        return None

    async def append(self, entries: Sequence[Entry]) -> Sequence[int | StentorError]:
        sent = [
            (e.topic, e.partition, e.body, None if e.message.key is None else e.message.key.encode(errors="replace"))
            for e in entries
        ]
        if self._transactions is not None and len(sent) > 1:
            return await self._together(self._transactions, entries, sent)
        await self.data.meet({entry.topic for entry in entries})
        results: list[int | StentorError] = []
        for entry, result in zip(entries, await self.data.send(sent, _HEADERS), strict=True):
            results.append(result if isinstance(result, int) else self._unsent(entry, result))
        return results

    def _unsent(self, entry: Entry, error: KafkaError) -> StentorError:
        found = _failure(self, error)
        if isinstance(found, Unavailable) and error.code() not in _NOT_SENT:
            return PublishUnknown([entry.message.id], _line(error))
        return found

    async def _together(
        self, transactions: Transactions, entries: Sequence[Entry], sent: Sequence[Sent]
    ) -> Sequence[int | StentorError]:
        try:
            return await transactions.publish(sent)
        except Aborted as error:
            return [_failure(self, error.error)] * len(sent)
        except ShutOut as error:
            raise PublishUnknown([entry.message.id for entry in entries], str(error)) from None
        except KafkaException as error:
            raise _failure(self, error.args[0]) from None

    async def write(self, writes: Sequence[Write]) -> list[bool]:
        if self._transactions is not None and any(one.outputs for one in writes):
            try:
                return await self._transactions.write(self.spaces, writes)
            except Aborted as error:
                raise _failure(self, error.error) from None
        for one in writes:
            if "!owner" in one.changes:  # what a former owner was about to do, nobody does any more
                one.changes[HOLD] = None
                await self._overrule(one)
        return await super().write(writes)

    async def _overrule(self, write: Write) -> None:
        """Before another process's member loses a partition: shut it out. It was, where the member is dead."""
        value = write.fence[1]
        if self._transactions is None or value is None:
            return
        ours = self._heartbeat.members if self._heartbeat is not None else {}
        member = decode_ownership(value).member
        if member and member not in ours:
            try:
                await self._transactions.overrule(write.space, value)
            except KafkaException as error:
                raise _failure(self, error.args[0]) from None

    async def before_claims(self, spaces: Sequence[str], living: Mapping[str, str], me: str) -> None:
        if self._transactions is not None:
            try:
                await self._transactions.keep(self.heartbeat.members)
                await self._transactions.before_claims(self.spaces, spaces, living, me)
            except KafkaException as error:
                raise _failure(self, error.args[0]) from None

    def feed(self) -> KafkaFeed:
        return KafkaFeed(self._settings, self._broken)

    def _broken(self, error: KafkaError) -> Unavailable | None:
        """What an error of a reader means; None for those that pass by themselves."""
        text = f"{self}: {_line(error)}"
        return Dropped(text) if error.code() in _GONE else Unavailable(text)

    async def tell(self, topic: str, value: bytes) -> int:
        [result] = await self.state.send([(topic, 0, value, None)])
        if isinstance(result, int):
            return result
        error = _failure(self, result)
        raise error if isinstance(error, UnknownTopic) else Unavailable(str(error))

    async def told(self, topic: str) -> list[bytes]:
        # A topic without leaders is there: only the metadata tell at once that there is none.
        found = (await self._metadata(ASK_PATIENCE, topic)).topics[topic]
        if found.error is not None:
            raise _failure(self, found.error)
        [(first, end)] = await self.bounds(topic, [0])
        if end <= first:
            return []
        [messages] = await self._look([(topic, 0, max(first, end - 32))], min(32, end - first))
        return [message.value() or b"" for message in messages]

    async def remove(self, topic: str) -> None:
        with contextlib.suppress(UnknownTopic):
            await self._answer(self._asked().delete_topics([topic], request_timeout=ASK_PATIENCE))

    async def _offsets(
        self, topic: str, partitions: Sequence[int], what: OffsetSpec, seen: IsolationLevel = _STORED
    ) -> list[int]:
        asked = {TopicPartition(topic, index): what for index in partitions}

        async def ask(patience: float) -> list[int]:
            listing = self._asked().list_offsets(asked, isolation_level=seen, request_timeout=patience)
            answers = await self._answer(listing)
            found = {cell.partition: answer.offset for cell, answer in answers.items()}
            if OFFSET_INVALID in found.values():  # what the client says of a leader that did not answer in time
                raise Unavailable(f"{self}: a leader of {topic} does not answer")
            return [found[index] for index in partitions]

        return await self._ask(ask, topic)

    async def bounds(self, topic: str, partitions: Sequence[int]) -> list[tuple[int, int]]:
        firsts, ends = await asyncio.gather(
            self._offsets(topic, partitions, _EARLIEST), self._offsets(topic, partitions, _LATEST)
        )
        return list(zip(firsts, ends, strict=True))

    async def find(self, topic: str, partitions: Sequence[int], moment: float) -> list[int]:
        # The ends first: where no event is as late, those that come now must not count as earlier, and be trimmed.
        ends = await self._offsets(topic, partitions, _LATEST)
        found = await self._offsets(topic, partitions, OffsetSpec.for_timestamp(max(0, int(moment * 1000))))
        return [end if offset < 0 else offset for offset, end in zip(found, ends, strict=True)]

    async def pending(self, places: Sequence[tuple[str, int, int]]) -> list[tuple[int, float | None]]:
        topics: dict[str, set[int]] = {}
        for topic, index, _ in places:
            topics.setdefault(topic, set()).add(index)
        names = {topic: sorted(indexes) for topic, indexes in topics.items()}
        bounds = await asyncio.gather(*(self.bounds(topic, indexes) for topic, indexes in names.items()))
        known = {
            (topic, index): bound
            for (topic, indexes), found in zip(names.items(), bounds, strict=True)
            for index, bound in zip(indexes, found, strict=True)
        }
        starts: list[tuple[str, int, int]] = []
        counts = []
        for topic, index, offset in places:
            first, end = known[topic, index]
            counts.append(max(0, end - max(first, offset)))
            starts.append((topic, index, max(first, offset)))
        wanted = list(dict.fromkeys(place for place, count in zip(starts, counts, strict=True) if count))
        times = await self._times(wanted)
        # Where there is none, nothing is left but marks of where transactions ended, or one of them is still open.
        unseen = {place[:2] for place in wanted if place not in times}
        closed = set()
        for topic, index in unseen:
            [end] = await self._offsets(topic, [index], _LATEST, _COMMITTED)
            if end >= known[topic, index][1]:
                closed.add((topic, index))
        return [
            (count, times.get(place)) if count and (place in times or place[:2] not in closed) else (0, None)
            for place, count in zip(starts, counts, strict=True)
        ]

    async def _times(self, places: Sequence[tuple[str, int, int]]) -> dict[tuple[str, int, int], float]:
        """When the message at each place was stored."""
        left = list(places)
        times: dict[tuple[str, int, int], float] = {}
        while left:
            turn: dict[tuple[str, int], tuple[str, int, int]] = {}
            for place in left:
                turn.setdefault(place[:2], place)  # a look reads a partition at one place only
            now = list(turn.values())
            for place, found in zip(now, await self._look(now, 1), strict=True):
                if found:
                    times[place] = found[0].timestamp()[1] / 1000
            left = [place for place in left if place not in now]
        return times

    async def _look(self, places: Sequence[tuple[str, int, int]], limit: int) -> list[list[Any]]:
        for last in (False, True):
            if self._looker is None:
                raise Unavailable(f"{self} is not open")
            try:
                return await asyncio.to_thread(self._looker.look, places, limit)
            except KafkaException as error:
                found = _failure(self, error.args[0])
                if last or not isinstance(found, Unavailable):  # a connection that fell silent is noticed by asking
                    raise found from None
            except RuntimeError as error:  # closed
                raise Unavailable(f"{self}: {error}") from None
        raise AssertionError

    async def await_visible(self, record: TopicRecord) -> None:
        # A commit is confirmed when its coordinator has it; the leaders, who then let it be read, hear of it later.
        indexes = range(record.partitions)
        ends = await self._offsets(record.stored, indexes, _LATEST)
        deadline = time.monotonic() + MARKED_WITHIN
        while any(map(gt, ends, await self._offsets(record.stored, indexes, _LATEST, _COMMITTED))):
            if time.monotonic() > deadline:
                log.warning(
                    "%s: what stands in %s behind a transaction that does not end is not seen", self, record.stored
                )
                return
            await asyncio.sleep(0.01)

    async def page(self, topic: str, index: int, offset: int, limit: int) -> Sequence[Stored]:
        [(first, end)] = await self.bounds(topic, [index])
        offset = max(offset, first)
        if offset >= end:
            return []
        [found] = await self._look([(topic, index, offset)], limit)
        name = topic.removeprefix(self.prefix)
        return [
            Stored(m.offset(), m.timestamp()[1] / 1000, unpack(m.value() or b"", name, f"{index}-{m.offset()}"))
            for m in found
        ]

    async def trim(self, topic: str, index: int, offset: int) -> None:
        if self._trimmed.get((topic, index), 0) >= offset:
            return
        await self._answer(
            self._asked().delete_records([TopicPartition(topic, index, offset)], request_timeout=ASK_PATIENCE)
        )
        self._trimmed[topic, index] = offset

    # ---- leases -----------------------------------------------------------------------------------------------------

    def heart(self) -> _Heart:
        return _Heart(self)


class _Heart(MessageHeart):
    def beat(self, name: str, value: bytes, lease: float) -> None:
        told = threading.Event()
        found: list[Any] = []

        def report(error: KafkaError | None, message: Any) -> None:
            found.append(error or message.offset())
            told.set()

        body = encode_lease((name, value, lease))
        if self._broker.state.produce(report, self._broker.lease_topic, 0, value=body) is None:
            raise OSError("no room to send the lease")
        if not told.wait(self._patience) or not isinstance(found[0], int):
            raise OSError(f"the lease was not taken: {found or 'no answer'}")
        self._broker.beaten = max(self._broker.beaten, found[0])
