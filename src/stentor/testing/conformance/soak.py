"""A randomised soak: faults of all kinds mixed under load, and the ledger's verdict."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from stentor.testing.conformance.events import Job
from stentor.testing.conformance.fleet import Fleet, FleetScene
from stentor.testing.conformance.program import Act
from stentor.testing.conformance.stage import LEASE, until

MINUTES = float(os.environ.get("STENTOR_SOAK_MINUTES", "0.2"))
SEED = int(os.environ.get("STENTOR_SOAK_SEED", random.randrange(2**32)))  # noqa: S311  no secret
KEYS = 40
BEHIND = 2000
"""The producer waits while so many events are unsettled: how long they take to settle depends on the machine."""
MEMBERS = 3


class _Storm:
    """One soak: a producer, members that come and go, and whoever redrives what died."""

    def __init__(self, fleet: Fleet, chance: random.Random) -> None:
        self.fleet = fleet
        self.chance = chance
        self.alive: list[Any] = []
        self.stopping = False
        self.redriven: set[str] = set()
        self.faults: dict[str, int] = {}
        self.script: dict[str, Any] = {
            "acts": [
                Act(do="fail", every=13, below=3),
                Act(do="fail", every=101, chance=0.8),
                Act(do="sleep", seconds=0.002),
            ],
            "attempts": 6,
            "makes": True,
            "first": "30ms",
        }

    async def join(self) -> None:
        self.alive.append(await self.fleet.start(**self.script))

    def _pick(self) -> Any:
        return self.alive.pop(self.chance.randrange(len(self.alive)))

    async def publish(self) -> None:
        n = 0
        while not self.stopping:
            await self.fleet.publish([Job(key=f"k{i}", n=n) for i in self.chance.sample(range(KEYS), 20)])
            n += 1
            await asyncio.sleep(self.chance.uniform(0.01, 0.05))
            if n % 10 == 0:
                await until(self._caught_up, "the members get on with it", 300)

    async def _caught_up(self) -> bool:
        """Whether few events are unsettled, or no more are to come."""
        stage = self.fleet.stage
        return self.stopping or await stage.waiting("work") + await stage.parked("work") <= BEHIND

    async def kill(self) -> None:
        await self._pick().kill()

    async def stop(self) -> None:
        await self._pick().stop()

    async def pause(self) -> None:
        member = self._pick()
        await member.pause()
        await asyncio.sleep(self.chance.uniform(0.2, 2.0) * LEASE)
        await member.resume()
        await member.stop()

    async def leave_be(self) -> None:
        await self.join()

    async def redrive(self) -> None:
        for letter in await self.fleet.stage.letters("work"):
            if letter.id not in self.redriven and self.chance.random() < 0.5:
                self.redriven.add(letter.id)
                await self.fleet.stage.redrive(letter)

    async def rage(self, seconds: float) -> None:
        """Faults, one after the other, for so long."""
        end = time.monotonic() + seconds
        kinds = [self.kill, self.kill, self.stop, self.pause, self.redrive, self.leave_be]
        while time.monotonic() < end:
            kind = self.chance.choice(kinds)
            self.faults[kind.__name__] = self.faults.get(kind.__name__, 0) + 1
            await kind()
            while len(self.alive) < MEMBERS:
                await self.join()
            while len(self.alive) > 2 * MEMBERS:
                await self.stop()
            await asyncio.sleep(self.chance.uniform(0.0, 0.4))


class Soak(FleetScene):
    """All rules at once, for $STENTOR_SOAK_MINUTES (default 0.2); $STENTOR_SOAK_SEED repeats a run's choices."""

    @pytest.mark.soak
    @pytest.mark.timeout(60 * (2 * MINUTES + 10))
    async def test_soak(self, fleet: Fleet, record_property: Callable[[str, object], None]) -> None:
        """Under kill -9, SIGTERM, SIGSTOP, failures, joins and redrives: none lost, order kept, repeats counted."""
        sys.stdout.write(f"{MINUTES:g} minutes, seed {SEED}\n")
        storm = _Storm(fleet, random.Random(SEED))  # noqa: S311  no secret
        for _ in range(MEMBERS):
            await storm.join()
        publishing = asyncio.create_task(storm.publish())
        try:
            await storm.rage(MINUTES * 60)
        finally:
            storm.stopping = True
            await publishing
        ended = time.monotonic()

        async def quiet() -> bool:
            return not (await fleet.stage.waiting("work") or await fleet.stage.parked("work"))

        await until(quiet, "all settled after the soak", 300 + MINUTES * 60)
        settled = time.monotonic() - ended
        letters = await fleet.stage.letters("work")
        dead = {(letter.message.key or "", number(letter.message.data)) for letter in letters}
        entries = [e for e in fleet.ledger.read() if (e.key, e.n) not in dead]
        audit = fleet.ledger.audit(fleet.published, given_up=dead)
        sys.stdout.write(
            f"{len(fleet.published)} events, {len(letters)} dead letters, {len(storm.redriven)} redriven, "
            f"{audit.duplicates} duplicates, faults {storm.faults}, {len(entries)} entries, "
            f"settled {settled:.0f} s after the last\n"
        )
        record_property("minutes", MINUTES)
        record_property("events", len(fleet.published))
        record_property("duplicates", audit.duplicates)
        record_property("deaths", storm.faults.get("kill", 0) + storm.faults.get("pause", 0))
        assert audit.lost == []
        disorder = [event for event in audit.disorder if event not in dead]
        for event in disorder[:1]:
            sys.stdout.write(f"around {event}:\n{fleet.ledger.around(event)}\n")
        assert disorder == []
        assert audit.overlaps == []
        made = await fleet.stage.browse("made")
        assert {(m.key, number(m.data)) for m in made} >= {event for event in fleet.published if event not in dead}
        if fleet.stage.features.dedupe:
            assert len({message.id for message in made}) == len(made)


def number(data: bytes) -> int:
    """The ``n`` of an event's JSON."""
    return int(data.split(b'"n":')[1].split(b",")[0].rstrip(b"}"))
