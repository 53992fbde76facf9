"""A Kafka topic of somebody else as a source. How far it was read is in the source's own position, with the events."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any, Literal

from stentor.brokers.trust import trust
from stentor.connect import BrokerUrl
from stentor.errors import ConfigError, DefinitionError, Unavailable, UnknownTopic
from stentor.source import Publish
from stentor.sources.apart import Apart
from stentor.sources.foreign import Decode, Foreign, Record, header_text
from stentor.sources.rows import To

MANY = 500
"""Messages whose events are published at once."""
LOOK = 30.0
"""Seconds after which it looks for partitions that were added."""
PATIENCE = 10.0
log = logging.getLogger("stentor.source")


class KafkaTopic(Foreign):
    """Reads all partitions: ``KafkaTopic("kafka://host", "orders", to=OrderPlaced)``.

    URL as of the broker ``kafka``, without its own options. ``to``: an event class, filled from what ``decode`` reads
    (JSON; ``avro(...)``, ``protobuf(...)``), or a function that takes a ``Record``, as ``cloudevents(app)`` is one.
    ``start``: where the first run begins. It joins no consumer group, and commits nothing in Kafka. Events of one
    partition come in their order; what was removed before it was read is told and left out.

    Raises:
        ConfigError: the URL is wrong, or confluent-kafka is not installed. DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        url: str,
        topic: str,
        *,
        to: To,
        decode: Decode | None = None,
        name: str = "kafka",
        start: Literal["earliest", "latest"] = "earliest",
    ) -> None:
        if start not in ("earliest", "latest"):
            raise DefinitionError(f'source {name}: start must be "earliest" or "latest", not {start!r}')
        super().__init__(name, topic, to, decode)
        try:
            from stentor.brokers.kafka_client import client_settings
        except ImportError:
            raise ConfigError(f"source {name} needs confluent-kafka: pip install 'stentor[kafka]'") from None
        parsed = BrokerUrl(url)
        if parsed.scheme != "kafka":
            raise ConfigError(f"{parsed} is no Kafka URL; write kafka://host:9092")
        settings = client_settings(parsed, trust(parsed, 9092))
        parsed.finish()
        self._server = str(parsed)
        self._start = start
        self._settings = settings | {
            "group.id": "stentor", "enable.auto.commit": False, "auto.offset.reset": "error",
            "isolation.level": "read_committed", "queued.max.messages.kbytes": 16 * 1024,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"source {self.name} of {self._server}"

    async def run(self, publish: Publish) -> None:
        """Read what is there, then follow, until it is stopped. Raises Unavailable or UnknownTopic."""
        from confluent_kafka import KafkaException

        try:
            with contextlib.closing(_Reading(self._settings, self._place)) as reading:
                await self._follow(reading, publish)
        except KafkaException as error:
            raise Unavailable(f"{self}: {error.args[0].str()}") from None

    async def _follow(self, reading: _Reading, publish: Publish) -> None:
        place: dict[str, int] = dict(publish.position or {})
        looked = 0.0
        while True:
            if time.monotonic() - looked > LOOK or not looked:
                first = "earliest" if place or looked else self._start  # what is added later is read as a whole
                found = await reading.call(reading.begin, place, first)
                looked = time.monotonic()
                if found != place:
                    place = found
                    await publish([], position=place)
            records, lost = await reading.call(reading.take)
            for partition, offset in lost.items():
                publish.counts.errors += 1
                log.warning("%s: %s-%d: offset %d is gone, going on behind it", self, self._place, partition, offset)
            if records:
                for partition, offset, _ in records:
                    place[str(partition)] = offset + 1
                named = [(f"{partition}-{offset}", record) for partition, offset, record in records]
                await self.take(publish, named, position=place)
            publish.counts.lag = await reading.call(reading.behind, place)


class _Reading(Apart):
    """A consumer of the topic."""

    def __init__(self, settings: dict[str, Any], topic: str) -> None:
        from confluent_kafka import Consumer

        self._consumer = Consumer(settings)
        self._topic = topic
        self._begun: set[int] = set()
        super().__init__("stentor kafka source", self._consumer.close)

    def begin(self, place: dict[str, int], start: str) -> dict[str, int]:
        """Read the partitions that are not read yet; the offset of each, those at the end made definite."""
        from confluent_kafka import TopicPartition

        about = self._consumer.list_topics(self._topic, timeout=PATIENCE).topics[self._topic]
        if about.error is not None:
            raise UnknownTopic(f"topic {self._topic}: {about.error.str()}")
        place = dict(place)
        added = []
        for partition in sorted(about.partitions.keys() - self._begun):
            if str(partition) not in place:
                low, high = self._consumer.get_watermark_offsets(
                    TopicPartition(self._topic, partition), timeout=PATIENCE
                )
                place[str(partition)] = high if start == "latest" else low
            added.append(TopicPartition(self._topic, partition, place[str(partition)]))
        if added:
            self._consumer.incremental_assign(added)
            self._begun |= {cell.partition for cell in added}
        return place

    def behind(self, place: dict[str, int]) -> int:
        """How many messages wait, as far as the last answers of the server told."""
        from confluent_kafka import TopicPartition

        ends = {
            partition: self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), cached=True)[1]
            for partition in self._begun
        }
        return sum(max(0, end - place[str(partition)]) for partition, end in ends.items())

    def take(self) -> tuple[list[tuple[int, int, Record]], dict[int, int]]:
        """What comes within a while, and the offsets that are no more. Raises KafkaException."""
        from confluent_kafka import KafkaError, KafkaException, TopicPartition

        first = self._consumer.poll(0.5)
        if first is None:
            return [], {}
        records: list[tuple[int, int, Record]] = []
        lost: dict[int, int] = {}
        for message in (first, *self._consumer.consume(MANY - 1, 0)):
            error = message.error()
            partition, offset = message.partition() or 0, message.offset() or 0
            if error is None:
                records.append((partition, offset, _record(self._topic, message)))
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                cell = TopicPartition(self._topic, partition)
                lost[partition] = offset
                cell.offset = self._consumer.get_watermark_offsets(cell, timeout=PATIENCE)[0]
                self._consumer.incremental_unassign([cell])
                self._consumer.incremental_assign([cell])
            elif not error.retriable() and error.code() not in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN):
                raise KafkaException(error)
        return records, lost


def _record(topic: str, message: Any) -> Record:
    headers = {name: header_text(value) for name, value in message.headers() or ()}
    kind, moment = message.timestamp()
    return Record(
        topic, f"{message.partition()}-{message.offset()}", message.value() or b"",
        None if message.key() is None else header_text(message.key()), headers, headers.get("content-type"),
        moment / 1000 if kind else None,
    )  # fmt: skip
