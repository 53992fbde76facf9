"""Services whose parts are of every kind."""

import dataclasses
import enum
import uuid
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Literal

import msgspec
import pydantic

from stentor import App, Batch, Context, Event, Group, Publish, Retry, Topic, event
from stentor.sources.webhook import github

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Line(msgspec.Struct):
    item: str
    count: Annotated[int, msgspec.Meta(ge=1, le=99)]
    pair: tuple[int, str] = (1, "x")


class OrderPlaced(
    Event, topic=Topic("shop.orders", partitions=4, retention="7d"), key="customer", type="shop.order.placed"
):
    """An order stands."""

    customer: uuid.UUID
    lines: list[Line]
    colour: Colour
    at: datetime
    day: date
    price: Decimal
    lasts: timedelta
    kind: Literal["new", "again"] = "new"
    note: str | None = None
    tags: dict[str, int] = msgspec.field(default_factory=dict)


class OrderPaid(Event, topic="shop.payments", key="customer", type="shop.order.paid"):
    customer: uuid.UUID


class Reminded(Event, topic="shop.mails", type="shop.reminded"):
    text: str


class Pushed(Event, topic="pushes", type="git.pushed"):
    ref: str


@event(topic="shop.payments", key="customer", type="shop.payment.refused")
@dataclasses.dataclass
class Refused:
    customer: uuid.UUID
    why: str = "no money"


@event(topic="shop.views", type="shop.viewed")
class Viewed(pydantic.BaseModel):
    """A page was looked at."""

    path: str = pydantic.Field(min_length=1, description="Below the site's root.")
    inner: "Where"


class Where(pydantic.BaseModel):
    country: str


class Reading(Event, topic="meters", type="meter.reading", wire="json"):
    value: float


shop = App("shop")
billing = App("billing")
mails = Group("mails", ordering="none", concurrency="auto", rate="10/s", on_dead="continue")


@shop.source()
async def till(publish: Publish) -> None:
    """What is asked for at the till."""
    await publish(made())


def made() -> OrderPlaced:
    return msgspec.json.decode(b"{}", type=OrderPlaced)


shop.webhook("/hooks/git", verify=github("secret of sixteen"), to={"push": Pushed})
shop.deliver(OrderPaid, to="https://partner.example/events", secret=SECRET)


@billing.on(OrderPlaced, retry=Retry(attempts=5, first="2s", never=(ValueError,)), timeout="3s")
async def charge(order: OrderPlaced) -> OrderPaid | Refused:
    """Take the money."""
    return OrderPaid(customer=order.customer)


@billing.on(OrderPaid, Refused, group=mails, where="type = 'shop.order.paid'")
async def tell(event: OrderPaid | Refused, ctx: Context) -> None:
    await ctx.publish(Reminded(text="thanks"))


@billing.on(Viewed, batch=Batch(50))
async def count(views: list[Viewed]) -> None: ...


@billing.on(Reading)
async def read(reading: Reading) -> None: ...


@billing.on(topic="shop.orders", group="billing.audit")
async def audit(message: object) -> None: ...


@billing.cron("0 6 * * *", tz="Europe/Berlin")
async def report() -> Reminded:
    return Reminded(text="day")
