"""``stentor mirror``: topics from one broker to another."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click

from stentor.broker import Broker
from stentor.cli.exits import FAILED, advise
from stentor.cli.options import json_option
from stentor.cli.output import plural, print_json, print_table
from stentor.cli.session import opened
from stentor.connect import connect
from stentor.errors import ConfigError, Unsupported
from stentor.message import dead_topic
from stentor.patterns.compare import Comparison, compare
from stentor.patterns.mirror import Mirror

SAY = 2.0
"""Seconds between two lines of progress."""


@click.command()
@click.argument("source", metavar="FROM-URL")
@click.argument("target", metavar="TO-URL")
@click.option("--topic", "topics", metavar="NAME", multiple=True, help="Only this topic; may be repeated.")
@click.option("--follow", is_flag=True, help="Go on with what is published, until Ctrl-C or SIGTERM.")
@click.option("--groups/--no-groups", default=True, help="With what the groups have, or the events alone.")
@click.option("--verify", is_flag=True, help="Then compare: counts, contents and the order of each key.")
@click.option("--name", default="", metavar="NAME", help="Tells several mirrors of one source apart.")
@json_option
def mirror(
    source: str,
    target: str,
    topics: tuple[str, ...],
    follow: bool,
    groups: bool,
    verify: bool,
    name: str,
    as_json: bool,
) -> None:
    """Copy topics from one broker to another, keeping id, key, order and time.

    Begin with --follow while the app runs; it copies events only. Then stop the app and run it without: it copies the
    rest, the delayed events, and what each group has: its place, retries, dead letters, timers and sources. A run that
    was killed is continued by the next.

    \b
      stentor mirror sqlite:///stentor.db kafka://broker:9092 --follow
      stentor mirror sqlite:///stentor.db kafka://broker:9092 --verify
    """  # noqa: D301
    if follow and verify:
        raise click.UsageError("--verify is for the end: run it without --follow")
    if source == target:
        raise click.UsageError("FROM-URL and TO-URL are the same")
    if not asyncio.run(_mirror(source, target, topics, follow, groups, verify, name, as_json)):
        sys.exit(FAILED)


@asynccontextmanager
async def _target(url: str) -> AsyncIterator[Broker]:
    broker = connect(url)
    if not broker.features.shared:
        raise ConfigError(f"{url} lives inside one process, so nothing that is copied there would be seen")
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


async def _mirror(
    source: str,
    target: str,
    topics: tuple[str, ...],
    follow: bool,
    groups: bool,
    verify: bool,
    name: str,
    as_json: bool,
) -> bool:
    async with opened(source) as old, _target(target) as new:
        for broker in (old, new):
            if not broker.features.browse and (verify or (groups and not follow)):
                raise Unsupported("browsing", broker.features.name, "say --no-groups, and do not --verify")
        async with Mirror(old, new, topics, groups=groups, name=name) as work:
            saying = asyncio.create_task(_say(work))
            try:
                moved: list[str] = []
                if follow:
                    await work.copy(follow=_stopped())
                else:
                    moved = await work.finish()
            finally:
                saying.cancel()
                await asyncio.gather(saying, return_exceptions=True)
            left = await work.behind()
            checked = [*work.topics, *(dead_topic(group.name) for group in work.groups)]
        if not as_json:
            click.echo(f"copied {plural(work.copied, 'event')}" + (f", {left:,} to go" if left else ""))
            if moved:
                click.echo(f"moved {plural(len(moved), 'group')}: {', '.join(moved)}")
        else:
            print_json({"copied": work.copied, "left": left, "groups": moved})
        if left and not follow:
            advise("something still publishes at the source: stop it, and run this again")
        return not verify or await _verify(old, new, checked, as_json)


def _stopped() -> asyncio.Event:
    """An event that is set by Ctrl-C or SIGTERM."""
    event = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    return event


async def _say(work: Mirror) -> None:
    """A line of progress on standard error now and then, when there was some."""
    said, since = 0, time.monotonic()
    while True:
        await asyncio.sleep(SAY)
        if work.copied != said:
            now = time.monotonic()
            rate = (work.copied - said) / (now - since)
            click.echo(f"{work.copied:,} copied, {rate:,.0f}/s, {await work.behind():,} to go", err=True)
            said, since = work.copied, now


async def _verify(old: Broker, new: Broker, topics: list[str], as_json: bool) -> bool:
    found = [await compare(old, new, topic) for topic in topics]
    if as_json:
        for one in found:
            print_json(one)
    else:
        shown = [one for one in found if one.events or one.delayed or one.extra]
        print_table(("topic", ">events", ">keys", ">delayed", "~compared"), [_row(one) for one in shown])
    return all(one.same for one in found)


def _row(one: Comparison) -> tuple[str, str, str, str, str]:
    faults = [
        f"{count:,} {what}"
        for count, what in (
            (one.missing, "missing"), (one.doubled, "doubled"), (one.changed, "changed"),
            (one.moved, "keys out of order"),
        )
        if count
    ]  # fmt: skip
    said = ", ".join(faults) or "the same"
    extra = f"; {one.extra:,} only at the target" if one.extra else ""
    return one.topic, f"{one.events:,}", f"{one.keys:,}", f"{one.delayed:,}", said + extra
