"""Kafka's client library in threads of its own: what sends, what reads on, what looks at a few messages."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from stentor.broker import FETCH_BYTES
from stentor.brokers.log_state import Feed, Read
from stentor.brokers.trust import Trust
from stentor.connect import BrokerUrl
from stentor.errors import Unavailable

SEND_PATIENCE = 10.0
"""Seconds after which a message that is not confirmed is given up."""
ASK_PATIENCE = 10.0
"""Seconds that the server has for an answer."""
AHEAD = 2000
"""Messages that a reader keeps ready."""
FETCH_WAIT = 50
"""Milliseconds that the server holds a fetch that finds nothing: what is begun to be read meanwhile waits for it."""


def client_settings(url: BrokerUrl, tls: Trust | None) -> dict[str, Any]:
    """What every client of a URL is made with; takes the option ``sasl``."""
    mechanism = url.option("sasl", "SCRAM-SHA-512")
    settings: dict[str, Any] = {
        "bootstrap.servers": ",".join(map(str, url.addresses(9092))), "client.id": "stentor", "log_level": 2,
        "allow.auto.create.topics": False,  # by asking; it would have the server's settings, which remove what is old
        "reconnect.backoff.ms": 50, "reconnect.backoff.max.ms": 1000, "socket.timeout.ms": 5_000,
        "socket.keepalive.enable": True, "socket.nagle.disable": True, "topic.metadata.refresh.fast.interval.ms": 20,
        "security.protocol": ("SASL_" if url.user else "") + ("SSL" if tls else "PLAINTEXT"),
    }  # fmt: skip
    if url.user:
        settings |= {"sasl.mechanism": mechanism, "sasl.username": url.user, "sasl.password": url.password or ""}
    if tls:
        named = {"ssl.ca.location": tls.ca, "ssl.certificate.location": tls.cert, "ssl.key.location": tls.key}
        settings |= {name: value for name, value in named.items() if value}
    return settings


def _hear(producer: Producer, seconds: float) -> None:
    """Let a producer tell what became of its messages."""
    with contextlib.suppress(KafkaException):  # the fatal error that ends it is raised here, once; a send meets it too
        producer.poll(seconds)


def meet(client: Consumer | Producer, met: set[str], topics: set[str], patience: float = ASK_PATIENCE) -> None:
    """Ask where topics are: by itself a client looks for those that it does not know once a second only."""
    for topic in topics - met:
        client.list_topics(topic, timeout=patience)
        met.add(topic)


class Sender:
    """A producer, and the thread that hears what became of its messages.

    A message that is given up ends the producer (``enable.gapless.guarantee``), so that none behind it is stored; the
    next send begins with a new one.
    """

    def __init__(self, settings: Mapping[str, Any], max_bytes: int) -> None:
        self._settings = {
            **settings, "acks": "all", "enable.idempotence": True, "enable.gapless.guarantee": True,
            "linger.ms": 0, "delivery.timeout.ms": int(SEND_PATIENCE * 1000), "message.max.bytes": max_bytes,
            "batch.size": 1024 * 1024, "topic.metadata.propagation.max.ms": 3000,
            "queue.buffering.max.kbytes": 256 * 1024,
        }  # fmt: skip
        self._lock = threading.Lock()
        self._producer = Producer(self._settings)
        self._met: set[str] = set()
        self._ended: deque[Producer] = deque()
        """Producers that were given up and have not told of all their messages yet."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="stentor kafka producer", daemon=True)
        self._thread.start()

    @property
    def producer(self) -> Producer:
        return self._producer

    def _run(self) -> None:
        while not self._closing:
            _hear(self._producer, 0.02 if self._ended else 0.1)
            for _ in range(len(self._ended)):
                producer = self._ended.popleft()
                _hear(producer, 0)
                if len(producer):  # what it had sent is given back in its own time
                    self._ended.append(producer)

    def _renew(self, broken: Producer) -> None:
        """Give a producer up."""
        with self._lock:
            if self._producer is broken:
                broken.purge(in_queue=True, in_flight=True)
                self._ended.append(broken)
                self._producer, self._met = Producer(self._settings), set()

    def close(self) -> None:
        """Give up what is not confirmed, and end the thread. Blocks."""
        self._closing = True
        self._thread.join(10)
        self._producer.purge(in_queue=True, in_flight=True)
        deadline = time.monotonic() + 5
        for producer in (self._producer, *self._ended):
            while len(producer) and time.monotonic() < deadline:
                _hear(producer, 0.1)

    async def meet(self, topics: set[str]) -> None:
        """Ask where topics are: else the first message waits up to a second."""
        if new := topics - self._met:
            self._met |= new
            with contextlib.suppress(KafkaException):  # the messages meet it, too
                await asyncio.to_thread(meet, self._producer, set(), new, 1.0)

    def produce(
        self,
        report: Callable[[Any, Any], None],
        topic: str,
        index: int,
        *,
        behind: Producer | None = None,
        **message: Any,
    ) -> Producer | None:
        """Hand a message over; None when there is no room now, else the producer that has it.

        ``report`` gets an error or the stored message. A message that must not be stored unless those before it are
        names the producer that has them in ``behind``.
        """
        producer = self._producer if behind is None else behind
        try:
            producer.produce(topic, partition=index, on_delivery=report, **message)
        except BufferError:
            return None
        except KafkaException as error:
            reason: KafkaError = error.args[0]
            if reason.code() == KafkaError._FATAL or reason.fatal():
                self._renew(producer)
                if behind is None:
                    return self.produce(report, topic, index, **message)
                reason = KafkaError(KafkaError._PURGE_QUEUE)
            report(reason, None)
        return producer

    async def send(
        self, messages: Sequence[tuple[str, int, bytes, bytes | None]], headers: list[tuple[str, bytes]] | None = None
    ) -> list[int | KafkaError]:
        """Store messages (topic, partition, value, key); an offset or an error for each.

        Of one that is not stored, none behind it is.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        results: list[Any] = [None] * len(messages)
        told: list[int] = []

        def resolve() -> None:
            if not future.done():
                future.set_result(None)

        def report(number: int, error: KafkaError | None, message: Any) -> None:
            results[number] = message.offset() if error is None else error
            told.append(number)
            if len(told) == len(results):
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(resolve)

        producer: Producer | None = None
        for number, (topic, index, value, key) in enumerate(messages):
            tell = partial(report, number)
            while (  # noqa: ASYNC110  the client does not say when there is room
                taken := self.produce(tell, topic, index, behind=producer, value=value, key=key, headers=headers)
            ) is None:
                await asyncio.sleep(0.005)
            producer = taken
        await future
        return results


class KafkaFeed(Feed):
    """A consumer in a thread, which reads partitions from offsets on and keeps what it read until it is taken."""

    def __init__(self, settings: Mapping[str, Any], broken: Callable[[KafkaError], Unavailable | None]) -> None:
        super().__init__()
        self._broken = broken
        self._settings = {
            **settings, "group.id": "stentor", "enable.auto.commit": False, "auto.offset.reset": "earliest",
            "isolation.level": "read_committed", "queued.max.messages.kbytes": 16 * 1024,
            "fetch.wait.max.ms": FETCH_WAIT, "fetch.error.backoff.ms": 100,
            "fetch.queue.backoff.ms": 50, "max.poll.interval.ms": 86_400_000,
        }  # fmt: skip
        self._loop = asyncio.get_running_loop()
        self._live: set[Any] = set()
        self._met: set[str] = set()
        self._commands: deque[tuple[Any, tuple[str, int, int] | None]] = deque()
        self._buffer: deque[Read] = deque()
        self._added = self._taken = 0
        self._work = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def seek(self, token: Any, topic: str, index: int, offset: int) -> None:
        """Read a partition from an offset on; what is read is marked with ``token``."""
        self._live.add(token)
        self._commands.append((token, (topic, index, offset)))
        self._work.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stentor kafka consumer", daemon=True)
            self._thread.start()

    def drop(self, token: Any) -> None:
        """Read no more for a token."""
        self._live.discard(token)
        self._commands.append((token, None))
        self._work.set()

    def take(self, limit: int) -> list[Read]:
        """What was read by now."""
        found: list[Read] = []
        buffer, live = self._buffer, self._live
        while buffer and len(found) < limit:
            read = buffer.popleft()
            self._taken += len(read.value)
            if read.token in live:
                found.append(read)
        if len(buffer) < AHEAD:
            self._work.set()
        return found

    async def close(self) -> None:
        self._closing = True
        self._work.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 10)

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._ready.set)

    def _failed(self, error: KafkaError) -> None:
        self._trouble = self._broken(error)
        self._wake()

    def _run(self) -> None:
        consumer = Consumer({**self._settings, "error_cb": self._failed})
        tokens: dict[tuple[str, int], Any] = {}
        while not self._closing:
            while self._commands:
                self._command(consumer, tokens, *self._commands.popleft())
            if not tokens or len(self._buffer) >= AHEAD or self._added - self._taken > FETCH_BYTES:
                self._work.wait(0.1)
                self._work.clear()
                consumer.poll(0) if not tokens else None
                continue
            # Waits for one, then takes what is there: ``consume`` alone waits until it has all that it may bring.
            first = consumer.poll(0.02)
            if first is None:
                continue
            found = 0
            for message in (first, *consumer.consume(500, 0)):
                error = message.error()
                if error is not None:
                    self._failed(error)
                    continue
                token = tokens.get((message.topic() or "", message.partition() or 0))
                if token is not None:
                    value = message.value() or b""
                    self._added += len(value)
                    found += 1
                    self._buffer.append(Read(token, message.offset() or 0, message.timestamp()[1] / 1000, value))
            if found:
                self._trouble = None
                self._wake()
        consumer.close()

    def _command(
        self, consumer: Consumer, tokens: dict[tuple[str, int], Any], token: Any, place: tuple[str, int, int] | None
    ) -> None:
        if place is None:
            mine = [cell for cell, held in tokens.items() if held is token]
        else:
            mine = [place[:2]] if place[:2] in tokens else []
        if mine:
            consumer.incremental_unassign([TopicPartition(*cell) for cell in mine])
            for cell in mine:
                del tokens[cell]
        if place is not None:
            with contextlib.suppress(KafkaException):
                meet(consumer, self._met, {place[0]})
            consumer.incremental_assign([TopicPartition(*place)])
            tokens[place[:2]] = token


class Looker:
    """A consumer for a look at a few messages."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._consumer = Consumer(
            {
                **settings, "group.id": "stentor", "enable.auto.commit": False, "auto.offset.reset": "error",
                "isolation.level": "read_committed", "enable.partition.eof": True, "fetch.queue.backoff.ms": 5,
                "fetch.wait.max.ms": 1,
                "fetch.message.max.bytes": 256 * 1024,
            }
        )  # fmt: skip
        self._lock = threading.Lock()
        self._met: set[str] = set()

    def look(self, places: Sequence[tuple[str, int, int]], limit: int) -> list[list[Any]]:
        """Up to ``limit`` messages from each topic, partition and offset on. Blocks. Raises KafkaException."""
        with self._lock:
            numbers = {place[:2]: number for number, place in enumerate(places)}
            found: list[list[Any]] = [[] for _ in places]
            left = set(range(len(places)))
            deadline = time.monotonic() + ASK_PATIENCE
            meet(self._consumer, self._met, {topic for topic, _, _ in places})
            self._consumer.assign([TopicPartition(*place) for place in places])
            try:
                while left:
                    if time.monotonic() > deadline:
                        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
                    first = self._consumer.poll(0.1)
                    for message in () if first is None else (first, *self._consumer.consume(limit, 0)):
                        number = numbers.get((message.topic() or "", message.partition() or 0))
                        error = message.error()
                        if number is None or number not in left:
                            continue
                        if error is None:
                            found[number].append(message)
                        elif error.code() not in (KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET):
                            raise KafkaException(error)
                        if error is not None or len(found[number]) == limit:
                            left.discard(number)
                return found
            finally:
                self._consumer.unassign()

    def close(self) -> None:
        with self._lock:
            self._consumer.close()
