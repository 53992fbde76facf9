"""The RabbitMQ broker keeps the contract, in one process and over several."""

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from stentor.brokers import log, rabbitmq
from stentor.brokers.rabbitmq_wire import Channel
from stentor.connect import connect
from stentor.errors import BrokerError
from stentor.testing.conformance import Faults, Rules, Soak
from stentor.testing.conformance.stage import LEASE
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


class RabbitMQ:
    @pytest.fixture(autouse=True)
    def keep_house_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log, "HOUSEKEEPING", 0.2)

    @pytest.fixture
    async def broker_url(
        self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[str]:
        """A namespace of which no stream is left behind: over a thousand of them keep the server busy, idle."""
        url = fresh(server_url("rabbitmq", tmp_path_factory), lease=LEASE, beat=LEASE / 4, partitions=4)
        there, made = rabbitmq.RabbitMQBroker._there, set()

        async def noted(self: rabbitmq.RabbitMQBroker, queue: str, settings: dict[str, Any] | None = None) -> None:
            made.add(queue)
            await there(self, queue, settings)

        monkeypatch.setattr(rabbitmq.RabbitMQBroker, "_there", noted)
        yield url
        broker = connect(url)
        assert isinstance(broker, rabbitmq.RabbitMQBroker)
        with contextlib.suppress(BrokerError):
            await broker._call(partial(_delete, made))
        await broker.disconnect()


async def _delete(queues: set[str], channel: Channel) -> None:
    for queue in queues:
        await channel.delete(queue)


class TestRabbitMQ(RabbitMQ, Rules):
    pass


class TestRabbitMQProcesses(RabbitMQ, Faults, Soak):
    pass
