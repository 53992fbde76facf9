"""A program of four handlers with nothing to do, whose memory the row ``footprint`` measures."""

from benchmarks.ours import Order
from stentor import App

app = App("idle")


@app.on(Order)
async def charge(order: Order) -> None: ...


@app.on(Order)
async def ship(order: Order) -> None: ...


@app.on(Order)
async def thank(order: Order) -> None: ...


@app.on(Order)
async def count(order: Order) -> None: ...
