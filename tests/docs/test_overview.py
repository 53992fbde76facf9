"""What the picture is made of: parts and links of every kind, declared or read from code."""

import pytest

from examples.shop.main import SERVICES
from stentor import App, Context, Event, Publish
from stentor.cli.load import load_app
from stentor.connect import BrokerUrl
from stentor.docs.overview import Overview, overview
from stentor.errors import ConfigError, DuplicateType
from stentor.gateway.routes import make, read_settings
from tests.docs import apps
from tests.docs.apps import billing, shop

BROKER = BrokerUrl("memory://")


def links(found: Overview) -> set[tuple[str, str, tuple[str, ...], bool]]:
    names = {id: f"{part.kind}:{part.name}" for id, part in found.parts.items()}
    return {(names[link.start], names[link.end], link.types, link.sure) for link in found.links}


def test_parts_of_every_kind_and_what_flows_between_them() -> None:
    assert links(overview([shop, billing], BROKER)) == {
        ("source:till", "topic:shop.orders", ("shop.order.placed",), False),
        ("source:/hooks/git", "topic:pushes", ("git.pushed",), True),
        ("topic:shop.orders", "handler:charge", ("shop.order.placed",), True),
        ("topic:shop.orders", "handler:audit", (), True),
        ("handler:charge", "topic:shop.payments", ("shop.order.paid", "shop.payment.refused"), True),
        ("topic:shop.payments", "handler:tell", ("shop.order.paid", "shop.payment.refused"), True),
        ("topic:shop.payments", "target:https://partner.example/events", ("shop.order.paid",), True),
        ("handler:tell", "topic:shop.mails", ("shop.reminded",), False),
        ("topic:shop.views", "handler:count", ("shop.viewed",), True),
        ("topic:meters", "handler:read", ("meter.reading",), True),
        ("source:cron 0 6 * * * Europe/Berlin", "handler:report", (), True),
        ("handler:report", "topic:shop.mails", ("shop.reminded",), True),
    }


def test_a_gateway_between_services_that_have_a_broker_each() -> None:
    text = 'dead_letter = "orders"\n[services]\n' + "".join(
        f'{name} = ["127.0.0.1:800{n}"]\n' for n, name in enumerate(("orders", "payments", "shipping"))
    )
    services = [load_app(f"examples.shop.bus:{name}") for name in SERVICES]
    found = overview(services, None, make(services, read_settings(text, "gateway.toml")))
    assert found.parts["gateway"].note == "127.0.0.1:8080"
    ways = {(link.start, link.end) for link in found.links}
    assert {end for start, end in ways if start == "gateway"} == {
        "topic/orders/shop.parcels", "topic/orders/shop.payments", "topic/payments/shop.orders",
        "topic/shipping/shop.payments",
    }  # fmt: skip
    assert {start for start, end in ways if end == "gateway"} == {
        "topic/orders/shop.orders", "topic/payments/shop.payments", "topic/shipping/shop.parcels",
    }  # fmt: skip
    assert not any(part.kind == "target" for part in found.parts.values())


def test_code_is_read_as_far_as_it_is_the_users_own() -> None:
    class Local(Event, topic="local"):
        pass

    def helper() -> object:
        return apps.Reminded(text="x")

    app = App("app")

    @app.source()
    async def source(publish: Publish) -> None:
        async def inner() -> None:
            await publish(Local())

        await inner()
        helper()

    @app.on(Local)
    async def handle(event: Local, ctx: Context) -> None:
        if isinstance(event, Local):  # it handles it, and does not publish it
            await ctx.publish(apps.Pushed(ref="main"))

    assert links(overview([app], BROKER)) == {
        ("source:source", "topic:local", ("Local",), False),
        ("source:source", "topic:shop.mails", ("shop.reminded",), False),
        ("topic:local", "handler:handle", ("Local",), True),
        ("handler:handle", "topic:pushes", ("git.pushed",), False),
    }


def test_what_an_app_declares_to_publish_and_no_part_of_it_does() -> None:
    app = App("app")
    app.publishes(apps.Reminded)
    assert links(overview([app], BROKER)) == {("source:app", "topic:shop.mails", ("shop.reminded",), True)}


def test_apps_that_do_not_go_together() -> None:
    class Mine(Event, topic="shop.mails", key="text", type="shop.reminded"):
        text: str

    other = App("other")
    other.publishes(Mine)
    with pytest.raises(DuplicateType, match=r"other has 'shop\.reminded' with another key \(text\)"):
        overview([billing, other], BROKER)
    with pytest.raises(ConfigError, match="two apps are called 'shop'"):
        overview([shop, App("shop")], BROKER)
