"""``stentor topics``: what there is to read."""

from __future__ import annotations

import time

import click

from stentor.cli.options import broker_option, json_option
from stentor.cli.output import ago, print_json, print_table, size
from stentor.cli.session import with_broker
from stentor.clock import iso

INTERNAL = "stentor."
"""What the names of Stentor's own topics begin with."""


@click.command()
@click.option("--all", "everything", is_flag=True, help="Stentor's own topics too: dead letters, timers, sources.")
@broker_option
@json_option
def topics(everything: bool, url: str | None, as_json: bool) -> None:
    """List the topics and what they hold."""
    found = with_broker(url, lambda broker: broker.admin.topics())
    found = [topic for topic in found if everything or not topic.name.startswith(INTERNAL)]
    if as_json:
        for topic in found:
            print_json(
                {
                    "name": topic.name,
                    "events": topic.events,
                    "bytes": topic.bytes,
                    "oldest": None if topic.oldest is None else iso(topic.oldest),
                    "newest": None if topic.newest is None else iso(topic.newest),
                }
            )
        return
    if not found:
        click.echo("no topics; `stentor declare MODULE:APP` makes those of an app")
        return
    now = time.time()
    rows = [
        (topic.name, f"{topic.events:,}", size(topic.bytes), ago(topic.oldest, now), ago(topic.newest, now))
        for topic in found
    ]
    print_table(("~topic", ">events", ">size", "oldest", "newest"), rows)
