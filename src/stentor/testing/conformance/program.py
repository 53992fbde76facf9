"""The program that the suite runs as processes of their own: ``python -m stentor.testing.conformance.program SCRIPT``.

Its handler writes all it sees to a ledger, and does what its script asks for: die at a point, fail, wait. A script is
JSON. With ``produce`` it publishes instead, and kills itself when the last publish has returned.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from stentor.app import App
from stentor.broker import Broker
from stentor.clock import Clock, SystemClock
from stentor.connect import connect
from stentor.context import Context
from stentor.group import Group
from stentor.message import Message
from stentor.plan import Counts
from stentor.program import Program
from stentor.retry import Retry
from stentor.testing.conformance.events import ALWAYS, Job, Made
from stentor.testing.conformance.faults import FaultyBroker, Point
from stentor.testing.conformance.ledger import Entry, Ledger
from stentor.testing.conformance.stands import stands


class Planned(Exception):
    """A failure that the script asked for."""


class Act(Struct, kw_only=True, omit_defaults=True):
    """Something to do when an event passes, ``times`` times over all processes together."""

    do: Literal["crash", "fail", "block", "sleep"]
    key: str | None = None
    n: int | None = None
    at: Point = "started"
    times: int = 1
    seconds: float = 0.0
    every: int = 1
    """Only for numbers that are multiples of it."""
    below: int = 0
    """Fail at all attempts below this one, however often that is."""
    chance: float = 0.0
    """Fail by chance, however often that is."""

    def fits(self, key: str, n: int) -> bool:
        return self.key in (None, key) and self.n in (None, n) and n % self.every == 0


class Script(Struct, kw_only=True, omit_defaults=True):
    """What a member does."""

    url: str
    ledger: str
    who: str = "someone"
    acts: list[Act] = []
    attempts: int | None = 20
    first: str = "20ms"
    park: bool = False
    concurrency: int = 64
    grace: str = "10s"
    makes: bool = False
    produce: int = 0
    factory: str = ""
    """``module:function`` that makes a broker of URL and clock, in place of ``connect``."""

    def claim(self, index: int) -> bool:
        """Whether an act is still to be done; each time is claimed by one process."""
        act = self.acts[index]
        for time in range(0 if act.below or act.chance else act.times):
            try:
                os.close(os.open(f"{self.ledger}.{index}.{time}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return True
        return False

    @property
    def gate(self) -> Path:
        """The file whose appearance ends every "block"."""
        return Path(f"{self.ledger}.open")


Crash = Callable[[], Awaitable[None]]


def make_app(script: Script, ledger: Ledger, crash: Crash) -> App:
    """The app of a member: one group ``work`` that handles Jobs, and makes a Made of each if asked to."""
    app = App("shop")
    for cls in ALWAYS:
        app.catalog.add(cls)
    group = Group("work", on_dead="park" if script.park else "continue", concurrency=script.concurrency)

    @group.on(Job, retry=Retry(attempts=script.attempts, first=script.first, factor=1))
    async def work(job: Job, ctx: Context) -> Made | None:
        entry = Entry("start", script.who, job.key, job.n, ctx.message.id, ctx.attempt)
        ledger.write(entry)
        for index, act in enumerate(script.acts):
            if not act.fits(job.key, job.n) or (act.do == "crash" and act.at != "started"):
                continue
            if act.do == "block":
                while not script.gate.exists():  # noqa: ASYNC110  another process makes it
                    await asyncio.sleep(0.005)
            elif act.do == "sleep":
                await asyncio.sleep(act.seconds)
            elif ctx.attempt < act.below or random.random() < act.chance or script.claim(index):  # noqa: S311
                if act.do == "crash":
                    await crash()
                ledger.write(msgspec.structs.replace(entry, what="fail"))
                raise Planned(f"{job.key} {job.n}")
        ledger.write(msgspec.structs.replace(entry, what="end"))
        return Made(key=job.key, n=job.n) if script.makes else None

    app.add(group)
    return app


def crashing(script: Script, crash: Crash) -> Callable[[Point, Message], Awaitable[None]]:
    """What a FaultyBroker calls at each point."""
    planned = [(index, act) for index, act in enumerate(script.acts) if act.do == "crash" and act.at != "started"]
    decode = msgspec.json.Decoder(Job).decode

    async def at(point: Point, message: Message) -> None:
        if any(act.at == point for _, act in planned) and message.type == "conformance.job":
            job = decode(message.data)
            for index, act in planned:
                if act.at == point and act.fits(job.key, job.n) and script.claim(index):
                    await crash()

    return at


async def play(
    script: Script, broker: Broker, crash: Crash, stop: asyncio.Event, ready: Callable[[Program, FaultyBroker], None]
) -> Counts:
    """Run a member until ``stop``; its counts at the end."""
    ledger = Ledger(script.ledger)
    app = make_app(script, ledger, crash)
    faulty = FaultyBroker(broker, crashing(script, crash))
    async with app.running(broker=faulty, grace=script.grace) as program:
        [worker] = program.workers
        ready(program, faulty)
        await stop.wait()
    ledger.close()
    return worker.counts


async def produce(script: Script, broker: Broker) -> None:
    """Publish events of ten keys in lists and one by one, note each when it is confirmed, and end nothing orderly."""
    ledger = Ledger(script.ledger)
    app = make_app(script, ledger, _kill)
    async with app.running(broker=broker, connect_only=True):
        n = 0
        while n < script.produce:
            batch = [Job(key=f"k{i}", n=n) for i in range(10)]
            await app.publish(batch if n % 2 else batch[0])
            for job in batch if n % 2 else batch[:1]:
                ledger.write(Entry("published", script.who, job.key, job.n))
            n += 1
        await _kill()


async def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.get_running_loop().create_future()


def make_broker(script: Script, clock: Clock) -> Broker:
    """The broker of a script, not yet open."""
    if not script.factory:
        return connect(script.url, clock)
    module, _, name = script.factory.partition(":")
    made: Broker = getattr(importlib.import_module(module), name)(script.url, clock)
    return made


async def main(text: str) -> None:
    """Do what a script says, until SIGTERM."""
    script = msgspec.json.decode(text, type=Script)
    broker = make_broker(script, SystemClock())
    await broker.open()
    if script.produce:
        await produce(script, broker)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    async def crash() -> None:
        ledger = Ledger(script.ledger)
        ledger.write(Entry("gone", script.who))
        await _kill()

    def ready(program: Program, faulty: FaultyBroker) -> None:
        def tell() -> None:
            [worker] = program.workers
            told = f"{worker.counts}, {worker.partitions} partitions, trouble: {worker.trouble}"
            sys.stderr.write(f"{told}\n{stands()}\n\n")
            sys.stderr.flush()

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    counts = await play(script, broker, crash, stop, ready)
    await broker.close()
    sys.stdout.write(msgspec.json.encode(counts).decode() + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
