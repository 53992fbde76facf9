"""Dead letters, from the command line and from a program: what is listed, and what redrive and drop do."""

import asyncio
import signal
from collections.abc import Callable
from datetime import timedelta

import pytest

from stentor import App, Event, Retry
from stentor.errors import UnknownGroup
from stentor.patterns.dead_letter import DeadLetters, Filter, UnknownDeadLetter
from stentor.testing import harness
from tests.cli.conftest import Stentor


def test_from_list_to_redrive(shop: Stentor, handled: Callable[..., None]) -> None:
    handled(("dora", 1), ("ada", 2), ("dora", 3))
    listed = shop("dead", "list")
    assert "shop.charge  ConnectionError: no bank for order 1  2" in listed, "errors that differ in a number are one"
    assert "2 dead letters." in listed
    letters = shop.json("dead", "list")
    fields = {"id", "type", "topic", "key", "group", "attempts", "errors", "time"}
    assert all(fields <= letter.keys() for letter in letters)
    first = letters[0]
    assert (first["type"], first["key"], first["attempts"], first["status"]) == ("shop.ordered", "dora", 2, "open")
    assert [error["type"] for error in first["errors"]] == ["ConnectionError"] * 2

    shown = shop("dead", "show", first["id"][:8])
    assert first["id"] in shown
    assert '"customer": "dora"' in shown
    assert "raise ConnectionError" in shown
    [one] = shop.json("dead", "show", first["id"])
    assert one["data"] == {"customer": "dora", "number": 1}

    assert "2 dead letters of shop.charge would be run again" in shop("dead", "redrive", "--all", "--dry-run")
    assert "say --yes" in shop("dead", "redrive", "--all", code=2)
    assert "1 dead letter of shop.charge run again when a worker" in shop("dead", "redrive", first["id"])
    assert shop("dead", "redrive", first["id"]) == "nothing to redrive\n", "it waits already"
    assert [letter["status"] for letter in shop.json("dead", "list")] == ["pending", "open"]

    (shop.folder / "mended").touch()
    worker = shop.start("run", "shop")
    worker.until("charged dora 1")
    assert "run again now" in shop("dead", "redrive", "--error", "order 3", "--yes")
    worker.until("charged dora 3")
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert shop("dead", "list") == "no dead letters\n"
    assert {letter["status"] for letter in shop.json("dead", "list", "--status", "all")} == {"redriven"}
    assert shop("dead", "redrive", first["id"]) == "nothing to redrive\n"


def test_drop(shop: Stentor, handled: Callable[..., None]) -> None:
    handled(("dora", 1), ("dora", 2))
    [answer] = shop.json("dead", "drop", "--key", "dora", "--yes")
    assert answer == {"group": "shop.charge", "action": "drop", "count": 2, "dry_run": False}
    handled(("ada", 3))
    worker = shop.start("run", "shop")
    worker.until("ready")
    while shop.json("dead", "list"):
        pass
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert {letter["status"] for letter in shop.json("dead", "list", "--status", "dropped")} == {"dropped"}
    assert shop("dead", "redrive", "--all", "--yes") == "nothing to redrive\n"


def test_nothing_and_nobody(shop: Stentor) -> None:
    shop("declare", "shop")
    assert shop("dead", "list") == "no dead letters\n"
    assert shop("dead", "redrive", "--all", "--yes") == "nothing to redrive\n"
    assert "no dead letter 'abc'" in shop("dead", "show", "abc", code=5)
    assert "no group 'pack'; there are shop.charge" in shop("dead", "list", "--group", "pack", code=5)


# ---- from a program -------------------------------------------------------------------------------------------------


class Job(Event, topic="jobs", key="key", type="job"):
    key: str
    number: int


class Workshop:
    """An app whose handlers fail until it is mended; it notes what ran."""

    def __init__(self) -> None:
        self.app = App("work")
        self.mended = False
        self.done: list[int] = []

        @self.app.on(Job, retry=Retry(attempts=1))
        async def work(job: Job) -> None:
            if not self.mended:
                raise (ValueError if job.number % 2 else KeyError)(f"job {job.number}")
            self.done.append(job.number)

        @self.app.on(Job, group="other", retry=Retry(attempts=1))
        async def other(job: Job) -> None:
            raise OSError("always")


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


def jobs(count: int) -> list[Job]:
    return [Job(key=f"k{number % 3}", number=number) for number in range(count)]


async def test_filters(workshop: Workshop) -> None:
    async with harness(workshop.app) as t:
        await t.publish(jobs(12))
        await t.settled()
        letters = DeadLetters(workshop.app.broker)
        assert sorted(await letters.groups()) == ["other", "work.work"]

        async def count(**which: object) -> int:
            return len([entry async for entry in letters.find(Filter(**which))])  # type: ignore[arg-type]

        assert await count() == 24
        assert await count(group="work.work") == 12
        assert await count(group="work.work", error="valueerror") == 6
        assert await count(error="ALWAYS") == 12
        assert await count(key="k0", group="other") == 4
        assert await count(type="job", topic="jobs", reason="attempts") == 24
        assert await count(type="other") == await count(topic="other") == await count(reason="never") == 0
        assert await count(since=t.now - timedelta(minutes=1)) == 24
        assert await count(until=t.now - timedelta(minutes=1)) == 0
        assert await count(status=("redriven",)) == 0
        with pytest.raises(UnknownGroup):
            await count(group="nobody")
        assert await count() == 24, "looking consumes nothing"


async def test_redrive_reaches_its_group_only_keeps_order_and_is_idempotent(workshop: Workshop) -> None:
    async with harness(workshop.app) as t:
        await t.publish(jobs(30))
        await t.settled()
        letters = DeadLetters(workshop.app.broker)
        which = Filter(group="work.work", error="ValueError")
        assert await letters.redrive(which, dry_run=True) == {"work.work": 15}
        assert {entry.status async for entry in letters.find()} == {"open"}
        workshop.mended = True
        seen: list[int] = []
        assert await letters.redrive(which, progress=seen.append) == {"work.work": 15}
        assert seen[-1] == 15
        assert await letters.redrive(which) == {}, "asked for already"
        await t.advance("2s")
        assert await letters.redrive(which) == {}, "done already"
        assert sorted(workshop.done) == list(range(1, 30, 2))
        assert len([entry async for entry in letters.find(Filter(group="other"))]) == 30
        assert len([entry async for entry in letters.find(Filter(group="work.work"))]) == 15


async def test_one_by_id_or_the_beginning_of_one(workshop: Workshop) -> None:
    async with harness(workshop.app) as t:
        await t.publish(jobs(40))
        await t.settled()
        letters = DeadLetters(workshop.app.broker)
        id = [entry.letter.id async for entry in letters.find(Filter(group="work.work"))][7]
        assert (await letters.get(id)).letter.message.data == b'{"key":"k1","number":7}'
        assert (await letters.get(id[:16])).letter.id == id
        with pytest.raises(UnknownDeadLetter, match="several"):
            await letters.get("")
        with pytest.raises(UnknownDeadLetter, match="no dead letter 'zz'"):
            await letters.redrive("zz")
        workshop.mended = True
        assert await letters.redrive(id[:16]) == {"work.work": 1}
        await t.advance("2s")
        assert workshop.done == [7]


async def test_a_wish_can_be_changed_until_it_is_carried_out(workshop: Workshop) -> None:
    async with harness(workshop.app) as t:
        await t.publish(jobs(1))
        await t.settled()
        letters = DeadLetters(workshop.app.broker)
        which = Filter(group="work.work")
        await letters.redrive(which)
        assert [entry.wish async for entry in letters.find(which)] == ["redrive"]
        assert await letters.drop(which) == {"work.work": 1}
        assert [entry.wish async for entry in letters.find(which)] == ["drop"]
        workshop.mended = True
        await t.advance("2s")
        assert workshop.done == []
        assert [entry.status async for entry in letters.find(Filter(group="work.work", status=("dropped",)))] == [
            "dropped"
        ]


async def test_what_dies_again_is_a_new_dead_letter(workshop: Workshop) -> None:
    async with harness(workshop.app) as t:
        await t.publish(jobs(3))
        await t.settled()
        letters = DeadLetters(workshop.app.broker)
        first = {entry.letter.id async for entry in letters.find(Filter(group="work.work"))}
        assert await letters.redrive(Filter(group="work.work")) == {"work.work": 3}
        await t.advance("2s")
        second = {entry.letter.id async for entry in letters.find(Filter(group="work.work"))}
        assert len(second) == 3
        assert not first & second


async def test_a_dropped_group_leaves_its_dead_letters_to_look_at() -> None:
    workshop = Workshop()
    async with workshop.app.running(url="memory://") as program:
        await workshop.app.publish(jobs(2))
        letters = DeadLetters(program.broker)
        async with asyncio.timeout(60):
            async for offset, _ in program.broker.browse("stentor.dead.other", "earliest", follow=True):
                if offset == 1:
                    break
        await program.workers[1].stop(1)
        await program.broker.admin.drop_group("other")
        assert len([entry async for entry in letters.find(Filter(group="other"))]) == 2
        with pytest.raises(UnknownGroup, match="is not declared"):
            await letters.redrive(Filter(group="other"))
