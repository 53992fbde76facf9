"""Timers in virtual time: nominal times, what was missed, time zones and their summer time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stentor import App, Event, Firing, Group, Retry
from stentor.errors import DefinitionError
from stentor.schedule import Cron, Every, Timer
from stentor.testing import harness

START = datetime(2026, 1, 1, tzinfo=UTC)


class Ticked(Event, topic="ticks"):
    at: datetime


def minutes(firings: list[Firing]) -> list[tuple[float, float, int]]:
    """When each fired and was due, in minutes since the start, and how many were missed."""
    return [
        ((f.at - START) / timedelta(minutes=1), (f.scheduled - START) / timedelta(minutes=1), f.missed) for f in firings
    ]


async def test_every_fires_at_multiples_of_its_period() -> None:
    app, seen = App("shop"), list[Firing]()

    @app.every("10m")
    async def tick(firing: Firing) -> Ticked:
        seen.append(firing)
        return Ticked(at=firing.scheduled)

    async with harness(app, start=START + timedelta(minutes=4)) as t:
        await t.advance("30m")
        assert minutes(seen) == [(10, 10, 0), (20, 20, 0), (30, 30, 0)]
        assert t.published(Ticked) == [Ticked(at=START + timedelta(minutes=m)) for m in (10, 20, 30)]
        ids = [message.id for message in t.messages if message.topic == "stentor.timer.shop.tick"]
        assert ids[0] == "shop.tick/tick@2026-01-01T00:10:00.000000Z"


@pytest.mark.parametrize(
    ("missed", "expected"),
    [
        ("once", [(10, 10, 0), (55, 50, 3), (60, 60, 0)]),
        ("skip", [(10, 10, 0), (60, 60, 0)]),
        ("all", [(10, 10, 0), (55, 20, 0), (55, 30, 0), (55, 40, 0), (55, 50, 0), (60, 60, 0)]),
    ],
)
async def test_what_was_missed_while_nothing_ran(missed: Any, expected: list[tuple[float, float, int]]) -> None:
    app, seen = App("shop"), list[Firing]()

    @app.every("10m", missed=missed)
    async def tick(firing: Firing) -> None:
        seen.append(firing)

    async with harness(app, start=START) as t:
        await t.advance("15m")
        await t.stop()
        await t.advance("40m")
        await t.start()
        await t.advance("5m")
    assert minutes(seen) == expected


@pytest.mark.parametrize("missed", ["once", "skip", "all"])
async def test_a_first_start_has_missed_nothing(missed: Any) -> None:
    app, seen = App("shop"), list[Firing]()

    @app.cron("0 3 * * *", missed=missed)
    async def nightly(firing: Firing) -> None:
        seen.append(firing)

    async with harness(app, start=START + timedelta(hours=5)) as t:
        await t.advance("21h")
        assert seen == []
        await t.advance("1h")
        assert minutes(seen) == [(27 * 60, 27 * 60, 0)]


async def test_a_failing_firing_is_retried_with_its_nominal_time_and_holds_the_next() -> None:
    app, seen = App("shop"), list[Firing]()

    @app.every("10m", retry=Retry(attempts=3, first="15m", factor=1))
    async def tick(firing: Firing) -> None:
        seen.append(firing)
        if len(seen) == 1:
            raise ValueError("no")

    async with harness(app, start=START) as t:
        await t.advance("25m")
        assert [f.scheduled for f in seen] == [START + timedelta(minutes=m) for m in (10, 10, 20)]


async def test_a_crash_does_not_fire_twice_or_forget() -> None:
    app, seen = App("shop"), list[Firing]()

    @app.every("10m")
    async def tick(firing: Firing) -> Ticked:
        seen.append(firing)
        return Ticked(at=firing.scheduled)

    async with harness(app, start=START) as t:
        await t.advance("10m")
        t.broker.faults._kill("shop.tick")
        await t.settled()
        await t.advance("20m")
        assert t.published(Ticked) == [Ticked(at=START + timedelta(minutes=m)) for m in (10, 20, 30)]


async def test_timers_share_a_group_with_handlers() -> None:
    app, group, seen = App("shop"), Group("ledger"), list[str]()

    @group.every("1m")
    async def flush() -> None:
        seen.append("flush")

    @group.on(Ticked)
    async def ticked(event: Ticked) -> None:
        seen.append("ticked")

    @group.cron("*/2 * * * *")
    async def even() -> None:
        seen.append("even")

    app.add(group)
    async with harness(app, start=START) as t:
        await t.publish(Ticked(at=START))
        await t.advance("2m")
        assert t.attempts(flush) == 2
    assert sorted(seen) == ["even", "flush", "flush", "ticked"]


async def test_one_process_fires_for_all() -> None:
    seen: list[str] = []

    def make(name: str) -> App:
        app = App("shop")

        @app.every("1m")
        async def tick() -> None:
            seen.append(name)

        return app

    one, two = make("one"), make("two")
    async with harness(one, start=START) as t, two.running(broker=t.broker, clock=t.clock, grace="0s"):
        await t.advance("10m")
    assert len(seen) == 10


def local(text: str, zone: str = "Europe/Berlin") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def firings(expression: str, zone: str, start: float, count: int) -> list[str]:
    cron, moment, found = Cron(expression, zone), start, []
    for _ in range(count):
        moment = cron.after(moment)
        found.append(datetime.fromtimestamp(moment, ZoneInfo(zone)).isoformat())
    return found


def test_cron_keeps_to_the_wall_clock_of_its_zone() -> None:
    # On 29 March 2026 Berlin goes from +01:00 to +02:00 at 02:00, on 25 October back at 03:00.
    assert firings("0 9 * * *", "Europe/Berlin", local("2026-03-28T00:00"), 2) == [
        "2026-03-28T09:00:00+01:00",
        "2026-03-29T09:00:00+02:00",
    ]
    assert firings("0 9 * * *", "Europe/Berlin", local("2026-10-24T00:00"), 2) == [
        "2026-10-24T09:00:00+02:00",
        "2026-10-25T09:00:00+01:00",
    ]


def test_a_time_that_summer_time_skips_still_fires_once_and_a_doubled_one_once() -> None:
    spring = firings("30 2 * * *", "Europe/Berlin", local("2026-03-28T12:00"), 2)
    assert len({text[:10] for text in spring}) == 2
    assert spring[0].startswith("2026-03-29T03:")  # 02:30 does not exist that night
    autumn = firings("30 2 * * *", "Europe/Berlin", local("2026-10-24T12:00"), 2)
    assert [text[:16] for text in autumn] == ["2026-10-25T02:30", "2026-10-26T02:30"]


async def test_cron_in_a_zone_through_the_change_of_time() -> None:
    app, seen = App("shop"), list[datetime]()

    @app.cron("0 3 * * *", tz="Europe/Berlin")
    async def nightly(firing: Firing) -> None:
        seen.append(firing.scheduled)

    async with harness(app, start=datetime(2026, 3, 27, 12, tzinfo=UTC)) as t:
        await t.advance("3d")
    assert seen == [
        datetime(2026, 3, 28, 2, tzinfo=UTC),
        datetime(2026, 3, 29, 1, tzinfo=UTC),
        datetime(2026, 3, 30, 1, tzinfo=UTC),
    ]


@given(st.floats(1e9, 2e9), st.sampled_from(["10ms", "0.1s", "1s", "7s", "1h", "30d"]))
def test_every_is_the_same_for_all_processes(moment: float, period: str) -> None:
    every = Every(period)
    following = every.after(moment)
    assert following > moment - 1e-6
    assert following - moment <= every.period + 1e-6
    assert abs(following / every.period - round(following / every.period)) < 1e-3
    assert every.after(following) > following


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.sampled_from(["once", "skip", "all"]))
def test_what_is_due_is_between_the_last_and_now(last: float, length: float, missed: Any) -> None:
    now = last + length
    due = Timer("t", Every("10s"), missed).due(last, now)
    times = [time for time, _ in due]
    assert all(last < time <= now for time in times)
    assert all(a < b for a, b in pairwise(times))
    assert len(due) <= 1 or missed == "all"


@pytest.mark.parametrize(
    ("register", "complaint"),
    [
        (lambda app: app.every("1ms"), "every: '1ms' is too short; the least is 10 ms"),
        (lambda app: app.every("often"), "every: 'often' is no duration"),
        (lambda app: app.cron("0 3 * *"), "cron: '0 3 .*' is no cron expression"),
        (lambda app: app.cron("61 * * * *"), "is no cron expression"),
        (lambda app: app.cron("@often"), "is no cron expression"),
        (lambda app: app.cron("0 3 * * *", tz="Mars/Olympus"), "cron: 'Mars/Olympus' is no time zone"),
        (lambda app: app.every("1m", missed="twice"), 'tick: missed must be "once", "skip" or "all", not \'twice\''),
        (lambda app: app.every("1m", retry=3), "tick: retry must be a Retry"),
    ],
)
def test_wrong_timers_are_refused_where_they_stand(register: Any, complaint: str) -> None:
    async def tick() -> None: ...

    with pytest.raises(DefinitionError, match=complaint):
        register(App("shop"))(tick)


def test_two_timers_of_one_name_in_one_group_are_refused() -> None:
    group = Group("g")

    async def tick() -> None: ...

    group.every("1m")(tick)
    with pytest.raises(DefinitionError, match="group g: two timers are called 'tick'"):
        group.cron("* * * * *")(tick)
