"""Rule 8: replay."""

from __future__ import annotations

import asyncio

import pytest

from stentor.context import Context
from stentor.errors import Unsupported
from stentor.group import Group
from stentor.retry import Retry
from stentor.testing.conformance.events import Job, Loose, Made, jobs
from stentor.testing.conformance.stage import Scene, Stage, until


class Replays(Scene):
    """Rule 8; on a broker without replay each test shows that it is refused."""

    async def _refused(self, stage: Stage) -> bool:
        if stage.features.replay:
            return False
        with pytest.raises(Unsupported, match="replay"):
            await stage.broker.admin.replay("shop.work", "earliest")
        return True

    async def test_r08_an_existing_group(self, stage: Stage) -> None:
        """A replay gives a group its events again, marked as replayed, in order; another group sees nothing of it."""
        if await self._refused(stage):
            return
        app = stage.app()
        seen: list[tuple[str, int, bool, int]] = []
        other: list[int] = []

        @app.on(Job)
        async def work(job: Job, ctx: Context) -> None:
            seen.append((job.key, job.n, bool(ctx.replayed), ctx.attempt))

        @app.on(Job)
        async def witness(job: Job) -> None:
            other.append(job.n)

        async with stage.running(app):
            await stage.publish(jobs("a b", 5))
            await stage.settled("shop.work", "shop.witness")
            seen.clear()
            assert await stage.broker.admin.replay("shop.work", "earliest") == 10
            await until(lambda: len(seen) == 10)
            await stage.publish(Job(key="a", n=5))
            await until(lambda: len(seen) == 11)
            await stage.settled("shop.work", "shop.witness")
        assert [entry for entry in seen if entry[0] == "a"] == [("a", n, n < 5, 1) for n in range(6)]
        assert [entry for entry in seen if entry[0] == "b"] == [("b", n, True, 1) for n in range(5)]
        assert len(other) == 11

    async def test_r08_by_offset_and_by_time(self, stage: Stage) -> None:
        """A replay starts at an offset, or at the first event stored at or after a time."""
        if await self._refused(stage):
            return
        app = stage.app()
        seen: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.n)

        async with stage.running(app):
            receipts = await stage.publish(jobs("a", 4))
            await stage.settled("shop.work")
            edge = await stage.edge()
            await stage.publish([Job(key="a", n=n) for n in (4, 5)])
            await stage.settled("shop.work")
            seen.clear()
            assert await stage.broker.admin.replay("shop.work", await stage.position(receipts[2])) == 4
            await until(lambda: seen == [2, 3, 4, 5])
            await stage.settled("shop.work")
            seen.clear()
            await stage.broker.admin.replay("shop.work", edge)
            await until(lambda: seen == [4, 5])
            await stage.settled("shop.work")

    async def test_r08_a_new_group(self, stage: Stage) -> None:
        """A group that is declared but never ran can be set to any place before it starts."""
        if await self._refused(stage):
            return
        app = stage.app()
        seen: list[int] = []

        @app.on(Job, group=Group("fresh", start="latest"))
        async def work(job: Job) -> None:
            seen.append(job.n)

        receipts = await stage.publish(jobs("a", 5))
        async with stage.running(app, connect_only=True):
            pass
        await stage.broker.admin.replay("fresh", await stage.position(receipts[3]))
        async with stage.running(app):
            await stage.settled("fresh")
        assert seen == [3, 4]

    async def test_r08_while_nobody_runs(self, stage: Stage) -> None:
        """A replay asked for between two runs is there at the next."""
        if await self._refused(stage):
            return
        app = stage.app()
        seen: list[tuple[int, bool]] = []

        @app.on(Job)
        async def work(job: Job, ctx: Context) -> None:
            seen.append((job.n, bool(ctx.replayed)))

        await stage.publish(jobs("a", 3))
        async with stage.running(app):
            await stage.settled("shop.work")
        await stage.broker.admin.replay("shop.work", "earliest")
        async with stage.running(app):
            await stage.settled("shop.work")
        assert seen == [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)]

    async def test_r08_parked_events_and_attempts_begin_anew(self, stage: Stage) -> None:
        """What was parked at or after the position is handled once, by the replay, at attempt 1; what was parked before
        it stays; dead letters stay.
        """
        if await self._refused(stage):
            return
        app = stage.app()
        broken = True
        seen: list[tuple[str, int, int]] = []

        @app.on(Job, retry=Retry(attempts=5, first="1h", never=(KeyError,)))
        async def work(job: Job, ctx: Context) -> None:
            if broken and job.key == "dead":
                raise KeyError("planned")
            if broken and job.key in ("early", "late"):
                raise ValueError("planned")
            seen.append((job.key, job.n, ctx.attempt))

        async with stage.running(app):
            await stage.publish([Job(key="early", n=0), Job(key="dead", n=0)])
            edge = await stage.edge()
            await stage.publish(Job(key="a", n=0))
            await stage.publish([Job(key="late", n=0), Job(key="late", n=1)])
            await stage.dead("shop.work")

            async def parked() -> bool:
                return await stage.parked("shop.work") == 3 and await stage.waiting("shop.work") == 0

            await until(parked)
            broken = False
            seen.clear()
            await stage.broker.admin.replay("shop.work", edge)
            await until(lambda: len(seen) == 3)

            async def one_left() -> bool:
                return await stage.parked("shop.work") == 1 and await stage.waiting("shop.work") == 0

            await until(one_left)
            assert len(await stage.letters("shop.work")) == 1
        assert sorted(seen) == [("a", 0, 1), ("late", 0, 1), ("late", 1, 1)]

    async def test_r08_a_held_key_before_the_position_stays_held(self, stage: Stage) -> None:
        """With on_dead="park", a replay from after the dead event does not free its key."""
        if await self._refused(stage):
            return
        app = stage.app()
        seen: list[tuple[str, int]] = []

        @app.on(Job, group=Group("strict", on_dead="park"), retry=Retry(attempts=1))
        async def work(job: Job) -> None:
            if job.key == "bad" and job.n == 0:
                raise ValueError("planned")
            seen.append((job.key, job.n))

        async with stage.running(app):
            await stage.publish(Job(key="bad", n=0))
            [letter] = await stage.dead("strict")
            edge = await stage.edge()
            await stage.publish(Job(key="a", n=0))
            await stage.settled("strict")
            await stage.broker.admin.replay("strict", edge)
            await until(lambda: len(seen) == 2)
            await stage.publish([Job(key="bad", n=1), Job(key="a", n=1)])
            await until(lambda: len(seen) == 3)
            assert seen == [("a", 0), ("a", 0), ("a", 1)]
            await stage.redrive(letter, redrive=False)
            await until(lambda: seen[3:] == [("bad", 1)])

    async def test_r08_outputs_of_a_replay(self, stage: Stage) -> None:
        """Outputs of a replay are events of their own: dedupe does not swallow them; a second replay makes others."""
        if await self._refused(stage):
            return
        app = stage.app()

        @app.on(Job)
        async def work(job: Job) -> Made:
            return Made(key=job.key, n=job.n)

        async with stage.running(app):
            await stage.publish(Job(key="a", n=1))
            await stage.settled("shop.work")
            for round in (2, 3):
                await stage.broker.admin.replay("shop.work", "earliest")

                async def made(round: int = round) -> bool:
                    return len(await stage.browse("made")) == round

                await until(made)
                await stage.settled("shop.work")
        assert len({message.id for message in await stage.browse("made")}) == 3

    async def test_r08_stale_settles_are_refused(self, stage: Stage) -> None:
        """A handler that began before the replay cannot settle: its event is handled again by the replay."""
        if await self._refused(stage):
            return
        app = stage.app()
        gate = asyncio.Event()
        begun = 0
        ended: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            nonlocal begun
            begun += 1
            mine = begun
            if mine == 1:
                await gate.wait()
            ended.append(mine)

        async with stage.running(app) as program:
            await stage.publish(jobs("a", 1))
            await until(lambda: program.workers[0].running == 1)
            await stage.broker.admin.replay("shop.work", "earliest")
            await until(lambda: 2 in ended)
            await stage.settled("shop.work")
            gate.set()
            await until(lambda: program.workers[0].counts.refused)
        # There may be more on a machine that stood still for longer than a lease.
        assert ended.index(2) < ended.index(1)

    async def test_r08_what_was_settled_out_of_order_is_replayed(self, stage: Stage) -> None:
        """An event that was done before the replay is marked as replayed, though one before it was not done."""
        if await self._refused(stage):
            return
        app = stage.app()
        held = False
        gate = asyncio.Event()
        seen: list[tuple[str, bool]] = []

        @app.on(Loose)
        async def work(loose: Loose, ctx: Context) -> None:
            nonlocal held
            if loose.n == 0 and not held:
                held = True
                await gate.wait()
                return
            seen.append((str(loose.n), bool(ctx.replayed)))

        async with stage.running(app):
            await stage.publish([Loose(n=n) for n in range(200)])
            await until(lambda: len(seen) == 199)

            async def settled() -> bool:
                return await stage.waiting("shop.work") == 1

            await until(settled)
            seen[:] = [("", False)]
            await stage.broker.admin.replay("shop.work", "earliest")
            await until(lambda: len({name for name, _ in seen}) == 201)  # some may come twice
            gate.set()
            await stage.settled("shop.work")
        assert {name for name, replayed in seen[1:] if not replayed} <= {"0"}

    async def test_r08_redrive_after_a_replay(self, stage: Stage) -> None:
        """An event that dies again in a replay has a dead letter of its own."""
        if await self._refused(stage):
            return
        app = stage.app()

        @app.on(Job, retry=Retry(attempts=1))
        async def work(job: Job) -> None:
            raise ValueError("planned")

        async with stage.running(app):
            await stage.publish(Job(key="a", n=1))
            await stage.dead("shop.work", 1)
            await stage.broker.admin.replay("shop.work", "earliest")
            first, second = await stage.dead("shop.work", 2)
            assert first.id != second.id
            assert first.message == second.message
