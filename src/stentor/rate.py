"""How many events a group begins in a time: a token bucket for the group, and a pace for each key.

The group's rate is divided among its members, so that all processes together keep it; a key is with one member at a
time. What waits for its turn stays where it is, and a full window stops the fetching: no attempt is used up.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from stentor.broker import Broker
from stentor.errors import StentorError
from stentor.lanes import Lane

if TYPE_CHECKING:
    from stentor.limiter import Limiter
    from stentor.worker import Worker

BURST = 0.1
"""Seconds of the rate that may begin at once after a time without events; one event at least."""
KEYS = 10_000
"""Keys whose last beginning is remembered at least, before those are dropped that may begin again."""


def concurrency(worker: Worker) -> int:
    """Handlers of a worker that may run at once, as far as no rate keeps them."""
    return worker.plan.concurrency if worker.limiter is None else worker.limiter.limit


def allowed(worker: Worker) -> int:
    """... and by the rate and the breaker: none before the next one's turn, one to try what was away."""
    if worker.pace is not None and worker.pace.closed:
        return 0
    return 1 if worker.circuit is not None and worker.circuit.open else concurrency(worker)


def learn(worker: Worker, limiter: Limiter, began: float) -> None:
    """Let the limiter see a call that began then and has ended; an error at once would say nothing of the load."""
    limiter.full = limiter.full or (bool(worker.ready) and worker.running >= worker.most)
    limiter.ended(began)
    worker.most = allowed(worker)
    worker.poke()


class Pace:
    """Keeps one worker within ``rate`` and each key within ``key_rate``, in events a second; 0: no limit."""

    def __init__(self, worker: Worker, rate: float, key_rate: float) -> None:
        self._worker = worker
        self._rate = rate
        self._mine = rate
        """This member's part."""
        self._key_wait = 1 / key_rate if key_rate else 0.0
        self._tokens = 1.0
        self._at = worker.clock.monotonic()
        self._next: dict[str, float] = {}
        """By key: when its next event may begin."""
        self._full = KEYS
        self.closed = False
        """No handler begins until there is a token again."""

    async def share(self, broker: Broker) -> None:
        """Take this member's part of the group's rate, by how many members there are now."""
        if self._rate:
            with contextlib.suppress(StentorError):  # while the server is away nothing begins anyway
                members = [info.members for info in await broker.admin.groups() if info.name == self._worker.group]
                self._mine = self._rate / max(1, *members)

    def begin(self, lane: Lane) -> bool:
        """Whether the head of a lane may begin now; if not, the lane is ready again when it may."""
        now = self._worker.clock.monotonic()
        if self._key_wait and lane.key is not None:
            wait = self._next.get(lane.key, now) - now
            if wait > 0:
                self._worker.clock.call_later(wait, partial(self._again, lane))
                return False
            if len(self._next) >= self._full:
                self._next = {key: at for key, at in self._next.items() if at > now}
                self._full = max(KEYS, 2 * len(self._next))
            self._next[lane.key] = now + self._key_wait
        if self._rate:
            self._spend(now)
        return True

    def _again(self, lane: Lane) -> None:
        if lane.head is not None and not lane.share.gone:
            self._worker.make_ready(lane)
            self._worker.poke()

    def _spend(self, now: float) -> None:
        self._tokens = min(max(1.0, self._mine * BURST), self._tokens + (now - self._at) * self._mine) - 1
        self._at = now
        if self._tokens < 1 and not self.closed:
            self.closed = True
            self._worker.most = 0
            self._worker.clock.call_later((1 - self._tokens) / self._mine, self._open)

    def _open(self) -> None:
        worker = self._worker
        self.closed = False
        worker.most = allowed(worker)
        worker.poke()
