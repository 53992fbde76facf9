"""What the demo shows: the state of every order as the topics tell it, live on a terminal or as plain lines."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import click

from stentor.cli import shop
from stentor.cli.output import console, is_terminal

if TYPE_CHECKING:
    from rich.console import Group

State = Literal["placed", "trying", "dead", "paid", "shipped"]
STYLES = {"placed": "dim", "trying": "yellow", "dead": "bold red", "paid": "cyan", "shipped": "green"}
SIGNS = {"placed": "·", "trying": "↻", "dead": "✗", "paid": "✓", "shipped": "■"}
ASCII = {"placed": ".", "trying": "~", "dead": "X", "paid": "+", "shipped": "#"}
LEGEND = {"placed": "waits", "trying": "is tried again", "dead": "dead letter", "paid": "paid", "shipped": "shipped"}
LAST = 7
"""How many lines of the story stay on the screen."""


class Board:
    """Every order by customer, with its state; what happened last; and who waits for something to happen."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.orders: dict[str, dict[int, State]] = {name: {} for name in shop.CUSTOMERS}
        self.paid: dict[str, list[int]] = {name: [] for name in shop.CUSTOMERS}
        self.failures = 0
        self.dead = 0
        self.stage = ""
        self.began = time.monotonic()
        self._story: deque[tuple[float, str, str]] = deque(maxlen=LAST)
        self._waiting: list[tuple[Callable[[], bool], asyncio.Event]] = []
        self._live = is_terminal()
        self._signs = SIGNS if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII

    # ---- what happens ---------------------------------------------------------------------------------------------

    def set(self, customer: str, number: int, state: State) -> None:
        """An order is in another state now."""
        known = self.orders[customer]
        if known.get(number) == "shipped" or (known.get(number) == "paid" and state != "shipped"):
            return  # topics are read side by side: the later state may be seen first
        known[number] = state
        if state == "paid":
            self.paid[customer].append(number)
        for reached, event in self._waiting:
            if reached():
                event.set()

    def tell(self, text: str, style: str = "") -> None:
        """A line of the story."""
        at = time.monotonic() - self.began
        self._story.append((at, text, style))
        if not self._live:
            click.echo(f"{at:5.1f} s  {text}")

    def begin(self, stage: str) -> None:
        """A chapter of the story."""
        self.stage = stage
        if not self._live:
            click.echo(f"\n{stage}")

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait until the board is in a state."""
        event = asyncio.Event()
        entry = (reached, event)
        self._waiting.append(entry)
        if not reached():
            await event.wait()
        self._waiting.remove(entry)

    def count(self, *states: State, but: str = "") -> int:
        """How many orders are in one of these states, one customer left out."""
        return sum(state in states for name, orders in self.orders.items() if name != but for state in orders.values())

    # ---- how it looks ---------------------------------------------------------------------------------------------

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the board while the body runs, on a terminal."""
        if not self._live:
            click.echo(f"A shop on {self.where}")
            yield
            return
        from rich.live import Live

        with Live(console=console(), get_renderable=self._render, refresh_per_second=12):
            yield

    def _render(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        signs = self._signs
        lines = [
            Text.assemble(("Stentor demo", "bold"), f"  {time.monotonic() - self.began:4.1f} s"),
            Text(f"A shop on {self.where}", style="dim", no_wrap=True, overflow="ellipsis"),
            Text(),
        ]
        for name, orders in self.orders.items():
            line = Text(f"  {name:7}", no_wrap=True)
            for number, state in sorted(orders.items()):
                line.append(f" {number:3}{signs[state]}", STYLES[state])
            lines.append(line)
        legend = Text("  ", no_wrap=True)
        for shown, meaning in LEGEND.items():
            legend.append(f"  {signs[shown]} {meaning}", STYLES[shown])
        lines += [
            Text(),
            legend,
            Text(),
            Text(self.stage + "\n" * (2 - len(self.stage.splitlines())), style="bold"),
            Text(),
        ]
        lines += [
            Text(f"  {at:5.1f} s  {text}", style=style, no_wrap=True, overflow="ellipsis")
            for at, text, style in self._story
        ]
        lines += [Text()] * (LAST - len(self._story))
        return Group(*lines)
