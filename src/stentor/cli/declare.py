"""``stentor declare``: the deploy step."""

from __future__ import annotations

import asyncio

import click

from stentor.app import App
from stentor.cli.load import load_app
from stentor.cli.options import broker_option
from stentor.cli.session import describe
from stentor.cli.topics import INTERNAL


@click.command()
@click.argument("target", metavar="MODULE:APP")
@broker_option
@click.option("--new-groups", is_flag=True, help="Accept new groups although others lost their handler.")
def declare(target: str, url: str | None, new_groups: bool) -> None:
    """Make an app's topics and groups: the deploy step.

    Run it before the first process that publishes: a declared group misses nothing, also while none of its members
    runs. Doing it twice changes nothing.
    """
    asyncio.run(_declare(load_app(target), url, new_groups))


async def _declare(app: App, url: str | None, new_groups: bool) -> None:
    async with app.running(url=url, new_groups=new_groups, connect_only=True) as program:
        click.echo(f"{app.name} on {describe(program.url, program.broker)}")
        groups = program.subscriptions()
        width = max(map(len, groups), default=0)
        for name, group in groups.items():
            topics = [topic for topic in group.topics if not topic.startswith(INTERNAL)]
            note = " (each running instance)" if group.instance else ""
            click.echo(f"  {name.ljust(width)}  reads {', '.join(topics) or 'its own timers and sources'}{note}")
