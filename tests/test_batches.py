"""Batch handlers: what a batch holds, and whose fault an error is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Annotated

import pytest

from stentor import App, Batch, BatchFailed, Context, Depends, Outgoing, Retry
from stentor.errors import DefinitionError
from stentor.testing import harness
from tests.orders import OrderPlaced, PaymentTaken

ONCE = Retry(attempts=1)
FAST = Retry(attempts=3, first="1s", factor=1)


async def test_a_batch_takes_many_keys_and_one_event_of_each() -> None:
    app = App("shop")
    batches: list[list[str]] = []

    @app.on(OrderPlaced, batch=Batch(size=3, wait="1s"))
    async def many(orders: list[OrderPlaced], ctx: Context) -> PaymentTaken:
        batches.append([order.order_id for order in orders])
        return PaymentTaken(order_id=str(len(orders)))

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id=key) for key in "abcda"])
        await t.settled()
        assert batches == [["a", "b", "c"]]
        await t.advance("1s")
        assert sorted(batches[1]) == ["a", "d"]
        assert t.published(PaymentTaken) == [PaymentTaken(order_id="3"), PaymentTaken(order_id="2")]


async def test_a_batch_sees_the_messages_of_its_events() -> None:
    app = App("shop")
    seen: list[tuple[str, str | None, object]] = []

    @app.on(OrderPlaced, batch=Batch(size=3))
    async def many(orders: list[OrderPlaced], ctx: Context) -> None:
        for order, message in zip(orders, ctx.messages, strict=True):
            seen.append((order.order_id, message.key, message.extensions["tenant"]))
            message.extensions["tenant"] = "changed"

    @app.on(OrderPlaced)
    async def one(order: OrderPlaced, ctx: Context) -> None:
        assert [message.id for message in ctx.messages] == [ctx.message.id]
        assert ctx.message.extensions["tenant"] == order.order_id.upper()

    async with harness(app) as t:
        await t.publish([Outgoing(OrderPlaced(order_id=key), headers={"tenant": key.upper()}) for key in "abc"])
        await t.settled()
        assert sorted(seen) == [("a", "a", "A"), ("b", "b", "B"), ("c", "c", "C")]
        assert not t.dead(one)


async def test_batch_failed_fails_those_it_names() -> None:
    app = App("shop")
    calls: list[list[str]] = []

    @app.on(OrderPlaced, batch=Batch(size=10), retry=FAST)
    async def many(orders: list[OrderPlaced]) -> None:
        names = [order.order_id for order in orders]
        calls.append(names)
        if "b" in names:
            raise BatchFailed({names.index("b"): ValueError("b is bad")})

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id=key) for key in "abc"])
        await t.advance("1m")
        assert calls == [["a", "b", "c"], ["b"], ["b"]]
        [letter] = t.dead(many)
        assert (letter.event.order_id, letter.attempts) == ("b", 3)
        assert {error.text for error in letter.errors} == {"b is bad"}


async def test_another_error_runs_the_members_one_by_one_at_no_attempt_for_the_others() -> None:
    app = App("shop")
    calls: list[tuple[str, int]] = []

    @app.on(OrderPlaced, batch=Batch(size=10), retry=FAST)
    async def many(orders: list[OrderPlaced], ctx: Context) -> None:
        calls.append(("".join(order.order_id for order in orders), ctx.attempt))
        if any(order.order_id == "b" for order in orders):
            raise ValueError("b is bad")

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id=key) for key in "abc"])
        await t.settled()
        assert calls == [("abc", 1), ("a", 1), ("b", 1), ("c", 1)]
        await t.advance("1m")
        assert calls[4:] == [("b", 2), ("b", 3)]
        assert len(t.dead(many)) == 1


async def test_batch_failed_with_a_wrong_index_fails_all() -> None:
    app = App("shop")

    @app.on(OrderPlaced, batch=Batch(size=10), retry=ONCE)
    async def many(orders: list[OrderPlaced]) -> None:
        raise BatchFailed({7: ValueError("no such member")})

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id=key) for key in "ab"])
        await t.settled()
        assert {letter.errors[0].text for letter in t.dead(many)} == {"BatchFailed names [7], not in the batch"}
        assert len(t.dead(many)) == 2


async def test_a_batch_opens_its_dependencies_once() -> None:
    opened: list[int] = []

    def session() -> Iterator[int]:
        opened.append(1)
        yield 1

    app = App("shop")

    @app.on(OrderPlaced, batch=Batch(size=10))
    def many(orders: list[OrderPlaced], s: Annotated[int, Depends(session)]) -> None: ...

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id=key) for key in "abcde"])
        await t.settled()
        assert opened == [1]


async def test_a_batch_handler_takes_a_list() -> None:
    async def one(order: OrderPlaced) -> None: ...

    app = App("shop")
    app.on(OrderPlaced, batch=Batch())(one)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="of a batch handler must be a list, not OrderPlaced"):
        async with harness(app):
            pass


async def turns(until: Callable[[], bool] = lambda: True) -> None:
    """Let the event loop go on until something holds, and as long as anything more could follow."""
    async with asyncio.timeout(60):
        while not until():
            await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)


async def test_what_comes_while_a_batch_runs_is_gathered_and_a_full_one_runs_beside() -> None:
    app = App("shop")
    batches: list[str] = []
    ends: list[asyncio.Event] = []

    @app.on(OrderPlaced, batch=Batch(size=3))
    async def many(orders: list[OrderPlaced]) -> None:
        batches.append("".join(order.order_id for order in orders))
        ends.append(asyncio.Event())
        await ends[-1].wait()

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await turns(lambda: len(batches) == 1)  # nothing waits for a timer
        await t.publish([OrderPlaced(order_id=key) for key in "bc"])
        await turns()
        assert batches == ["a"]
        await t.publish([OrderPlaced(order_id=key) for key in "def"])
        await turns(lambda: len(batches) == 2)
        assert (batches[0], len(batches[1])) == ("a", 3)  # full: there is no use in waiting for the first to end
        ends[1].set()
        await turns()
        assert len(batches) == 2  # the first still runs
        ends[0].set()
        await turns(lambda: len(batches) == 3)
        ends[2].set()
        await t.settled()
        assert sorted("".join(batches)) == list("abcdef")
        assert [len(batch) for batch in batches] == [1, 3, 2]


async def test_a_batch_whose_wait_is_over_begins_when_the_one_before_ends() -> None:
    app = App("shop")
    batches: list[str] = []
    end = asyncio.Event()

    @app.on(OrderPlaced, batch=Batch(size=10, wait="1s"))
    async def many(orders: list[OrderPlaced]) -> None:
        batches.append("".join(order.order_id for order in orders))
        if len(batches) == 1:
            await end.wait()

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id=key) for key in "abcdefghij"])
        await turns(lambda: len(batches) == 1)
        await t.publish([OrderPlaced(order_id=key) for key in "kl"])
        await turns()
        t.clock.move(t.clock.now() + 1.0)
        await turns()
        assert len(batches) == 1
        end.set()
        await t.settled()
        assert ["".join(sorted(batch)) for batch in batches] == ["abcdefghij", "kl"]
