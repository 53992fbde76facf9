r"""The services with a broker each, and a gateway between them: what one publishes goes to $SHOP_GATEWAY.

The file gateway.toml in this folder says where they are:

    dead_letter = "orders"
    [services]
    orders = ["127.0.0.1:8001"]
    payments = ["127.0.0.1:8002"]
    shipping = ["127.0.0.1:8003"]

    stentor gateway envoy --app examples.shop.bus:orders --app examples.shop.bus:payments \
        --app examples.shop.bus:shipping --out bus
    stentor run examples.shop.bus:payments --broker sqlite:///payments.db --http 127.0.0.1:8002
"""

import os

from examples.shop.events import OrderPaid, OrderPlaced, OrderShipped, PaymentRefused
from examples.shop.orders import app as orders
from examples.shop.payments import app as payments
from examples.shop.shipping import app as shipping

GATEWAY = os.environ.get("SHOP_GATEWAY") or "http://127.0.0.1:8080/events"

orders.deliver(OrderPlaced, to=GATEWAY)
payments.deliver(OrderPaid, PaymentRefused, to=GATEWAY)
shipping.deliver(OrderShipped, to=GATEWAY)
