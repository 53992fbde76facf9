"""Rules 2, 4, 5, 6, 7, 10, 11 and 12 while processes are killed, paused and stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta

import pytest

from stentor.app import App
from stentor.connect import BrokerUrl
from stentor.errors import ConfigError
from stentor.testing.conformance.events import Job, jobs
from stentor.testing.conformance.faults import Point
from stentor.testing.conformance.fleet import Fleet, FleetScene
from stentor.testing.conformance.program import Act
from stentor.testing.conformance.stage import PATIENCE, until


async def steady_load(fleet: Fleet, each: int, enough: Callable[[], bool] = lambda: True) -> None:
    """Publish at least ``each`` events for 25 keys over a while, and go on until it is enough."""
    n = 0
    while n < each or not enough():
        assert n < 1000, "it is never enough"
        await fleet.publish([Job(key=f"k{i}", n=n) for i in range(25)])
        n += 1
        await asyncio.sleep(0.02)


class Kills(FleetScene):
    """Rule 2, 5, 6 and 12: kill -9 at any point loses nothing."""

    @pytest.mark.parametrize("point", ["received", "started", "before_settle", "after_settle"])
    async def test_r02_a_worker_is_killed(self, fleet: Fleet, point: Point) -> None:
        """Killed at this point, with another key in five-minute backoff: all others are handled, in order, and the
        waiting key goes on waiting.
        """
        slow = Act(do="fail", key="slow", n=0, times=9)
        first = await fleet.start(acts=[slow], first="5m")
        await fleet.publish(jobs("slow", 4))
        await until(lambda: fleet.stage.parked("work"))

        async def all_parked() -> bool:
            return await fleet.stage.parked("work") == 4

        await until(all_parked)
        await first.stop()
        acts = [slow, Act(do="crash", key="k3", n=4, at=point)]
        killed = await fleet.start(acts=acts, first="5m")
        await fleet.publish(jobs(8, 10))
        await until(lambda: killed.dead, "the kill")
        await fleet.start(acts=acts, first="5m")
        await fleet.all_handled(but=4)
        audit = fleet.audit(given_up=[("slow", n) for n in range(4)])
        assert audit.clean, audit
        if point in ("received", "after_settle"):
            assert sum((e.key, e.n) == ("k3", 4) for e in fleet.ledger.read("end")) == 1
        assert set(fleet.starts("k3", 4)) == {1}, "the first crash of an event is free"
        assert fleet.starts("slow", 0) == [1]
        assert await fleet.stage.parked("work") == 4

    async def test_r02_a_producer_is_killed(self, fleet: Fleet) -> None:
        """What ``publish`` confirmed is there though the producer was killed the moment after."""
        if not fleet.stage.features.shared:
            # Its events may die with the process, and it says so: whoever demands more is refused.
            assert fleet.stage.features.durable == "process"
            with pytest.raises(ConfigError, match="durable"):
                async with App("shop", durable="host").running(broker=fleet.stage.broker, connect_only=True):
                    pass
            return
        await fleet.produce(41)
        assert len(fleet.published) == 20 * 10 + 21
        await fleet.start()
        await fleet.all_handled()
        audit = fleet.audit()
        assert audit.clean, audit
        assert (audit.duplicates, audit.burnt) == (0, 0)

    async def test_r11_everything_restarts_in_the_middle(self, fleet: Fleet) -> None:
        """All members are killed in the middle of the work, twice; what runs next finishes it."""
        acts = [Act(do="sleep", seconds=0.002)]
        members = [await fleet.start(acts=acts) for _ in range(2)]
        await fleet.publish(jobs(20, 15))
        unsettled = 0
        for share in (60, 160):
            await until(lambda share=share: len(fleet.handled()) >= share)  # type: ignore[misc]
            settled = await fleet.settled_at_least()
            await asyncio.gather(*(member.kill() for member in members))
            unsettled += len(fleet.handled()) - settled
            members = [await fleet.start(acts=acts) for _ in range(2)]
        await fleet.publish(jobs("new", 5))
        await fleet.all_handled()
        audit = fleet.audit()
        assert audit.clean, audit
        assert audit.duplicates <= unsettled, "only what was not settled at a kill"

    async def test_r05_attempts_across_crashes(self, fleet: Fleet) -> None:
        """Failures are counted across a crash; a first crash is free, later ones count."""
        acts = [
            Act(do="fail", key="a", n=0, times=2),
            Act(do="crash", key="a", n=0),
            Act(do="crash", key="b", n=0, times=2),
        ]
        member = await fleet.start(acts=acts)
        for key, crashes in (("a", 1), ("b", 2)):
            await fleet.publish(jobs(key, 2))
            for _ in range(crashes):
                await until(lambda member=member: member.dead)  # type: ignore[misc]
                member = await fleet.start(acts=acts)
            await fleet.all_handled()
        assert fleet.starts("a", 0) == [1, 2, 3, 4]
        assert fleet.starts("b", 0) == [1, 1, 2]
        assert fleet.audit().clean

    async def test_r05_an_event_that_kills(self, fleet: Fleet) -> None:
        """An event that kills every process that handles it is dead after its attempts; the key goes on."""
        acts = [Act(do="crash", key="a", n=0, times=99)]
        await fleet.publish(jobs("a", 3))
        for _ in range(4):
            member = await fleet.start(acts=acts, attempts=3)
            await until(lambda member=member: member.dead)  # type: ignore[misc]
        await fleet.start(acts=acts, attempts=3)
        [letter] = await fleet.stage.dead("work")
        await fleet.all_handled(but=1)
        assert fleet.starts("a", 0) == [1, 1, 2, 3]
        assert (letter.attempts, letter.message.key, letter.reason) == (3, "a", "attempts")

    @pytest.mark.parametrize("point", ["before_settle", "after_settle"])
    async def test_r12_outputs_across_a_crash(self, fleet: Fleet, point: Point) -> None:
        """A repeated handling publishes the same ids: with dedupe each output is stored once."""
        acts = [Act(do="crash", key="a", n=2, at=point)]
        killed = await fleet.start(acts=acts, makes=True)
        await fleet.publish(jobs("a", 5))
        await until(lambda: killed.dead)
        await fleet.start(acts=acts, makes=True)
        await fleet.all_handled()
        await fleet.stage.settled("work")
        made = [message.id for message in await fleet.stage.browse("made")]
        assert len(set(made)) == 5
        assert len(made) == 5 or not (fleet.stage.features.dedupe or fleet.stage.features.atomic)

    async def test_r12_outputs_under_kills(self, fleet: Fleet) -> None:
        """Members are killed under load: each output is there; once, where the broker can have it so."""
        members = [await fleet.start(makes=True) for _ in range(2)]
        loading = asyncio.create_task(steady_load(fleet, 40))
        for share in (100, 300, 500):
            await until(lambda share=share: len(fleet.handled()) > share)  # type: ignore[misc]
            await members.pop(0).kill()
            members.append(await fleet.start(makes=True))
        await loading
        await fleet.all_handled()
        await fleet.stage.settled("work")
        made = [message.id for message in await fleet.stage.browse("made")]
        assert len(set(made)) == len(fleet.published)
        assert len(set(made)) == len(made) or not (fleet.stage.features.dedupe or fleet.stage.features.atomic)

    async def test_r06_a_kill_before_the_dead_letter(self, fleet: Fleet) -> None:
        """Killed when the dead letter was about to be written: the event dies again, and has one dead letter."""
        acts = [Act(do="crash", key="a", n=0, at="before_settle"), Act(do="fail", key="a", n=0, times=9)]
        killed = await fleet.start(acts=acts, attempts=1)
        await fleet.publish(jobs("a", 2))
        await until(lambda: killed.dead)
        assert await fleet.stage.letters("work") == []
        await fleet.start(acts=acts, attempts=1)
        await fleet.stage.dead("work")
        await fleet.all_handled(but=1)
        await fleet.stage.settled("work")
        assert len(await fleet.stage.letters("work")) == 1

    async def test_r07_delays_outlive_everybody(self, fleet: Fleet) -> None:
        """A delayed event arrives though whoever ran meanwhile was killed; never early."""
        member = await fleet.start()
        due = fleet.stage.clock.now() + 1.0
        await fleet.stage.publish(Job(key="a", n=0), delay=timedelta(seconds=1))
        fleet.published.append(("a", 0))
        await member.kill()
        await fleet.start()
        await fleet.all_handled()
        assert due - 0.001 <= fleet.stage.clock.now() < due + PATIENCE


class Moves(FleetScene):
    """Rule 4: order while partitions move between processes."""

    async def test_r02_another_takes_over(self, fleet: Fleet, record_property: Callable[[str, object], None]) -> None:
        """What comes for the keys of a killed member is handled by one that was there already."""
        killed = await fleet.start()
        await fleet.publish(jobs(25, 1))
        await fleet.all_handled()
        other = await fleet.start()
        await killed.kill()
        began = time.monotonic()
        await fleet.publish([Job(key=f"k{n}", n=1) for n in range(25)])
        await fleet.all_handled()
        record_property("takeover", time.monotonic() - began)
        record_property("lease", BrokerUrl(fleet.stage.url).option("lease", 10.0, float))
        assert {entry.who for entry in fleet.ledger.read("end") if entry.n == 1} == {other.who}
        audit = fleet.audit()
        assert audit.clean, audit

    async def test_r04_members_come_and_go(self, fleet: Fleet) -> None:
        """Under load and with failing events, members join, stop and are killed: order holds, nothing is lost."""
        acts = [Act(do="fail", every=7, below=3), Act(do="sleep", seconds=0.001)]
        await fleet.start(acts=acts)
        second = await fleet.start(acts=acts)

        def had_some(count: int) -> bool:
            return len({entry.who for entry in fleet.ledger.read("end")}) >= count

        loading = asyncio.create_task(steady_load(fleet, 40, lambda: had_some(4)))
        await until(lambda: len(fleet.handled()) > 100)
        third = await fleet.start(acts=acts)
        await until(lambda: len(fleet.handled()) > 250 and had_some(3))
        await second.stop()
        settled = await fleet.settled_at_least()
        await third.kill()
        unsettled = len(fleet.handled()) - settled
        await fleet.start(acts=acts)
        await loading
        await fleet.all_handled()
        await fleet.stage.settled("work")
        audit = fleet.audit()
        assert audit.clean, audit
        assert audit.duplicates <= unsettled, "only what was not settled at the kill"

    async def test_r04_a_paused_process(self, fleet: Fleet) -> None:
        """A process paused for longer than its lease cannot settle what it runs: another has handled it by then."""
        acts = [Act(do="block", key="a", n=0)]
        paused = await fleet.start(acts=acts, makes=True)
        await fleet.publish(jobs("a", 3))
        await until(lambda: fleet.starts("a", 0))
        await paused.pause()
        await fleet.start(makes=True)
        await fleet.all_handled()
        await fleet.stage.settled("work")
        fleet.open_gate()
        await paused.resume()
        await until(lambda: len([e for e in fleet.ledger.read("end") if e.who == paused.who]) == 1)
        counts = await paused.stop()
        assert counts.refused == 1
        audit = fleet.audit()
        assert audit.clean, audit
        assert audit.duplicates == 1, "what ran in the paused process, counted"
        made = await fleet.stage.browse("made")
        assert len({message.id for message in made}) == 3
        assert len(made) == 3 or not (fleet.stage.features.dedupe or fleet.stage.features.atomic)

    async def test_r06_park_over_processes(self, fleet: Fleet) -> None:
        """A key that is held for its dead letter stays held in the next process; a redrive goes on in order there."""
        acts = [Act(do="fail", key="a", n=1, times=1)]
        first = await fleet.start(acts=acts, attempts=1, park=True)
        await fleet.publish(jobs("a b", 4))
        [letter] = await fleet.stage.dead("work")
        await fleet.all_handled(but=3)
        await until(lambda: fleet.stage.parked("work"))  # the letter may be there before the record of it
        await first.kill()
        await fleet.start(acts=acts, attempts=1, park=True)
        await fleet.publish([Job(key="a", n=4), Job(key="b", n=4)])
        await until(lambda: ("b", 4) in fleet.handled())
        assert not {("a", n) for n in range(1, 5)} & fleet.handled()
        await fleet.stage.redrive(letter)
        await fleet.all_handled()
        audit = fleet.audit()
        assert audit.clean, audit

    async def test_r04_a_redrive_behind_which_more_comes(self, fleet: Fleet) -> None:
        """A dead letter is redriven while its key runs, more comes, and the process is killed: the order holds."""
        acts = [Act(do="fail", key="a", n=0, times=1), Act(do="block", key="a", n=1)]
        first = await fleet.start(acts=acts, attempts=1)
        await fleet.publish(jobs("a", 4))
        [letter] = await fleet.stage.dead("work")
        await until(lambda: fleet.starts("a", 1))
        await fleet.stage.redrive(letter)
        await until(lambda: fleet.stage.parked("work"))
        await fleet.publish([Job(key="a", n=4), Job(key="a", n=5)])

        async def all_taken() -> bool:
            [waiting, parked] = await asyncio.gather(fleet.stage.waiting("work"), fleet.stage.parked("work"))
            return parked >= 3 and waiting + parked == 6

        await until(all_taken)
        await first.kill()
        fleet.open_gate()
        await fleet.start(acts=acts, attempts=1)
        await fleet.all_handled()
        assert [entry.n for entry in fleet.ledger.read("end")] == list(range(6))

    async def test_r04_a_kill_when_the_window_was_full(self, fleet: Fleet) -> None:
        """So many events waited behind a running one that they were put aside: after a kill they come after it."""
        first = await fleet.start(acts=[Act(do="block", key="a", n=0)])
        await fleet.publish(jobs("a", 1200))
        await until(lambda: fleet.stage.parked("work"))
        await first.kill()
        fleet.open_gate()
        await fleet.start()
        await fleet.all_handled()
        audit = fleet.audit()
        assert audit.clean, audit


class Stops(FleetScene):
    """Rule 10: SIGTERM."""

    async def test_r10_a_stop_with_a_thousand_prefetched(self, fleet: Fleet) -> None:
        """A stop with 1,000 deliveries in hand gives them back: the next handles them, each once, at attempt 1."""
        acts = [Act(do="block", key="a", n=0)]
        first = await fleet.start(acts=acts, concurrency=1)
        await fleet.publish([Job(key="a", n=0)])
        await until(lambda: fleet.starts("a", 0))
        await fleet.publish([job for job in jobs("a b c d e", 240) if (job.key, job.n) != ("a", 0)])
        stopping = asyncio.create_task(first.stop())
        await asyncio.sleep(0)
        fleet.open_gate()
        counts = await stopping
        assert counts.handled < 1200
        await fleet.start()
        await fleet.all_handled()
        audit = fleet.audit()
        assert audit.clean, audit
        assert (audit.duplicates, audit.burnt) == (0, 0)

    async def test_r10_sigterm_during_load(self, fleet: Fleet) -> None:
        """Members are stopped and replaced under load: zero loss, zero duplicates, zero attempts burnt."""
        acts = [Act(do="sleep", seconds=0.015)]
        members = [await fleet.start(acts=acts) for _ in range(2)]
        loading = asyncio.create_task(steady_load(fleet, 40))
        for share in (100, 300, 500):
            await until(lambda share=share: len(fleet.handled()) > share)  # type: ignore[misc]
            stopping = asyncio.create_task(members.pop(0).stop())
            members.append(await fleet.start(acts=acts))
            await stopping
        await loading
        await fleet.all_handled()
        audit = fleet.audit()
        assert audit.clean, audit
        assert (audit.duplicates, audit.burnt) == (0, 0)

    async def test_r10_what_does_not_end_in_time(self, fleet: Fleet) -> None:
        """A handler that outlasts the grace period is cut off, and its event comes again at attempt 1."""
        acts = [Act(do="block", key="a", n=0)]
        first = await fleet.start(acts=acts, grace="200ms")
        await fleet.publish(jobs("a b", 3))
        await until(lambda: len(fleet.handled()) == 3 and fleet.starts("a", 0))
        await first.stop()
        fleet.open_gate()
        await fleet.start(acts=acts)
        await fleet.all_handled()
        assert fleet.starts("a", 0) == [1, 1]
        assert fleet.audit().lost == []


class Faults(Kills, Moves, Stops):
    """The rules under faults."""
