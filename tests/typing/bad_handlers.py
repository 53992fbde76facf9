from __future__ import annotations

from stentor import App, Batch, Context, Event, Group, Message
from stentor.testing import harness


class OrderPlaced(Event, topic="orders", key="order_id"):
    order_id: str
    amount: float = 1.0


class OrderCancelled(Event, topic="orders", key="order_id"):
    order_id: str


app = App("shop")
group = Group("billing")
Group("x", ordering="fifo")  # E
Group("x", concurrency="many")  # E


@app.on(OrderPlaced)  # E
async def wrong_event(order: OrderCancelled) -> None: ...


@app.on(OrderPlaced, OrderCancelled)  # E
async def half(order: OrderPlaced) -> None: ...


@app.on(OrderPlaced)  # E
async def text(order: str) -> None: ...


@app.on(OrderPlaced)  # E
async def nothing() -> None: ...


@group.on(OrderPlaced)  # E
def wrong_in_group(order: OrderCancelled) -> None: ...


@app.on(OrderPlaced, batch=Batch())  # E
async def no_list(order: OrderPlaced) -> None: ...


@app.on(OrderPlaced)  # E
async def list_without_batch(orders: list[OrderPlaced]) -> None: ...


@app.on(topic="orders")  # E
async def not_a_message(order: OrderPlaced) -> None: ...


@app.on(OrderPlaced, where=lambda order: order.price > 1)  # E
async def wrong_filter(order: OrderPlaced) -> None: ...


@app.on(OrderPlaced, retries=3)  # E
async def unknown_option(order: OrderPlaced) -> None: ...


@app.on(OrderPlaced, timeout=30)  # E
async def number(order: OrderPlaced) -> None: ...


app.deliver(OrderPlaced)  # E
app.deliver(OrderPlaced, to=8080)  # E
app.deliver("orders", to="https://host/")  # E
app.deliver(OrderPlaced, to="https://host/", timeout=30)  # E
app.deliver(OrderPlaced, to="https://host/", where=lambda order: order.price > 1)  # E
app.deliver(OrderPlaced, to="https://host/", retries=3)  # E


@app.on(OrderPlaced)
async def inside(order: OrderPlaced, ctx: Context, message: Message) -> None:
    print(order.price)  # E
    await ctx.publish("text")  # E
    await ctx.publish(OrderPlaced)  # E
    print(message.body)  # E
    ctx.retry(after=5)  # E


async def main() -> None:
    async with harness(app) as t:
        await t.crash(inside, at="never")  # E
        await t.publish("text")  # E
