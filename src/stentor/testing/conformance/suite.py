"""The suite's classes, put together."""

from __future__ import annotations

from stentor.testing.conformance.crashes import Faults
from stentor.testing.conformance.dead_letters import DeadLetters, Redrive, Versions
from stentor.testing.conformance.groups import Backpressure, Groups, Isolation
from stentor.testing.conformance.order import Ordering
from stentor.testing.conformance.publishing import Delays, Duplicates, Publishing
from stentor.testing.conformance.refusals import Refusals
from stentor.testing.conformance.replays import Replays
from stentor.testing.conformance.retries import Outputs, Retries
from stentor.testing.conformance.soak import Soak

__all__ = ["Conformance", "Faults", "Rules", "Soak"]


class Rules(
    Publishing, Delays, Duplicates, Groups, Backpressure, Isolation, Ordering, Outputs, Retries, DeadLetters, Redrive,
    Versions, Replays, Refusals,
):  # fmt: skip
    """The rules inside one process."""


class Conformance(Rules, Faults, Soak):
    """All of it."""
