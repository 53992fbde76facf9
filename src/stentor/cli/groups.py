"""``stentor groups``: who reads."""

from __future__ import annotations

import click

from stentor.broker import Broker
from stentor.cli.exits import NotFound
from stentor.cli.options import broker_option, confirm, json_option, yes_option
from stentor.cli.output import plural, print_json, print_table
from stentor.cli.session import with_broker


@click.group()
def groups() -> None:
    """List, rename or drop consumer groups.

    A group is declared by the app that has its handlers; it has a place of its own in each topic, and misses nothing
    while none of its members runs.
    """


@groups.command("list")
@broker_option
@json_option
def list_(url: str | None, as_json: bool) -> None:
    """List the groups, what they read, and how many processes run each."""
    found = with_broker(url, lambda broker: broker.admin.groups())
    if as_json:
        for group in found:
            print_json(group)
        return
    if not found:
        click.echo("no groups; `stentor declare MODULE:APP` makes those of an app")
        return
    rows = [(group.name, group.app, ", ".join(group.topics), group.members or ("0", "yellow")) for group in found]
    print_table(("group", "app", "~topics", ">members"), rows)


@groups.command()
@click.argument("old")
@click.argument("new")
@broker_option
def rename(old: str, new: str, url: str | None) -> None:
    """Give a group another name; it keeps its place, its journal and its dead letters."""
    with_broker(url, lambda broker: broker.admin.rename_group(old, new))
    click.echo(f"{old} is now called {new}; its app must call it so too, before it runs again")


@groups.command()
@click.argument("name")
@yes_option
@broker_option
def drop(name: str, yes: bool, url: str | None) -> None:
    """Forget a group: its place, and what waits in its journal. Its dead letters stay."""
    waiting = with_broker(url, lambda broker: _waiting(broker, name))
    loses = f" It has {plural(waiting, 'event')} still to handle, which it will never see." if waiting else ""
    confirm(f"Drop group {name}?{loses}", yes)
    with_broker(url, lambda broker: broker.admin.drop_group(name))
    click.echo(f"{name} is dropped; declared again, it starts anew")


async def _waiting(broker: Broker, name: str) -> int:
    names = [group.name for group in await broker.admin.groups()]
    if name not in names:
        raise NotFound(f"no group {name!r}; there are {', '.join(names) or 'none'}")
    return sum(lag.events + lag.parked for lag in await broker.admin.lag() if lag.group == name)
