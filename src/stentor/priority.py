"""Which group goes first when those of one process want more than it can give.

A worker looks before it begins an event whether one of a higher priority waits for the process:

- it has events that could begin now, and has not come to them yet;
- or it runs as many at once as it may, more wait, and the process is busy: it uses a core up, which is all that the
  interpreter can, or its event loop comes late. If not, the higher group's own limit is what holds it back.

While that lasts the lower group runs one handler (or batch) at a time, and for a part of the time at most. It is not
told that it may: it looks again, so that the groups above it have nothing to do for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stentor.worker import Worker

SHARE = 0.1
"""The part of the time for which a lower group runs a handler meanwhile, at most."""
LOOK = 0.001
"""Seconds between two looks of a group that holds back."""
SPELL = 7
"""Handlers of one runner between two turns of the event loop where priorities differ (a power of two, less one)."""
ALONE = 127
"""... and where they do not."""
PERIOD = 0.05
"""Seconds over which the load of the process is measured."""
STAYS = 0.25
"""Seconds for which a process stays busy once it was: those that run now hide how many would."""
LATE = 0.005
"""Seconds: for so long a thread that computes keeps the interpreter from others (sys.getswitchinterval)."""
FULL = 0.9
"""The share of a core at which it counts as used up."""


def rank(workers: Sequence[Worker]) -> None:
    """Tell each of the workers of a process which ones go before it; where all are equal it costs nothing."""
    load = Load(asyncio.get_running_loop())
    equal = len({worker.plan.priority for worker in workers}) < 2
    for worker in workers:
        above = [other for other in workers if other.plan.priority > worker.plan.priority]
        worker.turn = Turn(worker, above, load) if above else None
        worker.spell = ALONE if equal else SPELL


class Load:
    """Whether the process has more to do than it can; measured only while somebody asks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked = self._measuring = False
        self._at = self._used = self._until = 0.0

    @property
    def busy(self) -> bool:
        """What the last periods showed; False before there is one."""
        self._asked = True
        if not self._measuring:
            self._begin()
        return self._loop.time() < self._until

    def _begin(self) -> None:
        self._measuring, self._asked = True, False
        self._at, self._used = self._loop.time(), time.process_time()
        self._loop.call_at(self._at + PERIOD, self._end)

    def _end(self) -> None:
        now = self._loop.time()
        took, used = now - self._at, time.process_time() - self._used
        if took >= PERIOD + LATE or used >= FULL * took:
            self._until = now + STAYS
        self._measuring = False
        if self._asked:
            self._begin()


class Turn:
    """When a worker may begin an event, as far as those above it leave it room."""

    def __init__(self, worker: Worker, above: Sequence[Worker], load: Load) -> None:
        self._worker = worker
        self._above = above
        self._load = load
        self._looking = False
        self._given = False
        """The next event may begin although others wait."""
        self._since = 0.0
        """When it did begin; 0 when it has ended."""
        self._next = 0.0
        """No other may before."""

    def mine(self) -> bool:
        """Whether an event may begin now; if not, the worker is poked when one may. Runners ask after each event."""
        worker = self._worker
        now = worker.loop.time()
        if self._since and not worker.running:
            self._next = now + (now - self._since) * (1 / SHARE - 1)
            self._since = 0.0
        if not worker.ready or self._given:
            if self._given:
                self._given, self._since = False, now
            return True
        if self._looking:
            return False
        if self._waited_for(now):
            self._looking = True
            worker.loop.call_later(LOOK, self._look)
            return False
        return True

    def _look(self) -> None:
        worker = self._worker
        now = worker.loop.time()
        self._looking = False
        if self._waited_for(now):
            if worker.running or now < self._next:
                self._looking = bool(worker.ready) and not worker.stopping
                if self._looking:
                    worker.loop.call_later(LOOK, self._look)
                return
            self._given = True
        worker.poke()

    def _waited_for(self, now: float) -> bool:
        """Whether a worker above waits for the process."""
        for other in self._above:
            if not other.ready or not other.most or other.hold.reason is not None or other.stopping:
                continue
            if other.running < other.most:
                if now <= other.consumer.until:  # else it waits for its broker to say that it still owns them
                    return True
            elif self._load.busy:
                return True
        return False
