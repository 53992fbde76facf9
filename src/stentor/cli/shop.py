"""A small shop: the app that ``stentor demo`` runs, and an example to begin from.

Orders come from a source. Taking their payment needs a bank, which fails at times, so it is retried. What is paid is
shipped. A customer's orders are handled one after the other, in the order they were placed, whatever fails; different
customers do not wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Protocol

from stentor import App, Context, Depends, Event, Group, Publish, Retry

CUSTOMERS = ("Ada", "Ben", "Cleo", "Dora", "Emil")
ORDERS = 30


class OrderPlaced(Event, topic="orders", key="customer", type="com.example.shop.order.placed"):
    """A customer wants something."""

    customer: str
    number: int
    amount: float


class PaymentTaken(Event, topic="payments", key="customer", type="com.example.shop.payment.taken"):
    """The bank gave its receipt."""

    customer: str
    number: int
    receipt: str


class OrderShipped(Event, topic="shipments", key="customer", type="com.example.shop.order.shipped"):
    """The parcel is on its way."""

    customer: str
    number: int


class CardRefused(Exception):
    """The bank says no, and will say no again."""


class Bank(Protocol):
    """Takes payments."""

    async def charge(self, customer: str, number: int, amount: float) -> str:
        """Take a payment and return its receipt. Raises ConnectionError when it is out, or CardRefused."""
        ...


class GoodBank:
    """A bank that always works; the demo, and a test, put another one in its place."""

    async def charge(self, customer: str, number: int, amount: float) -> str:
        return f"{customer}-{number}-{amount:.2f}"


async def open_bank() -> AsyncIterator[Bank]:
    """The connection to the bank: made once for the app, closed when it stops."""
    yield GoodBank()


app = App("shop")


@app.source()
async def website(publish: Publish) -> None:
    """Makes orders. Its position survives a restart, so that none is placed twice."""
    for number in range((publish.position or 0) + 1, ORDERS + 1):
        order = OrderPlaced(
            customer=CUSTOMERS[number * 7 % len(CUSTOMERS)], number=number, amount=10 + number * 37 % 90
        )
        await publish(order, position=number)
        await asyncio.sleep(0.25)


# Payments of a customer stay in order even when one of them is dead: on_dead="park" holds those behind it until the
# dead one is redriven or dropped.
payments = Group("payments", on_dead="park")


@payments.on(OrderPlaced, retry=Retry(attempts=4, first="300ms", factor=2, never=(CardRefused,)), timeout="5s")
async def charge(
    order: OrderPlaced, ctx: Context, bank: Annotated[Bank, Depends(open_bank, scope="app")]
) -> PaymentTaken:
    """Takes the payment; what it returns is published together with the ack."""
    receipt = await bank.charge(order.customer, order.number, order.amount)
    ctx.log.debug("order %d is paid at attempt %d", order.number, ctx.attempt)
    return PaymentTaken(customer=order.customer, number=order.number, receipt=receipt)


app.add(payments)


@app.on(PaymentTaken)
async def ship(paid: PaymentTaken) -> OrderShipped:
    """Packs the parcel."""
    await asyncio.sleep(0.05)
    return OrderShipped(customer=paid.customer, number=paid.number)
