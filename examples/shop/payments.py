"""The second service: charges for orders, by way of a bank that does not always answer."""

from collections.abc import Iterator
from typing import Annotated

from examples.shop.books import Books
from examples.shop.events import OrderPaid, OrderPlaced, PaymentRefused
from stentor import App, Context, Depends, Retry

LIMIT = 9_000
"""Cents; who orders for more is refused."""

app = App("payments")


def open_books() -> Iterator[Books]:
    books = Books("payments")
    yield books
    books.close()


@app.on(OrderPlaced, retry=Retry(attempts=10, first="50ms", longest="1s"))
async def charge(
    order: OrderPlaced, ctx: Context, books: Annotated[Books, Depends(open_books, scope="app")]
) -> OrderPaid | PaymentRefused:
    """The answer is published together with the acknowledgement of the order."""
    if order.number % 9 == 0 and ctx.attempt == 1:
        raise ConnectionError("the bank does not answer")
    if order.cents > LIMIT:
        books.write(order.number, order.customer, "refused")
        return PaymentRefused(number=order.number, customer=order.customer)
    books.write(order.number, order.customer, "paid")
    return OrderPaid(number=order.number, customer=order.customer, item=order.item)
