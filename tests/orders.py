"""Events that several tests use: orders and their payment."""

from stentor import Event


class OrderPlaced(Event, topic="orders", key="order_id", type="com.shop.order.placed"):
    order_id: str
    amount: float = 1.0


class OrderCancelled(Event, topic="orders", key="order_id", type="com.shop.order.cancelled"):
    order_id: str


class PaymentTaken(Event, topic="payments", key="order_id", type="com.shop.payment.taken"):
    order_id: str
