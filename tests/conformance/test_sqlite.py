"""The sqlite broker keeps the contract, in one process and over several."""

from pathlib import Path

import pytest

from stentor.brokers import sqlite
from stentor.testing.conformance import Faults, Rules, Soak
from stentor.testing.conformance.stage import LEASE


class Sqlite:
    @pytest.fixture(autouse=True)
    def keep_house_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite, "HOUSEKEEPING", 0.2)

    @pytest.fixture
    def broker_url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/events.db?lease={LEASE}&beat={LEASE / 4}"

    @pytest.fixture
    def full_url(self, broker_url: str) -> str:
        return f"{broker_url}&max_bytes={Rules.full}"


class TestSqlite(Sqlite, Rules):
    pass


@pytest.mark.slow
class TestSqliteProcesses(Sqlite, Faults, Soak):
    pass
