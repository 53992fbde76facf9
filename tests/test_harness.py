"""The test harness itself: time, what it tells, and the faults it makes."""

import asyncio
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated

import pytest

from stentor import App, Context, Depends, Event, Firing, Group, Outgoing, Retry
from stentor.errors import DefinitionError
from stentor.testing import context, harness


class OrderPlaced(Event, topic="orders", key="order_id", type="com.shop.order.placed"):
    order_id: str
    amount: float = 1.0


class PaymentTaken(Event, topic="payments", key="order_id", type="com.shop.payment.taken"):
    order_id: str


class CardRefused(Exception):
    pass


def shop() -> App:
    app = App("shop")

    @app.on(OrderPlaced, retry=Retry(attempts=3, first="1m", factor=2), group="charge")
    async def charge(order: OrderPlaced) -> PaymentTaken:
        if order.amount < 0:
            raise CardRefused(order.order_id)
        return PaymentTaken(order_id=order.order_id)

    return app


async def test_a_handler_runs_and_its_events_are_seen_in_order() -> None:
    async with harness(shop()) as t:
        receipts = await t.publish([OrderPlaced(order_id=key) for key in "abc"])
        await t.settled()
        assert [receipt.topic for receipt in receipts] == ["orders"] * 3
        assert t.published(PaymentTaken) == [PaymentTaken(order_id=key) for key in "abc"]
        assert t.published(OrderPlaced) == [OrderPlaced(order_id=key) for key in "abc"]
        assert t.dead("charge") == []


async def test_time_stands_still_until_it_is_advanced() -> None:
    began = time.monotonic()
    async with harness(shop(), start=datetime(2026, 1, 1, tzinfo=UTC)) as t:
        await t.publish(OrderPlaced(order_id="a", amount=-1.0))
        await t.advance("59s")
        assert t.dead("charge") == []
        await t.advance("1s")  # the second attempt; the third comes 2 minutes after it
        await t.advance("119s")
        assert t.dead("charge") == []
        await t.advance("1s")
        [dead] = t.dead("charge")
        assert t.now == datetime(2026, 1, 1, 0, 3, tzinfo=UTC)
        assert dead.event == OrderPlaced(order_id="a", amount=-1.0)
        assert (dead.attempts, dead.reason) == (3, "attempts")
        assert [datetime.fromtimestamp(error.time, UTC).minute for error in dead.errors] == [0, 1, 3]
    assert time.monotonic() - began < 5


async def test_reprs_tell_what_failed() -> None:
    app = App("shop")

    @app.on(OrderPlaced, retry=Retry(attempts=2, first="1s"))
    async def charge(order: OrderPlaced) -> None:
        raise CardRefused("no funds")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("1s")
        assert t.attempts(charge) == 2
        assert [run.attempt for run in t.attempts(charge).runs] == [1, 2]
        assert repr(t.attempts(charge)).endswith("#2 OrderPlaced(order_id='a', amount=1.0): CardRefused: no funds)")
        assert "dead in shop.charge after 2 attempts (attempts): OrderPlaced(order_id='a'" in repr(t.dead(charge))
        assert "no funds" in repr(t)


async def test_a_failing_test_shows_the_harness() -> None:
    app = App("shop")

    @app.on(OrderPlaced, retry=Retry(attempts=1))
    async def charge(order: OrderPlaced) -> None:
        raise CardRefused("no funds")

    with pytest.raises(AssertionError) as failed:
        async with harness(app) as t:
            await t.publish(OrderPlaced(order_id="a"))
            await t.settled()
            assert t.attempts(charge) == 2
    assert "CardRefused: no funds" in "".join(failed.value.__notes__)


async def test_timers_fire_at_their_times_while_time_advances() -> None:
    app = App("shop")
    seen: list[tuple[str, datetime]] = []

    @app.every("1m")
    async def minute(firing: Firing) -> None:
        seen.append(("minute", firing.at))

    @app.on(OrderPlaced)
    async def order(placed: OrderPlaced) -> None:
        seen.append((placed.order_id, t.now))

    start = datetime(2026, 1, 1, tzinfo=UTC)
    async with harness(app, start=start) as t:
        await t.publish(OrderPlaced(order_id="late"), delay="90s")
        await t.publish(OrderPlaced(order_id="at"), at=start + timedelta(seconds=30))
        await t.advance("2m")
    at = [(name, (moment - start).total_seconds()) for name, moment in seen]
    assert at == [("at", 30), ("minute", 60), ("late", 90), ("minute", 120)]


async def test_dependencies_and_handlers_are_replaced_by_fakes() -> None:
    app = App("shop")
    seen: list[object] = []

    def rate() -> float:
        raise AssertionError("the real one was called")

    async def real(order: OrderPlaced) -> None:
        raise AssertionError("the real one was called")

    async def fake(order: OrderPlaced) -> None:
        seen.append(order.order_id)

    app.on(OrderPlaced)(real)

    @app.on(OrderPlaced)
    async def convert(order: OrderPlaced, rate: Annotated[float, Depends(rate)]) -> None:
        seen.append(order.amount * rate)

    async with harness(app, overrides={rate: lambda: 2.0, real: fake}) as t:
        await t.publish(OrderPlaced(order_id="a", amount=21.0))
        await t.settled()
        assert t.attempts(real) == 1
    assert sorted(seen, key=str) == [42.0, "a"]


async def test_several_apps_share_the_broker() -> None:
    shop_app, ledger = shop(), App("ledger")

    @ledger.on(PaymentTaken)
    async def book(payment: PaymentTaken) -> None: ...

    async with harness(shop_app, ledger) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert t.attempts(book) == 1


async def test_settled_waits_for_threads_and_for_real_sleeps() -> None:
    app = App("shop")
    seen: list[str] = []

    @app.on(OrderPlaced)
    def thread(order: OrderPlaced) -> None:
        threading.Event().wait(0.05)
        seen.append("thread")

    @app.on(OrderPlaced)
    async def sleeps(order: OrderPlaced) -> None:
        await asyncio.sleep(0.05)
        seen.append("sleep")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert sorted(seen) == ["sleep", "thread"]


async def test_settled_does_not_wait_for_what_nothing_can_wake() -> None:
    app = App("shop")
    go = asyncio.Event()

    @app.on(OrderPlaced)
    async def waits(order: OrderPlaced) -> None:
        await go.wait()

    async with harness(app, patience="60s") as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert t.attempts(waits) == 0
        go.set()
        await t.settled()
        assert t.attempts(waits) == 1


async def test_a_timeout_runs_in_virtual_time() -> None:
    app = App("shop")

    @app.on(OrderPlaced, timeout="30s", retry=Retry(attempts=1))
    async def hangs(order: OrderPlaced) -> None:
        await asyncio.Event().wait()

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("29s")
        assert t.dead(hangs) == []
        await t.advance("1s")
        assert [dead.errors[0].text for dead in t.dead(hangs)] == ["no end within 30 s"]


async def test_fail_makes_the_next_calls_raise() -> None:
    app = App("shop")
    seen: list[int] = []

    @app.on(OrderPlaced, retry=Retry(first="1s", factor=1))
    async def charge(order: OrderPlaced, ctx: Context) -> None:
        seen.append(ctx.attempt)

    async with harness(app) as t:
        t.fail(charge, CardRefused("no"), times=2)
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("2s")
        assert seen == [3]
        assert t.attempts(charge) == 3


@pytest.mark.parametrize("at", ["received", "started", "before_settle", "after_settle"])
async def test_a_crash_at_each_point_loses_nothing(at: str) -> None:
    app = App("shop")
    attempts: list[int] = []

    @app.on(OrderPlaced)
    async def charge(order: OrderPlaced, ctx: Context) -> PaymentTaken:
        attempts.append(ctx.attempt)
        return PaymentTaken(order_id=order.order_id)

    async with harness(app) as t:
        await t.crash(charge, at=at)  # type: ignore[arg-type]
        await t.publish([OrderPlaced(order_id="a"), OrderPlaced(order_id="a"), OrderPlaced(order_id="b")])
        await t.settled()
        ids = [message.id for message in t.messages if message.type == "com.shop.payment.taken"]
        assert sorted(payment.order_id for payment in t.published(PaymentTaken)) == ["a", "a", "b"]
        assert len(set(ids)) == 3
    assert set(attempts) == {1}  # the first crash of an event is free


async def test_a_crash_cuts_off_a_handler_that_runs() -> None:
    app = App("shop")
    attempts: list[int] = []
    ends = asyncio.Event()

    @app.on(OrderPlaced)
    async def slow(order: OrderPlaced, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        await ends.wait()

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        for _ in range(2):
            await t.crash(slow, at="started")
            await t.settled()
        ends.set()
        await t.settled()
    assert attempts == [1, 1, 2]


async def test_a_crash_that_never_happens_is_an_error() -> None:
    app = shop()
    with pytest.raises(AssertionError, match="never happened"):
        async with harness(app) as t:
            await t.crash("charge", at="started")
    with pytest.raises(DefinitionError, match="at must be one of received, started"):
        async with harness(app) as t:
            await t.crash("charge", at="never")  # type: ignore[arg-type]


async def test_a_duplicate_has_the_id_of_its_original() -> None:
    app = App("shop")
    ids: list[str] = []

    @app.on(OrderPlaced)
    async def charge(order: OrderPlaced, ctx: Context) -> PaymentTaken:
        ids.append(ctx.message.id)
        return PaymentTaken(order_id=order.order_id)

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.duplicate(OrderPlaced(order_id="a"))
        await t.duplicate(OrderPlaced(order_id="b"))
        await t.settled()
        assert len(ids) == 4
        assert len(set(ids)) == 2
        # The second handling publishes the same id, which the broker knows already.
        assert t.published(PaymentTaken) == [PaymentTaken(order_id="a"), PaymentTaken(order_id="b")]


async def test_apps_stop_and_start_again_on_the_same_broker() -> None:
    app = App("shop")
    seen: list[str] = []

    @app.on(OrderPlaced)
    async def charge(order: OrderPlaced) -> None:
        seen.append(order.order_id)

    async with harness(app) as t:
        await t.stop()
        await t.publish(OrderPlaced(order_id="while it was away"))
        await t.settled()
        assert seen == []
        await t.start()
        await t.settled()
        assert seen == ["while it was away"]


async def test_an_app_has_its_own_clock_again_afterwards() -> None:
    app = shop()
    async with harness(app, start=datetime(2020, 1, 1, tzinfo=UTC)) as t:
        await app.publish(OrderPlaced(order_id="a"))
        assert t.messages[-1].time == "2020-01-01T00:00:00.000000Z"
    async with app.running(url="memory://"):
        pass
    assert app.catalog.stamp() > "2026"


async def test_what_is_no_handler_is_refused() -> None:
    async with harness(shop()) as t:
        with pytest.raises(DefinitionError, match="is no handler and no group of these apps; they have charge"):
            t.attempts(print)
        with pytest.raises(DefinitionError, match="needs an app"):
            harness()


async def test_work_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["stentor.testing.harness"], "ENDLESS", 0.05)
    app = App("shop")

    @app.on(OrderPlaced)
    async def again(order: OrderPlaced) -> OrderPlaced:
        return order

    async with harness(app, patience="10ms") as t:
        await t.publish(OrderPlaced(order_id="a"))
        with pytest.raises(AssertionError, match="work goes on without end"):
            await t.settled()


async def test_a_handler_is_called_directly_with_a_context() -> None:
    async def charge(order: OrderPlaced, ctx: Context) -> None:
        await ctx.publish(PaymentTaken(order_id=order.order_id), delay="5s")
        await ctx.progress(0.5, "half", state=b"1")
        if ctx.attempt == 2:
            ctx.dead("enough")

    order = OrderPlaced(order_id="a")
    ctx = context(Outgoing(order, id="order-1"))
    await charge(order, ctx)
    assert ctx.published == [PaymentTaken(order_id="a")]
    assert (ctx.message.id, ctx.message.key, ctx.group) == ("order-1", "a", "test")
    assert ctx.progressed[0].state == ctx.state == b"1"
    with pytest.raises(BaseException, match="enough"):
        await charge(order, context(order, attempt=2))


def test_a_sync_handler_is_called_directly_with_a_context() -> None:
    def charge(order: OrderPlaced, ctx: Context) -> None:
        ctx.publish_sync(PaymentTaken(order_id=order.order_id))
        ctx.progress_sync(1.0)
        ctx.log.info("done")

    ctx = context(OrderPlaced(order_id="a"), state=b"left")
    charge(OrderPlaced(order_id="a"), ctx)
    assert ctx.published == [PaymentTaken(order_id="a")]
    assert ctx.progressed[0].done == 1.0
    assert not ctx.stopping.is_set()


async def test_groups_are_named_by_themselves_too() -> None:
    app, billing = App("shop"), Group("billing")

    @billing.on(OrderPlaced, retry=Retry(attempts=1))
    async def invoice(order: OrderPlaced) -> None:
        raise CardRefused("no")

    app.add(billing)
    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert len(t.dead(billing)) == len(t.dead("billing")) == len(t.dead(invoice)) == 1


@pytest.mark.parametrize(
    "start", [f"2026-03-01T12:00:{second:02}.{second * 17:06}+00:00" for second in range(0, 60, 3)]
)
async def test_retries_after_fractions_of_a_second_fall_due(start: str) -> None:
    """Waits of 0.2 s, then 0.4 s, end wherever the clock began: no rounding leaves a timer behind."""
    app = App("shop")

    @app.on(OrderPlaced, retry=Retry(attempts=4, first="200ms"))
    async def charge(order: OrderPlaced) -> None:
        raise ValueError("no")

    async with harness(app, start=datetime.fromisoformat(start)) as t:
        await t.publish(OrderPlaced(order_id="a", amount=1.0))
        await t.advance("2s")
        assert t.attempts(charge) == 4
        assert len(t.dead(charge)) == 1
