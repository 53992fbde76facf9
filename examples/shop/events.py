"""What the services tell each other. All events of a customer share a key, so they are handled in their order."""

from stentor import Event


class OrderAsked(Event, topic="shop.asked", key="customer", type="com.example.shop.order.asked"):
    """What a customer would like; see `page.py`."""

    number: int
    customer: str
    item: str


class OrderPlaced(Event, topic="shop.orders", key="customer", type="com.example.shop.order.placed"):
    number: int
    customer: str
    item: str
    cents: int


class OrderPaid(Event, topic="shop.payments", key="customer", type="com.example.shop.order.paid"):
    number: int
    customer: str
    item: str


class PaymentRefused(Event, topic="shop.payments", key="customer", type="com.example.shop.payment.refused"):
    number: int
    customer: str


class OrderShipped(Event, topic="shop.parcels", key="customer", type="com.example.shop.order.shipped"):
    number: int
    customer: str
