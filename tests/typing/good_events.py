from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_type

import attrs
import msgspec
import pydantic

from stentor import App, Event, Outgoing, Receipt, Topic, event, replace, upcast


class Abstract(Event, topic=Topic("orders", partitions=3, retention="30d"), key="order_id"):
    order_id: str


class OrderPlaced(Abstract, type="com.shop.order.placed", version=2, newer="wait", also=("Placed",)):
    amount: float = 1.0


class Renamed(Event, topic="t", key=("a", "b"), rename="camel", wire="json"):
    a: str
    b: int


class Computed(Event, topic="t", key=lambda e: e.a):
    a: str


@event(topic="t", key="x")
@dataclass(frozen=True)
class D:
    x: int


@event(topic="t")
@attrs.frozen
class A:
    x: int


@event(topic="t")
class P(pydantic.BaseModel):
    x: int


@upcast(OrderPlaced, from_version=1)
def step(old: dict[str, Any]) -> dict[str, Any]:
    return old | {"amount": 1.0}


class Line(msgspec.Struct):
    sku: str


app = App("shop", broker="memory://", durable="process")
app.publishes(OrderPlaced, D, A, P)


async def main() -> None:
    order = OrderPlaced(order_id="a", amount=2.0)
    assert_type(order.amount, float)
    assert_type(replace(order, amount=3.0), OrderPlaced)
    assert_type(await app.publish(order, delay="5s", headers={"tenant": "a"}), Receipt)
    assert_type(await app.publish([order, D(x=1)]), list[Receipt])
    assert_type(await app.publish((order, order)), list[Receipt])
    orders = [order for _ in range(3)]
    assert_type(await app.publish(orders), list[Receipt])
    await app.publish(D(x=1))
    await app.publish(A(x=1))
    await app.publish(P(x=1))
    await app.publish(Outgoing(order, key="k"))
    await app.publish([Outgoing(order, delay="1s"), order])
    await app.publish(app.event("com.other", {"x": 1}, version=2))
    assert_type(app.publish_sync(order, id="1"), Receipt)
    assert_type(app.publish_sync([order]), list[Receipt])
