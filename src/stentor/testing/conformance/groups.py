"""Rules 3, 9 and 14: groups, backpressure, isolation."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress

import pytest

from stentor.context import Context
from stentor.errors import BrokerError
from stentor.group import Group
from stentor.message import Message
from stentor.retry import Retry
from stentor.testing.conformance.events import Brief, Job, Loose, Made, Order, Short, jobs
from stentor.testing.conformance.stage import PATIENCE, JumpingClock, Scene, Stage, until


class Groups(Scene):
    """Rule 3: every group sees every event, its members share them."""

    async def test_r03_every_group_sees_every_event(self, stage: Stage) -> None:
        """Two groups of one app and one of another each get all events, once."""
        seen: dict[str, list[str]] = {}
        apps = [stage.app("one"), stage.app("two")]
        for app in apps:
            for name in ("left", "right"):
                group = Group(f"{app.name}.{name}")

                @group.on(Job)
                async def work(job: Job, ctx: Context) -> None:
                    seen.setdefault(ctx.group, []).append(f"{job.key}{job.n}")

                app.add(group)
        async with stage.running(apps[0]), stage.running(apps[1]):
            await stage.publish(jobs(5, 20))
            await stage.settled("one.left", "one.right", "two.left", "two.right")
        expected = sorted(f"{job.key}{job.n}" for job in jobs(5, 20))
        assert {name: sorted(found) for name, found in seen.items()} == dict.fromkeys(
            ("one.left", "one.right", "two.left", "two.right"), expected
        )

    async def test_r03_members_share(self, stage: Stage) -> None:
        """Three members of a group get every event once between them, and each gets some."""
        seen: dict[int, list[str]] = {0: [], 1: [], 2: []}

        async with AsyncExitStack() as stack:
            for index in range(3):
                app = stage.app()

                @app.on(Job)
                async def work(job: Job, index: int = index) -> None:
                    seen[index].append(f"{job.key}{job.n}")

                await stack.enter_async_context(stage.running(app))

            async def joined() -> bool:
                return all(lag.members == 3 for lag in await stage.lag("shop.work"))

            await until(joined)
            published = 0
            deadline = time.monotonic() + PATIENCE  # a broker may take a moment to spread partitions
            while not all(seen.values()):
                assert time.monotonic() < deadline, seen
                await stage.publish(jobs(200, 1))
                published += 1
                await stage.settled("shop.work")
        assert sum(len(found) for found in seen.values()) == 200 * published

    async def test_r03_a_declared_group_misses_nothing(self, stage: Stage) -> None:
        """What is published while no member runs waits for the group, before its first start and between runs."""
        app = stage.app()
        seen: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.n)

        async with stage.running(app, connect_only=True):
            pass
        await stage.publish([Job(key="a", n=n) for n in range(5)])
        async with stage.running(app):
            await until(lambda: len(seen) == 5)
            await stage.settled("shop.work")
        await stage.publish([Job(key="a", n=n) for n in range(5, 9)])
        async with stage.running(app):
            await until(lambda: len(seen) == 9)
        assert seen == list(range(9))

    async def test_r03_where_a_new_group_starts(self, stage: Stage) -> None:
        """A new group begins with the earliest event held, or with ``start="latest"`` after its declaration."""
        await stage.publish(jobs("a", 3))
        app = stage.app()
        seen: dict[str, list[int]] = {"all": [], "new": []}

        @app.on(Job, group=Group("all"))
        async def every(job: Job) -> None:
            seen["all"].append(job.n)

        @app.on(Job, group=Group("new", start="latest"))
        async def new(job: Job) -> None:
            seen["new"].append(job.n)

        async with stage.running(app):
            await stage.publish(Job(key="a", n=3))
            await stage.settled("all", "new")
        assert seen == {"all": [0, 1, 2, 3], "new": [3]}

    async def test_r03_retention_spares_what_is_not_settled(self, stage: Stage, stage_clock: JumpingClock) -> None:
        """A topic keeps what a declared group has not settled, however old, when what nobody reads is gone."""
        app = stage.app()
        seen: list[tuple[str, int]] = []

        @app.on(Short)
        async def work(short: Short) -> None:
            seen.append((short.key, short.n))

        async with stage.running(app, connect_only=True):
            await app.publish([Short(key="a", n=n) for n in range(10)])
        await stage.publish(Brief(key="nobody reads it"))
        stage_clock.skip(3600)
        await stage.publish([Short(key="b", n=n) for n in range(5000)])  # enough to make a broker tidy up

        async def tidied() -> bool:
            return await stage.browse("brief") == []

        with suppress(AssertionError):  # brokers tidy up when they see fit
            await until(tidied, patience=1.5)
        async with stage.running(app):
            await until(lambda: len(seen) == 5010)
        assert [n for key, n in seen if key == "a"] == list(range(10))
        assert [n for key, n in seen if key == "b"] == list(range(5000))

    async def test_r03_broadcast(self, stage: Stage) -> None:
        """Every running instance gets each event from its start on; its dead letters go to the base group."""
        seen: list[list[int]] = [[], []]
        async with AsyncExitStack() as stack:
            await stage.publish(Job(key="a", n=0))
            for found in seen:
                app = stage.app()
                group = Group("live", broadcast=True)

                @group.on(Job, retry=Retry(attempts=1))
                async def work(job: Job, found: list[int] = found) -> None:
                    found.append(job.n)
                    if job.n == 3:
                        raise ValueError("planned")

                app.add(group)
                await stack.enter_async_context(stage.running(app))
            await stage.publish([Job(key="a", n=n) for n in (1, 2, 3)])
            await until(lambda: all(len(found) == 3 for found in seen))
            await until(lambda: stage.letters("live"))
            letters = await stage.letters("live")
        assert seen == [[1, 2, 3], [1, 2, 3]]
        assert {letter.group for letter in letters} == {"live"}

    async def test_r03_single(self, stage: Stage) -> None:
        """A single group runs one event at a time, whatever its members and keys."""
        running: list[str] = []
        most = 0
        done = 0
        async with AsyncExitStack() as stack:
            for _ in range(2):
                app = stage.app()
                group = Group("alone", single=True)

                @group.on(Job)
                async def work(job: Job) -> None:
                    nonlocal most, done
                    running.append(job.key)
                    most = max(most, len(running))
                    await asyncio.sleep(0)
                    running.remove(job.key)
                    done += 1

                app.add(group)
                await stack.enter_async_context(stage.running(app))
            await stage.publish(jobs(20, 5))
            await until(lambda: done == 100)
        assert most == 1

    async def test_r03_rename(self, stage: Stage) -> None:
        """A renamed group goes on where it was, with its parked events, its dead letters and its attempts."""
        app = stage.app()
        seen: list[tuple[str, int, int]] = []
        tried = 0

        @app.on(Job, retry=Retry(attempts=100, first="10ms", never=(KeyError,)))
        async def old(job: Job, ctx: Context) -> None:
            nonlocal tried
            if job.n == 1:
                tried = ctx.attempt
                ctx.retry("1s")
            if job.n == 2:
                raise KeyError("planned")
            seen.append((job.key, job.n, ctx.attempt))

        async with stage.running(app):
            await stage.publish([Job(key="a", n=0), Job(key="b", n=1), Job(key="c", n=2)])
            await stage.dead("shop.old")
            await until(lambda: stage.parked("shop.old"))
        app = stage.app()

        @app.on(Job, group=Group("fresh", was=("old",)))
        async def new(job: Job, ctx: Context) -> None:
            seen.append((job.key, job.n, ctx.attempt))

        async with stage.running(app):
            await stage.publish(Job(key="a", n=3))
            await stage.settled("fresh")
        assert sorted(seen) == [("a", 0, 1), ("a", 3, 1), ("b", 1, tried + 1)]
        assert [info.name for info in await stage.broker.admin.groups()] == ["fresh"]
        assert len(await stage.letters("fresh")) == 1

    async def test_r03_drop(self, stage: Stage) -> None:
        """A dropped group is forgotten and starts anew; one that has members is not dropped."""
        app = stage.app()
        seen: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.n)

        await stage.publish(jobs("a", 3))
        async with stage.running(app):
            await stage.settled("shop.work")
            with pytest.raises(BrokerError, match="member"):
                await stage.broker.admin.drop_group("shop.work")
        await stage.broker.admin.drop_group("shop.work")
        assert await stage.broker.admin.groups() == []
        async with stage.running(app):
            await stage.settled("shop.work")
        assert seen == [0, 1, 2, 0, 1, 2]


class Backpressure(Scene):
    """Rule 9: what is slow or stuck holds memory bounded and slows nobody else."""

    full = 1_000_000
    """Bytes at which the broker of ``full_url`` has no more room, more or less."""

    @pytest.fixture
    def full_url(self) -> str:
        """The URL of a fresh broker that is soon full; override it where there is such a setting."""
        pytest.skip("no size limit is known of this broker")

    async def test_r09_stuck_handler(self, stage: Stage) -> None:
        """With one key stuck and thousands of its events behind it, other keys go on and memory stays bounded."""
        app = stage.app()
        stuck = asyncio.Event()
        done: list[str] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            if job.key == "stuck" and job.n == 0:
                await stuck.wait()
            done.append(f"{job.key}{job.n}")

        async with stage.running(app) as program:
            await stage.publish([Job(key="stuck", n=n) for n in range(4000)])
            await stage.publish(jobs(50, 20))
            await until(lambda: len(done) == 1000, "the other keys")
            [worker] = program.workers
            held = sum(
                (lane.head is not None) + len(lane.rest or ())
                for share in worker.shares.values()
                for lane in share.lanes.values()
            )
            assert held <= 2048
            stuck.set()
            await stage.settled("shop.work", patience=2 * PATIENCE)  # each of thousands records its start
        assert [name for name in done if name.startswith("stuck")] == [f"stuck{n}" for n in range(4000)]

    async def test_r09_large_bodies(self, stage: Stage) -> None:
        """A stuck handler in front of 100 MB holds a bounded part of it in the worker."""
        app = stage.app()
        stuck = asyncio.Event()
        done = 0

        @app.on(Job, group=Group("work", concurrency=2))
        async def work(job: Job) -> None:
            nonlocal done
            await stuck.wait()
            done += 1

        size = min(1_000_000, stage.features.max_bytes // 2)
        count = 100_000_000 // size
        for n in range(0, count, 10):
            await stage.publish([Job(key=f"k{i}", n=n, body="x" * size) for i in range(10)])
        async with stage.running(app) as program:
            [worker] = program.workers
            before = -1

            def still() -> bool:
                nonlocal before
                size = worker._bytes
                grown, before = size != before, size
                return not grown and size > 0

            await until(still)
            await until(still)
            assert worker._bytes <= 90_000_000
            stuck.set()
            await until(lambda: done == count)

    async def test_r09_slow_group(self, stage: Stage) -> None:
        """A group that stands still does not slow another on the same topic."""
        app = stage.app()
        gate = asyncio.Event()
        fast: list[int] = []
        slow: list[int] = []

        @app.on(Job, group=Group("slow", concurrency=1))
        async def stand(job: Job) -> None:
            await gate.wait()
            slow.append(job.n)

        @app.on(Job, group="fast")
        async def go(job: Job) -> None:
            fast.append(job.n)

        async with stage.running(app):
            await stage.publish(jobs(10, 300))
            await until(lambda: len(fast) == 3000)
            assert slow == []
            gate.set()
            await until(lambda: len(slow) == 3000)

    async def test_r09_publishers_wait_for_room(self, full_url: str, stage_clock: JumpingClock) -> None:
        """At the size limit publishers wait while the group stands still, and go on as it does; nothing is lost."""
        stage = Stage(full_url, self.make_broker, stage_clock)
        await stage.start()
        app = stage.app()
        gate = asyncio.Event()
        seen: list[int] = []
        body = "x" * 10_000
        most = 40 * self.full // len(body)
        published = 0
        stalled = -1

        @app.on(Job)
        async def work(job: Job) -> None:
            await gate.wait()
            seen.append(job.n)

        async def publish() -> None:
            nonlocal published
            while published < most and not (gate.is_set() and published > stalled + 50):
                await stage.publish(Job(key="a", n=published, body=body))
                published += 1

        async with stage.running(app):
            publishing = asyncio.create_task(publish())
            while stalled != published:  # until there is no progress for a while
                stalled = published
                await asyncio.wait([publishing], timeout=1.0)
            assert published < most, "nobody waits"
            gate.set()
            await publishing
            await stage.settled("shop.work")
        await stage.stop()
        assert seen == list(range(published))

    async def test_r09_ten_thousand_keys(self, stage: Stage) -> None:
        """Ten thousand keys, two events each: all handled, in order per key."""
        app = stage.app()
        seen: dict[str, list[int]] = {}

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.setdefault(job.key, []).append(job.n)

        async with stage.running(app) as program:
            everything = jobs(10_000, 2)
            for start in range(0, len(everything), 1000):
                await stage.publish(everything[start : start + 1000])
            await until(lambda: program.workers[0].counts.handled == 20_000, patience=2 * PATIENCE)
            assert len(program.workers[0].shares) > 0
            await until(lambda: not any(share.lanes for share in program.workers[0].shares.values()), "no lane is left")
        assert set(map(tuple, seen.values())) == {(0, 1)}


class Isolation(Scene):
    """Rule 14: nobody's doing changes anything for the rest."""

    async def test_r14_mutation(self, stage: Stage) -> None:
        """What a handler does to its event or message, no other group and no retry sees."""
        app = stage.app()
        seen: dict[str, list[tuple[tuple[int, ...], str]]] = {}

        def spoil(job: Job, message: Message, name: str) -> None:
            seen.setdefault(name, []).append((tuple(job.parts), str(message.extensions.get("tenant"))))
            job.parts.append(99)
            message.extensions["tenant"] = "mallory"

        @app.on(Job, retry=Retry(first="10ms"))
        async def first(job: Job, message: Message, ctx: Context) -> None:
            spoil(job, message, "first")
            if ctx.attempt == 1:
                raise ValueError("planned")

        @app.on(Job)
        async def second(job: Job, message: Message) -> None:
            spoil(job, message, "second")

        async with stage.running(app):
            await stage.publish(Job(key="a", n=1, parts=[1, 2]), headers={"tenant": "alice"})
            await stage.settled("shop.first", "shop.second")
        good = ((1, 2), "alice")
        assert seen == {"first": [good, good], "second": [good]}

    async def test_r14_another_groups_failure(self, stage: Stage) -> None:
        """A group whose every event fails leaves another at its first attempts."""
        app = stage.app()
        attempts: list[int] = []

        @app.on(Job, retry=Retry(attempts=2, first="5ms"))
        async def broken(job: Job) -> None:
            raise ValueError("planned")

        @app.on(Job)
        async def sound(job: Job, ctx: Context) -> None:
            attempts.append(ctx.attempt)

        async with stage.running(app):
            await stage.publish(jobs(5, 4))
            await stage.settled("shop.broken", "shop.sound")
            await stage.dead("shop.broken", 20)
        assert attempts == [1] * 20

    async def test_r14_another_topics_flood(self, stage: Stage) -> None:
        """While one topic is flooded and its group stands still, an event of another topic is handled."""
        app = stage.app()
        gate = asyncio.Event()
        seen: list[int] = []

        @app.on(Loose)
        async def flood(loose: Loose) -> None:
            await gate.wait()

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.n)

        async with stage.running(app):
            await stage.publish([Loose(n=n) for n in range(5000)])
            await stage.publish(Job(key="a", n=1))
            await until(lambda: seen)
            gate.set()

    async def test_r14_types_nobody_asked_for(self, stage: Stage) -> None:
        """Events of other types on the topic are skipped by a group, settled, and never dead."""
        app = stage.app()
        seen: list[str] = []

        @app.on(Order)
        async def work(order: Order) -> None:
            seen.append(order.key)

        async with stage.running(app):
            await stage.publish([Job(key="a", n=1), Order(key="a", n=2), Job(key="a", n=3)])
            await stage.send(Message(id="x", source="/x", type="unheard.of", topic="jobs", data=b"\xff", key="a"))
            await stage.settled("shop.work")
            assert await stage.letters("shop.work") == []
        assert seen == ["a"]

    async def test_r14_two_apps_share_a_broker(self, stage: Stage) -> None:
        """One app's output is another's input; stopping the first leaves the second running."""
        maker, taker = stage.app("maker"), stage.app("taker")
        seen: list[int] = []

        @maker.on(Job)
        async def make(job: Job) -> Made:
            return Made(key=job.key, n=job.n)

        @taker.on(Made)
        async def take(made: Made) -> None:
            seen.append(made.n)

        async with stage.running(taker):
            async with stage.running(maker):
                await stage.publish([Job(key="a", n=n) for n in range(10)])
                await stage.settled("maker.make")
            await until(lambda: len(seen) == 10)
        assert seen == list(range(10))
