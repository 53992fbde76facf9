from __future__ import annotations

from dataclasses import dataclass

from stentor import App, Event, Retry


class OrderPlaced(Event, topic="orders", key="order_id"):
    order_id: str
    amount: float = 1.0


class Wrong(Event, topic="orders", newer="guess"):  # E
    x: int


class Unknown(Event, topic="orders", partitions=3):  # E
    x: int


@dataclass
class Line:
    sku: str


class Plain:
    pass


OrderPlaced(order="a")  # E
OrderPlaced(order_id=5)  # E
OrderPlaced("a")  # E
print(OrderPlaced(order_id="a").amonut)  # E
order = OrderPlaced(order_id="a")
order.amount = 2.0  # E
Retry(atempts=3)  # E
Retry(first=5)  # E

app = App("shop")
App("shop", durable="forever")  # E


async def main() -> None:
    await app.publish("text")  # E
    await app.publish({"order_id": "a"})  # E
    await app.publish(5)  # E
    await app.publish(None)  # E
    await app.publish(OrderPlaced)  # E
    await app.publish(Plain())  # E
    await app.publish(["text"])  # E
    await app.publish([order, "text"])  # E
    await app.publish([OrderPlaced])  # E
    await app.publish([order], id="x")  # E
    await app.publish(order, dealy="5s")  # E
    await app.publish(order, delay=5)  # E
    app.publish_sync("text")  # E
    app.publish_sync(OrderPlaced)  # E
