"""The conformance suite: the contract of docs/guarantees.md, rule by rule, for any broker.

    from stentor.testing.conformance import Conformance

    class TestMine(Conformance):
        @pytest.fixture
        def broker_url(self) -> str:
            return "mine://localhost"  # a fresh, empty broker for each test

It runs under pytest with pytest-asyncio in auto mode. Names of tests say the rule: ``test_r04_...`` is of rule 4.
A feature that ``Features`` denies is tested to be refused, never skipped. ``Rules`` are those tests that need one
process, ``Faults`` those that kill, pause and stop members, ``Soak`` mixes faults at random; Conformance is all three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stentor.testing.conformance.suite import Conformance, Faults, Rules, Soak

__all__ = ["Conformance", "Faults", "Rules", "Soak"]

_TESTS = (
    "crashes", "dead_letters", "fleet", "groups", "order", "publishing", "refusals", "replays", "retries", "soak",
    "stage", "suite",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    # Imported when asked for: the suite's own processes need no pytest.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in _TESTS))
    from stentor.testing.conformance import suite

    globals().update({known: getattr(suite, known) for known in __all__})
    return globals()[name]
