"""Sources: positions that survive, ids that stay, one process or each."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from stentor import App, Event, Group, Publish
from stentor.errors import DefinitionError, InvalidEvent, StentorError
from stentor.health import Health
from stentor.testing import harness


class Line(Event, topic="lines", key="n"):
    n: int


LINES = 10


async def test_a_source_publishes_and_its_events_are_handled() -> None:
    app, seen = App("feed"), list[int]()

    @app.source()
    async def feed(publish: Publish) -> None:
        assert publish.position is None
        for n in range(3):
            await publish(Line(n=n), position=n)
        await publish([Line(n=3), Line(n=4)])

    @app.on(Line)
    async def handle(line: Line) -> None:
        seen.append(line.n)

    async with harness(app) as t:
        await t.settled()
        assert sorted(seen) == [0, 1, 2, 3, 4]


async def test_a_restart_continues_at_the_position() -> None:
    app = App("feed")
    starts: list[Any] = []
    stop_at = 4

    @app.source()
    async def feed(publish: Publish) -> None:
        starts.append(publish.position)
        for n in range(0 if publish.position is None else publish.position["next"], LINES):
            if n == stop_at:
                await publish.stopping.wait()
                return
            await publish(Line(n=n), position={"next": n + 1})
            assert publish.position == {"next": n + 1}

    async with harness(app) as t:
        await t.settled()
        assert [line.n for line in t.published(Line)] == [0, 1, 2, 3]
        await t.stop()
        stop_at = 7
        await t.start()
        await t.settled()
        stop_at = 100
        t.broker.faults._kill("feed.feed")  # a crash this time
        await t.settled()
        assert [line.n for line in t.published(Line)] == list(range(LINES))
        assert starts == [None, {"next": 4}, {"next": 7}]


async def test_a_failing_source_starts_again_at_its_position_after_a_while() -> None:
    app, starts = App("feed"), list[Any]()

    @app.source()
    async def feed(publish: Publish) -> None:
        starts.append(publish.position)
        await publish(Line(n=len(starts)), position=len(starts))
        if len(starts) < 3:
            raise OSError("connection lost")

    async with harness(app) as t:
        await t.settled()
        assert starts == [None]
        await t.advance("1s")
        assert starts == [None, 1]
        await t.advance("2s")
        assert starts == [None, 1, 2]
        assert [line.n for line in t.published(Line)] == [1, 2, 3]


async def test_ids_are_the_same_again_where_the_broker_cannot_write_both_at_once() -> None:
    app = App("feed")

    @app.source()
    async def feed(publish: Publish) -> None:
        start = publish.position or 0
        for n in range(start, 3):
            await publish([Line(n=n), Line(n=n + 100)], position=n + 1)

    t = harness(app)
    t.broker.features = msgspec.structs.replace(t.broker.features, atomic=False)
    async with t:
        await t.settled()
        first = [message.id for message in t.messages if message.topic == "lines"]
        assert len(set(first)) == 6
        # The position was lost, as by a crash between the events and the position: the same ids are published again.
        await t.stop()
        for journal in t.broker._groups["feed.feed"].journal.values():
            journal.clear()
        await t.start()
        await t.settled()
        assert [message.id for message in t.messages if message.topic == "lines"] == first


async def test_options_of_publish_reach_the_event() -> None:
    app = App("feed")

    @app.source()
    async def feed(publish: Publish) -> None:
        await publish(Line(n=1), id="one", subject="s", headers={"tenant": "a"}, position=1)

    async with harness(app) as t:
        await t.settled()
        [message] = [message for message in t.messages if message.topic == "lines"]
        assert (message.id, message.subject, message.extensions["tenant"]) == ("one", "s", "a")


async def test_a_bad_event_is_refused_inside_the_source() -> None:
    app, errors = App("feed"), list[str]()

    @app.source()
    async def feed(publish: Publish) -> None:
        for bad in (Line(n="x"), "text"):  # type: ignore[arg-type]
            try:
                await publish(bad, position=1)  # type: ignore[arg-type]
            except InvalidEvent as error:
                errors.append(str(error))

    async with harness(app) as t:
        await t.settled()
    assert len(errors) == 2
    assert "Expected `int`, got `str`" in errors[0]


async def test_one_process_runs_a_source_or_each_does() -> None:
    running: list[str] = []

    def make(name: str) -> App:
        app = App("feed")

        @app.source()
        async def one(publish: Publish) -> None:
            running.append(f"one in {name}")
            await asyncio.Event().wait()

        @app.source(instances="each")
        async def each(publish: Publish) -> None:
            running.append(f"each in {name}")
            await publish(Line(n=1))
            await asyncio.Event().wait()

        return app

    first, second = make("first"), make("second")
    async with harness(first) as t:
        await t.settled()
        async with second.running(broker=t.broker, clock=t.clock, grace="0s"):
            await t.settled()
            assert sorted(running) == ["each in first", "each in second", "one in first"]
            assert len(t.published(Line)) == 2


async def test_a_source_of_each_process_keeps_no_position_and_starts_again_when_it_fails() -> None:
    app, errors = App("feed"), list[str]()

    @app.source(instances="each")
    async def feed(publish: Publish) -> None:
        try:
            await publish(Line(n=1), position=5)
        except Exception as error:
            errors.append(str(error))
            raise

    async with harness(app) as t:
        await t.settled()
        await t.advance("1s")
    assert errors == ['source feed: a source with instances="each" keeps no position'] * 2


async def test_a_group_may_have_a_source_and_its_handlers() -> None:
    app, group, seen = App("feed"), Group("all"), list[int]()

    @group.source()
    async def feed(publish: Publish) -> None:
        await publish(Line(n=1), position=1)

    @group.on(Line)
    async def handle(line: Line) -> None:
        seen.append(line.n)

    app.add(group)
    async with harness(app) as t:
        await t.settled()
    assert seen == [1]


class Lines:
    def __init__(self, name: str, numbers: range) -> None:
        self.name = name
        self.numbers = numbers
        self.fails = 0

    async def run(self, publish: Publish) -> None:
        for n in self.numbers[publish.position or 0 :]:
            await publish(Line(n=n), position=n - self.numbers.start + 1)
            publish.counts.lag = self.numbers.stop - n - 1
            if self.fails:
                self.fails -= 1
                raise OSError("gone")


async def test_an_object_is_a_source_with_the_name_and_place_that_it_says() -> None:
    app, low, high = App("feed"), Lines("low", range(3)), Lines("high", range(10, 12))
    low.fails = 1
    app.add(low)
    group = Group("other")
    group.source()(high)
    app.add(group)
    assert list(app.groups()) == ["feed.low", "other"]
    async with harness(app) as t:
        await t.settled()
        assert sorted(line.n for line in t.published(Line)) == [0, 10, 11]
        await t.advance("1s")
        assert sorted(line.n for line in t.published(Line)) == [0, 1, 2, 10, 11]
        assert app.program is not None
        metrics, _ = await Health(app.program).metrics("", {}, 0)
    for line in (
        'events_total{group="feed.low",source="low"} 3.0', 'errors_total{group="feed.low",source="low"} 1.0',
        'lag{group="feed.low",source="low"} 0.0', 'events_total{group="other",source="high"} 2.0',
    ):  # fmt: skip
        assert f"stentor_source_{line}" in metrics.decode()


async def test_two_sources_of_a_group_fail_apart() -> None:
    app, group, seen = App("feed"), Group("both"), list[str]()

    @group.source()
    async def fails(publish: Publish) -> None:
        raise StentorError("always")

    @group.source()
    async def goes_on(publish: Publish) -> None:
        seen.append("started")
        await asyncio.Event().wait()

    app.add(group)
    async with harness(app) as t:
        await t.advance("10s")
    assert seen == ["started"]


async def test_an_object_says_that_each_process_runs_it() -> None:
    class Socket(Lines):
        instances = "each"

    app = App("feed")
    app.add(Socket("socket", range(1)))
    [source] = app.groups()["feed.socket"].sources
    assert source.instances == "each"


def test_an_object_that_is_no_source_is_refused() -> None:
    class Runs:
        async def run(self) -> None: ...

    with pytest.raises(
        DefinitionError, match=r"source Runs: write it as: async def run\(self, publish: Publish\) -> None"
    ):
        App("feed").add(Runs())
    with pytest.raises(DefinitionError, match=r"no source \(async def run\(self, publish\)\)"):
        App("feed").add(object())
    with pytest.raises(DefinitionError, match="source"):
        App("feed").add(Lines("two words", range(1)))


@pytest.mark.parametrize("wrong", [lambda publish: None, len])
def test_what_is_no_source_is_refused(wrong: Any) -> None:
    with pytest.raises(DefinitionError, match=r"write it as: async def .*\(publish: Publish\) -> None"):
        App("feed").source()(wrong)


def test_a_source_takes_one_parameter() -> None:
    async def feed(publish: Publish, more: int) -> None: ...

    with pytest.raises(DefinitionError, match="source feed: write it as"):
        App("feed").source()(feed)  # type: ignore[type-var]
    with pytest.raises(DefinitionError, match='instances must be "one" or "each", not \'two\''):
        App("feed").source(instances="two")(feed)  # type: ignore[arg-type, type-var]
