"""The event of every benchmark: an order of 200 bytes of JSON, and the plain typed class that it is decoded to."""

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
SIZE = 200


class PlainOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What the floors and the peers without typed events of their own decode to."""

    order_id: str
    customer: str
    amount: float
    currency: str
    items: list[str]
    sent: int
    note: str


def fields(number: int, *, key: str | None = None, sent: int = 0) -> dict[str, Any]:
    """The fields of one order; ``note`` fills it up to 200 bytes."""
    found: dict[str, Any] = {
        "order_id": key or f"order-{number % 5000:06d}",
        "customer": f"customer-{number:08d}",
        "amount": 12.5,
        "currency": "EUR",
        "items": ["anvil", "rope", "lantern"],
        "sent": sent,
        "note": "",
    }
    found["note"] = "x" * max(0, SIZE - len(msgspec.json.encode(found)))
    return found


def plain_orders(count: int) -> list[PlainOrder]:
    return [PlainOrder(**fields(number)) for number in range(count)]


def bodies(count: int) -> list[bytes]:
    return [msgspec.json.encode(order) for order in plain_orders(count)]


def chunks(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[at : at + size]) for at in range(0, len(items), size)]


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(PlainOrder).decode
