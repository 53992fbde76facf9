"""A page for customers, beside the three services: they order by WebSocket, and see what becomes of it as it happens.

    stentor run examples.shop.page:app --http 127.0.0.1:8000

A customer asks for an item; what it costs is the shop's to say. That the name in the query is the customer's own stands
for a login: `identify` is where a program looks at its session.
"""

from pathlib import Path

from examples.shop.events import OrderAsked, OrderPaid, OrderPlaced, OrderShipped, PaymentRefused
from stentor import App, Context
from stentor.exchange import Endpoint, Exchange
from stentor.identity import Identity, Visit

PRICES = {"lamp": 4_500, "chair": 8_900, "kettle": 3_200, "globe": 9_900}
"""Cents."""
PAGE = Path(__file__).with_name("page.html")

app = App("page")


def identify(visit: Visit) -> Identity | None:
    """Who comes by: customers see what has their key, and order for themselves."""
    name = visit.query.get("customer", "")
    if not name.isascii() or not name.isalnum():  # it goes into an expression
        return None
    told = (OrderPlaced, OrderPaid, PaymentRefused, OrderShipped)
    return Identity(name=name, publish=(OrderAsked,), subscribe=told, where=f"partitionkey = '{name}'")


app.users(OrderAsked, OrderPlaced, OrderPaid, PaymentRefused, OrderShipped, identify=identify)


@app.on(OrderAsked)
async def place(asked: OrderAsked, ctx: Context) -> OrderPlaced:
    if asked.item not in PRICES:
        ctx.dead(f"there is no {asked.item!r} in the shop")
    return OrderPlaced(number=asked.number, customer=asked.customer, item=asked.item, cents=PRICES[asked.item])


async def show(exchange: Exchange) -> None:
    await exchange.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")


app.mount(Endpoint("/", show, ("GET",)))
