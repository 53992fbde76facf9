"""``stentor demo``: a small shop, a bank that fails, and what becomes of the orders."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import click

from stentor.broker import Broker
from stentor.cli import shop
from stentor.cli.demo_board import Board
from stentor.cli.output import plural
from stentor.message import dead_topic, decode_dead_letter
from stentor.patterns.dead_letter import DeadLetters, Filter

UNLUCKY = "Dora"
OUT_FROM = 2
"""The order of hers from which on the bank is out for her."""
FAILS = 0.15
"""The share of the other calls that fail."""
LIMIT = 60.0
READING = 3.0
"""Seconds to take in what is on the screen."""


class FlakyBank:
    """A bank that fails at times, and for one customer always, until it is mended."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._random = random.Random(7)  # noqa: S311  the same story each time
        self._attempts: dict[int, int] = {}
        self.calls = 0
        self.mended = False

    async def charge(self, customer: str, number: int, amount: float) -> str:
        self.calls += 1
        attempt = self._attempts[number] = self._attempts.get(number, 0) + 1
        self._board.set(customer, number, "trying" if attempt > 1 else "placed")
        await asyncio.sleep(self._random.uniform(0.05, 0.2))
        placed = sorted(self._board.orders[customer]).index(number) + 1
        out = customer == UNLUCKY and placed >= OUT_FROM and not self.mended
        if out or (customer != UNLUCKY and attempt < 3 and self._random.random() < FAILS):
            error = "no connection to her bank" if out else "connection reset"
            self._board.failures += 1
            self._board.set(customer, number, "trying")
            self._board.tell(f"order {number} of {customer}: attempt {attempt} failed, {error}", "yellow")
            raise ConnectionError(error)
        return f"{customer}-{number}-{amount:.2f}"


@click.command()
@click.option("--keep", is_flag=True, help="Keep the database, to look at it with the other commands.")
@click.option("--source", is_flag=True, help="Print the program of the shop instead.")
@click.pass_context
def demo(ctx: click.Context, keep: bool, source: bool) -> None:
    """Watch a small shop: order, retries, a dead letter and its redrive.

    Needs no data and no network, and ends by itself after some 15 seconds.
    """
    if source:
        click.echo(Path(shop.__file__).read_text(encoding="utf-8"), nl=False)
        return
    logging.getLogger("stentor").setLevel(logging.CRITICAL)  # what fails is part of the story here
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the file goes also when the terminal is closed
        signal.signal(number, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="stentor-demo-"))
    path = folder / "shop.db"
    try:
        asyncio.run(_play(path))
    except TimeoutError:
        raise click.ClickException(f"the demo did not end within {LIMIT:g} s; is this machine very busy?") from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    _next_steps(path if keep else None)
    ctx.exit(0)


async def _play(path: Path) -> None:
    board = Board(str(path))
    bank = FlakyBank(board)

    async def open_bank() -> AsyncIterator[shop.Bank]:
        yield bank

    async with asyncio.timeout(LIMIT):
        async with shop.app.running(url=f"sqlite:///{path}", overrides={shop.open_bank: open_bank}) as program:
            broker = program.broker
            watching = [asyncio.create_task(_watch(broker, topic, board)) for topic in _TOPICS]
            try:
                with board.shown():
                    held = await _story(board, bank, broker)
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)
            stored = sum([topic.events for topic in await broker.admin.topics()])
        _summary(board, bank, held, stored)


async def _story(board: Board, bank: FlakyBank, broker: Broker) -> int:
    """The three chapters; returns how many orders were held behind the dead one."""
    board.begin("1  Orders come in. The bank fails at times, so payments are tried again.")
    await board.until(lambda: board.dead > 0)
    board.begin(
        f"2  {UNLUCKY}'s payment failed for good: a dead letter. Her later orders wait\n   behind it; nobody else's do."
    )
    others = shop.ORDERS - shop.ORDERS // len(shop.CUSTOMERS)
    await board.until(
        lambda: board.count("shipped", but=UNLUCKY) == others and sum(map(len, board.orders.values())) == shop.ORDERS
    )
    await asyncio.sleep(READING)
    held = sum([lag.parked for lag in await broker.admin.lag()])
    bank.mended = True
    board.begin(
        "3  Her bank works again. The dead letter is redriven: it comes first,\n   then what was held behind it."
    )
    counts = await DeadLetters(broker).redrive(Filter())
    board.tell(f"redriven: {plural(sum(counts.values()), 'dead letter')}", "bold")
    await board.until(lambda: board.count("shipped") == shop.ORDERS)
    await asyncio.sleep(READING / 2)
    return held


_TOPICS = ("orders", "payments", "shipments", dead_topic("payments"))


async def _watch(broker: Broker, topic: str, board: Board) -> None:
    """Read a topic from beside, as `stentor tail` does, and keep the board up to date."""
    async for _, message in broker.browse(topic, "earliest", follow=True):
        if topic.startswith("stentor.dead."):
            letter = decode_dead_letter(message.data)
            order = shop.app.catalog.read(shop.OrderPlaced.__event__, letter.message)  # type: ignore[attr-defined]
            board.dead += 1
            board.tell(
                f"order {order.number} of {order.customer}: dead letter after {letter.attempts} attempts", "bold red"
            )
            board.set(order.customer, order.number, "dead")
            continue
        spec = shop.app.catalog.find(message.type)
        assert spec is not None
        event = shop.app.catalog.read(spec, message)
        if isinstance(event, shop.OrderPlaced):
            board.orders[event.customer].setdefault(event.number, "placed")
            board.set(event.customer, event.number, board.orders[event.customer][event.number])
        elif isinstance(event, shop.PaymentTaken):
            board.set(event.customer, event.number, "paid")
            if event.customer == UNLUCKY:
                board.tell(f"order {event.number} of {event.customer}: paid", "cyan")
        else:
            board.set(event.customer, event.number, "shipped")


def _summary(board: Board, bank: FlakyBank, held: int, stored: int) -> None:
    """Figures, all counted: from the topics, the bank and the broker."""
    ordered = sum(sorted(orders) == board.paid[name] for name, orders in board.orders.items())
    payments = sum(map(len, board.paid.values()))
    lines = (
        ("orders", f"{board.count('shipped')} of {sum(map(len, board.orders.values()))} placed, paid and shipped"),
        ("payments", f"{payments}, none twice" if payments == board.count("shipped") else f"{payments}"),
        ("order", f"kept for {ordered} of {plural(len(board.orders), 'customer')}"),
        ("retries", f"{plural(bank.calls, 'call')} to the bank, of which {board.failures} failed"),
        ("dead letters", f"{board.dead}, with {plural(held, 'order')} held behind; redriven, then all in order"),
        ("stored", f"{plural(stored, 'event')} on disk, each before its publish returned"),
        ("time", f"{time.monotonic() - board.began:.1f} s"),
    )
    click.echo()
    for name, text in lines:
        click.echo(f"  {click.style(name.ljust(13), bold=True)} {text}")
    if ordered != len(board.orders) or payments != shop.ORDERS:
        raise click.ClickException("that is not what should have happened; please report it")


def _next_steps(kept: Path | None) -> None:
    steps = [
        ("stentor demo --source", "the program that you saw"),
        ("stentor new myshop", "a project of your own, with a test"),
        ("stentor run MODULE:APP", "run it; --broker names another broker"),
    ]
    if kept is not None:
        steps[:0] = [
            (f"export STENTOR_BROKER=sqlite:///{kept}", ""),
            ("stentor dead list --status all", "what became of the dead letter"),
            ("stentor tail --from earliest --no-follow", "all events"),
        ]
    else:
        steps.insert(1, ("stentor demo --keep", "again, and keep the file to look into"))
    width = max(len(command) for command, _ in steps if len(command) < 50)
    click.echo(f"\n{click.style('Next', bold=True)}")
    for command, what in steps:
        click.echo(f"  {click.style(command.ljust(width), fg='cyan')}  {what}".rstrip())
