"""The Kafka broker keeps the contract, in one process and over several."""

import os

import pytest

from stentor.brokers import log
from stentor.testing.conformance import Faults, Rules, Soak
from stentor.testing.conformance.crashes import Kills, Moves
from stentor.testing.conformance.publishing import Publishing
from stentor.testing.conformance.replays import Replays
from stentor.testing.conformance.retries import Outputs
from stentor.testing.conformance.stage import LEASE
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


class Kafka:
    kind = os.environ.get("STENTOR_TEST_KAFKA", "kafka")
    """The server; ``STENTOR_TEST_KAFKA=kafka39`` holds the oldest version to all rules."""

    @pytest.fixture(autouse=True)
    def keep_house_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log, "HOUSEKEEPING", 0.2)

    @pytest.fixture
    def broker_url(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return fresh(server_url(self.kind, tmp_path_factory), lease=LEASE, beat=LEASE / 4, partitions=4)


class TestKafka(Kafka, Rules):
    pass


class TestKafkaProcesses(Kafka, Faults, Soak):
    pass


class TestKafkaTransactions(Kafka, Publishing, Outputs, Kills, Moves):
    """Outputs and what is settled with them in one transaction of Kafka's."""

    @pytest.fixture
    def broker_url(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        url = server_url(self.kind, tmp_path_factory)
        return fresh(url, lease=LEASE, beat=LEASE / 4, partitions=4, transactions=1)


class TestKafka39(Kafka, Publishing, Replays):
    """The oldest version, in what depends most on it: sizes, settings of topics, places by offset and by time."""

    kind = "kafka39"
