"""What a worker runs: the routes of a group, its settings, and what it counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stentor.event import EventSpec
from stentor.handler import Handler, Invoke
from stentor.lanes import Lane
from stentor.subscription import Subscription

if TYPE_CHECKING:
    from stentor.worker import Duties


@dataclass(slots=True, eq=False)
class Route:
    """A handler, ready to run: how its events are read, and what runs them."""

    handler: Handler
    spec: EventSpec | None
    invoke: Invoke
    pending: deque[Lane] = field(default_factory=deque)
    """For a batch handler: lanes whose head waits for the next batch."""
    armed: bool = False


Duty = Callable[["Duties"], Awaitable[None]]


@dataclass(slots=True)
class Plan:
    """A group as the worker runs it."""

    name: str
    subscription: Subscription
    routes: dict[str, Route]
    """By event type."""
    topics: dict[str, Route]
    """Handlers of whole topics, and of topics of plain JSON."""
    ordered: bool = True
    concurrency: int = 64
    park: bool = False
    broadcast: bool = False
    duties: dict[str, Duty] = field(default_factory=dict)
    """By topic: what the owner of its partition 0 runs beside the events (timers, sources)."""


@dataclass(slots=True)
class Counts:
    """What a worker did since it started."""

    handled: int = 0
    failed: int = 0
    retried: int = 0
    dead: int = 0
    skipped: int = 0
    refused: int = 0
