"""Peers on Kafka, each as its documentation shows: a topic of twelve partitions, keyed, confirmed by all replicas.

They are imported where they are used, because none of them has to be installed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import servers
from benchmarks.measure import Figures, timed
from benchmarks.order import decode, encode, fields, plain_orders
from benchmarks.outstanding import Seen, by_tasks

MANY = 60_000
SOME = 10_000
OUTSTANDING = 1_000
GROUP = "bench"


def server(folder: Path) -> str:
    """The URL of the row's Kafka; the first to ask starts it, it ends with the benchmark."""
    return servers.shared("kafka", folder / "server", os.getppid())


@contextmanager
def topic(folder: Path) -> Iterator[tuple[str, str]]:
    """The address of the server, and a topic of the case's own that flushes each write, as Stentor's do there."""
    from confluent_kafka.admin import AdminClient, NewTopic

    address = urlsplit(server(folder)).netloc
    name = f"orders-{secrets.token_hex(4)}"
    admin = AdminClient({"bootstrap.servers": address})
    for done in admin.create_topics([NewTopic(name, 12, 1, config={"flush.messages": "1"})]).values():
        done.result()
    try:
        yield address, name
    finally:
        for done in admin.delete_topics([name]).values():
            done.result()


# ---- the client alone ----------------------------------------------------------------------------------------------


def confluent(folder: Path) -> Figures:
    """confluent-kafka: produced with a callback each, 1,000 unconfirmed; 500 consumed, decoded, committed at once."""
    with topic(folder) as (address, name):
        return {"publish": _produce(address, name), "consume": _consume(address, name)}


def _produce(address: str, name: str) -> float:
    """With the settings of Stentor's own producer."""
    from confluent_kafka import Producer

    producer = Producer({
        "bootstrap.servers": address, "acks": "all", "enable.idempotence": True, "linger.ms": 1,
        "batch.size": 1024 * 1024, "socket.nagle.disable": True,
    })  # fmt: skip
    stored = 0

    def report(error: Any, message: Any) -> None:
        nonlocal stored
        assert error is None
        stored += 1

    orders = plain_orders(MANY)
    producer.list_topics(name)  # it is connected now
    with timed() as taken:
        for number, order in enumerate(orders):
            producer.produce(name, encode(order), order.order_id.encode(), on_delivery=report)
            producer.poll(0)
            while number - stored >= OUTSTANDING:
                producer.poll(0.01)
        producer.flush()
    assert stored == MANY
    return MANY / taken()


def _consume(address: str, name: str) -> float:
    from confluent_kafka import Consumer

    consumer = Consumer({
        "bootstrap.servers": address, "group.id": GROUP + name, "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
    })  # fmt: skip
    consumer.subscribe([name])
    seen = Seen(MANY)
    while seen.left:
        found = consumer.consume(500, 1.0)
        for message in found:
            decode(message.value())
            seen.add()
        if found:
            consumer.commit(asynchronous=bool(seen.left))
    taken = seen.elapsed()
    consumer.close()
    return MANY / taken


# ---- FastStream ----------------------------------------------------------------------------------------------------


async def faststream_confluent(folder: Path, acks: bool = False) -> Figures:
    """On confluent-kafka."""
    from faststream.confluent import KafkaBroker

    return await _faststream(folder, KafkaBroker, acks)


async def faststream_aiokafka(folder: Path, acks: bool = False) -> Figures:
    """On aiokafka."""
    from faststream.kafka import KafkaBroker

    return await _faststream(folder, KafkaBroker, acks)


async def _faststream(folder: Path, kind: Any, acks: bool) -> Figures:
    """A subscriber in a group, which commits every 5 s, its default, or after each handler with ``acks``.

    Its producer is told what Stentor's is: acks=all, idempotence.
    """
    from faststream import AckPolicy

    from benchmarks.pydantic_order import PydanticOrder

    with topic(folder) as (address, name):
        broker = kind(address, logger=None, acks="all", enable_idempotence=True)
        seen = Seen(SOME)

        how = {"ack_policy": AckPolicy.ACK} if acks else {}

        @broker.subscriber(name, group_id=GROUP + name, auto_offset_reset="earliest", **how)
        async def handle(order: PydanticOrder) -> None:
            seen.add()

        await broker.connect()
        events = [PydanticOrder(**fields(number)) for number in range(SOME)]
        published = await by_tasks(
            lambda event: broker.publish(event, name, key=event.order_id.encode()), events, OUTSTANDING
        )
        await broker.start()
        await seen.all.wait()
        await broker.stop()
    return {"consume": SOME / (seen.last - seen.first), "publish": published}
