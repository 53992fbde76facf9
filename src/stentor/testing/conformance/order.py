"""Rule 4: the events of a key run one at a time, in publish order."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import AsyncExitStack

from stentor.app import App
from stentor.context import Context
from stentor.group import Group
from stentor.retry import Retry
from stentor.testing.conformance.events import Job, Loose, Order, jobs
from stentor.testing.conformance.stage import Scene, Stage, until


class Watch:
    """What handlers saw: the order per key, and whether one key ever ran twice at once."""

    def __init__(self) -> None:
        self.ends: dict[str, list[int]] = {}
        self.running: set[str] = set()
        self.most = 0
        self.count = 0

    async def __call__(self, key: str, n: int, pause: float | None = 0) -> None:
        assert key not in self.running, f"{key} runs twice at once"
        self.running.add(key)
        self.most = max(self.most, len(self.running))
        try:
            if pause is not None:
                await asyncio.sleep(pause)
        finally:
            self.running.discard(key)
        self.ends.setdefault(key, []).append(n)
        self.count += 1

    def in_order(self, each: int) -> None:
        assert all(found == list(range(each)) for found in self.ends.values()), self.ends


class Ordering(Scene):
    """Rule 4, in one process and over members that come and go."""

    async def test_r04_order_of_a_key(self, stage: Stage) -> None:
        """Each key's events run one at a time in publish order, while different keys run at the same time."""
        app, watch = stage.app(), Watch()

        @app.on(Job)
        async def work(job: Job) -> None:
            await watch(job.key, job.n, 0.001)

        async with stage.running(app):
            await stage.publish(jobs(20, 25))
            await until(lambda: watch.count == 500)
        watch.in_order(25)
        assert watch.most > 5

    async def test_r04_order_across_types(self, stage: Stage) -> None:
        """Handlers of one group keep the order of a key across their types."""
        app = stage.app()
        group = Group("both")
        seen: dict[str, list[str]] = {}

        @group.on(Job, retry=Retry(first="5ms"))
        async def job(job: Job, ctx: Context) -> None:
            if ctx.attempt == 1 and job.n % 3 == 0:
                raise ValueError("planned")
            seen.setdefault(job.key, []).append(f"job{job.n}")

        @group.on(Order)
        async def order(order: Order) -> None:
            seen.setdefault(order.key, []).append(f"order{order.n}")

        app.add(group)
        expected = [f"{kind}{n}" for n in range(10) for kind in ("job", "order")]
        async with stage.running(app):
            for n in range(10):
                await stage.publish([kind(key=key, n=n) for kind in (Job, Order) for key in ("a", "b")])
            await stage.settled("both")
        assert seen == {"a": expected, "b": expected}

    async def test_r04_order_through_retries(self, stage: Stage) -> None:
        """A failing event holds its key's later events, also those published while it waits; other keys go on."""
        app, watch = stage.app(), Watch()

        @app.on(Job, retry=Retry(first="20ms", factor=1))
        async def work(job: Job, ctx: Context) -> None:
            if job.key == "k0" and job.n in (1, 4) and ctx.attempt < 3:
                raise ValueError("planned")
            await watch(job.key, job.n)

        async with stage.running(app):
            for n in range(40):
                await stage.publish([Job(key=f"k{i}", n=n) for i in range(5)])
                await asyncio.sleep(0)
            await stage.settled("shop.work")
        watch.in_order(40)

    async def test_r04_order_while_published_steadily(self, stage: Stage) -> None:
        """A key that fails again and again while its events keep coming loses none and mixes none."""
        app, watch = stage.app(), Watch()

        @app.on(Job, retry=Retry(first="3ms", factor=1, jitter=0.5))
        async def work(job: Job, ctx: Context) -> None:
            if job.n % 10 == 3 and ctx.attempt < 3:
                raise ValueError("planned")
            await watch(job.key, job.n)

        async with stage.running(app):
            for n in range(300):
                await stage.publish([Job(key="a", n=n), Job(key="b", n=n)])
            await stage.settled("shop.work")
        watch.in_order(300)

    async def test_r04_members_join_and_leave(self, stage: Stage) -> None:
        """Under load, members join and leave: nothing is lost, handled twice, at once or out of order."""
        watch = Watch()

        def member() -> App:
            app = stage.app()

            @app.on(Job)
            async def work(job: Job) -> None:
                await watch(job.key, job.n, 0.003)

            return app

        each = 150
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(stage.running(member()))
            for n in range(0, each, 10):  # there is always something under way
                await stage.publish([Job(key=f"k{i}", n=m) for m in range(n, n + 10) for i in range(20)])
            for wanted in (100, 300, 500):
                await until(lambda wanted=wanted: watch.count >= wanted)  # type: ignore[misc]
                async with stage.running(member()):
                    target = watch.count + 100
                    await until(lambda target=target: watch.count >= min(target, 20 * each))  # type: ignore[misc]
            await until(lambda: watch.count >= 20 * each)
            await stage.settled("shop.work")
        watch.in_order(each)
        assert watch.count == 20 * each

    async def test_r04_a_member_joins_under_constant_load(self, stage: Stage) -> None:
        """A member that joins while the first never has a quiet moment gets its share all the same."""
        counts = [0, 0]
        stop = False

        def member(index: int) -> App:
            app = stage.app()

            @app.on(Job)
            async def work(job: Job) -> None:
                counts[index] += 1

            return app

        async def flood() -> None:
            while not stop:
                await stage.publish(jobs(100, 1))
                await asyncio.sleep(0)

        async with stage.running(member(0)):
            flooding = asyncio.create_task(flood())
            await until(lambda: counts[0] > 500)
            async with stage.running(member(1)):
                await until(lambda: counts[1] > 100, "a share for the second member")
            stop = True
            await flooding

    async def test_r04_retries_move_with_their_key(self, stage: Stage) -> None:
        """A key that waits for a retry when its member leaves goes on with the next one, in order, attempts kept."""
        seen: list[tuple[int, int]] = []
        failed = 0

        def member(fail: bool) -> App:
            app = stage.app()

            @app.on(Job, retry=Retry(first="300ms", jitter=0))
            async def work(job: Job, ctx: Context) -> None:
                nonlocal failed
                if fail:
                    failed += 1
                    raise ValueError("planned")
                seen.append((job.n, ctx.attempt))

            return app

        async with stage.running(member(fail=True)):
            await stage.publish(jobs("a", 5))

            async def parked() -> bool:
                return await stage.parked("shop.work") == 5

            await until(parked)
        async with stage.running(member(fail=False)):
            await stage.publish(Job(key="a", n=5))
            await stage.settled("shop.work")
        assert seen == [(0, 1 + failed), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]

    async def test_r04_unordered_groups_do_not_wait(self, stage: Stage) -> None:
        """With ordering="none" a failing or slow event holds nothing of its key back."""
        app = stage.app()
        gate = asyncio.Event()
        seen: list[int] = []

        @app.on(Job, group=Group("free", ordering="none"), retry=Retry(first="30ms"))
        async def work(job: Job, ctx: Context) -> None:
            if job.n == 0:
                await gate.wait()
            if job.n == 1 and ctx.attempt == 1:
                raise ValueError("planned")
            seen.append(job.n)

        async with stage.running(app):
            await stage.publish(jobs("a", 6))
            await until(lambda: len(seen) == 5)
            gate.set()
            await stage.settled("free")
        assert sorted(seen) == [0, 1, 2, 3, 4, 5]
        assert seen[-1] == 0

    async def test_r04_events_without_a_key(self, stage: Stage) -> None:
        """Events without a key are each handled once, many at a time, and retried alone."""
        app = stage.app()
        seen: list[int] = []
        running = most = 0

        @app.on(Loose, retry=Retry(first="10ms"))
        async def work(loose: Loose, ctx: Context) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            if loose.n % 10 == 0 and ctx.attempt == 1:
                raise ValueError("planned")
            seen.append(loose.n)

        async with stage.running(app):
            await stage.publish([Loose(n=n) for n in range(200)])
            await stage.settled("shop.work")
        assert sorted(seen) == list(range(200))
        assert most > 5

    async def test_r04_a_thread_keeps_its_key(self, stage: Stage) -> None:
        """A sync handler past its timeout keeps its key until its thread returns; only then comes the retry."""
        app = stage.app()
        lock = threading.Lock()
        attempts: list[int] = []

        @app.on(Job, timeout="300ms", retry=Retry(first="5ms"))
        def work(job: Job, ctx: Context) -> None:
            assert lock.acquire(blocking=False), "the key runs twice at once"
            try:
                attempts.append(ctx.attempt)
                end = time.monotonic() + 0.8
                while job.n == 0 and ctx.attempt == 1 and time.monotonic() < end:
                    time.sleep(0.01)
            finally:
                lock.release()

        async with stage.running(app):
            await stage.publish(jobs("a", 2))
            await stage.settled("shop.work")
        assert attempts == [1, 2, 1]

    async def test_r04_timeout(self, stage: Stage) -> None:
        """A handler past its timeout is cancelled; that is a failed attempt, and other keys do not wait for it."""
        app = stage.app()
        seen: list[tuple[str, int]] = []

        @app.on(Job, timeout="60ms", retry=Retry(attempts=2, first="10ms"))
        async def work(job: Job, ctx: Context) -> None:
            seen.append((job.key, ctx.attempt))
            if job.key == "slow":
                await asyncio.get_running_loop().create_future()

        async with stage.running(app):
            await stage.publish([Job(key="slow", n=1), Job(key="a", n=1)])
            [letter] = await stage.dead("shop.work")
        assert sorted(seen) == [("a", 1), ("slow", 1), ("slow", 2)]
        assert [error.type for error in letter.errors] == ["TimeoutError", "TimeoutError"]
        assert "0.06 s" in letter.errors[0].text

    async def test_r04_a_stale_settle_is_refused(self, stage: Stage) -> None:
        """What a member settles after its partition went to another under a new epoch is refused, outputs and all."""
        if not stage.features.replay:
            return  # a lost lease is tested with processes; here a replay takes the partition away
        app = stage.app()
        gate = asyncio.Event()
        epochs: list[int] = []

        @app.on(Job)
        async def work(job: Job, ctx: Context) -> None:
            epochs.append(ctx.attempt)
            if len(epochs) == 1:
                await gate.wait()
                await ctx.publish(Job(key="stale", n=job.n))

        async with stage.running(app) as program:
            await stage.publish(Job(key="a", n=0))
            await until(lambda: epochs)
            await stage.broker.admin.replay("shop.work", "earliest")
            # Twice, or more often: a member may take the partition while the replay is about to set its place.
            await until(lambda: len(epochs) >= 2)
            await stage.settled("shop.work")
            counts = program.workers[0].counts
            before = counts.refused
            gate.set()
            await until(lambda: counts.refused == before + 1)
            await stage.settled("shop.work")
        assert [m.key for m in await stage.browse("jobs")] == ["a"]
        assert set(epochs) == {1}
