from pathlib import Path

import pytest

from stentor.testing.conformance import Conformance


class TestSqlite(Conformance):
    @pytest.fixture
    def broker_url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/events.db?lease=1&beat=0.25"
