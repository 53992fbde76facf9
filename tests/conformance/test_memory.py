"""The memory broker keeps the contract."""

import pytest

from stentor.testing.conformance import Conformance


class TestMemory(Conformance):
    @pytest.fixture
    def broker_url(self) -> str:
        return "memory://"

    @pytest.fixture
    def full_url(self) -> str:
        return f"memory://?max_bytes={self.full}"
