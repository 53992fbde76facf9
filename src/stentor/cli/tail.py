"""``stentor tail``: events as they are published."""

from __future__ import annotations

import asyncio
import heapq
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
    """Show events as they are published.

    All topics, or those named; it takes nothing from anybody.

    --json prints CloudEvents in JSON, with the topic as an extension.

    \b
      stentor tail orders --type com.shop.order.placed --from 10m
      stentor tail --where "source = '/shop' AND subject LIKE 'eu-%'"
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

    async def run(self, url: str | None) -> None:
        async with opened(url) as broker:
            if not broker.features.browse:
                raise Unsupported("browsing", broker.features.name, "read it with a group of its own")
            known = await self._known(broker)
            for topic in self._topics:
                if topic not in known:
                    raise NotFound(f"no topic {topic!r}; there are {', '.join(sorted(known)) or 'none'}")
            places = await self._history(broker, list(self._topics or known))
            if self._follow and not self._enough.is_set():
                await self._live(broker, places)

    async def _history(self, broker: Broker, topics: list[str]) -> dict[str, Start]:
        """Print what is there already, by time; returns where to go on in each topic."""
        places: dict[str, Start] = dict.fromkeys(topics, self._start)
        if self._start == "latest":
            return places
        heads: list[tuple[str, str, int, Message]] = []
        streams = {topic: broker.browse(topic, self._start, follow=False) for topic in topics}

        async def advance(topic: str) -> None:
            found = await anext(streams[topic], None)
            if found is not None:
                heapq.heappush(heads, (found[1].time or "", topic, *found))

        for topic in topics:
            await advance(topic)
        while heads and not self._enough.is_set():
            _, topic, offset, message = heapq.heappop(heads)
            places[topic] = offset + 1
            self._take(topic, offset, message)
            await advance(topic)
        return places

    async def _live(self, broker: Broker, places: dict[str, Start]) -> None:
        """Print what comes, from topics that appear meanwhile too."""
        readers = {
            topic: asyncio.create_task(self._follow_one(broker, topic, place)) for topic, place in places.items()
        }
        enough = asyncio.create_task(self._enough.wait())
        try:
            while not self._enough.is_set():
                done, _ = await asyncio.wait(
                    [enough, *readers.values()], timeout=LOOK_AGAIN, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()  # a reader ends by its error
                for topic in () if self._topics else await self._known(broker):
                    if topic not in readers:
                        readers[topic] = asyncio.create_task(self._follow_one(broker, topic, "earliest"))
        finally:
            for task in (enough, *readers.values()):
                task.cancel()
            await asyncio.gather(enough, *readers.values(), return_exceptions=True)

    async def _follow_one(self, broker: Broker, topic: str, place: Start) -> None:
        async for offset, message in broker.browse(topic, place, follow=True):
            self._take(topic, offset, message)

    async def _known(self, broker: Broker) -> list[str]:
        names = [topic.name for topic in await broker.admin.topics()]
        return [name for name in names if self._everything or name in self._topics or not name.startswith(INTERNAL)]

    def _take(self, topic: str, offset: int, message: Message) -> None:
        """Print a message if it is wanted, and there is room under the limit."""
        if self._enough.is_set() or not self._wanted(message):
            return
        self._print(topic, offset, message)
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                self._enough.set()

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
