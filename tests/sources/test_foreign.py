"""Topics and queues of others as sources and sinks: each message once, in whatever form, and nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aio_pika
import fastavro
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2

from stentor import App, Context, Event
from stentor.connect import BrokerUrl
from stentor.errors import AuthenticationFailed, BrokerError, ConfigError, DefinitionError, InvalidEvent, Unavailable
from stentor.message import new_id
from stentor.sinks.kafka import KafkaSink
from stentor.sinks.rabbitmq import RabbitSink
from stentor.sources import kafka
from stentor.sources.foreign import Record, avro, cloudevents, protobuf
from stentor.sources.kafka import KafkaTopic
from stentor.sources.rabbitmq import RabbitQueue
from stentor.subscription import murmur2
from tests import command
from tests.faults import Proxy
from tests.real import server_url
from tests.sources import reading
from tests.sources.reading import Line, Reader, until


class Order(Event, topic="orders", key="customer", type="com.example.order"):
    number: int
    customer: str = ""
    at: datetime | None = None


SCHEMA = {
    "type": "record", "name": "Order", "fields": [
        {"name": "number", "type": "long"},
        {"name": "customer", "type": "string"},
        {"name": "at", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}]},
    ],
}  # fmt: skip
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


running = partial(reading.running, (Order, Line))


def positions(path: Path) -> int:
    """How many sources have a position in a file."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        [count] = db.execute("SELECT count(*) FROM stentor_journal WHERE name LIKE 's/source/%'").fetchone()
    return int(count)


def dead(app: App, group: str) -> int:
    assert app.program is not None
    return next(worker.counts.dead for worker in app.program.workers if worker.group == group)


def record(data: bytes, content_type: str | None = None, **headers: str) -> Record:
    return Record("orders", "0-1", data, "k", headers, content_type)


# ---- forms ----------------------------------------------------------------------------------------------------------


def encoded(**fields: Any) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, SCHEMA, {"at": None, **fields})
    return out.getvalue()


class Registry:
    """Answers as a schema registry does, to whoever gives the password; its schemas, and how often it was asked."""

    def __init__(self) -> None:
        self.schemas: dict[int, Any] = {}
        self.asked = 0
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked += 1
                schema = registry.schemas.get(int(self.path.removeprefix("/schemas/ids/")))
                known = self.headers["Authorization"] == "Basic YWRhOnNlY3JldA=="
                self.send_response(401 if not known else 404 if schema is None else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"schema": json.dumps(schema)}).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://ada:secret@127.0.0.1:{self.server.server_port}"


@pytest.fixture
def registry() -> Iterator[Registry]:
    found = Registry()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_avro_by_a_file_or_by_a_registry(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "order.avsc").write_text(json.dumps(SCHEMA))
    data = encoded(number=7, customer="ada", at=NOON)
    expected = {"number": 7, "customer": "ada", "at": NOON}
    assert avro(tmp_path / "order.avsc")(record(data)) == expected
    registry.schemas[258] = SCHEMA
    decode = avro(registry=registry.url)
    for _ in range(3):
        assert decode(record(b"\0\0\0\1\2" + data)) == expected
    assert registry.asked == 1
    with pytest.raises(InvalidEvent, match="knows no schema 259"):
        decode(record(b"\0\0\0\1\3" + data))
    with pytest.raises(InvalidEvent, match="does not begin with the zero byte"):
        decode(record(b"{}"))
    with pytest.raises(Unavailable, match="401"):
        avro(registry=registry.url.replace("ada:secret@", ""))(record(b"\0\0\0\1\2" + data))
    with pytest.raises(ConfigError, match="is no schema"):
        avro(tmp_path / "nothing.avsc")
    with pytest.raises(ConfigError, match="name a schema file or a registry"):
        avro()


def test_protobuf(tmp_path: Path) -> None:
    file = descriptor_pb2.FileDescriptorProto(name="order.proto", package="shop", syntax="proto3")
    file.dependency.append("google/protobuf/timestamp.proto")
    kind = file.enum_type.add(name="Kind")
    for number, name in enumerate(("WEB", "SHOP")):
        kind.value.add(name=name, number=number)
    order = file.message_type.add(name="Order")
    field = descriptor_pb2.FieldDescriptorProto
    for number, (name, type, type_name, label) in enumerate(
        (
            ("number", field.TYPE_INT64, None, field.LABEL_OPTIONAL),
            ("customer", field.TYPE_STRING, None, field.LABEL_OPTIONAL),
            ("at", field.TYPE_MESSAGE, ".google.protobuf.Timestamp", field.LABEL_OPTIONAL),
            ("kind", field.TYPE_ENUM, ".shop.Kind", field.LABEL_OPTIONAL),
            ("lines", field.TYPE_STRING, None, field.LABEL_REPEATED),
            ("parent", field.TYPE_MESSAGE, ".shop.Order", field.LABEL_OPTIONAL),
        ),
        1,
    ):
        order.field.add(name=name, number=number, type=type, type_name=type_name, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    cls: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Order"))
    made = cls(number=2**60, kind=1, lines=["a", "b"], parent=cls(customer="ada"))
    made.at.FromDatetime(NOON)
    assert protobuf(cls)(record(made.SerializeToString())) == {
        "number": 2**60, "customer": "", "at": NOON, "kind": "SHOP", "lines": ["a", "b"],
        "parent": {"number": 0, "customer": "ada", "kind": "WEB", "lines": []},
    }  # fmt: skip
    framed = b"\0\0\0\0\5"
    assert protobuf(cls, framed=True)(record(framed + b"\0" + made.SerializeToString()))["number"] == 2**60
    with pytest.raises(InvalidEvent, match="another message"):
        protobuf(cls, framed=True)(record(framed + b"\2\2"))

    described = tmp_path / "order.desc"
    time = descriptor_pb2.FileDescriptorProto.FromString(timestamp_pb2.DESCRIPTOR.serialized_pb)
    described.write_bytes(descriptor_pb2.FileDescriptorSet(file=[time, file]).SerializeToString())
    data = made.SerializeToString()
    assert protobuf(described, "shop.Order")(record(data)) == protobuf(cls)(record(data))
    with pytest.raises(ConfigError, match=r"no message 'Order'; it has google\.protobuf\.Timestamp, shop\.Order"):
        protobuf(described, "Order")
    with pytest.raises(ConfigError, match=r"order\.proto: No such file"):
        protobuf("order.proto", "shop.Order")
    described.write_bytes(b"syntax = proto3")
    with pytest.raises(ConfigError, match="is no whole set of descriptors"):
        protobuf(str(described), "shop.Order")


@pytest.mark.parametrize("prefix", ["ce_", "cloudEvents:", "cloudEvents_"])
def test_cloudevents_in_both_modes(prefix: str) -> None:
    app = App("shop")
    app.publishes(Order)
    read = cloudevents(app)
    attributes = {"specversion": "1.0", "id": "7", "source": "/till", "type": "com.example.order", "vat": "yes"}
    data = b'{"number": 7, "customer": "ada"}'
    binary = record(data, "application/json", **{prefix + name: value for name, value in attributes.items()})
    structured = json.dumps({**attributes, "data": json.loads(data)}).encode()
    for found in (read(binary), read(record(structured, "application/cloudevents+json; charset=utf-8"))):
        assert found.event == Order(number=7, customer="ada")
        assert (found.id, found.source, found.key, found.headers) == ("7", "/till", "k", {"vat": "yes"})
    with pytest.raises(InvalidEvent, match="is no CloudEvent"):
        read(record(data, "application/json"))
    with pytest.raises(InvalidEvent, match="shop does not know 'x'"):
        read(record(structured.replace(b"com.example.order", b"x"), "application/cloudevents+json"))


def test_what_makes_no_sense_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="is no Kafka URL"):
        KafkaTopic("amqp://x", "t", to=Order)
    with pytest.raises(ConfigError, match="unknown option lease"):
        KafkaTopic("kafka://x?lease=3", "t", to=Order)
    with pytest.raises(DefinitionError, match="source kafka: start must be"):
        KafkaTopic("kafka://x", "t", to=Order, start="now")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is no RabbitMQ URL"):
        RabbitQueue("kafka://x", "q", to=Order)
    with pytest.raises(DefinitionError, match="prefetch must be 1 to 65535"):
        RabbitQueue("amqp://x", "q", to=Order, prefetch=0)


# ---- Kafka ----------------------------------------------------------------------------------------------------------


class Topic:
    """A topic of somebody else, on a real server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = f"theirs-{secrets.token_hex(4)}"
        servers: dict[str, Any] = {"bootstrap.servers": BrokerUrl(url).host}
        self.admin = AdminClient(servers)
        self._servers = servers
        self._done(self.admin.create_topics([NewTopic(self.name, 3, 1)]))
        self._producer = Producer(servers)

    def _done(self, asked: dict[Any, Any]) -> None:
        for future in asked.values():
            future.result(30)

    def grow(self, partitions: int) -> None:
        self._done(self.admin.create_partitions([NewPartitions(self.name, partitions)]))
        deadline = time.monotonic() + 30
        while True:
            self._producer = Producer(self._servers)  # one that asked before knows the old number for a while
            if len(self._producer.list_topics(self.name, timeout=10).topics[self.name].partitions) == partitions:
                return
            assert time.monotonic() < deadline

    def remove(self, partition: int, offset: int) -> None:
        self._done(self.admin.delete_records([TopicPartition(self.name, partition, offset)]))

    def produce(self, *values: bytes, key: str | None = None, partition: int | None = None, **options: Any) -> None:
        place: dict[str, Any] = {} if partition is None else {"partition": partition}
        errors: list[Any] = []
        for value in values:
            self._producer.produce(
                self.name, value, key=key, on_delivery=lambda error, _: errors.append(error), **place, **options
            )
        assert self._producer.flush(30) == 0
        assert not any(errors), errors


@pytest.fixture
def topic(tmp_path_factory: pytest.TempPathFactory) -> Topic:
    return Topic(server_url("kafka", tmp_path_factory).partition("?")[0])


def order(number: int, customer: str = "ada") -> bytes:
    return json.dumps({"number": number, "customer": customer}).encode()


@pytest.mark.slow
@pytest.mark.server
async def test_a_kafka_topic_is_read_once_over_restarts(
    tmp_path: Path, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "LOOK", 0.2)
    file = f"sqlite:///{tmp_path}/events.db"
    for n in range(30):
        topic.produce(order(n, f"c{n % 3}"), key=f"c{n % 3}", partition=n % 3)

    def source(**options: Any) -> KafkaTopic:
        return KafkaTopic(topic.url, topic.name, to=Order, **options)

    async with running(source(), url=file) as found:
        await until(lambda: len(found) == 30)
        for customer in range(3):  # in the order of the partition
            assert [o.number for o in found if o.customer == f"c{customer}"] == list(range(customer, 30, 3))
    topic.produce(order(30), order(31), partition=1)
    async with running(source(), url=file) as found:
        await until(lambda: len(found) == 2)
        assert [o.number for o in found] == [30, 31]
        topic.grow(4)
        topic.produce(order(32), partition=3)
        await until(lambda: len(found) == 3)
    async with running(source(name="late", start="latest"), url=f"sqlite:///{tmp_path}/late.db") as found:
        await until(lambda: positions(tmp_path / "late.db"))  # where it began is kept, though nothing came
    topic.produce(order(33), partition=0)
    async with running(source(name="late", start="latest"), url=f"sqlite:///{tmp_path}/late.db") as found:
        await until(lambda: [o.number for o in found] == [33])
    topic.produce(*map(order, range(34, 600)), partition=0)
    app = App("shop")
    app.publishes(Order)
    app.add(source(name="counted"))
    async with app.running(url="memory://", new_groups=True) as program:
        [counts] = [one.counts for group in program.groups.values() for one in group.sources]
        await until(lambda: counts.events == 600)
        await until(lambda: counts.lag == 0)
        topic.produce(order(600), partition=0)
        await until(lambda: counts.events == 601)


@pytest.mark.slow
@pytest.mark.server
async def test_what_kafka_removed_is_told_and_the_rest_comes(
    tmp_path: Path, topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    file = f"sqlite:///{tmp_path}/events.db"
    topic.produce(*map(order, range(3)), partition=0)
    async with running(KafkaTopic(topic.url, topic.name, to=Order), url=file) as found:
        await until(lambda: len(found) == 3)
    topic.produce(*map(order, range(3, 9)), partition=0)
    topic.remove(0, 6)
    async with running(KafkaTopic(topic.url, topic.name, to=Order), url=file) as found:
        await until(lambda: len(found) == 3)
        assert [o.number for o in found] == [6, 7, 8]
    assert "offset 3 is gone" in caplog.text


@pytest.mark.slow
@pytest.mark.server
async def test_what_cannot_be_read_is_a_dead_letter_and_a_registry_that_is_away_is_waited_for(
    topic: Topic, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    registry.schemas[1] = SCHEMA
    frame = b"\0\0\0\0\1"
    topic.produce(frame + encoded(number=1, customer="ada"), b"\xff", frame + encoded(number=2, customer="bob"))
    wrong = KafkaTopic(topic.url, topic.name, to=Order, decode=avro(registry="http://127.0.0.1:1"), name="away")
    right = KafkaTopic(topic.url, topic.name, to=Order, decode=avro(registry=registry.url))
    app = App("reading", broker="memory://")
    async with running(right, wrong, app=app) as found:
        await until(lambda: len(found) == 2 and "does not tell schema 1" in caplog.text)
        assert sorted(found, key=lambda o: int(o.number)) == [
            Order(number=1, customer="ada"), Order(number=2, customer="bob"),
        ]  # fmt: skip
        await until(lambda: dead(app, "reading.kafka") == 1)
        assert dead(app, "reading.away") == 0


@pytest.mark.slow
@pytest.mark.server
async def test_a_message_that_could_not_be_read_is_an_event_when_its_decoder_is_mended(
    topic: Topic, tmp_path: Path
) -> None:
    broker = f"sqlite:///{tmp_path}/events.db"
    topic.produce(order(1), b"number=2;customer=ada", order(3), partition=0)
    async with running(KafkaTopic(topic.url, topic.name, to=Order), url=broker) as found:
        await until(lambda: [o.number for o in found] == [1, 3])
        await command.dead("reading.kafka", 1, broker=broker)
    async with running(KafkaTopic(topic.url, topic.name, to=Order, decode=mended), url=broker) as found:
        await command.redrive("reading.kafka", 1, broker=broker)
        await until(lambda: found == [Order(number=2, customer="ada")])
        await command.dead("reading.kafka", 1, broker=broker, status="redriven")
        topic.produce(order(4), partition=0)
        await until(lambda: len(found) == 2)
        assert [o.number for o in found] == [2, 4], "the others are not read again"


def mended(record: Record) -> Any:
    """Reads what the decoder before could not."""
    if record.data.startswith(b"{"):
        return record.json()
    fields = dict(part.split("=") for part in record.data.decode().split(";"))
    return fields | {"number": int(fields["number"])}


@pytest.mark.slow
@pytest.mark.server
async def test_cloudevents_of_a_kafka_topic(topic: Topic) -> None:
    app = App("reading", broker="memory://")
    head = [("ce_specversion", b"1.0"), ("ce_id", b"7"), ("ce_source", b"/till"), ("ce_type", b"com.example.order")]
    topic.produce(order(7), headers=[*head, ("content-type", b"application/json")], key="ada")
    async with running(KafkaTopic(topic.url, topic.name, to=cloudevents(app)), app=app) as found:
        await until(lambda: found == [Order(number=7, customer="ada")])
        stored = [message async for _, message in app.broker.browse("orders", "earliest", follow=False)]
        assert [(message.id, message.source) for message in stored] == [("7", "/till")]


@pytest.mark.slow
@pytest.mark.server
async def test_each_message_once_over_kills_of_the_reader(tmp_path: Path, topic: Topic) -> None:
    reader = Reader(tmp_path, "stentor.sources.kafka", "KafkaTopic", f"{topic.url!r}, {topic.name!r}, to=Line")
    count = 0
    try:
        for _ in range(5):
            reader.start()
            for _ in range(10):
                topic.produce(*(b'{"n": %d}' % n for n in range(count, count + 50)))
                count += 50
                await asyncio.sleep(0.05)
            await reader.published(count - 300)
            reader.kill()
        reader.start()
        assert sorted(await reader.published(count)) == list(range(count))
    finally:
        reader.kill()


@pytest.mark.slow
@pytest.mark.server
async def test_a_topic_that_is_not_there_and_a_server_that_is_away(
    topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = KafkaTopic("kafka://127.0.0.1:1", "t", to=Order, name="nowhere")
    missing = KafkaTopic(topic.url, "missing", to=Order, name="missing")
    async with running(nowhere, missing):
        await until(lambda: "topic missing:" in caplog.text and "source nowhere of kafka://127.0.0.1:1" in caplog.text)


# ---- RabbitMQ -------------------------------------------------------------------------------------------------------


class Queue:
    """A queue of somebody else, on a real server."""

    def __init__(self, url: str, channel: Any) -> None:
        self.url = url
        self.name = f"theirs-{secrets.token_hex(4)}"
        self._channel = channel

    async def publish(self, *values: bytes, **options: Any) -> None:
        for value in values:
            message = aio_pika.Message(value, **{"message_id": new_id(), **options})
            await self._channel.default_exchange.publish(message, self.name)

    async def waiting(self) -> int:
        """Messages that nobody has been sent."""
        queue = await self._channel.declare_queue(self.name, durable=True, passive=True)
        return int(queue.declaration_result.message_count)


@pytest.fixture
async def queue(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Queue]:
    url = server_url("rabbitmq", tmp_path_factory).partition("?")[0]
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        found = Queue(url, channel)
        await channel.declare_queue(found.name, durable=True)
        yield found


@pytest.mark.slow
@pytest.mark.server
async def test_a_rabbitmq_queue_is_read_and_emptied(queue: Queue) -> None:
    app = App("reading", broker="memory://")
    await queue.publish(*map(order, range(1200)))
    async with running(RabbitQueue(queue.url, queue.name, to=Order, prefetch=100), app=app) as found:
        await until(lambda: len(found) == 1200)
        await queue.publish(b"no json", order(1200), content_type="application/json")
        await until(lambda: len(found) == 1201)
        assert [o.number for o in found] == list(range(1201))
        await until(lambda: dead(app, "reading.rabbitmq") == 1)
    assert await queue.waiting() == 0


@pytest.mark.slow
@pytest.mark.server
async def test_a_message_that_is_off_its_queue_is_an_event_when_its_decoder_is_mended(
    queue: Queue, tmp_path: Path
) -> None:
    broker = f"sqlite:///{tmp_path}/events.db"
    await queue.publish(order(1), b"number=2;customer=ada", order(3))
    async with running(RabbitQueue(queue.url, queue.name, to=Order), url=broker) as found:
        await until(lambda: [o.number for o in found] == [1, 3])
        await command.dead("reading.rabbitmq", 1, broker=broker)
    assert await queue.waiting() == 0
    async with running(RabbitQueue(queue.url, queue.name, to=Order, decode=mended), url=broker) as found:
        await command.redrive("reading.rabbitmq", 1, broker=broker)
        await until(lambda: found == [Order(number=2, customer="ada")])
        await command.dead("reading.rabbitmq", 1, broker=broker, status="redriven")


@pytest.mark.slow
@pytest.mark.server
async def test_each_message_once_over_kills_of_the_consumer(tmp_path: Path, queue: Queue) -> None:
    reader = Reader(
        tmp_path, "stentor.sources.rabbitmq", "RabbitQueue", f"{queue.url!r}, {queue.name!r}, to=Line, prefetch=50"
    )
    count = 0
    try:
        for _ in range(5):
            reader.start()
            for _ in range(10):
                await queue.publish(*(b'{"n": %d}' % n for n in range(count, count + 20)))
                count += 20
                await asyncio.sleep(0.05)
            await reader.published(count - 150)
            reader.kill()
        reader.start()
        assert sorted(await reader.published(count)) == list(range(count))
    finally:
        reader.kill()


@pytest.mark.slow
@pytest.mark.server
async def test_a_queue_goes_on_after_its_connection_was_cut(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    host, _, port = BrokerUrl(queue.url).host.partition(":")
    with Proxy(int(port)) as proxy:
        url = queue.url.replace(f"{host}:{port}", f"127.0.0.1:{proxy.port}")
        async with running(RabbitQueue(url, queue.name, to=Order)) as found:
            await queue.publish(order(1))
            await until(lambda: len(found) == 1)
            proxy.drop()
            await queue.publish(order(2))
            await until(lambda: len(found) == 2)
    assert "the connection is lost" in caplog.text
    assert await queue.waiting() == 0


@pytest.mark.slow
@pytest.mark.server
async def test_a_queue_that_is_not_there_and_a_wrong_password(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    parsed = BrokerUrl(queue.url)
    missing = RabbitQueue(queue.url, "missing", to=Order, name="missing")
    wrong = RabbitQueue(f"amqp://guest:wrong-word@{parsed.host}", queue.name, to=Order, name="wrong")
    async with running(missing, wrong):
        await until(lambda: "no queue 'missing'" in caplog.text and "source wrong of amqp" in caplog.text)
    assert "wrong-word" not in caplog.text


# ---- and as sinks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_events_go_to_a_kafka_topic_and_come_back(topic: Topic, mode: Any) -> None:
    there, back = App("shop", broker="memory://"), App("till", broker="memory://")
    async with KafkaSink(topic.url) as sink:

        @there.on(Order)
        async def hand_on(order: Order, ctx: Context) -> None:
            await sink.forward(topic.name, ctx.message, mode=mode)

        async with there, running(KafkaTopic(topic.url, topic.name, to=cloudevents(back)), app=back) as found:
            receipt = await there.publish(Order(number=7, customer="ada"), headers={"vat": True})
            await until(lambda: found == [Order(number=7, customer="ada")])
            stored = [message async for _, message in back.broker.browse("orders", "earliest", follow=False)]
            assert [(m.id, m.source, m.key) for m in stored] == [(receipt.id, "/shop", "ada")]
            assert str(stored[0].extensions["vat"]).lower() == "true"


@pytest.mark.slow
@pytest.mark.server
async def test_keys_go_where_kafkas_own_clients_put_them(topic: Topic) -> None:
    consumer = Consumer({"bootstrap.servers": BrokerUrl(topic.url).host, "group.id": "t", "auto.offset.reset": "error"})
    try:
        async with KafkaSink(topic.url) as sink:
            for n in range(20):
                await sink.publish(topic.name, {"n": n}, key=f"key {n}", headers={"from": "test"})
        consumer.assign([TopicPartition(topic.name, partition, 0) for partition in range(3)])
        seen: dict[str, int | None] = {}
        while len(seen) < 20:
            message = await asyncio.to_thread(consumer.poll, 1)
            if message is not None and message.error() is None:
                seen[(message.key() or b"").decode()] = message.partition()
                assert message.headers() == [("from", b"test")]
        assert seen == {f"key {n}": murmur2(f"key {n}".encode()) % 3 for n in range(20)}
    finally:
        consumer.close()


@pytest.mark.slow
@pytest.mark.server
async def test_what_a_kafka_sink_cannot_store_is_an_error(topic: Topic) -> None:
    async with KafkaSink(topic.url) as sink:
        with pytest.raises(BrokerError, match=topic.name):
            await sink.publish(topic.name, b"x" * 2_000_000)
    async with KafkaSink("kafka://127.0.0.1:1", timeout="300ms") as sink:
        with pytest.raises(Unavailable, match=r"no confirmation for t within 0\.3 s"):
            await sink.publish("t", b"x")


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_events_go_to_a_rabbitmq_queue_and_come_back(queue: Queue, mode: Any) -> None:
    there, back = App("shop", broker="memory://"), App("till", broker="memory://")
    async with RabbitSink(queue.url) as sink:

        @there.on(Order)
        async def hand_on(order: Order, ctx: Context) -> None:
            await sink.forward(queue.name, ctx.message, mode=mode)

        async with there, running(RabbitQueue(queue.url, queue.name, to=cloudevents(back)), app=back) as found:
            receipt = await there.publish(Order(number=7, customer="ada"))
            await until(lambda: found == [Order(number=7, customer="ada")])
            stored = [message async for _, message in back.broker.browse("orders", "earliest", follow=False)]
            assert [(m.id, m.source, m.key) for m in stored] == [(receipt.id, "/shop", "ada")]
        with pytest.raises(BrokerError, match="no queue takes 'nowhere'"):
            await sink.publish("nowhere", b"x")


@pytest.mark.slow
@pytest.mark.server
async def test_a_rabbitmq_sink_says_who_is_refused(queue: Queue) -> None:
    with pytest.raises(AuthenticationFailed, match="amqp://"):
        async with RabbitSink(f"amqp://guest:wrong@{BrokerUrl(queue.url).host}"):
            pass
    with pytest.raises(Unavailable):
        async with RabbitSink("amqp://127.0.0.1:1"):
            pass
