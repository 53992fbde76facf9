"""The app: groups and their names, renaming, what it publishes and from where, its broker."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stentor import App, Context, Group, Message, Named, Outgoing, Receipt, Retry
from stentor.brokers.memory import MemoryBroker
from stentor.clock import SystemClock
from stentor.connect import BrokerUrl, connect
from stentor.errors import (
    ConfigError,
    DefinitionError,
    GroupsChanged,
    InvalidEvent,
    NotConnected,
    UnknownTopic,
)
from stentor.testing import harness
from tests.orders import OrderCancelled, OrderPlaced, PaymentTaken

SOURCE = Path(__file__).parents[1] / "src"


def memory() -> MemoryBroker:
    return MemoryBroker(BrokerUrl("memory://"), SystemClock())


async def handle(order: OrderPlaced) -> None: ...
async def cancel(order: OrderCancelled) -> None: ...


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_groups_are_named_by_app_and_function_or_by_themselves() -> None:
    app = App("shop")
    app.on(OrderPlaced)(handle)
    app.on(OrderCancelled, group="joined")(cancel)
    app.on(OrderPlaced, group="joined")(handle)
    billing = Group("billing")
    billing.on(OrderPlaced)(handle)
    app.add(billing)
    nameless = Group()
    nameless.on(OrderCancelled)(cancel)
    app.add(nameless)
    assert list(app.groups()) == ["shop.handle", "joined", "billing", "shop.cancel"]
    assert [handler.name for handler in app.groups()["joined"].handlers] == ["cancel", "handle"]


def test_two_groups_of_one_name_are_refused_at_the_second() -> None:
    app = App("shop")
    app.on(OrderPlaced)(handle)
    with pytest.raises(
        DefinitionError, match=r"two groups are called 'shop.handle'; give one of them group=Group\('handle2'\)"
    ):
        app.on(OrderCancelled)(handle)  # type: ignore[arg-type]


async def test_a_group_without_a_handler_is_refused_at_start() -> None:
    app, later = App("shop"), Group("later")
    app.add(later)
    later.on(OrderPlaced)(handle)
    async with harness(app):
        pass
    app.add(Group("empty"))
    with pytest.raises(DefinitionError, match="group empty has no handler"):
        async with harness(app):
            pass
    with pytest.raises(DefinitionError, match="a group without a name takes that of its first handler"):
        app.add(Group())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": ""}, "app '': use 1 to 200 letters"),
        ({"name": "my shop"}, "app 'my shop'"),
        ({"name": "shop", "durable": "forever"}, 'durable must be "process", "host" or "replica", not'),
    ],
)
def test_wrong_app_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DefinitionError, match=complaint):
        App(**settings)


async def test_handlers_of_one_group_keep_the_order_across_their_types() -> None:
    app, log = App("shop"), []

    @app.on(OrderPlaced, group="ledger", retry=Retry(first="1s"))
    async def placed(order: OrderPlaced, ctx: Context) -> None:
        if ctx.attempt == 1:
            raise ValueError("not yet")
        log.append(f"placed {order.order_id}")

    @app.on(OrderCancelled, group="ledger")
    async def cancelled(order: OrderCancelled) -> None:
        log.append(f"cancelled {order.order_id}")

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id="a"), OrderCancelled(order_id="a"), OrderCancelled(order_id="b")])
        await t.settled()
        assert log == ["cancelled b"]
        await t.advance("2s")
        assert log == ["cancelled b", "placed a", "cancelled a"]


async def test_a_type_that_no_handler_asked_for_is_skipped() -> None:
    app = App("shop")
    app.on(OrderPlaced)(handle)
    async with harness(app) as t:
        await t.publish([OrderCancelled(order_id="a"), OrderPlaced(order_id="a")])
        await t.settled()
        assert t.attempts(handle) == 1
        assert t.dead(handle) == []
        assert [lag.events for lag in await t.broker.admin.lag()] == [0]


async def test_a_whole_topic_handler_sees_every_message() -> None:
    app, seen = App("shop"), []

    @app.on(topic="orders")
    async def everything(message: Message) -> None:
        seen.append((message.type, message.key))

    @app.on(topic="orders", where="type LIKE '%.placed'")
    async def filtered(message: Message) -> None:
        seen.append(("filtered", message.key))

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id="a"), OrderCancelled(order_id="b")])
        await t.publish(Named(type="com.unknown", topic="orders", data={"x": 1}))
        await t.settled()
    assert sorted(seen, key=str) == sorted(
        [("com.shop.order.placed", "a"), ("com.shop.order.cancelled", "b"), ("com.unknown", None), ("filtered", "a")],
        key=str,
    )


async def test_a_whole_topic_handler_takes_a_message() -> None:
    app = App("shop")

    async def wrong(order: OrderPlaced) -> None: ...

    app.on(topic="orders")(wrong)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="of a whole-topic handler must be a Message, not OrderPlaced"):
        async with harness(app):
            pass


async def test_only_and_except_choose_groups() -> None:
    app = App("shop")
    app.on(OrderPlaced)(handle)
    app.on(OrderCancelled)(cancel)
    app.on(OrderPlaced, group="other")(handle)

    async def started(**options: Any) -> list[str]:
        async with app.running(url="memory://", **options) as program:
            return [worker.plan.name for worker in program.workers]

    assert await started() == ["shop.handle", "shop.cancel", "other"]
    assert await started(only=["handle"]) == ["shop.handle"]
    assert await started(only=["shop.cancel", "other"]) == ["shop.cancel", "other"]
    assert await started(skip=["handle"]) == ["shop.cancel", "other"]
    with pytest.raises(DefinitionError, match=r"no group 'nope' in shop; there are shop.handle, shop.cancel, other"):
        await started(only=["nope"])


async def test_broadcast_reaches_every_instance_and_starts_at_the_latest() -> None:
    broker, seen = memory(), []

    def make(name: str) -> App:
        app = App("shop")

        @app.on(OrderPlaced, group=Group("refresh", broadcast=True))
        async def refresh(order: OrderPlaced) -> None:
            seen.append(f"{name} {order.order_id}")

        return app

    one, two = make("one"), make("two")
    async with one.running(broker=broker):
        await one.publish(OrderPlaced(order_id="early"))
        async with two.running(broker=broker):
            await one.publish(OrderPlaced(order_id="both"))
            async with asyncio.timeout(60):
                while len(seen) < 3:
                    await asyncio.sleep(0)
    assert sorted(seen) == ["one both", "one early", "two both"]


# ---- renaming -------------------------------------------------------------------------------------------------------


async def test_a_renamed_handler_is_noticed_and_both_ways_out_are_named() -> None:
    broker = memory()
    old = App("shop")
    old.on(OrderPlaced)(handle)
    async with old.running(broker=broker):
        pass

    async def renamed(order: OrderPlaced) -> None: ...

    new = App("shop")
    new.on(OrderPlaced)(renamed)
    with pytest.raises(GroupsChanged) as refused:
        async with new.running(broker=broker):
            pass
    text = str(refused.value)
    assert "group shop.handle lost its handler while shop.renamed is new" in text
    assert "Group(was='shop.handle')" in text
    assert "--new-groups" in text
    async with new.running(broker=broker, new_groups=True):
        names = [info.name for info in await broker.admin.groups()]
    assert names == ["shop.handle", "shop.renamed"]


@pytest.mark.parametrize("was", ["shop.handle", "handle", ("older", "handle")])
async def test_was_takes_over_the_place_and_the_dead_letters(was: Any) -> None:
    seen: list[str] = []
    old, new = App("shop"), App("shop")

    @old.on(OrderPlaced, retry=Retry(attempts=1))
    async def handle(order: OrderPlaced) -> None:
        seen.append(f"old {order.order_id}")
        if order.order_id == "bad":
            raise ValueError("no")

    @new.on(OrderPlaced, group=Group(was=was))
    async def renamed(order: OrderPlaced) -> None:
        seen.append(f"new {order.order_id}")

    async with harness(old) as t:
        await t.publish([OrderPlaced(order_id="a"), OrderPlaced(order_id="bad")])
        await t.settled()
        await t.stop()
        await t.publish(OrderPlaced(order_id="b"))
        t.apps = (new,)
        await t.start()
        await t.settled()
        assert seen == ["old a", "old bad", "new b"]
        assert [info.name for info in await t.broker.admin.groups()] == ["shop.renamed"]
        assert [
            topic.events for topic in await t.broker.admin.topics() if topic.name == "stentor.dead.shop.renamed"
        ] == [1]


async def test_a_new_group_beside_the_old_ones_is_no_rename() -> None:
    broker, app = memory(), App("shop")
    app.on(OrderPlaced)(handle)
    async with app.running(broker=broker):
        pass
    app.on(OrderCancelled)(cancel)
    async with app.running(broker=broker):
        pass
    other = App("other")
    other.on(OrderPlaced)(handle)
    async with other.running(broker=broker):
        pass


# ---- publishing -----------------------------------------------------------------------------------------------------


async def test_publish_returns_receipts() -> None:
    app = App("shop", broker="memory://")
    app.on(OrderPlaced)(handle)
    async with app:
        one = await app.publish(OrderPlaced(order_id="a"), id="order-a")
        again = await app.publish(OrderPlaced(order_id="a"), id="order-a")
        many = await app.publish([OrderPlaced(order_id="b"), OrderCancelled(order_id="b")])
        both = await app.publish((OrderPlaced(order_id="c"), Outgoing(OrderPlaced(order_id="c"), delay="1h")))
        assert one == Receipt("order-a", "orders", 0)
        assert again == Receipt("order-a", "orders", 0, duplicate=True)
        assert [receipt.position for receipt in many] == [1, 2]
        assert [receipt.position for receipt in both] == [3, None]
        assert await app.publish([]) == []
        assert await app.cancel(both[1].id)
        assert not await app.cancel(both[1].id)


async def test_a_list_with_one_bad_event_is_refused_as_a_whole() -> None:
    app = App("shop", broker="memory://")
    async with app.connected():
        with pytest.raises(InvalidEvent):
            await app.publish([OrderPlaced(order_id="a"), OrderPlaced(order_id=5)])  # type: ignore[arg-type]
        with pytest.raises(InvalidEvent, match=r"options apply to one event; wrap the members of a list in Outgoing"):
            await app.publish([OrderPlaced(order_id="a")], id="x")  # type: ignore[call-overload]
        await app.publish(OrderPlaced(order_id="a"))
        assert [m.key async for _, m in app.broker.browse("orders", "earliest", follow=False)] == ["a"]


async def test_unknown_publish_options_are_refused() -> None:
    app = App("shop", broker="memory://")
    async with app.connected():
        with pytest.raises(TypeError, match="delya"):
            await app.publish(OrderPlaced(order_id="a"), delya="5s")  # type: ignore[call-overload]


async def test_an_app_that_does_not_run_cannot_publish() -> None:
    app = App("shop")
    with pytest.raises(NotConnected, match=r"use `async with app:` or `async with app.connected\(\):`"):
        await app.publish(OrderPlaced(order_id="a"))
    with pytest.raises(NotConnected):
        app.broker  # noqa: B018


async def test_an_app_runs_once_at_a_time() -> None:
    app = App("shop", broker="memory://")
    async with app:
        with pytest.raises(DefinitionError, match="app 'shop' is running or connected already"):
            async with app:
                pass
    async with app.connected():
        pass


async def test_publishes_declares_what_the_app_owns() -> None:
    app = App("shop", broker="memory://")
    app.publishes(OrderPlaced)
    app.publishes(PaymentTaken)
    async with app.connected():
        await app.publish([OrderPlaced(order_id="a"), PaymentTaken(order_id="a")])
        for refused in (OrderCancelled(order_id="a"), app.event("com.shop.other", {})):
            with pytest.raises(
                InvalidEvent, match=r"this app does not publish 'com.shop.\S+'; declare it with app.publishes"
            ):
                await app.publish(refused)
    with pytest.raises(DefinitionError, match="int is no event"):
        app.publishes(int)


async def test_an_event_by_name() -> None:
    app = App("shop")
    seen: list[Any] = []

    @app.on(OrderPlaced)
    async def typed(order: OrderPlaced) -> None:
        seen.append(order)

    @app.on(topic="notes")
    async def notes(message: Message) -> None:
        seen.append((message.type, message.data))

    async with harness(app) as t:
        await app.publish(app.event("com.shop.order.placed", {"order_id": "a"}))
        await app.publish(app.event("note", {"text": "x"}, topic="notes", key="k"))
        with pytest.raises(InvalidEvent, match=r"com\.shop\.order\.placed: Object missing required field `order_id`"):
            app.event("com.shop.order.placed", {})
        with pytest.raises(UnknownTopic, match="topic 'nowhere' was never declared"):
            await app.publish(app.event("note", {}, topic="nowhere"))
        await t.settled()
    assert seen == [OrderPlaced(order_id="a"), ("note", b'{"text":"x"}')]


async def test_a_topic_without_groups_accepts_events() -> None:
    app = App("shop")

    @app.on(OrderPlaced)
    async def charge(order: OrderPlaced, ctx: Context):  # type: ignore[no-untyped-def]
        await ctx.publish(PaymentTaken(order_id="context"))
        await app.publish(OrderCancelled(order_id="app"))
        return PaymentTaken(order_id="returned, without an annotation")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert len(t.published(PaymentTaken)) == 2
        assert t.dead(charge) == []


async def test_publish_at_any_depth_of_a_handler_knows_its_cause() -> None:
    app = App("shop")

    async def deep() -> None:
        await asyncio.gather(app.publish(PaymentTaken(order_id="deep")), deeper())

    async def deeper() -> None:
        await app.publish(OrderCancelled(order_id="deeper"))

    @app.on(OrderPlaced)
    async def charge(order: OrderPlaced) -> None:
        await deep()
        await asyncio.create_task(deeper())
        await asyncio.to_thread(app.publish_sync, PaymentTaken(order_id="thread"))

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"), headers={"correlationid": "story"})
        await t.settled()
        order, *caused = t.messages
        assert len(caused) == 4
        assert {message.extensions["causationid"] for message in caused} == {order.id}
        assert {message.extensions["correlationid"] for message in caused} == {"story"}
        assert len({message.id for message in caused}) == 4
        # Outside the handler there is no cause.
        await app.publish(PaymentTaken(order_id="outside"))
        assert "causationid" not in t.messages[-1].extensions


async def test_a_chain_of_events_has_one_correlation() -> None:
    app = App("shop")

    @app.on(OrderPlaced)
    async def one(order: OrderPlaced) -> PaymentTaken:
        return PaymentTaken(order_id=order.order_id)

    @app.on(PaymentTaken)
    async def two(payment: PaymentTaken) -> OrderCancelled:
        return OrderCancelled(order_id=payment.order_id)

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        first, second, third = t.messages
        assert second.extensions["causationid"] == first.id
        assert third.extensions["causationid"] == second.id
        assert second.extensions["correlationid"] == third.extensions["correlationid"] == first.id
        traces = {str(m.extensions["traceparent"]).split("-")[1] for m in (second, third)}
        assert len(traces) == 1


async def test_a_delayed_event_is_not_early_and_survives_a_restart_of_the_app() -> None:
    app, seen = App("shop"), []

    @app.on(OrderPlaced)
    async def charge(order: OrderPlaced, ctx: Context) -> None:
        seen.append((order.order_id, t.now))

    start = datetime(2026, 1, 1, tzinfo=UTC)
    async with harness(app, start=start) as t:
        await app.publish(OrderPlaced(order_id="a"), delay="10m")
        await app.publish(OrderPlaced(order_id="a2"), at=start + timedelta(minutes=5))
        await t.stop()
        await t.advance("1m")
        await t.start()
        await t.advance("1h")
    assert seen == [("a2", start + timedelta(minutes=5)), ("a", start + timedelta(minutes=10))]


# ---- brokers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("memory", "broker 'memory' is no URL; write for example sqlite:///stentor.db"),
        ("carrier-pigeon://loft", "no broker for carrier-pigeon://; installed are amqp, amqps, kafka, memory, nats"),
        (
            "memory://?max_byte=5",
            "memory://: unknown option max_byte; memory knows max_bytes, namespace, password_file",
        ),
        ("memory://?max_bytes=lots", "option max_bytes='lots'"),
        ("memory://?max_bytes=5&max_bytes=6", "an option stands twice"),
        ("memory://?namespace=a%20b", "namespace 'a b'"),
        ("kafka://me:secret@[::1", "broker '…@[::1' is no URL: Invalid IPv6 URL"),
    ],
)
async def test_a_wrong_broker_url_is_refused_at_start(url: str, complaint: str) -> None:
    app = App("shop", broker=url)
    with pytest.raises(DefinitionError, match=re.escape(complaint)):
        async with app:
            pass


@pytest.mark.parametrize("scheme", ["amqp", "amqps", "kafka", "nats", "postgresql", "redis", "rocketmq"])
@pytest.mark.parametrize("address", ["one:nine", "one:", "one:99999", "::1", "one:1:2"])
def test_what_is_no_address_is_refused(scheme: str, address: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{address!r} is no host and port; write host:")):
        connect(f"{scheme}://{address}")


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("", ["localhost:1"]), ("one", ["one:1"]), (":5", ["localhost:5"]), ("one,two:5", ["one:1", "two:5"]),
        ("u:p@one:7", ["one:7"]), ("[::1]", ["[::1]:1"]), ("[fe80::1%25eth0]:8,one", ["[fe80::1%25eth0]:8", "one:1"]),
    ],
)  # fmt: skip
def test_addresses(host: str, addresses: list[str]) -> None:
    found = BrokerUrl(f"kafka://{host}/").addresses(1)
    assert [str(address) for address in found] == addresses
    assert all("[" not in name for name, _ in found)


@pytest.mark.parametrize("scheme", ["postgresql", "redis"])
def test_several_addresses_where_one_can_be_are_refused(scheme: str) -> None:
    with pytest.raises(ConfigError, match=f"{scheme}://one,two:5: name one host"):
        connect(f"{scheme}://one,two:5")


async def test_a_broker_weaker_than_the_demand_is_refused() -> None:
    app = App("shop", broker="memory://", durable="host")
    with pytest.raises(ConfigError, match="the app demands durable='host', but memory gives 'process'"):
        async with app:
            pass
    async with harness(app):  # the harness stands in for whatever is demanded
        pass


async def test_the_broker_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STENTOR_BROKER", "memory://?wrong=1")
    with pytest.raises(ConfigError, match="unknown option wrong"):
        async with App("shop"):
            pass
    monkeypatch.delenv("STENTOR_BROKER")
    (tmp_path / "broker").write_text("memory://?file=1\n")
    monkeypatch.setenv("STENTOR_BROKER_FILE", str(tmp_path / "broker"))
    with pytest.raises(ConfigError, match="unknown option file"):
        async with App("shop"):
            pass
    monkeypatch.setenv("STENTOR_BROKER_FILE", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"\$STENTOR_BROKER_FILE: .*missing"):
        async with App("shop"):
            pass
