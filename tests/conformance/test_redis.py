"""The Redis broker keeps the contract, in one process and over several."""

import pytest

from stentor.brokers import log
from stentor.testing.conformance import Faults, Rules, Soak
from stentor.testing.conformance.stage import LEASE
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


class Redis:
    @pytest.fixture(autouse=True)
    def keep_house_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log, "HOUSEKEEPING", 0.2)

    @pytest.fixture
    def broker_url(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return fresh(server_url("redis", tmp_path_factory), lease=LEASE, beat=LEASE / 4, partitions=4)


class TestRedis(Redis, Rules):
    pass


class TestRedisProcesses(Redis, Faults, Soak):
    pass
