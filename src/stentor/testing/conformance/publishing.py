"""Rules 1, 7 and 12: durable publish, delay, duplicates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from stentor.context import Context
from stentor.errors import InvalidEvent, PublishUnknown, TooLarge, UnknownTopic, Unsupported
from stentor.event import Outgoing, Topic
from stentor.message import Message, new_id
from stentor.retry import Retry
from stentor.testing.conformance.events import Job, Lonely, Made, jobs
from stentor.testing.conformance.stage import LATE, JumpingClock, Scene, Stage, until


class Publishing(Scene):
    """Rule 1: ``publish`` returns when the broker has it."""

    async def test_r01_published_is_there(self, stage: Stage) -> None:
        """Once publish returned, anyone who looks finds the event, unchanged and at the position of its receipt."""
        receipt = await stage.publish(Job(key="a", n=1, body="ö"), subject="s", headers={"tenant": "t", "weight": 3})
        other = await stage.another()
        if not stage.features.browse:
            with pytest.raises(Unsupported):
                _ = [entry async for entry in other.browse("jobs", "earliest", follow=False)]
            return
        [(offset, message)] = [entry async for entry in other.browse("jobs", "earliest", follow=False)]
        assert (message.id, message.topic) == (receipt.id, receipt.topic)
        assert receipt.position == (offset if stage.features.placed else None)
        assert (message.key, message.type, message.subject) == ("a", "conformance.job", "s")
        assert message.extensions == {"tenant": "t", "weight": 3}
        assert b"\xc3\xb6" in message.data

    async def test_r01_a_list_is_stored_as_a_whole_or_not_at_all(self, stage: Stage) -> None:
        """One message for a topic that nobody declared refuses the whole list."""
        good = Message(id=new_id(), source="/x", type="conformance.job", topic="jobs", data=b"{}", key="a")
        bad = Message(id=new_id(), source="/x", type="t", topic="never-declared", data=b"{}")
        with pytest.raises(UnknownTopic, match="never-declared"):
            await stage.send(good, bad)
        assert await stage.browse("jobs") == []

    async def test_r01_order_of_publish(self, stage: Stage) -> None:
        """The events of a key lie in the order in which they were published, in lists and one at a time."""
        await stage.publish(jobs("a b", 50))
        for n in range(50, 60):
            await stage.publish(Job(key="a", n=n))
        found = [m for m in await stage.browse("jobs") if m.key == "a"]
        assert [int(m.data.split(b'"n":')[1].split(b",")[0]) for m in found] == list(range(60))

    async def test_r01_publishers_at_once(self, stage: Stage) -> None:
        """A thousand publishes that wait at once are all stored, each once."""
        receipts = await asyncio.gather(*(stage.publish(Job(key=f"k{n % 7}", n=n)) for n in range(1000)))
        if stage.features.placed:
            assert len({(n % 7, receipt.position) for n, receipt in enumerate(receipts)}) == 1000
        assert len(await stage.browse("jobs")) == 1000

    async def test_r01_publishing_while_topics_are_declared(self, stage: Stage) -> None:
        """A program that declares once more, for a new handler or subscription, disturbs nobody who publishes."""
        declaring = True

        async def declare() -> None:
            while declaring:
                await stage.broker.declare([Topic("jobs")], [])

        declared = asyncio.create_task(declare())
        for n in range(100):
            await stage.publish(Job(key="a", n=n))
        declaring = False
        await declared
        assert len(await stage.browse("jobs")) == 100

    async def test_r01_unconfirmed_publish(self, stage: Stage) -> None:
        """Without a confirmation PublishUnknown carries the ids; the repetition with them is no second event."""
        app = stage.app()

        async with stage.running(app) as program:
            broker: Any = program.broker
            broker.unconfirmed = lambda messages: PublishUnknown([m.id for m in messages], "the line was cut")
            with pytest.raises(PublishUnknown) as caught:
                await app.publish(Job(key="a", n=1), id="job-1")
            assert caught.value.ids == ["job-1"]
            broker.unconfirmed = None
            receipt = await app.publish(Job(key="a", n=1), id="job-1")
        assert receipt.duplicate is stage.features.dedupe
        assert len(await stage.browse("jobs")) == (1 if stage.features.dedupe else 2)

    async def test_r01_topic_without_groups(self, stage: Stage) -> None:
        """A topic that no group reads takes events; the first group that comes finds what is still held."""
        await stage.publish([Lonely(key="a"), Lonely(key="b")])
        assert len(await stage.browse("lonely")) == 2

    async def test_r01_sizes(self, stage: Stage) -> None:
        """A body of 1 MiB (or what the broker takes) arrives whole; one over its limit is refused at the publisher."""
        body = ("0123456789abcdef" * 65536)[: stage.features.max_bytes - 8192]
        app = stage.app()
        seen: list[str] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.body)

        async with stage.running(app):
            await app.publish([Job(key=f"k{n}", n=n, body=body) for n in range(5)])
            with pytest.raises(TooLarge, match=f"{stage.features.max_bytes:,}"):
                await app.publish(Job(key="a", n=1, body="x" * stage.features.max_bytes))
            await until(lambda: len(seen) == 5)
        assert all(text == body for text in seen)


class Delays(Scene):
    """Rule 7: delay."""

    async def test_r07_never_early_hardly_late(
        self, stage: Stage, record_property: Callable[[str, object], None]
    ) -> None:
        """Delayed events arrive after their time, but not much, in the order of their times."""
        app = stage.app()
        seen: list[tuple[int, float]] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append((job.n, stage.clock.now()))

        async with stage.running(app):
            start = stage.clock.now()
            # In one call: on a slow machine the times of several would not be in the order of their waits.
            receipts = await app.publish(
                [Outgoing(Job(key="a", n=n), delay=timedelta(seconds=wait)) for n, wait in enumerate((0.4, 0.1, 0.25))]
            )
            assert [receipt.position for receipt in receipts] == [None] * 3
            await app.publish(Job(key="a", n=3))
            await app.publish(Job(key="b", n=4), at=datetime.now(UTC) + timedelta(seconds=0.3))
            await until(lambda: len(seen) == 5)
            late = dict(seen)
            assert [n for n, _ in seen if n != 4] == [3, 1, 2, 0]
            for n, wait in ((0, 0.4), (1, 0.1), (2, 0.25)):
                assert wait - 0.001 <= late[n] - start < wait + LATE
            seen.clear()
            waits = [0.5 + n / 100 for n in range(100)]
            start = stage.clock.now()
            await app.publish(
                [Outgoing(Job(key=f"k{n}", n=n), delay=timedelta(seconds=wait)) for n, wait in enumerate(waits)]
            )
            await until(lambda: len(seen) == len(waits))
        for n, when in seen:
            assert waits[n] - 0.001 <= when - start < waits[n] + LATE
            record_property("late", when - start - waits[n])

    async def test_r07_a_year_and_no_longer(self, stage: Stage) -> None:
        """A delay of a year is accepted and does not arrive now; a longer one and a naive time are refused."""
        receipt = await stage.publish(Job(key="a", n=1), delay="365d")
        assert receipt.position is None
        with pytest.raises(InvalidEvent, match="year"):
            await stage.publish(Job(key="a", n=2), delay="500d")
        with pytest.raises(InvalidEvent, match="time zone"):
            await stage.publish(Job(key="a", n=2), at=datetime(2030, 1, 1))  # noqa: DTZ001
        assert await stage.browse("jobs") == []

    async def test_r07_cancel(self, stage: Stage, stage_clock: JumpingClock) -> None:
        """A cancelled event never arrives; cancelling it again, or one that has arrived, says that there is none."""
        app = stage.app()
        seen: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.n)

        async with stage.running(app):
            first = await app.publish(Job(key="a", n=1), delay="1h")
            if not stage.features.cancel:
                with pytest.raises(Unsupported, match="cancel"):
                    await app.cancel(first.id)
                return
            await app.publish(Job(key="a", n=2), delay="61m")
            assert await app.cancel(first.id) is True
            assert await app.cancel(first.id) is False
            stage_clock.jump(2 * 3600)
            await until(lambda: seen)
            assert seen == [2]

    async def test_r07_cancelled_or_handled(self, stage: Stage) -> None:
        """Whoever cancels an event just when it falls due is told what becomes of it: taken back, or handled."""
        if not stage.features.cancel:
            return
        app = stage.app()
        seen: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.n)

        async def take_back(n: int, id: str) -> bool:
            await stage.clock.sleep(start + n / 50 + (n % 7 - 5) / 500 - stage.clock.now())
            return await app.cancel(id)

        async with stage.running(app):
            start = stage.clock.now() + 1
            receipts = await app.publish(
                [Outgoing(Job(key="a", n=n), at=datetime.fromtimestamp(start + n / 50, UTC)) for n in range(100)]
            )
            answers = await asyncio.gather(*(take_back(n, receipt.id) for n, receipt in enumerate(receipts)))
            expected = [n for n, cancelled in enumerate(answers) if not cancelled]
            await app.publish(Job(key="a", n=100), at=datetime.fromtimestamp(start + 2.1, UTC))
            await until(lambda: 100 in seen)
        assert sorted(set(seen) - {100}) == expected

    async def test_r07_what_waits_is_listed(self, stage: Stage) -> None:
        """Delayed events can be looked at, the next one first, as they were published; or the broker refuses it."""
        [later, sooner, gone] = [
            await stage.publish(Job(key="a", n=n), delay=delay, headers={"origin": "test"})
            for n, delay in ((1, "2h"), (2, "1h"), (3, "3h"))
        ]
        admin = stage.broker.admin
        try:
            listed = await admin.delayed()
        except Unsupported:
            return
        assert [message.id for message in listed] == [sooner.id, later.id, gone.id]
        assert [(m.topic, m.key, m.extensions["origin"]) for m in listed] == [("jobs", "a", "test")] * 3
        assert all(
            0 < message.due - stage.clock.now() - hours * 3600 + 60 < 60.5
            for message, hours in zip(listed, (1, 2, 3), strict=True)
        )
        if stage.features.cancel:
            assert await admin.cancel(gone.id)
            assert [message.id for message in await admin.delayed()] == [sooner.id, later.id]

    async def test_r07_a_delayed_event_is_cancelled_at_once(self, stage: Stage) -> None:
        """Who has the receipt can take the event back, however early."""
        if not stage.features.cancel:
            return
        for n in range(20):
            receipt = await stage.publish(Job(key="a", n=n), delay="1h")
            assert await stage.broker.admin.cancel(receipt.id)
            assert not await stage.broker.admin.cancel(receipt.id)
        assert not await stage.broker.admin.delayed()

    async def test_r07_the_clock_is_set_forward(self, stage: Stage, stage_clock: JumpingClock) -> None:
        """Delayed events and retries that a jump of the clock makes due run now, not at the end of their timers."""
        app = stage.app()
        seen: list[tuple[int, int]] = []

        @app.on(Job, retry=Retry(first="1h", jitter=0))
        async def work(job: Job, ctx: Context) -> None:
            if job.n == 1 and ctx.attempt == 1:
                raise ValueError("planned")
            seen.append((job.n, ctx.attempt))

        async with stage.running(app):
            await app.publish(Job(key="a", n=1))
            await app.publish(Job(key="b", n=2), delay="30m")
            await until(lambda: stage.parked("shop.work"))
            stage_clock.jump(7200)
            await until(lambda: len(seen) == 2, "what the jump made due")
        assert sorted(seen) == [(1, 2), (2, 1)]

    async def test_r07_the_clock_is_set_back(self, stage: Stage, stage_clock: JumpingClock) -> None:
        """Nothing is early by the clock that was set back, nothing else waits for it, and nothing is lost."""
        app = stage.app()
        seen: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.n)

        async with stage.running(app):
            await app.publish(Job(key="a", n=1), delay="2s")
            stage_clock.jump(-3600)
            over = time.monotonic() + 2.2
            await app.publish([Job(key="b", n=n) for n in (2, 3)])
            await until(lambda: len(seen) == 2 and time.monotonic() > over)
            assert seen == [2, 3]
            stage_clock.jump(3600)
            await until(lambda: len(seen) == 3)


class Duplicates(Scene):
    """Rule 12: duplicates, and ids that follow from their cause."""

    async def test_r12_an_id_given_twice(self, stage: Stage) -> None:
        """The same source and id is one event where the broker says so, and two where it does not; never in between."""
        receipts = [await stage.publish(Job(key="a", n=n), id="same") for n in (1, 2)]
        receipts += await stage.publish(
            [Outgoing(Job(key="a", n=3), id="same"), Outgoing(Job(key="a", n=4), id="else")]
        )
        again = stage.features.dedupe
        assert [receipt.duplicate for receipt in receipts] == [False, again, again, False]
        found = [message.id for message in await stage.browse("jobs")]
        assert found == (["same", "else"] if again else ["same", "same", "same", "else"])

    async def test_r12_another_source_is_another_event(self, stage: Stage) -> None:
        """Ids are compared together with their source."""
        await stage.publish(Job(key="a", n=1), id="same")
        receipt = await stage.publish(Job(key="a", n=1), id="same", source="/elsewhere")
        assert not receipt.duplicate
        assert len(await stage.browse("jobs")) == 2

    async def test_r12_derived_ids_are_stable(self, stage: Stage) -> None:
        """What a handler publishes has the same ids at every attempt, and cause and correlation of its input."""
        app = stage.app()
        ids: dict[int, str] = {}

        @app.on(Job, retry=Retry(first="10ms"))
        async def work(job: Job, ctx: Context) -> Made:
            receipt = await app.publish(Made(key=job.key, n=100 + job.n))
            ids[ctx.attempt] = receipt.id
            if ctx.attempt < 3:
                raise ValueError("planned")
            await ctx.publish(Made(key=job.key, n=200 + job.n))
            return Made(key=job.key, n=300 + job.n)

        async with stage.running(app):
            cause = await stage.publish(Job(key="a", n=1))
            await stage.settled("shop.work")
        assert list(ids) == [1, 2, 3]
        assert len(set(ids.values())) == 1
        made = await stage.browse("made")
        assert len({message.id for message in made}) == 3
        assert len(made) == (3 if stage.features.dedupe else 5)
        for message in made:
            assert message.extensions["causationid"] == message.extensions["correlationid"] == cause.id

    async def test_r12_the_same_input_twice(self, stage: Stage) -> None:
        """A duplicate of the input that the broker let through makes outputs with the ids of the first."""
        app = stage.app()
        handled: list[str] = []

        @app.on(Job)
        async def work(job: Job, ctx: Context) -> Made:
            handled.append(ctx.message.id)
            return Made(key=job.key, n=job.n)

        copies = [
            Message(
                id="one",
                source="/x",
                type="conformance.job",
                topic="jobs",
                key="a",
                data=b'{"key":"a","n":1}',
                fresh=True,
            )
            for _ in range(2)
        ]
        async with stage.running(app):
            for copy in copies:
                await stage.send(copy)
            await stage.settled("shop.work")
        assert handled == ["one", "one"]
        assert len({message.id for message in await stage.browse("made")}) == 1
