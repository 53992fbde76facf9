from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated

from stentor import (
    App,
    Batch,
    BatchFailed,
    Context,
    Depends,
    Event,
    Firing,
    Group,
    Message,
    Outgoing,
    Publish,
    Retry,
    event,
    on,
)
from stentor.sinks.http import Target
from stentor.testing import context, harness


class OrderPlaced(Event, topic="orders", key="order_id"):
    order_id: str
    amount: float = 1.0


class OrderCancelled(Event, topic="orders", key="order_id"):
    order_id: str


class Third(Event, topic="orders"):
    order_id: str


@event(topic="t")
@dataclass
class D:
    x: int


app = App("shop")
group = Group("billing", on_dead="park", was=("old",))


def session() -> Iterator[int]:
    yield 1


@app.on(OrderPlaced, retry=Retry(attempts=3, never=(ValueError,)), timeout="30s")
async def charge(order: OrderPlaced, ctx: Context, s: Annotated[int, Depends(session)]) -> OrderCancelled | None:
    await ctx.publish(OrderCancelled(order_id=order.order_id), delay="1s")
    ctx.log.info("done")
    if ctx.attempt > 2:
        ctx.dead("enough")
    return OrderCancelled(order_id=order.order_id)


@app.on(OrderPlaced, OrderCancelled, where=lambda e: e.order_id != "")
async def both(e: OrderPlaced | OrderCancelled) -> None: ...


@app.on(OrderPlaced, OrderCancelled, Third)
def three(e: OrderPlaced | OrderCancelled | Third) -> list[OrderCancelled]:
    return []


@app.on(OrderPlaced, where="tenant = 'a'", group=group)
def sync(order: OrderPlaced) -> tuple[OrderCancelled, Third]:
    return OrderCancelled(order_id="a"), Third(order_id="a")


@group.on(OrderCancelled)
async def generator(order: OrderCancelled, message: Message) -> AsyncIterator[OrderCancelled | Outgoing]:
    yield order
    yield Outgoing(order, delay="1m")


@app.on(OrderPlaced, batch=Batch(size=10, wait="1s"))
async def many(orders: list[OrderPlaced], ctx: Context) -> None:
    raise BatchFailed({0: ValueError("no")})


@app.on(D)
async def other_kinds(d: D) -> None: ...


@app.on(topic="orders")
async def whole(message: Message) -> None: ...


@app.every("10s")
async def tick(firing: Firing) -> None: ...


@app.cron("0 3 * * *", tz="Europe/Berlin", missed="all")
async def nightly() -> None: ...


@app.source()
async def feed(publish: Publish) -> None:
    await publish(OrderPlaced(order_id="a"), position=1)


class Component:
    @on(OrderPlaced)
    async def placed(self, order: OrderPlaced) -> None: ...

    @app.on(OrderPlaced)
    async def on_app(self, order: OrderPlaced) -> None: ...


app.add(group)
app.add(Component())


async def main() -> None:
    await charge(OrderPlaced(order_id="a"), context(OrderPlaced(order_id="a")), 1)
    await both(OrderCancelled(order_id="a"))
    sync(OrderPlaced(order_id="a"))
    async with harness(app, overrides={session: lambda: 1}) as t:
        await t.publish(OrderPlaced(order_id="a"))
        await t.advance("5m")
        first: OrderCancelled = t.published(OrderCancelled)[0]
        print(first, t.dead(charge)[0].event, t.attempts(charge) == 2)
        t.fail(charge, ValueError, times=2)
        await t.crash(charge, at="started")
    async with app:
        pass
    async with app.connected():
        pass


def script() -> None:
    with app.connected():
        app.publish_sync(OrderPlaced(order_id="a"))


app.deliver(OrderPlaced, to="https://billing.example/events", secret="whsec_x", timeout="5s", retry=Retry(attempts=3))
app.deliver(OrderPlaced, OrderCancelled, to="https://billing.example/events", where=lambda event: event.order_id != "")
app.deliver(OrderPlaced, to=Target("https://billing.example/", mode="structured"), group=group, batch=Batch(50))
app.deliver(topic="orders", to="https://billing.example/", where=lambda message: message.key is not None)
app.subscriptions(OrderPlaced, allow=lambda headers: headers.get("x-client"), inside=("10.0.0.0/8",))
