"""A shop as a large one would be: 8 services, 25 topics, 40 handlers."""

from functools import reduce
from operator import or_
from typing import Any

from stentor import App, Event, Publish
from stentor.connect import BrokerUrl
from stentor.docs.overview import Overview, overview

TABLE = """
web checkout . cart.submitted
web profile . customer.changed,consent.given
web catalogue . search.made,page.seen
orders accept cart.submitted order.placed,order.refused
orders paid payment.taken,payment.refused order.confirmed,order.cancelled
orders reserved stock.reserved,stock.short order.reserved,order.cancelled
orders sent parcel.sent order.fulfilled
orders back return.received order.returned
orders remind every order.overdue
payments charge order.reserved payment.taken,payment.refused
payments refund order.cancelled,order.returned refund.made
payments settle every settlement.closed
payments dispute bank.disputed dispute.opened
payments bank . bank.disputed,bank.booked
payments book bank.booked ledger.booked
stock reserve order.placed stock.reserved,stock.short
stock release order.cancelled stock.released
stock restock delivery.arrived inventory.counted
stock count every inventory.counted
stock forecast stock.short purchase.asked
stock supplier . delivery.arrived
stock buy purchase.asked purchase.made
shipping pack order.confirmed parcel.packed
shipping label parcel.packed label.printed
shipping hand_over label.printed parcel.sent
shipping carrier . tracking.seen
shipping track tracking.seen parcel.arrived,parcel.lost
shipping take_back return.asked return.received
mail welcome customer.created mail.sent
mail confirm order.confirmed mail.sent
mail shipped parcel.sent mail.sent
mail apologise order.cancelled,parcel.lost mail.sent
mail arrived parcel.arrived mail.sent
mail bounce bounce.seen customer.unreachable
mail server . bounce.seen
customers create customer.changed customer.created
customers consent consent.given consent.stored
customers unreachable customer.unreachable -
customers score payment.refused,dispute.opened customer.rated
customers points order.fulfilled points.given
customers ask . return.asked,ticket.opened
customers answer ticket.opened ticket.closed
customers lost parcel.lost ticket.opened
customers disputed dispute.opened ticket.opened
figures searches search.made,page.seen figures.made
figures sales order.confirmed,order.cancelled,order.returned,order.fulfilled figures.made
figures money refund.made,settlement.closed,ledger.booked figures.made
figures supply purchase.made,inventory.counted,stock.released figures.made
figures rates customer.rated,points.given,ticket.closed figures.made
"""
"""Service, function, what it takes ("." for a source, "every" for a timer) and what it sends."""


def large() -> Overview:
    """All of it, together on one broker."""
    events: dict[str, Any] = {}
    apps: dict[str, App] = {}

    meta: Any = type(Event)

    def event(type_: str) -> Any:
        if type_ not in events:
            name = "".join(word.title() for word in type_.split("."))
            space = {"__annotations__": {"id": str, "cents": int}, "__module__": __name__}
            events[type_] = meta(
                name, (Event,), space, topic=type_.partition(".")[0], key="id", type=f"com.example.{type_}"
            )
        return events[type_]

    for line in TABLE.split("\n")[1:-1]:
        service, name, takes, sends = line.split()
        app = apps.setdefault(service, App(service))
        sent = tuple(event(type) for type in sends.split(",") if type != "-")
        if takes == ".":
            _source(app, name, sent)
        elif takes == "every":
            _timer(app, name, sent)
        else:
            _handler(app, name, tuple(event(type) for type in takes.split(",")), sent)
    return overview(list(apps.values()), BrokerUrl("kafka://kafka-1.example.com:9092,kafka-2.example.com:9092"))


def _source(app: App, name: str, sent: tuple[Any, ...]) -> None:
    first, last = sent[0], sent[-1]

    async def function(publish: Publish) -> None:
        print(first, last)

    function.__name__ = name
    app.source()(function)


def _timer(app: App, name: str, sent: tuple[Any, ...]) -> None:
    async def function() -> Any: ...

    function.__name__ = name
    function.__annotations__ = {"return": _any(sent)}
    app.every("1h")(function)


def _handler(app: App, name: str, takes: tuple[Any, ...], sent: tuple[Any, ...]) -> None:
    async def function(event: Any) -> Any: ...

    function.__name__ = name
    function.__annotations__ = {"event": _any(takes), "return": _any(sent)}
    app.on(*takes)(function)


def _any(types: tuple[Any, ...]) -> Any:
    return reduce(or_, types) if types else None
