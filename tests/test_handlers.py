"""What a handler is and does: what is refused, its ends, filters, threads, state."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import pytest

from stentor import App, Context, Depends, Event, Firing, Group, Outgoing, Retry
from stentor.errors import DefinitionError, DuplicateType
from stentor.testing import harness
from tests.orders import OrderCancelled, OrderPlaced, PaymentTaken

ONCE = Retry(attempts=1)
FAST = Retry(attempts=3, first="1s", factor=1)


# ---- what is refused ------------------------------------------------------------------------------------------------


async def nothing() -> None: ...
async def no_annotation(order) -> None: ...  # type: ignore[no-untyped-def]
async def wrong_annotation(order: OrderCancelled) -> None: ...
async def text_annotation(order: str) -> None: ...
async def half_annotation(order: OrderPlaced | None) -> None: ...
async def keyword_only(*, order: OrderPlaced) -> None: ...
async def uninjectable(order: OrderPlaced, session: int) -> None: ...
async def returns_text(order: OrderPlaced) -> str:
    return ""


async def returns_list(order: OrderPlaced) -> list[int]:
    return []


async def returns_class(order: OrderPlaced) -> type[OrderPlaced]:
    return OrderPlaced


def number(x: int) -> int:
    return x


async def bad_dependency(order: OrderPlaced, n: Annotated[int, Depends(number)]) -> None: ...


def per_delivery(ctx: Context) -> int:
    return 1


async def bad_scope(order: OrderPlaced, n: Annotated[int, Depends(per_delivery, scope="app")]) -> None: ...


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (nothing, "handler nothing .*it takes no parameter; its first parameter is the event"),
        (no_annotation, r"parameter 'order' has no annotation; write order: OrderPlaced"),
        (wrong_annotation, "is annotated OrderCancelled, but the handler is registered for OrderPlaced"),
        (text_annotation, "is annotated str, but the handler is registered for OrderPlaced"),
        (keyword_only, "its first parameter is the event and cannot be keyword-only"),
        (uninjectable, "parameter 'session' cannot be injected; annotate it as Context, Message"),
        (returns_text, "it returns str, which is no event"),
        (returns_list, "it returns int, which is no event"),
        (returns_class, "which is no event"),
        (bad_dependency, r"Depends\(number\): parameter 'x' cannot be injected"),
        (bad_scope, r"Depends\(per_delivery\): with scope='app' it can depend only on others of that scope"),
    ],
)
async def test_a_handler_that_cannot_be_served_is_refused_at_start(function: Any, complaint: str) -> None:
    app = App("shop")
    app.on(OrderPlaced)(function)
    with pytest.raises(DefinitionError, match=complaint):
        async with harness(app):
            pass


async def test_a_refused_start_leaves_nothing_behind() -> None:
    app = App("shop")
    app.on(OrderPlaced)(text_annotation)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError):
        async with harness(app) as t:
            pass
    t = harness(App("other"))
    app = App("shop")
    app.on(OrderPlaced)(text_annotation)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError):
        async with app.running(broker=t.broker):
            pass
    assert await t.broker.admin.groups() == []


@pytest.mark.parametrize(
    ("register", "complaint"),
    [
        (lambda app: app.on()(returns_text), r"on\(\) needs event types or topic="),
        (lambda app: app.on(OrderPlaced, topic="x")(returns_text), r"on\(\) takes event types or topic=, not both"),
        (lambda app: app.on(int)(returns_text), "int is no event; derive it from Event or use @event"),
        (lambda app: app.on("OrderPlaced")(returns_text), "'OrderPlaced' is no event"),
        (lambda app: app.on(Event)(returns_text), "Event is no event; it has no topic="),
        (lambda app: app.on(OrderPlaced, timeout="0s")(returns_text), "timeout must be above zero"),
        (lambda app: app.on(OrderPlaced, timeout="soon")(returns_text), "returns_text: timeout: 'soon' is no duration"),
        (lambda app: app.on(OrderPlaced, retry=3)(returns_text), "retry must be a Retry, not 3"),
        (lambda app: app.on(OrderPlaced, batch=3)(returns_text), "batch must be a Batch, not 3"),
        (lambda app: app.on(OrderPlaced, where=3)(returns_text), "where must be a predicate or a CloudEvents SQL text"),
        (
            lambda app: app.on(OrderPlaced, where="type = ")(returns_text),
            "where: invalid CloudEvents SQL: expected a value",
        ),
        (lambda app: app.on(topic="a b")(returns_text), "topic 'a b': use 1 to 200 letters"),
        (lambda app: app.on(OrderPlaced)(5), "a handler must be a function, not 5"),
    ],
)
def test_a_wrong_registration_is_refused_where_it_stands(register: Callable[[Any], Any], complaint: str) -> None:
    with pytest.raises(DefinitionError, match=complaint):
        register(App("shop"))


def test_two_handlers_of_one_type_in_one_group_are_refused() -> None:
    group = Group("billing")

    @group.on(OrderPlaced)
    async def one(order: OrderPlaced) -> None: ...

    with pytest.raises(
        DuplicateType, match=r"group billing: one \(.*\) and two \(.*\) both handle 'com.shop.order.placed'"
    ):

        @group.on(OrderCancelled, OrderPlaced)
        async def two(order: OrderCancelled | OrderPlaced) -> None: ...


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "a b"}, "group 'a b': use 1 to 200"),
        ({"ordering": "fifo"}, 'ordering must be "key" or "none"'),
        ({"concurrency": 0}, "concurrency must be a whole number from 1"),
        ({"concurrency": True}, "concurrency must be"),
        ({"start": "now"}, 'start must be "earliest" or "latest"'),
        ({"on_dead": "stop"}, 'on_dead must be "continue" or "park"'),
        ({"on_dead": "park", "ordering": "none"}, 'on_dead="park" needs ordering="key"'),
        ({"on_dead": "park", "broadcast": True}, 'on_dead="park" needs ordering="key" and no broadcast'),
        ({"broadcast": True, "single": True}, "broadcast and single exclude each other"),
    ],
)
def test_wrong_group_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DefinitionError, match=complaint):
        Group(**settings)


# ---- ends -----------------------------------------------------------------------------------------------------------


async def test_what_a_handler_returns_is_published_with_the_ack() -> None:
    app = App("shop")

    @app.on(OrderPlaced)
    async def one(order: OrderPlaced) -> PaymentTaken | None:
        return PaymentTaken(order_id="one") if order.amount else None

    @app.on(OrderPlaced)
    async def many(order: OrderPlaced) -> list[PaymentTaken]:
        return [PaymentTaken(order_id="list")] * 2

    @app.on(OrderPlaced)
    async def pair(order: OrderPlaced) -> tuple[PaymentTaken, OrderCancelled]:
        return PaymentTaken(order_id="tuple"), OrderCancelled(order_id="tuple")

    @app.on(OrderPlaced)
    async def generator(order: OrderPlaced) -> AsyncIterator[PaymentTaken]:
        for name in ("generator 1", "generator 2"):
            yield PaymentTaken(order_id=name)
            await asyncio.sleep(0)

    @app.on(OrderPlaced)
    async def options(order: OrderPlaced) -> Outgoing:
        return Outgoing(PaymentTaken(order_id="outgoing"), delay="1m")

    @app.on(OrderPlaced)
    def thread(order: OrderPlaced) -> PaymentTaken:
        return PaymentTaken(order_id="thread")

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id="a"), OrderPlaced(order_id="b", amount=0.0)])
        await t.advance("59s")
        names = [payment.order_id for payment in t.published(PaymentTaken)]
        assert sorted(names) == sorted(
            ["one", *["list"] * 4, *["tuple"] * 2, *["generator 1", "generator 2"] * 2, "thread", "thread"]
        )
        assert t.published(OrderCancelled) == [OrderCancelled(order_id="tuple")] * 2
        await t.advance("1s")
        assert len(t.published(PaymentTaken)) == len(names) + 2


async def test_what_a_failing_handler_published_is_dropped() -> None:
    app = App("shop")

    @app.on(OrderPlaced, retry=FAST)
    async def charge(order: OrderPlaced, ctx: Context) -> AsyncIterator[PaymentTaken]:
        await ctx.publish(PaymentTaken(order_id=f"context {ctx.attempt}"))
        yield PaymentTaken(order_id=f"yield {ctx.attempt}")
        if ctx.attempt == 1:
            raise ValueError("no")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("1s")
        assert t.published(PaymentTaken) == [PaymentTaken(order_id="context 2"), PaymentTaken(order_id="yield 2")]


async def test_what_is_no_event_fails_the_handler_that_returned_it() -> None:
    app = App("shop")

    @app.on(OrderPlaced, retry=ONCE)
    async def wrong(order: OrderPlaced) -> Any:
        return "text"

    @app.on(OrderPlaced, retry=ONCE)
    async def invalid(order: OrderPlaced) -> PaymentTaken:
        return PaymentTaken(order_id=5)  # type: ignore[arg-type]

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert "str is no event" in t.dead(wrong)[0].errors[0].text
        assert "Expected `str`, got `int`" in t.dead(invalid)[0].errors[0].text


async def test_outputs_carry_ids_that_follow_from_the_input() -> None:
    app = App("shop")

    @app.on(OrderPlaced)
    async def charge(order: OrderPlaced, ctx: Context) -> list[Event]:
        await ctx.publish(PaymentTaken(order_id="first"))
        return [PaymentTaken(order_id="second"), OrderCancelled(order_id="third")]

    async with harness(app) as t:
        await t.crash(charge, at="before_settle")
        await t.publish(Outgoing(OrderPlaced(order_id="a"), headers={"correlationid": "story-1"}))
        await t.settled()
        assert t.attempts(charge) == 2
        order, *outputs = t.messages
        assert len({message.id for message in outputs}) == 3
        for message in outputs:
            assert message.extensions["causationid"] == order.id
            assert message.extensions["correlationid"] == "story-1"
            assert str(message.extensions["traceparent"]).startswith("00-")
        await t.duplicate(OrderPlaced(order_id="a"))
        await t.settled()
        assert t.attempts(charge) == 3
        assert len([m for m in t.messages if m.topic == "payments"]) == 2  # the same ids again: kept once


async def test_ctx_retry_and_ctx_dead_are_not_swallowed() -> None:
    app = App("shop")
    seen: list[int] = []

    @app.on(OrderPlaced, retry=Retry(attempts=3, first="1h"))
    async def handle(order: OrderPlaced, ctx: Context) -> None:
        seen.append(ctx.attempt)
        try:
            if len(seen) == 1:
                ctx.retry(after="5s")
            if len(seen) == 2:
                ctx.retry(after="5s", count=False)
            ctx.dead("the customer is gone")
        except Exception:
            raise AssertionError("swallowed") from None

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("4s")
        assert seen == [1]
        await t.advance("1s")
        assert seen == [1, 2]
        await t.advance("5s")
        assert seen == [1, 2, 2]
        assert [(letter.reason, letter.attempts) for letter in t.dead(handle)] == [("the customer is gone", 2)]


async def test_ctx_retry_ends_with_the_attempts_unless_it_does_not_count() -> None:
    app = App("shop")
    calls = {"counts": 0, "free": 0}

    @app.on(OrderPlaced, retry=FAST)
    async def counts(order: OrderPlaced, ctx: Context) -> None:
        calls["counts"] += 1
        ctx.retry()

    @app.on(OrderPlaced, retry=FAST)
    def free(order: OrderPlaced, ctx: Context) -> None:
        calls["free"] += 1
        ctx.retry(after="1s", count=False)

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("10s")
        assert calls["counts"] == 3
        assert len(t.dead(counts)) == 1
        assert calls["free"] == 11
        assert t.dead(free) == []


async def test_never_errors_are_dead_at_once() -> None:
    class Refused(Exception):
        pass

    app = App("shop")

    @app.on(OrderPlaced, retry=Retry(never=(Refused,)))
    async def charge(order: OrderPlaced) -> None:
        raise Refused("card")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        [letter] = t.dead(charge)
        assert (letter.reason, letter.attempts, letter.errors[0].text) == ("never", 1, "card")
        assert letter.errors[0].type.endswith("Refused")
        assert "in charge" in letter.errors[0].traceback


async def test_a_timeout_is_an_attempt() -> None:
    app = App("shop")
    seen: list[int] = []

    @app.on(OrderPlaced, timeout="30s", retry=FAST)
    async def slow(order: OrderPlaced, ctx: Context) -> None:
        seen.append(ctx.attempt)
        if ctx.attempt < 3:
            await asyncio.Event().wait()

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("2m")
        assert seen == [1, 2, 3]
        assert t.dead(slow) == []


async def test_a_handlers_own_timeout_keeps_its_text() -> None:
    app = App("shop")

    @app.on(OrderPlaced, timeout="30s", retry=ONCE)
    async def own(order: OrderPlaced) -> None:
        raise TimeoutError("the bank did not answer")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert t.dead(own)[0].errors[0].text == "the bank did not answer"


# ---- threads --------------------------------------------------------------------------------------------------------


async def test_sync_handlers_run_in_threads_and_may_publish() -> None:
    app = App("shop")
    threads: set[int] = set()

    @app.on(OrderPlaced)
    def charge(order: OrderPlaced, ctx: Context) -> PaymentTaken:
        threads.add(threading.get_ident())
        ctx.publish_sync(PaymentTaken(order_id="with the ack"))
        ctx.progress_sync(0.5, "half")
        receipt = app.publish_sync(PaymentTaken(order_id="at once"))
        assert receipt.topic == "payments"
        return PaymentTaken(order_id="returned")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert t.published(PaymentTaken) == [
            PaymentTaken(order_id=name) for name in ("at once", "with the ack", "returned")
        ]
        order, *payments = t.messages
        assert {message.extensions["causationid"] for message in payments} == {order.id}
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("concurrency", [20, "auto"])
async def test_as_many_sync_handlers_run_at_once_as_the_group_allows(concurrency: Any) -> None:
    """The event loop's own threads are fewer: four more than cores."""
    app = App("shop", broker="memory://")
    together = threading.Barrier(20)
    met = asyncio.Event()
    loop = asyncio.get_running_loop()

    @app.on(OrderPlaced, group=Group("shop.charge", concurrency=concurrency), retry=Retry(attempts=1))
    def charge(order: OrderPlaced) -> None:
        if concurrency == 20:
            together.wait(20)
        if order.order_id == "39":
            loop.call_soon_threadsafe(met.set)

    async with app, asyncio.timeout(60):
        await app.publish([OrderPlaced(order_id=str(n)) for n in range(40)])
        await met.wait()
    assert not together.broken


async def test_a_sync_handler_past_its_timeout_keeps_its_key_until_it_returns() -> None:
    app = App("shop")
    go = threading.Event()
    seen: list[str] = []

    @app.on(OrderPlaced, timeout="30s", retry=FAST)
    def slow(order: OrderPlaced, ctx: Context) -> None:
        seen.append(f"begin {order.amount:g}.{ctx.attempt}")
        if ctx.attempt == 1 and order.amount == 1:
            go.wait(60)
            seen.append(f"cancelled {ctx.cancelled}")

    async with harness(app, patience="50ms") as t:
        await t.publish([OrderPlaced(order_id="k"), OrderPlaced(order_id="k", amount=2.0)])
        await t.advance("1m")
        assert seen == ["begin 1.1"]
        go.set()
        await t.settled()
        await t.advance("1s")
        assert seen == ["begin 1.1", "cancelled True", "begin 1.2", "begin 2.1"]


# ---- filters --------------------------------------------------------------------------------------------------------


async def test_where_filters_by_a_predicate_or_by_sql() -> None:
    app = App("shop")
    seen: list[str] = []

    @app.on(OrderPlaced, where=lambda order: order.amount > 1)
    async def predicate(order: OrderPlaced) -> None:
        seen.append(f"predicate {order.order_id}")

    @app.on(OrderPlaced, OrderCancelled, where="tenant = 'a' AND type LIKE '%.placed' AND partitionkey != 'z'")
    async def sql(order: OrderPlaced | OrderCancelled) -> None:
        seen.append(f"sql {order.order_id}")

    @app.on(OrderPlaced, where=lambda order: 1 / order.amount > 0, retry=ONCE)
    async def raises(order: OrderPlaced) -> None:
        seen.append(f"raises {order.order_id}")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="x", amount=2.0))
        await t.publish(OrderPlaced(order_id="y"), headers={"tenant": "a"})
        await t.publish(OrderPlaced(order_id="z"), headers={"tenant": "a"})
        await t.publish(OrderCancelled(order_id="y"), headers={"tenant": "a"})
        await t.publish(OrderPlaced(order_id="0", amount=0.0))
        await t.settled()
        assert sorted(seen) == ["predicate x", "raises x", "raises y", "raises z", "sql y"]
        assert [letter.errors[0].type for letter in t.dead(raises)] == ["ZeroDivisionError"]
        assert t.dead(predicate) == t.dead(sql) == []


# ---- state and stopping ---------------------------------------------------------------------------------------------


async def test_progress_survives_a_crash_and_a_retry() -> None:
    app = App("shop")
    states: list[tuple[int, bytes | None]] = []

    @app.on(OrderPlaced, retry=FAST)
    async def job(order: OrderPlaced, ctx: Context) -> None:
        states.append((ctx.attempt, ctx.state))
        await ctx.progress(0.4, "step", state=b"%d" % len(states))
        if len(states) == 1:
            raise ValueError("again")
        if len(states) == 2:
            await asyncio.Event().wait()

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("1s")
        await t.crash(job, at="started")
        await t.settled()
        assert states == [(1, None), (2, b"1"), (3, b"2")]
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert states[3:] == [(1, None)]


async def test_progress_is_a_number_from_0_to_1() -> None:
    app = App("shop")

    @app.on(OrderPlaced, retry=ONCE)
    async def job(order: OrderPlaced, ctx: Context) -> None:
        await ctx.progress(40)

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert t.dead(job)[0].errors[0].text == "progress is a number from 0 to 1, not 40"


async def test_a_long_handler_leaves_at_a_stop_and_goes_on_after_it() -> None:
    app = App("shop")
    states: list[tuple[int, bytes | None]] = []

    @app.on(OrderPlaced)
    async def job(order: OrderPlaced, ctx: Context) -> None:
        states.append((ctx.attempt, ctx.state))
        await ctx.progress(0.5, state=b"half")
        if ctx.state != b"half" or len(states) == 1:
            await ctx.stopping.wait()
            ctx.retry(count=False, after="0s")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        await t.stop()
        await t.start()
        await t.settled()
    assert states == [(1, None), (1, b"half")]


async def test_a_handler_cannot_change_the_event_of_another() -> None:
    class Basket(Event, topic="baskets"):
        items: list[str]

    app = App("shop")
    seen: list[list[str]] = []

    @app.on(Basket)
    async def one(basket: Basket) -> None:
        seen.append(list(basket.items))
        basket.items.append("changed")

    @app.on(Basket)
    async def two(basket: Basket) -> None:
        seen.append(list(basket.items))
        basket.items.append("changed")

    async with harness(app) as t:
        await t.publish(Basket(items=["a"]))
        await t.settled()
    assert seen == [["a"], ["a"]]


async def test_the_frames_above_a_handler_are_few() -> None:
    import traceback

    frames: list[str] = []
    app = App("shop", broker="memory://")
    done = asyncio.Event()

    @app.on(OrderPlaced)
    async def handle(order: OrderPlaced, ctx: Context) -> None:
        frames.extend(frame.name for frame in traceback.extract_stack() if "/stentor/" in frame.filename)
        done.set()

    async with app:
        await app.publish(OrderPlaced(order_id="a"))
        await asyncio.wait_for(done.wait(), 60)
    assert len(frames) <= 3, frames


async def test_a_firing_takes_no_parameters_or_a_firing() -> None:
    app = App("shop")
    seen: list[str] = []

    @app.every("1m")
    async def bare() -> None:
        seen.append("bare")

    @app.every("1m")
    async def full(firing: Firing, ctx: Context) -> None:
        seen.append(f"full {firing.missed} {ctx.group}")

    @app.every("1m")
    def thread(ctx: Context) -> None:
        seen.append(f"thread {ctx.attempt}")

    async with harness(app) as t:
        await t.advance("1m")
    assert sorted(seen) == ["bare", "full 0 shop.full", "thread 1"]
