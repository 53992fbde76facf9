"""What a handler is given: its event, its context, what it depends on; as a function, a method or a component."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest

import stentor
from stentor import App, Context, Depends, Event, Message, Retry
from stentor.errors import DefinitionError
from stentor.testing import harness
from tests.orders import OrderCancelled, OrderPlaced, PaymentTaken

ONCE = Retry(attempts=1)
FAST = Retry(attempts=3, first="1s", factor=1)


async def test_parameters_are_injected_by_their_annotations() -> None:
    app = App("shop")
    seen: list[Any] = []

    @app.on(OrderPlaced)
    async def handle(order: OrderPlaced, message: Message, ctx: Context, *, extra: int = 5) -> None:
        seen.append((order, message.type, ctx.message is message, ctx.group, ctx.app is app, ctx.attempt, extra))

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
    assert seen == [(OrderPlaced(order_id="a"), "com.shop.order.placed", True, "shop.handle", True, 1, 5)]


async def test_local_classes_work_as_events_and_as_dependencies() -> None:
    class Local(Event, topic="local"):
        x: int

    class Session:
        pass

    def session() -> Session:
        return Session()

    app = App("shop")
    seen: list[Any] = []

    @app.on(Local)
    async def handle(event: Local, s: Annotated[Session, Depends(session)]) -> Local | None:
        seen.append((event, type(s)))
        return Local(x=event.x - 1) if event.x else None

    async with harness(app) as t:
        await t.publish(Local(x=1))
        await t.settled()
        assert t.published(Local) == [Local(x=1), Local(x=0)]
    assert seen == [(Local(x=1), Session), (Local(x=0), Session)]


async def test_dependencies_open_in_order_and_close_before_the_ack() -> None:
    log: list[str] = []

    def plain() -> str:
        log.append("plain")
        return "plain"

    async def later() -> str:
        log.append("later")
        return "later"

    def generator(first: Annotated[str, Depends(plain)]) -> Iterator[str]:
        log.append(f"open generator after {first}")
        yield "generator"
        log.append("close generator")

    async def agenerator(ctx: Context) -> AsyncIterator[str]:
        log.append(f"open agenerator for {ctx.message.key}")
        yield "agenerator"
        log.append("close agenerator")

    @contextlib.contextmanager
    def manager() -> Iterator[str]:
        yield "manager"
        log.append("close manager")

    @contextlib.asynccontextmanager
    async def amanager() -> AsyncIterator[str]:
        yield "amanager"
        log.append("close amanager")

    app = App("shop")

    @app.on(OrderPlaced)
    async def handle(
        order: OrderPlaced,
        a: Annotated[str, Depends(later)],
        b: Annotated[str, Depends(generator)],
        c: Annotated[str, Depends(agenerator)],
        d: Annotated[str, Depends(manager)],
        e: Annotated[str, Depends(amanager)],
    ) -> PaymentTaken:
        log.append(f"{a} {b} {c} {d} {e}")
        return PaymentTaken(order_id=order.order_id)

    @app.on(PaymentTaken)
    async def published(payment: PaymentTaken) -> None:
        log.append("published")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="k"))
        await t.settled()
    assert log == [
        "later",
        "plain",
        "open generator after plain",
        "open agenerator for k",
        "later generator agenerator manager amanager",
        "close amanager",
        "close manager",
        "close agenerator",
        "close generator",
        "published",
    ]


async def test_an_error_while_closing_is_the_handlers_error() -> None:
    async def session() -> AsyncIterator[str]:
        yield "session"
        raise RuntimeError("commit failed")

    app = App("shop")

    @app.on(OrderPlaced, retry=ONCE)
    async def handle(order: OrderPlaced, s: Annotated[str, Depends(session)]) -> PaymentTaken:
        return PaymentTaken(order_id=order.order_id)

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
        assert [letter.errors[0].text for letter in t.dead(handle)] == ["commit failed"]
        assert t.published(PaymentTaken) == []


async def test_a_dependency_sees_the_handlers_error() -> None:
    log: list[str] = []

    async def session() -> AsyncIterator[str]:
        try:
            yield "session"
        except ValueError as error:
            log.append(f"rollback after {error}")
            raise
        else:
            log.append("commit")

    app = App("shop")

    @app.on(OrderPlaced, retry=FAST)
    async def handle(order: OrderPlaced, ctx: Context, s: Annotated[str, Depends(session)]) -> None:
        if ctx.attempt == 1:
            raise ValueError("no")

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("1s")
    assert log == ["rollback after no", "commit"]


async def test_a_dependency_of_the_app_is_made_once_and_closed_at_the_stop() -> None:
    log: list[str] = []

    async def pool() -> AsyncIterator[str]:
        log.append("open")
        await asyncio.sleep(0)
        yield "pool"
        log.append("close")

    def client(p: Annotated[str, Depends(pool, scope="app")]) -> str:
        return f"client of {p}"

    app = App("shop")
    seen: list[str] = []

    @app.on(OrderPlaced)
    async def one(order: OrderPlaced, p: Annotated[str, Depends(pool, scope="app")]) -> None:
        seen.append(p)

    @app.on(OrderPlaced)
    def two(order: OrderPlaced, c: Annotated[str, Depends(client)]) -> None:
        seen.append(c)

    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id=key) for key in "abc"])
        await t.settled()
        assert log == ["open"]
    assert log == ["open", "close"]
    assert sorted(set(seen)) == ["client of pool", "pool"]
    assert len(seen) == 6


async def test_a_dependency_of_the_app_that_failed_is_tried_again() -> None:
    tries: list[int] = []

    async def pool() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("refused")
        return "pool"

    app = App("shop")

    @app.on(OrderPlaced, retry=FAST)
    async def handle(order: OrderPlaced, p: Annotated[str, Depends(pool, scope="app")]) -> None: ...

    async with harness(app) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("1s")
        assert len(tries) == 2
        assert t.dead(handle) == []


async def test_overrides_reach_dependencies_of_dependencies() -> None:
    def url() -> str:
        return "real"

    def client(u: Annotated[str, Depends(url)]) -> str:
        return f"client of {u}"

    app = App("shop")
    seen: list[str] = []

    @app.on(OrderPlaced)
    async def handle(order: OrderPlaced, c: Annotated[str, Depends(client)]) -> None:
        seen.append(c)

    async with harness(app, overrides={url: lambda: "fake"}) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.settled()
    assert seen == ["client of fake"]


async def test_methods_and_callable_objects_are_handlers() -> None:
    seen: list[str] = []

    class Component:
        def __init__(self, name: str) -> None:
            self.name = name

        @stentor.on(OrderPlaced)
        async def placed(self, order: OrderPlaced) -> PaymentTaken:
            seen.append(f"{self.name} {order.order_id}")
            return PaymentTaken(order_id=order.order_id)

        @stentor.on(OrderCancelled)
        def cancelled(self, order: OrderCancelled, ctx: Context) -> None:
            seen.append(f"{self.name} cancelled {order.order_id} in {ctx.group}")

    class Caller:
        async def __call__(self, order: OrderPlaced) -> None:
            seen.append(f"called {order.order_id}")

    app = App("shop")
    app.add(Component("c"))
    app.on(OrderPlaced)(Caller())
    assert list(app.groups()) == ["shop.Component", "shop.Caller"]
    async with harness(app) as t:
        await t.publish([OrderPlaced(order_id="a"), OrderCancelled(order_id="a")])
        await t.settled()
    assert sorted(seen) == ["c a", "c cancelled a in shop.Component", "called a"]


def test_a_component_without_handlers_is_refused() -> None:
    with pytest.raises(
        DefinitionError, match=r"object is no Group, no source .*, and no method of it carries @stentor.on"
    ):
        App("shop").add(object())
