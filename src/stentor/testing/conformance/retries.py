"""Rules 2 and 5: outputs with the ack, and retry."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

from stentor.context import Context
from stentor.errors import BatchFailed, StorageFull, Unavailable
from stentor.group import Group
from stentor.handler import Batch
from stentor.retry import Retry
from stentor.testing.conformance.events import Job, Loose, Made, jobs
from stentor.testing.conformance.stage import LATE, Scene, Stage, until


class Outputs(Scene):
    """Rule 2: ack only after the outputs are durable, each delivery for itself."""

    async def test_r02_one_refused_output_of_500(self, stage: Stage) -> None:
        """Of 500 events settled together one has an output that the broker refuses: only that one fails."""
        app = stage.app()
        attempts: list[int] = []

        @app.on(Job, retry=Retry(attempts=2, first="10ms"))
        async def work(job: Job, ctx: Context) -> None:
            attempts.append(ctx.attempt)
            await ctx.publish(Made(key=job.key, n=job.n))
            if job.key == "k250":
                await ctx.publish(app.event("unknown", {}, topic="never-declared"))

        async with stage.running(app):
            await stage.publish(jobs(500, 1))
            [letter] = await stage.dead("shop.work")
            await stage.settled("shop.work")
        assert (letter.message.key, letter.attempts) == ("k250", 2)
        assert all(error.type.endswith("UnknownTopic") for error in letter.errors)
        assert sorted(m.key or "" for m in await stage.browse("made")) == sorted(
            f"k{n}" for n in range(500) if n != 250
        )
        assert (attempts.count(1), attempts.count(2)) == (500, 1)

    async def test_r02_a_refused_output_of_a_batch_handler(self, stage: Stage) -> None:
        """When an output of a batch is refused, its members run one by one: the good ones keep their outputs."""
        app = stage.app()

        @app.on(Job, batch=Batch(size=10), retry=Retry(attempts=2, first="10ms"))
        async def work(batch: list[Job], ctx: Context) -> None:
            for job in batch:
                await ctx.publish(Made(key=job.key, n=job.n))
                if job.key == "k3":
                    await ctx.publish(app.event("unknown", {}, topic="never-declared"))

        async with stage.running(app):
            await stage.publish(jobs(10, 1))
            [letter] = await stage.dead("shop.work")
            await stage.settled("shop.work")
        assert letter.message.key == "k3"
        assert {m.key for m in await stage.browse("made")} == {f"k{n}" for n in range(10) if n != 3}

    async def test_r02_outputs_of_a_failure_are_dropped(self, stage: Stage) -> None:
        """What a handler published with ``ctx.publish`` before it failed never appears."""
        app = stage.app()

        @app.on(Job, retry=Retry(first="10ms"))
        async def work(job: Job, ctx: Context) -> Made:
            await ctx.publish(Made(key=job.key, n=ctx.attempt))
            if ctx.attempt < 3:
                raise ValueError("planned")
            return Made(key=job.key, n=10)

        async with stage.running(app):
            await stage.publish(Job(key="a", n=1))
            await stage.settled("shop.work")
        assert [m.data for m in await stage.browse("made")] == [b'{"key":"a","n":3}', b'{"key":"a","n":10}']

    async def test_r02_the_next_of_the_key_waits_for_outputs(self, stage: Stage) -> None:
        """A key's next event starts after the outputs of the one before are durable."""
        app = stage.app()
        found: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> Made:
            found.append(len(await stage.browse("made")))
            return Made(key=job.key, n=job.n)

        async with stage.running(app):
            await stage.publish(jobs("a", 8))
            await stage.settled("shop.work")
        assert found == list(range(8))

    async def test_r02_what_was_settled_out_of_order_stays_settled(self, stage: Stage) -> None:
        """Events that were done behind a stuck one do not come again after a stop; the stuck one does."""
        seen: list[int] = []

        def member(gate: asyncio.Event) -> Any:
            app = stage.app()

            @app.on(Loose, group=Group("work", concurrency=300))
            async def work(loose: Loose) -> None:
                if loose.n == 0:
                    await gate.wait()
                seen.append(loose.n)

            return app

        async with stage.running(member(asyncio.Event()), grace="50ms"):
            await stage.publish([Loose(n=n) for n in range(200)])
            await until(lambda: len(seen) == 199)
        gate = asyncio.Event()
        gate.set()
        async with stage.running(member(gate)):
            await stage.settled("work")
        assert sorted(seen) == list(range(200))
        assert seen[-1] == 0

    async def test_r02_settling_is_repeated(self, stage: Stage) -> None:
        """While the broker cannot be reached nothing is lost or handled again; it goes on when the broker is back."""
        app = stage.app()
        seen: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> Made:
            seen.append(job.n)
            return Made(key=job.key, n=job.n)

        async with stage.running(app) as program:
            broker: Any = program.broker
            await stage.publish(jobs("a", 3))
            await until(lambda: len(seen) == 3)
            broker.away = Unavailable("unplugged")
            await stage.publish([Job(key="a", n=n) for n in range(3, 6)])
            await until(lambda: program.workers[0].trouble is not None)
            assert await broker.health() == "unplugged"
            broker.away = None
            await stage.settled("shop.work")
            assert program.workers[0].trouble is None
        assert seen == list(range(6))
        assert len(await stage.browse("made")) == 6

    async def test_r02_a_refused_park_is_repeated(self, stage: Stage) -> None:
        """When the broker has no room for what a failure must remember, the event is neither lost nor overtaken."""
        app = stage.app()
        seen: list[tuple[int, int]] = []

        @app.on(Job, retry=Retry(first="10ms"))
        async def work(job: Job, ctx: Context) -> None:
            if job.n == 0 and ctx.attempt == 1:
                raise ValueError("planned")
            seen.append((job.n, ctx.attempt))

        async with stage.running(app) as program:
            broker: Any = program.broker
            refused = 0

            def refuse(settlement: Any) -> StorageFull | None:
                nonlocal refused
                if refused < 2 and any(name.startswith("q/") for name in settlement.records):
                    refused += 1
                    return StorageFull("planned")
                return None

            broker.refuse = refuse
            await stage.publish(jobs("a", 4))
            await stage.settled("shop.work")
        assert refused == 2
        assert seen == [(0, 2), (1, 1), (2, 1), (3, 1)]


class Retries(Scene):
    """Rule 5: attempts and delays."""

    async def test_r05_attempts_and_delays(self, stage: Stage) -> None:
        """Attempts are counted from 1, the waits follow the policy."""
        app = stage.app()
        times: list[float] = []
        attempts: list[int] = []

        @app.on(Job, retry=Retry(attempts=4, first="40ms", factor=2, jitter=0))
        async def work(job: Job, ctx: Context) -> None:
            times.append(stage.clock.now())
            attempts.append(ctx.attempt)
            if ctx.attempt < 4:
                raise ValueError("planned")

        async with stage.running(app):
            await stage.publish(Job(key="a", n=1))
            await stage.settled("shop.work")
            assert await stage.letters("shop.work") == []
        waits = [later - sooner for sooner, later in pairwise(times)]
        assert attempts == [1, 2, 3, 4]
        for wait, least in zip(waits, (0.04, 0.08, 0.16), strict=True):
            assert least - 0.001 <= wait < least + LATE

    async def test_r05_a_waiting_key_blocks_nobody(self, stage: Stage) -> None:
        """A hundred keys wait an hour for their retry, each with events behind it; the other keys are all handled."""
        app = stage.app()
        seen: list[str] = []

        @app.on(Job, retry=Retry(first="1h"))
        async def work(job: Job) -> None:
            if job.key.startswith("bad"):
                raise ValueError("planned")
            seen.append(job.key)

        async with stage.running(app):
            bad = " ".join(f"bad{n}" for n in range(100))
            await stage.publish(jobs(bad, 20))
            await stage.publish(jobs(20, 50))
            await until(lambda: len(seen) == 1000)

            async def parked() -> bool:
                return await stage.parked("shop.work") == 2000 and await stage.waiting("shop.work") == 0

            await until(parked)

    async def test_r05_a_stop_burns_no_attempt(self, stage: Stage) -> None:
        """What a stop cuts off, and what it gives back, comes at the attempt at which it was."""
        attempts: list[tuple[int, int]] = []
        gate = asyncio.Event()

        def member() -> Any:
            app = stage.app()

            @app.on(Job, retry=Retry(first="10ms"))
            async def work(job: Job, ctx: Context) -> None:
                attempts.append((job.n, ctx.attempt))
                if job.n == 0 and ctx.attempt == 1:
                    raise ValueError("planned")
                await gate.wait()

            return app

        for stops in range(3):
            async with stage.running(member(), grace="10ms"):
                if not stops:
                    await stage.publish(jobs("a", 3))
                await until(lambda stops=stops: len(attempts) == 2 + stops)  # type: ignore[misc]
        gate.set()
        async with stage.running(member()):
            await stage.settled("shop.work")
        assert attempts == [(0, 1), (0, 2), (0, 2), (0, 2), (0, 2), (1, 1), (2, 1)]

    async def test_r05_asked_retries(self, stage: Stage) -> None:
        """``ctx.retry`` waits as long as asked; with ``count=False`` it burns no attempt, else it does."""
        app = stage.app()
        attempts: list[int] = []
        calls = 0

        @app.on(Job, retry=Retry(attempts=3, first="1h"))
        async def work(job: Job, ctx: Context) -> None:
            nonlocal calls
            calls += 1
            attempts.append(ctx.attempt)
            ctx.retry("10ms", count=calls > 4)

        async with stage.running(app):
            await stage.publish(Job(key="a", n=1))
            [letter] = await stage.dead("shop.work")
        assert attempts == [1, 1, 1, 1, 1, 2, 3]
        assert letter.attempts == 3

    async def test_r05_batches(self, stage: Stage) -> None:
        """Of a batch, BatchFailed fails those it names; any other error fails only whose fault it is, run alone."""
        app = stage.app()
        attempts: dict[str, list[int]] = {}
        done: list[str] = []

        @app.on(Job, batch=Batch(size=8), retry=Retry(attempts=2, first="10ms"))
        async def work(batch: list[Job], ctx: Context) -> None:
            if not {"k2", "k5"} & {job.key for job in batch}:  # a later one may share the batch of their retry
                for job in batch:
                    attempts.setdefault(job.key, []).append(ctx.attempt)
            if any(job.key == "k5" for job in batch):
                raise ValueError("planned")
            bad = {i: KeyError("planned") for i, job in enumerate(batch) if job.key == "k2"}
            done.extend(job.key for job in batch if job.key != "k2")
            if bad:
                raise BatchFailed(bad)

        async with stage.running(app):
            await stage.publish(jobs(8, 1))
            letters = await stage.dead("shop.work", 2)
            await stage.settled("shop.work")
        assert {letter.message.key: letter.attempts for letter in letters} == {"k2": 2, "k5": 2}
        assert sorted(done) == [f"k{n}" for n in range(8) if n not in (2, 5)]
        assert all(set(found) == {1} for found in attempts.values())

    async def test_r05_filters(self, stage: Stage) -> None:
        """What ``where`` leaves out is settled without being handled; order holds for the rest."""
        app = stage.app()
        seen: dict[str, list[int]] = {"odd": [], "sql": []}

        @app.on(Job, group=Group("odd"), where=lambda job: job.n % 2 == 1)
        async def odd(job: Job) -> None:
            seen["odd"].append(job.n)

        @app.on(Job, group=Group("sql"), where="tenant = 'x'")
        async def sql(job: Job) -> None:
            seen["sql"].append(job.n)

        async with stage.running(app):
            for n in range(6):
                await stage.publish(Job(key="a", n=n), headers={"tenant": "x" if n > 3 else "y"})
            await stage.settled("odd", "sql")
        assert seen == {"odd": [1, 3, 5], "sql": [4, 5]}

    async def test_r05_progress_survives(self, stage: Stage) -> None:
        """The state that a long handler recorded is there when it must run again, here or in the next process."""
        states: list[bytes | None] = []
        recorded = False

        def member(last: bool) -> Any:
            app = stage.app()

            @app.on(Job, retry=Retry(first="10ms"))
            async def work(job: Job, ctx: Context) -> None:
                nonlocal recorded
                states.append(ctx.state)
                if not last:
                    await ctx.progress(0.5, "half", state=b"half")
                    recorded = True
                    await asyncio.get_running_loop().create_future()

            return app

        async with stage.running(member(last=False), grace="20ms"):
            await stage.publish(Job(key="a", n=1))
            await until(lambda: recorded)
        async with stage.running(member(last=True)):
            await stage.settled("shop.work")
        assert states == [None, b"half"]
