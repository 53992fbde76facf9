"""Priority between the groups of a process: what begins first when it has more to do than it can."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable
from typing import Any

import pytest

from stentor import App, Batch, Event, Group, priority
from stentor.errors import DefinitionError
from stentor.testing import harness


class Payment(Event, topic="payments", key=None, type="test.priority.payment"):
    n: int


class Letter(Event, topic="letters", key=None, type="test.priority.letter"):
    n: int


def compute() -> None:
    """Keep the interpreter for some milliseconds."""
    for _ in range(100_000):
        pass


def handler(kind: str, begun: Callable[[str], None], name: str) -> Callable[[Any], Any]:
    """A handler that keeps the process: without ever giving the event loop back, in two steps, or in a thread."""

    async def whole(event: Any) -> None:
        begun(name)
        time.sleep(0.001)  # noqa: ASYNC251 - it stands for a computation

    async def steps(event: Any) -> None:
        begun(name)
        for _ in range(2):
            time.sleep(0.01)  # noqa: ASYNC251
            await asyncio.sleep(0)

    def thread(event: Any) -> None:
        begun(name)
        compute()

    async def batch(events: Any) -> None:
        for _ in events:
            begun(name)
        time.sleep(0.001)  # noqa: ASYNC251

    return {"whole": whole, "steps": steps, "thread": thread, "batch": batch}[kind]


async def beginnings(kind: str, high: int, count: int, concurrency: int) -> list[str]:
    """The order in which as many payments as letters begin, all of them waiting from the start."""
    order: list[str] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def begun(name: str) -> None:
        order.append(name)
        if len(order) == 2 * count:
            loop.call_soon_threadsafe(done.set)

    app = App("shop", broker="memory://")
    batch = Batch(size=2) if kind == "batch" else None
    for name, event, rank in (("letter", Letter, 0), ("payment", Payment, high)):
        group = Group(name, concurrency=concurrency, priority=rank)
        on: Any = group.on
        function = handler(kind, begun, name)
        if batch is not None:
            function.__annotations__ = {"events": types.GenericAlias(list, (event,))}
        on(event, batch=batch)(function)
        app.add(group)
    async with app, asyncio.timeout(60):
        await app.publish([event(n=n) for n in range(count) for event in (Letter, Payment)])
        await done.wait()
    assert order.count("letter") == order.count("payment") == count
    return order


def letters_before_the_last_payment(order: list[str]) -> int:
    last = len(order) - 1 - order[::-1].index("payment")
    return order[:last].count("letter")


@pytest.mark.parametrize(
    ("kind", "count", "concurrency"), [("whole", 300, 64), ("batch", 300, 64), ("steps", 30, 4), ("thread", 200, 4)]
)
async def test_under_overload_the_important_group_begins_first_and_the_other_goes_on(
    kind: str, count: int, concurrency: int
) -> None:
    letters = letters_before_the_last_payment(await beginnings(kind, 1, count, concurrency))
    assert 0 < letters < count / 2
    letters = letters_before_the_last_payment(await beginnings(kind, 0, count, concurrency))
    assert letters > count / 2


async def test_a_higher_group_at_its_own_limit_holds_back_nobody_in_a_process_that_has_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(priority, "LATE", 3600.0)  # whatever else this machine has to do
    app = App("shop", broker="memory://")
    paying: list[int] = []
    writing: list[int] = []
    end, all_begun = asyncio.Event(), asyncio.Event()

    @app.on(Payment, group=Group("payments", concurrency=2, priority=1))
    async def pay(payment: Payment) -> None:
        paying.append(payment.n)
        await end.wait()

    @app.on(Letter, group=Group("letters", concurrency=8))
    async def write(letter: Letter) -> None:
        writing.append(letter.n)
        if len(writing) == 8:
            all_begun.set()
        await end.wait()

    async with app, asyncio.timeout(60):
        await app.publish([Payment(n=n) for n in range(100)])
        while len(paying) < 2:
            await asyncio.sleep(0)
        await app.publish([Letter(n=n) for n in range(8)])
        await all_begun.wait()  # all at once, as nothing ends
        assert len(paying) == 2
        end.set()


async def test_what_a_rate_holds_back_waits_for_no_process() -> None:
    app = App("shop")
    seen: list[Event] = []

    @app.on(Payment, group=Group("payments", rate="1/h", priority=1))
    async def pay(payment: Payment) -> None:
        seen.append(payment)

    @app.on(Letter, group=Group("letters", priority=-1))
    async def write(letter: Letter) -> None:
        seen.append(letter)

    async with harness(app) as t:
        await t.publish([event(n=n) for n in range(100) for event in (Letter, Payment)])
        await t.settled()
        assert [type(event) for event in seen].count(Letter) == 100
        assert [type(event) for event in seen].count(Payment) == 1


async def test_nobody_looks_where_all_are_equal() -> None:
    app = App("shop", broker="memory://")
    for name in ("one", "two"):

        @app.on(Payment, group=Group(name, priority=3))
        async def pay(payment: Payment) -> None: ...

    async with app:
        assert app.program is not None
        assert [worker.turn for worker in app.program.workers] == [None, None]


@pytest.mark.parametrize("wrong", ["high", 1.5, True, None])
def test_a_priority_is_a_whole_number(wrong: Any) -> None:
    with pytest.raises(DefinitionError, match="priority must be a whole number"):
        Group("payments", priority=wrong)
