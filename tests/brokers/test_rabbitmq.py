"""What is special about RabbitMQ: its faults, its security, what its alarms do, and its streams."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest

import servers
from servers.rabbitmq import RabbitMQ
from servers.tls import PASSWORD
from stentor import App, Event, Group
from stentor.brokers.rabbitmq import RabbitMQBroker, _failure
from stentor.brokers.rabbitmq_wire import BASIC_CANCEL, Channel, Refused
from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError, PublishUnknown, Unavailable, UnknownTopic
from stentor.event import Topic
from stentor.message import Message
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from stentor.testing.conformance.events import Job
from stentor.testing.conformance.stage import until
from tests.faults import ServerFaults, ThreeNodes
from tests.real import fresh, server_url, unavailable

pytestmark = [pytest.mark.server, pytest.mark.slow]


class TestRabbitMQServer(ServerFaults):
    name = "rabbitmq"


class TestRabbitMQNodes(ThreeNodes):
    name = "rabbitmq3"

    async def leader(self, broker: Any, server: Any, topic: str) -> int:
        listed = await asyncio.to_thread(server.nodes[0].ctl, "list_queues", "name", "leader", "--silent")
        leaders = dict(line.split() for line in listed.splitlines())
        return [node.node for node in server.nodes].index(leaders[f"{topic}.0"])


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh(server_url("rabbitmq", tmp_path_factory))


@pytest.fixture
def secure(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh(server_url("rabbitmq", tmp_path_factory, secure=True))


def message(id: str, size: int = 2, key: str | None = None) -> Message:
    return Message(id=id, source="s", type="x", topic="t", data=b"x" * size, key=key)


async def opened(url: str) -> RabbitMQBroker:
    broker = connect(url)
    assert isinstance(broker, RabbitMQBroker)
    await broker.open()
    return broker


async def ids(broker: RabbitMQBroker) -> list[str]:
    return [found.id async for _, found in broker.browse("t", "earliest", follow=False)]


async def test_tls_and_a_password(secure: str) -> None:
    broker = await opened(secure)
    try:
        await broker.declare([Topic("t")], [])
        await broker.publish([message("1")])
        assert await ids(broker) == ["1"]
        assert await broker.health() is None
    finally:
        await broker.close()


async def test_what_is_wrong_is_said_at_once(secure: str) -> None:
    """A wrong password, an authority that nobody knows, nobody who listens."""
    for url in (secure.replace(quote(PASSWORD, safe=""), "wrong-word"), secure.partition("?ca=")[0]):
        async with asyncio.timeout(60):
            with pytest.raises(AuthenticationFailed) as caught:
                await opened(url)
        assert "wrong-word" not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(Unavailable):
        await opened("amqp://127.0.0.1:1")


async def test_a_virtual_host_that_is_not_there(plain: str) -> None:
    head, _, query = plain.partition("?")
    with pytest.raises(AuthenticationFailed, match="vhost"):
        await opened(f"{head}/nowhere?{query}")


async def test_another_number_of_partitions(plain: str) -> None:
    broker = await opened(plain)
    try:
        await broker.make_topic(f"{broker.prefix}t", 3)
        with pytest.raises(ConfigError, match="has 3 partitions, not 4; write partitions=3"):
            await broker.make_topic(f"{broker.prefix}t", 4)
        with pytest.raises(ConfigError, match="more partitions than 2"):
            await broker.make_topic(f"{broker.prefix}t", 2)
    finally:
        await broker.close()


@pytest.mark.parametrize("made", [["t.1"], ["t.1", "t.0"]])
async def test_a_topic_that_was_left_half_made(plain: str, made: list[str]) -> None:
    """By who was killed when the last stream stood, but had no first message yet."""
    broker = await opened(f"{plain}&partitions=2")
    try:
        for queue in made:
            channel = await broker.native.channel()
            await channel.declare(broker.prefix + queue, {"x-queue-type": "stream"})
            if queue != made[-1]:
                await broker._tell(broker.prefix + queue, b"-")
        await broker.declare([Topic("t")], [])
        assert await ids(broker) == []
        await broker.publish([message(str(n), key=str(n)) for n in range(20)])
        assert set(await ids(broker)) == {str(n) for n in range(20)}
    finally:
        await broker.close()


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("PRECONDITION_FAILED - queue 't.0' in vhost '/' does not have a replica on the local node", Unavailable),
        ("PRECONDITION_FAILED - inequivalent arg 'x-max-age' for queue 't.0' in vhost '/'", ConfigError),
    ],
)
def test_a_stream_that_another_has_just_begun_to_make_is_waited_for(said: str, means: type[Exception]) -> None:
    """Its process says so for a moment; other preconditions do not pass."""
    assert type(_failure("amqp://", Refused(406, said))) is means


async def test_large_and_many(plain: str) -> None:
    """Bodies of several frames, and more messages than are read ahead."""
    broker = await opened(f"{plain}&partitions=1")
    try:
        await broker.declare([Topic("t")], [])
        await broker.publish([message("large", 3_000_000)])
        await broker.publish([message(str(n), 10) for n in range(3000)])
        found = [found async for _, found in broker.browse("t", "earliest", follow=False)]
        assert [one.id for one in found] == ["large", *(str(n) for n in range(3000))]
        assert found[0].data == b"x" * 3_000_000
    finally:
        await broker.close()


async def test_an_alarm_of_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without memory it takes nothing: publishes wait a while, then say why, and go on when the alarm is over."""
    try:
        RabbitMQ.install()
    except servers.Missing as missing:
        unavailable(missing)
    with RabbitMQ(tmp_path_factory.mktemp("alarm")) as server:
        broker = await opened(server.url)
        try:
            await broker.declare([Topic("t")], [])
            await broker.publish([message("1")])
            await asyncio.to_thread(server.ctl, "set_vm_memory_high_watermark", "0.00000001")
            with pytest.raises(PublishUnknown, match="takes no events now: "):
                await broker.publish([message("tried")])  # the server tells of it at the first that it leaves lying
            with pytest.raises(Unavailable, match="takes no events now: "):
                await broker.publish([message("refused")])
            assert "takes no events now" in str(await broker.health())
            await asyncio.to_thread(server.ctl, "set_vm_memory_high_watermark", "0.4")
            while await broker.health() is not None:
                await asyncio.sleep(0.05)
            await broker.publish([message("2")])
            assert await ids(broker) == ["1", "tried", "2"]
        except subprocess.CalledProcessError as error:
            raise AssertionError(error.stderr) from error
        finally:
            await broker.close()


@pytest.fixture
async def own(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RabbitMQ]:
    """A server of this test's own, which may be treated badly."""
    try:
        RabbitMQ.install()
    except servers.Missing as missing:
        unavailable(missing)
    with RabbitMQ(tmp_path_factory.mktemp("own")) as server:
        yield server


class Wish(Event, topic="wishes", key="key"):
    key: str
    n: int


def handling(url: str, seen: list[tuple[str, int]]) -> App:
    app = App("shop", broker=f"{url}?partitions=1")

    @app.on(Job)
    async def work(job: Job) -> None:
        await asyncio.sleep(0.01)
        seen.append((job.key, job.n))

    return app


async def test_handlers_go_on_during_an_alarm(own: RabbitMQ) -> None:
    """Reading does, handlers too until too much is not settled; then all is, in order, and nothing is lost."""
    seen: list[tuple[str, int]] = []
    app = handling(own.url, seen)
    async with app.running() as program:
        broker: Any = program.broker
        await app.publish([Job(key=f"k{n % 4}", n=n) for n in range(2000)])
        await until(lambda: len(seen) > 50, "it has begun")
        await asyncio.to_thread(own.ctl, "set_vm_memory_high_watermark", "0.00000001")
        await until(lambda: broker._state._connection.blocked, "the alarm is felt")
        before = len(seen)
        more = [asyncio.create_task(app.publish(Job(key=f"k{n % 4}", n=n))) for n in range(2000, 2004)]
        await asyncio.sleep(3)  # how long the alarm lasts
        assert len(seen) > before
        assert len([n async for n, _ in broker.browse("jobs", "earliest", follow=False)]) >= 2000
        await asyncio.to_thread(own.ctl, "set_vm_memory_high_watermark", "0.4")
        await asyncio.gather(*more)
        await until(lambda: len(set(seen)) == 2004, "all are handled")
        for key in range(4):
            mine = [n for name, n in dict.fromkeys(seen) if name == f"k{key}"]
            assert mine == sorted(mine)
        assert [worker.failure for worker in program.workers] == [None]


async def test_the_process_that_leads_a_stream_dies(own: RabbitMQ) -> None:
    """Another takes its place: reading goes on where it was."""
    seen: list[tuple[str, int]] = []
    app = handling(own.url, seen)
    find = '{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"jobs.0">>))'
    async with app.running() as program:
        for first in (0, 100, 200):
            jobs = [Job(key="a", n=n) for n in range(first, first + 100)]
            await asyncio.gather(*(patiently(app, job) for job in jobs))
            await until(lambda: len(seen) > first + 20, "it reads")  # noqa: B023  awaited in this turn
            await asyncio.to_thread(own.ctl, "eval", f"{find}, exit(amqqueue:get_pid(Q), kill).")
        await until(lambda: len(set(seen)) == 300, "reading goes on")
        assert {n for _, n in seen} == set(range(300))
        assert [worker.failure for worker in program.workers] == [None]


async def patiently(app: App, job: Job) -> None:
    while True:
        with contextlib.suppress(Unavailable, PublishUnknown):
            await app.publish(job)
            return
        await asyncio.sleep(0.1)


async def test_the_server_cancels_a_consumer(own: RabbitMQ, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody removes a stream under a reader: it is told, the same group's other topics are read on."""
    cancelled: list[int] = []
    method = Channel.method

    def noted(self: Channel, number: int, data: bytes) -> None:
        if number == BASIC_CANCEL:
            cancelled.append(self.number)
        method(self, number, data)

    monkeypatch.setattr(Channel, "method", noted)
    seen: list[tuple[str, int]] = []
    app = App("shop", broker=f"{own.url}?partitions=1")

    @app.on(Job, Wish, group=Group("all"))
    async def work(event: Job | Wish) -> None:
        seen.append((type(event).__name__, event.n))

    async with app.running() as program:
        await app.publish([Job(key="a", n=1), Wish(key="a", n=1)])
        await until(lambda: len(seen) == 2, "it reads")
        await asyncio.to_thread(own.ctl, "delete_queue", "jobs.0")
        await until(lambda: cancelled, "the server cancels")
        for n in range(2, 5):
            await app.publish(Wish(key="a", n=n))
        await until(lambda: len(seen) == 5, "the other topic is read on")
        with pytest.raises(UnknownTopic):
            await app.publish(Job(key="a", n=2))
        assert len(cancelled) == 1
        assert [worker.failure for worker in program.workers] == [None]
