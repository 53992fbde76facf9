"""Rule 6: dead letters and redrive."""

from __future__ import annotations

import asyncio
from typing import Any

from stentor.context import Context
from stentor.errors import Unavailable
from stentor.event import Event, upcast
from stentor.group import Group
from stentor.message import Message, dead_topic
from stentor.retry import Retry
from stentor.testing.conformance.events import Job, Made, jobs
from stentor.testing.conformance.stage import Scene, Stage, until


def raw(data: bytes, **attributes: Any) -> Message:
    """A message of type conformance.job with any bytes."""
    fields: dict[str, Any] = {"id": "raw", "source": "/x", "type": "conformance.job", "topic": "jobs", "key": "a"}
    return Message(data=data, **{**fields, **attributes})


class DeadLetters(Scene):
    """Rule 6: giving up loses nothing."""

    async def test_r06_after_the_last_attempt(self, stage: Stage) -> None:
        """The dead letter has the message as it was, and every error with its time."""
        app = stage.app()

        @app.on(Job, retry=Retry(attempts=3, first="10ms"))
        async def work(job: Job, ctx: Context) -> None:
            raise ValueError(f"planned {ctx.attempt}")

        async with stage.running(app):
            before = stage.clock.now()
            receipt = await stage.publish(Job(key="a", n=1, body="b"), headers={"tenant": "t"}, subject="s")
            [letter] = await stage.dead("shop.work")
            await stage.settled("shop.work")
        [original] = await stage.browse("jobs")
        message = letter.message
        assert (message.id, message.data, message.key) == (receipt.id, original.data, "a")
        assert (message.subject, message.extensions["tenant"], message.time) == ("s", "t", original.time)
        assert (letter.group, letter.attempts, letter.reason) == ("shop.work", 3, "attempts")
        assert [error.text for error in letter.errors] == ["planned 1", "planned 2", "planned 3"]
        assert before <= letter.errors[0].time < letter.errors[2].time <= letter.time <= stage.clock.now()

    async def test_r06_at_once(self, stage: Stage) -> None:
        """A ``never`` error, and ``ctx.dead``, give up at the first attempt."""
        app = stage.app()

        @app.on(Job, retry=Retry(never=(KeyError,)))
        async def work(job: Job, ctx: Context) -> None:
            if job.n == 1:
                raise KeyError("planned")
            ctx.dead("not wanted")

        async with stage.running(app):
            await stage.publish([Job(key="a", n=1), Job(key="b", n=2)])
            letters = await stage.dead("shop.work", 2)
        found = {letter.message.key: (letter.attempts, letter.reason) for letter in letters}
        assert found == {"a": (1, "never"), "b": (1, "not wanted")}

    async def test_r06_poison(self, stage: Stage) -> None:
        """Bytes that are nothing valid, wrong fields, a wrong content type, a senseless version: dead at once, bytes
        kept, and the events around them are handled.
        """
        app = stage.app()
        seen: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.n)

        poison = [
            raw(b"\xff\x00\xfe"),
            raw(b""),
            raw(b'{"key":1,"n":"x"}'),
            raw(b"[" * 2000),
            raw(b'{"key":"a","n":1}', datacontenttype="image/png"),
            raw(b'{"key":"a","n":1}', extensions={"schemaversion": "soon"}),
            raw(b"null", key=None),
        ]
        for index, message in enumerate(poison):
            message.id = f"poison{index}"
        async with stage.running(app):
            await stage.publish(Job(key="a", n=1))
            await stage.send(*poison)
            await stage.publish(Job(key="a", n=2))
            letters = await stage.dead("shop.work", len(poison))
            await stage.settled("shop.work")
        assert seen == [1, 2]
        assert {letter.message.id: letter.message.data for letter in letters} == {m.id: m.data for m in poison}
        assert {(letter.reason, letter.attempts) for letter in letters} == {("undecodable", 1)}

    async def test_r06_no_letter_no_ack(self, stage: Stage) -> None:
        """While the dead letter cannot be written the event is not settled; then there is one letter, and it is."""
        app = stage.app()

        @app.on(Job, retry=Retry(attempts=1))
        async def work(job: Job) -> None:
            raise ValueError("planned")

        async with stage.running(app) as program:
            broker: Any = program.broker
            refused = 0

            def refuse(settlement: Any) -> Unavailable | None:
                nonlocal refused
                if any(output.topic == dead_topic("shop.work") for output in settlement.outputs):
                    refused += 1
                    return Unavailable("planned")
                return None

            broker.refuse = refuse
            await stage.publish(Job(key="a", n=1))
            await until(lambda: refused >= 2)
            assert await stage.waiting("shop.work") == 1
            broker.refuse = None
            await stage.dead("shop.work")
            await stage.settled("shop.work")

    async def test_r06_no_letter_no_ack_over_a_stop(self, stage: Stage) -> None:
        """If the process stops before the dead letter could be written, the event comes again."""
        attempts: list[int] = []

        def member() -> Any:
            app = stage.app()

            @app.on(Job, retry=Retry(attempts=1))
            async def work(job: Job, ctx: Context) -> None:
                attempts.append(ctx.attempt)
                raise ValueError("planned")

            return app

        async with stage.running(member(), grace="100ms") as program:
            broker: Any = program.broker
            refused: list[Any] = []

            def refuse(settlement: Any) -> Unavailable | None:
                if not settlement.outputs:
                    return None
                refused.append(settlement)
                return Unavailable("planned")

            broker.refuse = refuse
            await stage.publish(Job(key="a", n=1))
            await until(lambda: refused)
        assert await stage.letters("shop.work") == []
        async with stage.running(member()):
            await stage.dead("shop.work")
            await stage.settled("shop.work")
        assert attempts == [1, 1]

    async def test_r06_no_letter_no_overtaking(self, stage: Stage) -> None:
        """What comes while the dead letter of a key to be held cannot be written stays behind it, over a stop too."""
        seen: list[str] = []

        def member() -> Any:
            app = stage.app()

            @app.on(Job, group=Group("strict", on_dead="park"), retry=Retry(attempts=1))
            async def work(job: Job) -> None:
                if job.key == "a" and job.n == 0:
                    raise ValueError("planned")
                seen.append(job.key)

            return app

        async with stage.running(member(), grace="100ms") as program:
            broker: Any = program.broker
            refused: list[Any] = []

            def refuse(settlement: Any) -> Unavailable | None:
                if not settlement.outputs:
                    return None
                refused.append(settlement)
                return Unavailable("planned")

            broker.refuse = refuse
            await stage.publish(jobs("a", 1))
            await until(lambda: refused)
            others = [f"k{number}" for number in range(20)]  # some in each partition
            await stage.publish([Job(key="a", n=1), *(Job(key=key, n=1) for key in others)])
            await until(lambda: len(seen) == len(others))
        async with stage.running(member()):
            await stage.dead("strict")

            async def held() -> bool:
                return await stage.parked("strict") == 1

            await until(held)
        assert "a" not in seen

    async def test_r06_looking_consumes_nothing(self, stage: Stage) -> None:
        """Reading dead letters again and again changes nothing."""
        app = stage.app()

        @app.on(Job, retry=Retry(attempts=1))
        async def work(job: Job) -> None:
            raise ValueError("planned")

        async with stage.running(app):
            await stage.publish(jobs("a b", 2))
            first = await stage.dead("shop.work", 4)
            assert await stage.letters("shop.work") == first == await stage.letters("shop.work")


class Redrive(Scene):
    """Rule 6: redrive and drop, under continue and park."""

    async def test_r06_redrive_under_continue(self, stage: Stage) -> None:
        """Redriven events reach only their group, keep id, key and their order, and start at attempt 1 again."""
        app = stage.app()
        broken = True
        seen: list[tuple[str, int]] = []
        other: list[int] = []
        ids: dict[int, str] = {}

        @app.on(Job, retry=Retry(attempts=2, first="5ms"))
        async def work(job: Job, ctx: Context) -> Made | None:
            if broken and job.n < 3:
                raise ValueError("planned")
            seen.append((job.key, job.n))
            assert ctx.attempt == 1
            ids[job.n] = ctx.message.id
            return Made(key=job.key, n=job.n)

        @app.on(Job)
        async def witness(job: Job) -> None:
            other.append(job.n)

        async with stage.running(app):
            receipts = await stage.publish(jobs("a", 5))
            letters = await stage.dead("shop.work", 3)
            await until(lambda: len(seen) == 2)
            broken = False
            for letter in letters:
                await stage.redrive(letter)
            await until(lambda: len(seen) == 5)
            await stage.settled("shop.work", "shop.witness")
        assert seen == [("a", 3), ("a", 4), ("a", 0), ("a", 1), ("a", 2)]
        assert other == [0, 1, 2, 3, 4]
        assert [ids[n] for n in range(5)] == [receipt.id for receipt in receipts]
        assert len(await stage.browse("made")) == 5

    async def test_r06_redrive_under_park(self, stage: Stage) -> None:
        """With on_dead="park" the key is held, across a restart too; a redrive goes on with the dead one, those held,
        then live ones. Other keys never wait.
        """
        broken = True
        seen: dict[str, list[int]] = {}

        def member() -> Any:
            app = stage.app()

            @app.on(Job, group=Group("strict", on_dead="park"), retry=Retry(attempts=2, first="5ms"))
            async def work(job: Job) -> None:
                if broken and job.key == "a" and job.n == 1:
                    raise ValueError("planned")
                seen.setdefault(job.key, []).append(job.n)

            return app

        async with stage.running(member()):
            await stage.publish(jobs("a b", 4))
            [letter] = await stage.dead("strict")
            await until(lambda: len(seen.get("b", ())) == 4)

            async def held() -> bool:
                return await stage.parked("strict") == 2

            await until(held)
        async with stage.running(member()):
            await stage.publish([Job(key="a", n=4), Job(key="b", n=4)])
            await until(lambda: len(seen["b"]) == 5)
            assert seen["a"] == [0]
            broken = False
            await stage.redrive(letter)
            await until(lambda: len(seen["a"]) == 5)
            await stage.publish(Job(key="a", n=5))
            await stage.settled("strict")
        assert seen == {"a": [0, 1, 2, 3, 4, 5], "b": [0, 1, 2, 3, 4]}

    async def test_r06_drop_under_park(self, stage: Stage) -> None:
        """Dropping the dead letter lets a held key go on without it."""
        app = stage.app()
        seen: list[int] = []

        @app.on(Job, group=Group("strict", on_dead="park"), retry=Retry(attempts=1))
        async def work(job: Job) -> None:
            if job.n == 0:
                raise ValueError("planned")
            seen.append(job.n)

        async with stage.running(app):
            await stage.publish(jobs("a", 3))
            [letter] = await stage.dead("strict")
            await stage.redrive(letter, redrive=False)
            await stage.settled("strict")
        assert seen == [1, 2]

    async def test_r06_redrive_is_idempotent(self, stage: Stage) -> None:
        """Asking twice, before and after, handles the event once more, not twice."""
        app = stage.app()
        seen: list[int] = []
        broken = True

        @app.on(Job, retry=Retry(attempts=1))
        async def work(job: Job) -> None:
            if broken:
                raise ValueError("planned")
            seen.append(job.n)

        async with stage.running(app):
            await stage.publish(Job(key="a", n=1))
            [letter] = await stage.dead("shop.work")
            broken = False
            await stage.redrive(letter)
            await stage.redrive(letter)
            await until(lambda: seen)
            await stage.redrive(letter)
            await until(lambda: self._marks_applied(stage, letter))
            await stage.publish(Job(key="a", n=2))
            await stage.settled("shop.work")
        assert seen == [1, 2]

    @staticmethod
    async def _marks_applied(stage: Stage, letter: Any) -> bool:
        return not await stage.broker.admin.journal(letter.group, letter.message.topic, letter.partition, "m/")

    async def test_r06_redrive_while_nobody_runs(self, stage: Stage) -> None:
        """A redrive asked for while no member runs is applied by the next one."""
        app = stage.app()
        seen: list[int] = []
        broken = True

        @app.on(Job, retry=Retry(attempts=1))
        async def work(job: Job) -> None:
            if broken:
                raise ValueError("planned")
            seen.append(job.n)

        async with stage.running(app):
            await stage.publish(Job(key="a", n=1))
            [letter] = await stage.dead("shop.work")
            await stage.settled("shop.work")
        broken = False
        await stage.redrive(letter)
        async with stage.running(app):
            await until(lambda: seen == [1])
            await stage.settled("shop.work")

    async def test_r06_a_redriven_event_dies_again(self, stage: Stage) -> None:
        """An event that dies again after a redrive has a second dead letter, which can be redriven in turn."""
        app = stage.app()
        failing = 2
        seen: list[int] = []

        @app.on(Job, group=Group("strict", on_dead="park"), retry=Retry(attempts=1))
        async def work(job: Job) -> None:
            if job.n == 0 and failing:
                raise ValueError("planned")
            seen.append(job.n)

        async with stage.running(app):
            await stage.publish(jobs("a", 3))
            [first] = await stage.dead("strict", 1)
            await stage.redrive(first)
            letters = await stage.dead("strict", 2)
            assert seen == []
            failing = 0
            [second] = [letter for letter in letters if letter.id != first.id]
            await stage.redrive(second)
            await stage.settled("strict")
        assert seen == [0, 1, 2]


class Versions(Scene):
    """Rule 6 and the design's section 2: older, newer and unreadable versions."""

    async def test_r06_newer_versions_wait(self, stage: Stage) -> None:
        """An event newer than the program is held with its key, at no attempt; a newer program handles it in order."""

        class Old(Event, topic="jobs", key="key", type="versioned", newer="wait"):
            key: str
            n: int

        class New(Event, topic="jobs", key="key", type="versioned", version=2):
            key: str
            n: int
            unit: str

        @upcast(New, from_version=1)
        def add_unit(old: dict[str, Any]) -> dict[str, Any]:
            return {**old, "unit": "none"}

        seen: list[Any] = []
        old, new = stage.app(), stage.app()

        @old.on(Old, group="v")
        async def of_old(event: Old) -> None:
            seen.append((event.key, event.n))

        @new.on(New, group="v")
        async def of_new(event: New, ctx: Context) -> None:
            seen.append((event.key, event.n, event.unit, ctx.attempt))

        first = raw(b'{"key":"a","n":1,"unit":"kg"}', type="versioned", extensions={"schemaversion": 2}, id="n1")
        async with stage.running(old):
            await stage.send(first)
            await stage.send(raw(b'{"key":"a","n":2}', type="versioned", id="n2"))
            await stage.send(raw(b'{"key":"b","n":3}', type="versioned", id="n3", key="b"))

            async def held() -> bool:
                return await stage.parked("v") == 2

            await until(held)
            await until(lambda: seen == [("b", 3)])
        async with stage.running(new):
            await stage.settled("v")
        assert seen[1:] == [("a", 1, "kg", 1), ("a", 2, "none", 1)]
        assert await stage.letters("v") == []

    async def test_r06_newer_is_dead_where_asked(self, stage: Stage) -> None:
        """With newer="dead" a newer version is a dead letter at once."""

        class Strict(Event, topic="jobs", key="key", type="strict", newer="dead"):
            key: str

        app = stage.app()

        @app.on(Strict)
        async def work(event: Strict) -> None:
            await asyncio.get_running_loop().create_future()

        async with stage.running(app):
            await stage.send(raw(b'{"key":"a"}', type="strict", extensions={"schemaversion": 2}))
            [letter] = await stage.dead("shop.work")
        assert letter.reason == "undecodable"
