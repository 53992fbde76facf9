"""What a confirmed event survives: what an app demands is held against what the server says; so says doctor."""

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from stentor import App
from stentor.broker import Durable
from stentor.cli.doctor import _broker
from stentor.connect import connect
from stentor.errors import ConfigError
from stentor.event import Topic
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from stentor.testing.conformance.events import Job
from tests.real import fresh, opened, server_url

server = [pytest.mark.server, pytest.mark.slow]
CLUSTERS = ["kafka3", "nats3", "rabbitmq3"]


async def demand(url: str, durable: Durable) -> None:
    """Start an app that publishes jobs and demands a level; ConfigError where it is refused."""
    app = App("shop", broker=url, durable=durable)
    app.publishes(Job)
    async with app.connected():
        pass


async def doctored(url: str) -> dict[str, tuple[str, str]]:
    return {finding.check: (finding.verdict, finding.found) for finding in await _broker(url)}


@pytest.mark.parametrize("url", ["kafka://h", "nats://h", "amqp://h"])
def test_no_copy_at_all_cannot_be_asked_for(url: str) -> None:
    with pytest.raises(ConfigError, match="option replicas='0': at least 1"):
        connect(f"{url}?replicas=0")


@pytest.mark.parametrize("url", ["amqp://h", "rocketmq://h"])
def test_who_removes_nothing_takes_no_retention(url: str) -> None:
    with pytest.raises(ConfigError, match="unknown option retention"):
        connect(f"{url}?retention=1h")


class TestOneNode:
    pytestmark = server

    async def test_kafka_that_does_not_flush(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        url = fresh(server_url("kafka", tmp_path_factory))
        await demand(url, "host")
        with pytest.raises(ConfigError, match="demands durable='replica', but kafka gives 'host'"):
            await demand(url, "replica")
        with pytest.raises(ConfigError, match="demands durable='host', but kafka gives 'process'"):
            await demand(f"{url}&flush=0", "host")
        assert (await doctored(url))["durability"][1].startswith("host")
        assert (await doctored(f"{url}&flush=0"))["durability"][1].startswith("process")

    async def test_a_kafka_topic_that_does_not_flush(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Whoever made it, and whatever the URL says."""
        url = fresh(server_url("kafka", tmp_path_factory))
        await demand(url, "host")
        async with opened(url) as broker:
            resource = ConfigResource(ResourceType.TOPIC, f"{broker.prefix}jobs")
            resource.add_incremental_config(
                ConfigEntry("flush.messages", "1000", incremental_operation=AlterConfigOpType.SET)
            )
            await broker._answer(broker._asked().incremental_alter_configs([resource]))
        with pytest.raises(ConfigError, match="kafka gives 'process'"):
            await demand(url, "host")

    async def test_rabbitmq_is_not_believed_what_its_url_says(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        plain = server_url("rabbitmq", tmp_path_factory)
        twice = plain.replace("127.0.0.1:", "localhost:") + "," + plain.partition("://")[2]
        for url in (plain, twice):
            with pytest.raises(ConfigError, match="demands durable='replica', but rabbitmq gives 'process'"):
                await demand(fresh(url, replicas=3), "replica")

    async def test_what_doctor_cannot_see_of_rabbitmq_it_does_not_praise(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        url = fresh(server_url("rabbitmq", tmp_path_factory))
        async with opened(url) as broker:
            await broker.declare([Topic("t", partitions=2)], [])
            found = await doctored(url)
            assert found["replicas"] == ("ok", "none is seen but on the node of the URL")
            assert found["retention"][0] == "ok"
            assert "AMQP does not tell" in found["retention"][1]
            channel = await broker.native.channel()
            await channel.delete(f"{broker.prefix}t.1")
            small = {
                "x-queue-type": "stream",
                "x-max-length-bytes": 1_000_000,
                "x-stream-max-segment-size-bytes": 500_000,
            }
            await channel.declare(f"{broker.prefix}t.1", small)
            for _ in range(20):
                await broker._tell(f"{broker.prefix}t.1", b"-" * 200_000)
            found = await doctored(url)
            assert found.get("retention") == ("warn", f"{broker.prefix}t.1 has lost events"), found


class TestThreeNodes:
    pytestmark = server

    @pytest.mark.parametrize("kind", CLUSTERS)
    async def test_the_least_of_the_topics_counts(self, kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        url = fresh(server_url(kind, tmp_path_factory))
        await demand(url, "replica")
        found = await doctored(url)
        assert found["durability"][1].startswith("replica")
        assert found["replicas"][0] == "ok"
        url = fresh(server_url(kind, tmp_path_factory))
        async with opened(url) as broker:
            assert broker.features.durable == "replica"
            broker._replicas = 1
            await broker.declare([Topic("jobs")], [])
            assert broker.features.durable == "process" if kind != "kafka3" else "host"
        with pytest.raises(ConfigError, match="demands durable='replica'"):
            await demand(url, "replica")
        assert (await doctored(url))["replicas"][0] == "warn"

    async def test_of_one_rabbitmq_node_no_copies_are_seen(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        hosts, _, options = server_url("rabbitmq3", tmp_path_factory).partition("?")
        url = fresh(f"{hosts.partition(',')[0]}?{options}")
        with pytest.raises(ConfigError, match="rabbitmq gives 'process'"):
            await demand(url, "replica")
