"""`stentor mirror`: what is moved to another broker is all there, once, in order, and groups go on where they were."""

import asyncio
import inspect
import itertools
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stentor import App, Context, Event, Group, Publish, Retry
from stentor.broker import Broker
from stentor.errors import UnknownTopic
from stentor.event import Topic
from stentor.message import Message
from stentor.patterns import handover, member
from stentor.patterns.compare import compare
from stentor.patterns.dead_letter import DeadLetters, Filter
from stentor.patterns.member import MirrorError
from stentor.patterns.mirror import CHUNK, Mirror
from stentor.subscription import Subscription
from tests.real import brokers, opened, url_of

PAIRS = [("memory", "memory"), ("sqlite", "sqlite")]
PAIRS += [sides for name in brokers() for sides in (("sqlite", name), (name, "sqlite"))]
SIDES = [
    pytest.param(
        *sides,
        id="-".join(sides),
        marks=[[], [pytest.mark.slow]][at] if at < 2 else [pytest.mark.server, pytest.mark.slow],
    )
    for at, sides in enumerate(PAIRS)
]
TARGETS = [
    pytest.param(name, marks=[pytest.mark.slow, *([pytest.mark.server] if name != "sqlite" else [])])
    for name in ("sqlite", *brokers())
]


class Placed(Event, topic="orders", key="customer", type="test.placed"):
    customer: str
    number: int


class Tick(Event, topic="ticks", key=None, type="test.tick"):
    number: int


class Record:
    """What the handlers saw: where, and in which order."""

    def __init__(self) -> None:
        self.side = "source"
        self.seen: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
        self.attempts: dict[int, int] = {}

    def add(self, group: str, order: Placed) -> None:
        self.seen[group].append((self.side, order.customer, order.number))

    def numbers(self, group: str) -> list[int]:
        return [number for _, _, number in self.seen[group]]


def make_app(record: Record) -> App:
    app = App("shop")

    @app.on(Placed)
    async def all_of_them(order: Placed) -> None:
        record.add("all", order)

    @app.on(Placed, retry=Retry(attempts=None, first="50ms", longest="50ms"))
    async def flaky(order: Placed, ctx: Context) -> None:
        if order.customer == "c1" and record.side == "source":
            raise ConnectionError("planned")
        record.attempts[order.number] = ctx.attempt
        record.add("flaky", order)

    strict = Group("shop.strict", on_dead="park")

    @app.on(Placed, group=strict, retry=Retry(attempts=1))
    async def refuse(order: Placed) -> None:
        if order.customer == "c2" and record.side == "source":
            raise ValueError("planned")
        record.add("strict", order)

    @app.source()
    async def clock(publish: Publish) -> None:
        first = publish.position or 0
        for number in range(first + 1, first + 11):
            await publish(Tick(number=number), position=number)
        await publish.stopping.wait()

    return app


@asynccontextmanager
async def pair(
    kinds: tuple[str, str], tmp_path: Path, factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Broker, Broker]]:
    urls = [url_of(kind, tmp_path / f"{index}.db", factory) for index, kind in enumerate(kinds)]
    async with opened(urls[0]) as source, opened(urls[1]) as target:
        yield source, target


async def until(condition: Callable[[], Any]) -> None:
    """Wait until ``condition()``, or what it awaits to, is true."""
    async with asyncio.timeout(60):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(0.01)


async def browse(broker: Broker, topic: str) -> list[Message]:
    return [message async for _, message in broker.browse(topic, "earliest", follow=False)]


def order(message: Message) -> tuple[str | None, int]:
    return message.key, int(message.data.rpartition(b":")[2].rstrip(b"}"))


@pytest.mark.parametrize(("one", "other"), SIDES)
async def test_a_running_shop_goes_on_where_it_was(
    one: str, other: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    record = Record()
    async with pair((one, other), tmp_path, tmp_path_factory) as (source, target):
        async with make_app(record).running(broker=source) as program:
            app = program.runtime.app
            await app.publish([Placed(customer=f"c{n % 5}", number=n) for n in range(100)])
            await app.publish(Placed(customer="c4", number=1000), delay="1h")
            await app.publish(Placed(customer="c4", number=1001), delay="2s")
            await until(lambda: len(record.numbers("all")) >= 100 and len(record.numbers("flaky")) >= 80)
            await until(lambda: len(record.numbers("strict")) >= 80)
            async with Mirror(source, target) as mirror:  # under load: what is published now is not in the first copy
                await mirror.copy()
                await app.publish([Placed(customer=f"c{n % 5}", number=n) for n in range(100, 150)])
                await mirror.copy()
        assert source.features.name == one
        record.side = "target"
        await source.publish([message_of(n) for n in range(150, 200)])  # nobody handles these at the source
        async with Mirror(source, target) as mirror:
            moved = await mirror.finish()
        assert set(moved) == {"shop.all_of_them", "shop.flaky", "shop.strict", "shop.clock"}
        for topic in ("orders", "ticks", "stentor.dead.shop.strict"):
            found = await compare(source, target, topic)
            assert found.same, found
            assert found.extra == 0
        assert [message.data for message in await target.admin.delayed() if message.topic == "orders"][-1].endswith(
            b"1000}"
        )

        async with make_app(record).running(broker=target):
            everything = [*range(200), 1001]
            await until(lambda: sorted(record.numbers("all")) == everything)
            await until(lambda: sorted(record.numbers("flaky")) == everything)
            held = [number for number in everything if number % 5 == 2]
            await until(lambda: sorted(record.numbers("strict")) == [n for n in everything if n not in held])
            letters = DeadLetters(target)
            assert await letters.redrive(Filter()) == {"shop.strict": 1}
            await until(lambda: sorted(record.numbers("strict")) == everything)
            async with asyncio.timeout(60):
                while len(await browse(target, "ticks")) != 20:
                    await asyncio.sleep(0.01)
        for group, seen in record.seen.items():
            for customer in {customer for _, customer, _ in seen}:
                numbers = [number for _, who, number in seen if who == customer and number < 1000]
                assert numbers == sorted(numbers), f"{group}, {customer}"
        assert record.attempts[1] > 1, "the attempts at the source count"
        ticks = [order(message)[1] for message in await browse(target, "ticks")]
        assert sorted(ticks) == list(range(1, 21)), "the source goes on behind its position"


def message_of(number: int, customer: str = "") -> Message:
    key = customer or f"c{number % 5}"
    return Message(
        id=f"m{number}", source="/test", type="test.placed", topic="orders", key=key, time="2026-01-01T00:00:00Z",
        data=f'{{"customer":"{key}","number":{number}}}'.encode(), datacontenttype="application/json",
        extensions={"recordedtime": "2026-01-01T00:00:01Z", "weight": 3},
    )  # fmt: skip


async def declared(broker: Broker, *groups: str) -> None:
    """Topic orders with its groups, as an app leaves them behind."""
    await broker.declare([Topic("orders")], [Subscription(group=name, topics=("orders",), app="x") for name in groups])


@pytest.fixture
async def sides() -> AsyncIterator[tuple[Broker, Broker]]:
    async with opened("memory://") as source, opened("memory://") as target:
        await declared(source, "x.work")
        yield source, target


Sides = tuple[Broker, Broker]


async def test_all_of_an_event_is_kept(sides: Sides) -> None:
    source, target = sides
    due = time.time() + 3600
    later = msgspec.structs.replace(message_of(2), due=due, subject="a", dataschema="/schema")
    await source.publish([message_of(1), later])
    async with Mirror(source, target) as mirror:
        await mirror.finish()
    assert await browse(target, "orders") == [message_of(1)]
    assert await target.admin.delayed() == [later]


async def test_a_delayed_event_that_was_copied_is_not_copied_again_when_it_falls_due(sides: Sides) -> None:
    source, target = sides
    await source.publish([msgspec.structs.replace(message_of(1), due=time.time() + 0.3)])
    async with Mirror(source, target) as mirror:
        await mirror.finish()
        assert mirror.copied == 1
    await until(lambda: browse(source, "orders"))
    await until(lambda: browse(target, "orders"))
    target.features = msgspec.structs.replace(target.features, dedupe=False)  # the mirror's own notes must do
    async with Mirror(source, target) as mirror:
        await mirror.finish()
        assert mirror.copied == 0
    assert [message.id for message in await browse(target, "orders")] == ["m1"]


async def test_what_others_publish_at_the_target_is_left_to_the_groups(sides: Sides) -> None:
    source, target = sides
    await source.publish([message_of(n) for n in range(10)])
    record: list[int] = []
    app = App("x")

    @app.on(Placed)
    async def work(order: Placed) -> None:
        record.append(order.number)

    async with app.running(broker=source):
        await until(lambda: len(record) == 10)
    async with Mirror(source, target) as mirror:
        await mirror.copy()
        await target.publish([message_of(77)])
        assert await mirror.finish() == ["x.work"]
    found = await compare(source, target, "orders")
    assert (found.same, found.extra) == (True, 1)
    async with app.running(broker=target):
        await until(lambda: record[10:] == [77])


async def test_a_group_is_moved_once(sides: Sides) -> None:
    source, target = sides
    await source.publish([message_of(n) for n in range(10)])
    async with Mirror(source, target) as mirror:
        assert await mirror.finish() == ["x.work"]
    await source.publish([message_of(10)])
    async with Mirror(source, target) as mirror:
        assert await mirror.finish() == []
    await target.admin.drop_group("x.work")
    async with Mirror(source, target) as mirror:
        assert await mirror.finish() == ["x.work"], "after a rehearsal, say"
    assert [lag.events for lag in await target.admin.lag() if lag.group == "x.work"] == [11]


async def test_one_topic_alone(sides: Sides) -> None:
    source, target = sides
    await source.declare([Topic("others")], [Subscription(group="x.both", topics=("orders", "others"), app="x")])
    await source.publish([message_of(1), msgspec.structs.replace(message_of(2), topic="others")])
    async with Mirror(source, target, ["others"], groups=False) as mirror:
        assert await mirror.finish() == []
    assert {topic.name for topic in await target.admin.topics()} == {"others", "stentor.mirror"}
    async with Mirror(source, target, ["others"], name="again") as mirror:
        assert await mirror.finish() == ["x.both"]
    [group] = [group for group in await target.admin.groups() if group.name == "x.both"]
    assert group.topics == ("others",)


async def test_what_cannot_be_mirrored_says_why(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = sides
    monkeypatch.setattr(member, "PATIENCE", 0.3)
    with pytest.raises(UnknownTopic, match=r"no topic nowhere .*; there are orders"):
        await Mirror(source, target, ["nowhere"]).__aenter__()
    async with Mirror(source, target):
        with pytest.raises(MirrorError, match="another process is a member"):
            await Mirror(source, target).__aenter__()
    async with opened("memory://") as third:
        with pytest.raises(MirrorError, match=r"mirrored before, and not to .*--name"):
            await Mirror(source, third).__aenter__()
        async with Mirror(source, third, name="third") as mirror:
            await mirror.finish()
    app = App("x")
    app.on(Placed)(work)
    async with app.running(broker=source), Mirror(source, target) as mirror:
        with pytest.raises(MirrorError, match=r"x\.work has 1 running members on .*stop its workers first"):
            await mirror.finish()
    await target.publish([message_of(1)])
    await target.admin.replay("x.work", "latest")
    await source.publish([message_of(1)])
    async with Mirror(source, target) as mirror:
        with pytest.raises(MirrorError, match=r"does not give x\.work 1 events .*groups drop x\.work"):
            await mirror.finish()


async def work(order: Placed) -> None:
    pass


async def test_a_comparison_finds_what_is_wrong(sides: Sides) -> None:
    source, target = sides
    await declared(target)
    events = [message_of(n, customer=f"c{n % 2}") for n in range(8)]
    await source.publish(events)
    changed = msgspec.structs.replace(events[0], data=b"{}")
    again = msgspec.structs.replace(events[7], fresh=True)
    await target.publish([changed, *events[2:7], events[7], again, message_of(99)])
    found = await compare(source, target, "orders")
    assert (found.missing, found.doubled, found.changed, found.extra) == (1, 1, 1, 1)
    assert not found.same
    async with opened("memory://") as swapped:
        await declared(swapped)
        await swapped.publish([events[2], events[0], events[1], *events[3:]])
        found = await compare(source, swapped, "orders")
        assert (found.missing, found.moved, found.same) == (0, 1, False)


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("side", [0, 1])
async def test_a_comparison_sees_what_falls_due_meanwhile_once(
    sides: Sides, side: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event leaves those that wait and joins the topic as either is read: it is there, and there once."""
    now, later = time.time() + 0.2, time.time() + 3600
    for at, broker in enumerate(sides):
        await declared(broker)
        await broker.publish([message_of(1), msgspec.structs.replace(message_of(2), due=now if at == side else later)])
    broker = sides[side]
    read = broker.browse

    async def due() -> bool:
        return not await broker.admin.delayed()

    async def slow(topic: str, since: Any, follow: bool) -> AsyncIterator[Any]:
        if when == "before":
            await until(due)
        async for found in read(topic, since, follow=follow):
            yield found
        await until(due)

    monkeypatch.setattr(broker, "browse", slow)
    found = await compare(*sides, "orders")
    assert (found.missing, found.doubled, found.extra) == (0, 0, 0)


async def test_a_run_that_ends_anywhere_is_continued(sides: Sides) -> None:
    """Stored at the target and not acked at the source: known by the note, also where nothing is deduplicated."""
    source, target = sides
    await source.publish([message_of(n) for n in range(3 * CHUNK)])
    target.features = msgspec.structs.replace(target.features, dedupe=False)
    for _ in range(3):
        async with Mirror(source, target) as mirror:

            async def die(_: object) -> None:
                raise ZeroDivisionError

            mirror._reader.consumer.settle = die  # type: ignore[assignment,method-assign]
            with pytest.raises(ZeroDivisionError):
                await mirror.copy()
    async with Mirror(source, target) as mirror:
        await mirror.copy()
        found = await compare(source, target, "orders")
        assert found.same, found


@pytest.mark.parametrize("kind", TARGETS)
def test_kill_9_on_the_way(kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A mirror under load is killed again and again: nothing is lost, nothing is doubled, each key is in order."""
    source = f"sqlite:///{tmp_path}/source.db"
    target = url_of(kind, tmp_path / "target.db", tmp_path_factory)
    command = [sys.executable, "-m", "stentor", "mirror", source, target]

    async def publish() -> None:
        async with opened(source) as broker, opened(target) as other:
            await declared(broker, "x.work")
            numbers = itertools.count()

            published = 0

            async def some(held: int) -> None:
                nonlocal published
                if published > held + 5000:  # it is still starting: what waits is enough to be killed over
                    await asyncio.sleep(0.05)
                    return
                await broker.publish([message_of(next(numbers)) for _ in range(700)])
                published += 700

            async def held() -> int:
                return sum(topic.events for topic in await other.admin.topics() if topic.name == "orders")

            for _ in range(2):
                before = await held()
                process = await asyncio.create_subprocess_exec(*command, "--follow")
                deadline = time.monotonic() + 60
                while (now := await held()) < before + 500:
                    await some(now)
                    assert process.returncode is None
                    assert time.monotonic() < deadline, "nothing is copied"
                process.send_signal(signal.SIGKILL)
                await process.wait()

    asyncio.run(publish())
    last = subprocess.run([*command, "--verify"], capture_output=True, text=True, check=False, timeout=120)
    assert last.returncode == 0, last.stdout + last.stderr
    assert "the same" in last.stdout
    assert "moved 1 group: x.work" in last.stdout


async def test_what_falls_due_while_a_group_is_moved_is_left_to_do(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = sides
    await source.publish([message_of(1), msgspec.structs.replace(message_of(2), due=time.time() + 0.5)])
    read = handover._read

    async def wait_and_read(*args: Any) -> Any:
        standing = await read(*args)
        await until(lambda: both(source, target))
        return standing

    async def both(*brokers: Broker) -> bool:
        return all([len(await browse(broker, "orders")) == 2 for broker in brokers])

    monkeypatch.setattr(handover, "_read", wait_and_read)
    async with Mirror(source, target) as mirror:
        await mirror.finish()
    assert [lag.events for lag in await target.admin.lag() if lag.group == "x.work"] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("strike", range(5))
async def test_a_move_that_breaks_off_anywhere_is_continued(strike: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before, between or after what it writes of a group: the next run leads to the same."""
    record = Record()
    async with opened("memory://") as source, opened("memory://") as target:
        async with make_app(record).running(broker=source) as program:
            await program.runtime.app.publish([Placed(customer=f"c{n % 5}", number=n) for n in range(50)])
            await until(lambda: len(record.numbers("flaky")) == 40)
            await until(lambda: len(record.numbers("strict")) == 40 and len(record.numbers("all")) == 50)
        record.side = "target"
        settle, left = handover._settle, itertools.count(strike, -1)

        async def settle_or_die(*args: Any) -> None:
            if next(left) == 0:
                raise ZeroDivisionError
            await settle(*args)

        monkeypatch.setattr(handover, "_settle", settle_or_die)
        with pytest.raises(ZeroDivisionError):
            async with Mirror(source, target) as mirror:
                await mirror.finish()
        async with Mirror(source, target) as mirror:
            await mirror.finish()
        found = await compare(source, target, "stentor.dead.shop.strict")
        assert (found.same, found.events) == (True, 1)
        async with make_app(record).running(broker=target):
            await until(lambda: sorted(record.numbers("flaky")) == [*range(50)])
            await DeadLetters(target).redrive(Filter())
            await until(lambda: sorted(record.numbers("strict")) == [*range(50)])
        assert sorted(record.numbers("all")) == [*range(50)], "nothing of it is handled again"
        for group in ("flaky", "strict"):
            for rest in range(5):
                numbers = [number for number in record.numbers(group) if number % 5 == rest]
                assert numbers == sorted(numbers), group
