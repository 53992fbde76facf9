"""``stentor tail``: events as they are published."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from typing import Any

import click
import msgspec

from stentor.broker import Broker, Start
from stentor.cesql import CesqlSyntaxError, parse
from stentor.cli.exits import NotFound
from stentor.cli.options import Place, broker_option, json_option
from stentor.cli.output import is_terminal, local, print_json, printable
from stentor.cli.session import opened
from stentor.cli.topics import INTERNAL
from stentor.clock import parse_iso
from stentor.cloudevents import attributes, to_structured
from stentor.errors import ConfigError, Unsupported
from stentor.message import Message

LOOK_AGAIN = 1.0
"""Seconds between looks for new topics."""
Wanted = Callable[[Message], bool]


@click.command()
@click.argument("topics", metavar="[TOPIC]...", nargs=-1)
@click.option("--type", "types", metavar="TYPE", multiple=True, help="Only events of this type; may be repeated.")
@click.option("--key", "keys", metavar="KEY", multiple=True, help="Only events with this key; may be repeated.")
@click.option("--where", metavar="CESQL", help="Only events that a CloudEvents SQL expression takes.")
@click.option(
    "--from", "start", type=Place(), default="latest", show_default=True, metavar="earliest|latest|TIME|OFFSET",
    help="Where to begin.",
)  # fmt: skip
@click.option("--limit", "-n", metavar="N", type=click.IntRange(1), help="End after so many.")
@click.option("--follow/--no-follow", default=True, help="Wait for new events; else end at the newest.")
@click.option("--all", "everything", is_flag=True, help="Stentor's own topics too: dead letters, timers.")
@broker_option
@json_option
def tail(
    topics: tuple[str, ...],
    types: tuple[str, ...],
    keys: tuple[str, ...],
    where: str | None,
    start: Start,
    limit: int | None,
    follow: bool,
    everything: bool,
    url: str | None,
    as_json: bool,
) -> None:
    """Show events as they are published; all topics, or some. It takes nothing from anybody.

    --json prints CloudEvents in JSON, with the topic as an extension.

    \b
      stentor tail orders --type com.shop.order.placed --from 10m
      stentor tail --where "subject LIKE 'eu-%' AND amount > 100"
    """  # noqa: D301
    if isinstance(start, int) and len(topics) != 1:
        raise click.UsageError("an offset is a place in one topic; name that topic")
    wanted = _wanted(types, keys, where)
    asyncio.run(_Tail(topics, start, wanted, limit, follow, everything, as_json).run(url))


def _wanted(types: tuple[str, ...], keys: tuple[str, ...], where: str | None) -> Wanted:
    expression = None
    if where is not None:
        try:
            expression = parse(where)
        except CesqlSyntaxError as error:
            raise ConfigError(f"--where: {error}") from None

    def wanted(message: Message) -> bool:
        if types and message.type not in types:
            return False
        if keys and message.key not in keys:
            return False
        return expression is None or expression.matches(attributes(message))

    return wanted


class _Tail:
    """Reads several topics at once, and prints what is wanted."""

    def __init__(
        self, topics: tuple[str, ...], start: Start, wanted: Wanted, limit: int | None, follow: bool, everything: bool,
        as_json: bool,
    ) -> None:  # fmt: skip
        self._topics = topics
        self._start = start
        self._wanted = wanted
        self._left = limit
        self._follow = follow
        self._everything = everything
        self._as_json = as_json
        self._width = shutil.get_terminal_size().columns if is_terminal() else None
        self._enough = asyncio.Event()
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def run(self, url: str | None) -> None:
        async with opened(url) as broker:
            if not broker.features.browse:
                raise Unsupported("browsing", broker.features.name, "read it with a group of its own")
            known = await self._known(broker)
            for topic in self._topics:
                if topic not in known:
                    raise NotFound(f"no topic {topic!r}; there are {', '.join(sorted(known)) or 'none'}")
            for topic in self._topics or known:
                self._read(broker, topic, self._start)
            try:
                while await self._wait(broker):
                    pass
            finally:
                for task in self._readers.values():
                    task.cancel()
                await asyncio.gather(*self._readers.values(), return_exceptions=True)

    async def _wait(self, broker: Broker) -> bool:
        """Go on for a while; False at the end."""
        enough = asyncio.create_task(self._enough.wait())
        waits = [enough, *(() if self._follow else [asyncio.gather(*self._readers.values())])]
        readers = [] if not self._follow else list(self._readers.values())
        done, _ = await asyncio.wait([*waits, *readers], timeout=LOOK_AGAIN, return_when=asyncio.FIRST_COMPLETED)
        enough.cancel()
        for task in done:
            if task is not enough:
                task.result()  # a reader ends by its error only, unless it does not follow
        if self._enough.is_set() or (done and not self._follow):
            return False
        if self._follow and not self._topics:
            for topic in await self._known(broker):
                if topic not in self._readers:
                    self._read(broker, topic, "earliest")  # it is new, and all in it too
        return True

    async def _known(self, broker: Broker) -> list[str]:
        names = [topic.name for topic in await broker.admin.topics()]
        return [name for name in names if self._everything or name in self._topics or not name.startswith(INTERNAL)]

    def _read(self, broker: Broker, topic: str, start: Start) -> None:
        self._readers[topic] = asyncio.create_task(self._print_from(broker, topic, start))

    async def _print_from(self, broker: Broker, topic: str, start: Start) -> None:
        async for offset, message in broker.browse(topic, start, follow=self._follow):
            if self._enough.is_set():
                return
            if self._wanted(message):
                self._print(topic, offset, message)
                if self._left is not None:
                    self._left -= 1
                    if self._left == 0:
                        self._enough.set()
                        return

    def _print(self, topic: str, offset: int, message: Message) -> None:
        if self._as_json:
            event: dict[str, Any] = msgspec.json.decode(to_structured(message))
            print_json({**event, "topic": topic, "sequence": f"{offset:020d}"})
            return
        when = local(parse_iso(message.time), day=False) if message.time else "-"
        what = message.type or "(plain JSON)"
        data = printable(message.data.decode("utf-8", "backslashreplace"))
        parts: list[tuple[str, dict[str, Any]]] = [
            (when, {"dim": True}),
            (f"{topic}@{offset}", {"fg": "cyan"}),
            (what, {"bold": True}),
        ]
        parts += [(message.key, {"fg": "yellow"})] if message.key is not None else []
        used = sum(len(text) + 2 for text, _ in parts)
        if self._width is not None and used + len(data) > self._width:
            data = data[: max(self._width - used - 1, 20)] + "…"
        click.echo("  ".join(click.style(printable(text), **style) for text, style in parts) + f"  {data}")
