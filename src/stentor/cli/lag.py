"""``stentor lag``: what each group has still to do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import click

from stentor.broker import Broker
from stentor.cli.exits import NotFound
from stentor.cli.options import broker_option, duration, json_option
from stentor.cli.output import console, is_terminal, make_table, print_json, print_table
from stentor.cli.session import opened
from stentor.cli.topics import INTERNAL
from stentor.clock import iso, seconds
from stentor.message import Lag
from stentor.observe.text import span

COLUMNS = ("~group", "~topic", ">waiting", ">oldest", ">parked", ">members")


@click.command()
@click.argument("names", metavar="[GROUP]...", nargs=-1)
@click.option("--watch", "-w", is_flag=True, help="Go on, until Ctrl-C.")
@click.option("--interval", metavar="TIME", default="1s", callback=duration, show_default=True, help="For --watch.")
@click.option("--all", "everything", is_flag=True, help="Stentor's own topics too, such as timers.")
@broker_option
@json_option
def lag(names: tuple[str, ...], watch: bool, interval: str, everything: bool, url: str | None, as_json: bool) -> None:
    """Show what each group has still to do.

    "waiting" events are in the topic; "parked" ones failed and wait for their next attempt, or wait behind one that
    does, or behind a dead letter.
    """
    asyncio.run(_lag(names, url, seconds(interval) if watch else None, everything=everything, as_json=as_json))


async def _lag(
    names: Sequence[str], url: str | None, interval: float | None, *, everything: bool, as_json: bool
) -> None:
    async with opened(url) as broker:
        if interval is None:
            _print(await _ask(broker, names, everything=everything), as_json=as_json)
        elif as_json or not is_terminal():
            while True:
                _print(await _ask(broker, names, everything=everything), as_json=as_json)
                await asyncio.sleep(interval)
        else:
            from rich.live import Live

            with Live(console=console(), auto_refresh=False) as live:
                while True:
                    found = await _ask(broker, names, everything=everything)
                    live.update(make_table(COLUMNS, map(_row, found)), refresh=True)
                    await asyncio.sleep(interval)


async def _ask(broker: Broker, names: Sequence[str], *, everything: bool) -> list[Lag]:
    found = await broker.admin.lag()
    known = {entry.group for entry in found}
    for name in names:
        if name not in known:
            raise NotFound(f"no group {name!r}; there are {', '.join(sorted(known)) or 'none'}")
    return [
        entry
        for entry in found
        if (not names or entry.group in names) and (everything or not entry.topic.startswith(INTERNAL) or entry.parked)
    ]


def _row(entry: Lag) -> tuple[Any, ...]:
    idle = entry.members == 0
    return (
        entry.group, entry.topic, (f"{entry.events:,}", "red" if idle and entry.events else ""),
        span(entry.seconds) if entry.events else "-", (f"{entry.parked:,}", "yellow" if entry.parked else ""),
        (str(entry.members), "red" if idle and entry.events + entry.parked else ""),
    )  # fmt: skip


def _print(found: Sequence[Lag], *, as_json: bool) -> None:
    if as_json:
        import time

        now = iso(time.time())
        for entry in found:
            print_json(
                {
                    "time": now, "group": entry.group, "topic": entry.topic, "events": entry.events,
                    "seconds": round(entry.seconds, 3), "parked": entry.parked, "members": entry.members,
                }
            )  # fmt: skip
    elif not found:
        click.echo("no groups; `stentor declare MODULE:APP` makes those of an app")
    else:
        print_table(COLUMNS, [_row(entry) for entry in found])
