"""The order for peers that decode with pydantic; a module of its own, because only they need it installed."""

from pydantic import BaseModel


class PydanticOrder(BaseModel):
    order_id: str
    customer: str
    amount: float
    currency: str
    items: list[str]
    sent: int
    note: str
