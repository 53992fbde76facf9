"""The third service: packs what is paid for, and sends it off."""

import asyncio
from collections.abc import Iterator
from typing import Annotated

from examples.shop.books import Books
from examples.shop.events import OrderPaid, OrderShipped
from stentor import App, Depends

app = App("shipping")


def open_books() -> Iterator[Books]:
    books = Books("shipping")
    yield books
    books.close()


@app.on(OrderPaid)
async def ship(paid: OrderPaid, books: Annotated[Books, Depends(open_books, scope="app")]) -> OrderShipped:
    await asyncio.sleep(0.005)  # packing; parcels of other customers are packed meanwhile
    books.write(paid.number, paid.customer, "sent")
    return OrderShipped(number=paid.number, customer=paid.customer)
