"""A worker process of a bench: the app as it is, with a witness around its handlers that writes down each end.

What it writes is a file of fixed records, appended by all processes, so that what a killed one saw is there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

from msgspec import Struct

from stentor.app import App
from stentor.capacity.times import fitted
from stentor.context import Context, Dead
from stentor.errors import DefinitionError
from stentor.event import Event
from stentor.group import Group
from stentor.message import Message
from stentor.plan import Route

EXTENSION = "stentorbench"
"""The CloudEvents extension that numbers the events of a bench."""
POISON = 100
"""One in so many events is refused for good in a poison run."""
SLOW = 0.1
"""Seconds that each event takes longer in a member that was made slow."""
_RECORD = struct.Struct("<qqdd")


class Job(Struct, kw_only=True, omit_defaults=True):
    """What a member runs: the groups of an app (of the built-in one without ``target``) on a broker."""

    url: str
    ledger: str
    groups: list[str]
    target: str = ""
    service: float = 0.0
    cv: float = 1.0
    concurrency: int = 64
    poison: bool = False


class Work(Event, topic="bench.work", key="key", type="io.stentor.bench.work"):
    """What the built-in app handles."""

    key: str
    n: int
    text: str = ""


def work_app(service: float, cv: float, concurrency: int) -> App:
    """The built-in app: one handler that waits for ``service`` seconds on average, varying by ``cv``."""
    app = App("bench")
    group = Group("bench.work", concurrency=concurrency)
    times = fitted(service, cv) if service else []

    @group.on(Work)
    async def work(event: Work) -> None:
        if times:
            await asyncio.sleep(times[event.n * 7919 % len(times)])

    app.add(group)
    return app


class Seen(Struct, array_like=True):
    """An end of a handler: the event's number, the group's, and when it began and ended (``time.monotonic``)."""

    n: int
    group: int
    began: float
    ended: float


def read(path: Path, offset: int) -> tuple[list[Seen], int]:
    """What the members have written since ``offset``, and the offset to go on from."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = len(data) - len(data) % _RECORD.size
    return [Seen(*fields) for fields in _RECORD.iter_unpack(data[:whole])], offset + whole


def number_of(message: Message) -> int | None:
    """The number of an event of a bench."""
    number = message.extensions.get(EXTENSION)
    return None if number is None else int(number)


def poisoned(n: int) -> bool:
    """Whether a poison run refuses the event with this number."""
    return n % POISON == POISON // 2


class Witness:
    """Wraps the handlers of the measured groups."""

    def __init__(self, job: Job) -> None:
        self._numbers = {name: number for number, name in enumerate(job.groups)}
        self._poison = job.poison
        self._file = os.open(job.ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.slow = False

    def adapt(self, route: Route) -> None:
        """Put the witness around a route's handler. Raises DefinitionError: poison for a batch handler."""
        if self._poison and route.handler.batch is not None:
            raise DefinitionError(f"{route.handler.place}: poison is for handlers of one event, not for batches")
        inner = route.invoke

        async def invoke(event: Any, context: Context) -> Any:
            began = time.monotonic()
            numbers = [n for message in context.messages if (n := number_of(message)) is not None]
            if self.slow:
                await asyncio.sleep(SLOW)
            if self._poison and any(poisoned(n) for n in numbers):
                raise Dead("poison of a bench")
            result = await inner(event, context)
            group, ended = self._numbers[context.group], time.monotonic()
            os.write(self._file, b"".join(_RECORD.pack(n, group, began, ended) for n in numbers))
            return result

        route.invoke = invoke


async def play(app: App, job: Job) -> None:
    """Run a member until SIGTERM; says "ready" on standard output. SIGUSR1 makes it slow, SIGUSR2 quick again."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    witness = Witness(job)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: setattr(witness, "slow", True))
    loop.add_signal_handler(signal.SIGUSR2, lambda: setattr(witness, "slow", False))
    async with app.running(url=job.url, only=job.groups, grace="10s", new_groups=True, adapt=witness.adapt):
        os.write(1, b"ready\n")
        await stop.wait()
