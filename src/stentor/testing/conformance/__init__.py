"""The conformance suite: the contract of docs/guarantees.md, rule by rule, for any broker.

    from stentor.testing.conformance import Conformance

    class TestMine(Conformance):
        @pytest.fixture
        def broker_url(self) -> str:
            return "mine://localhost"  # a fresh, empty broker for each test

It runs under pytest with pytest-asyncio in auto mode. Names of tests say the rule: ``test_r04_...`` is of rule 4.
A feature that ``Features`` denies is tested to be refused, never skipped.
"""

from __future__ import annotations

import pytest

_PARTS = ("dead_letters", "groups", "order", "publishing", "refusals", "replays", "retries", "stage", "suite")
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in _PARTS))

from stentor.testing.conformance.suite import Conformance, Rules  # noqa: E402  the line above comes first

__all__ = ["Conformance", "Rules"]
