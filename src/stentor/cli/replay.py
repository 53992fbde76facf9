"""``stentor replay``: set a group back."""

from __future__ import annotations

import asyncio

import click

from stentor.broker import Broker, Start
from stentor.cli.exits import NotFound
from stentor.cli.options import Place, broker_option, confirm, dry_run_option, json_option, yes_option
from stentor.cli.output import plural, print_json, progress
from stentor.cli.session import opened
from stentor.errors import Unsupported


@click.command()
@click.argument("group")
@click.option(
    "--to", "place", type=Place(), required=True, metavar="earliest|latest|TIME|OFFSET",
    help='Where the group goes on; TIME is "10m" (ago) or ISO 8601.',
)  # fmt: skip
@click.option("--topic", "topics", metavar="NAME", multiple=True, help="Only this topic of the group; may be repeated.")
@dry_run_option
@yes_option
@broker_option
@json_option
def replay(
    group: str, place: Start, topics: tuple[str, ...], dry_run: bool, yes: bool, url: str | None, as_json: bool
) -> None:
    """Set a group back (or forward), so that it sees events again.

    Other groups are not touched. Handlers see ctx.replayed; what they publish gets new ids. Retries above the
    place are forgotten, dead letters stay.
    """
    asyncio.run(_replay(group, place, topics, url, dry_run=dry_run, yes=yes, as_json=as_json))


async def _replay(
    group: str, place: Start, topics: tuple[str, ...], url: str | None, *, dry_run: bool, yes: bool, as_json: bool
) -> None:
    async with opened(url) as broker:
        if not broker.features.replay:
            raise Unsupported("replay", broker.features.name, "publish the events again, or choose a broker with a log")
        known = {info.name: info for info in await broker.admin.groups()}
        if group not in known:
            raise NotFound(f"no group {group!r}; there are {', '.join(sorted(known)) or 'none'}")
        for topic in topics:
            if topic not in known[group].topics:
                raise NotFound(f"group {group} does not read {topic!r}; it reads {', '.join(known[group].topics)}")
        where = f"to {place:%Y-%m-%d %H:%M:%S%z}" if hasattr(place, "year") else f"to {place}"
        if dry_run:
            count = await _count(broker, place, topics or known[group].topics)
        else:
            confirm(f"Set {group} {where}? Its handlers will run again for what they have handled since.", yes)
            count = await broker.admin.replay(group, place, topics)
    if as_json:
        print_json({"group": group, "events": count, "dry_run": dry_run})
    else:
        would = "would see" if dry_run else "sees"
        click.echo(f"{group} {'would be' if dry_run else 'is'} set {where} and {would} {plural(count, 'event')}")


async def _count(broker: Broker, place: Start, topics: tuple[str, ...]) -> int:
    """How many events stand behind a place."""
    if not broker.features.browse:
        raise Unsupported("counting before a replay", broker.features.name, "replay without --dry-run")
    count = 0
    held = sum(topic.events for topic in await broker.admin.topics() if topic.name in topics)
    with progress("counting", held) as advance:
        for topic in topics:
            async for _ in broker.browse(topic, place, follow=False):
                count += 1
                if count % 1000 == 0:
                    advance(count)
    return count
