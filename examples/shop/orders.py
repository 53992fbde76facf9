"""The first service: takes orders ($SHOP_ORDERS of them, $SHOP_RATE a second) and learns what became of each."""

import asyncio
import os
from collections.abc import Iterator
from typing import Annotated

from examples.shop.books import Books
from examples.shop.events import OrderPlaced, OrderShipped, PaymentRefused
from stentor import App, Depends, Group, Publish

ITEMS = ("lamp", "chair", "kettle", "globe")
CUSTOMERS = 20
TOGETHER = 10

app = App("orders")


def make(number: int) -> OrderPlaced:
    """The order of a number, the same in every run."""
    return OrderPlaced(
        number=number,
        customer=f"customer-{number * 7 % CUSTOMERS}",
        item=ITEMS[number % len(ITEMS)],
        cents=number * 37 % 10_000,
    )


@app.source()
async def place(publish: Publish) -> None:
    """Place orders; the position is the number of the last one, stored with it."""
    wanted, rate = int(os.environ.get("SHOP_ORDERS") or 1000), float(os.environ.get("SHOP_RATE") or 500)
    last = publish.position or 0
    while last < wanted and not publish.stopping.is_set():
        some = [make(number) for number in range(last + 1, min(last + TOGETHER, wanted) + 1)]
        await publish(some, position=some[-1].number)
        last = some[-1].number
        await asyncio.sleep(len(some) / rate)


def open_books() -> Iterator[Books]:
    books = Books("orders")
    yield books
    books.close()


OrderBooks = Annotated[Books, Depends(open_books, scope="app")]
outcomes = Group("orders.outcomes")


@outcomes.on(OrderShipped)
async def shipped(parcel: OrderShipped, books: OrderBooks) -> None:
    books.write(parcel.number, parcel.customer, "shipped")


@outcomes.on(PaymentRefused)
async def refused(payment: PaymentRefused, books: OrderBooks) -> None:
    books.write(payment.number, payment.customer, "refused")


app.add(outcomes)
