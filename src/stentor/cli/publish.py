"""``stentor publish``: events from the command line."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import click
import msgspec

from stentor.broker import Broker
from stentor.catalog import Catalog
from stentor.cli.load import learn_events, load_app
from stentor.cli.options import Moment, broker_option, duration, json_option
from stentor.cli.output import plural, print_json, progress
from stentor.cli.session import opened
from stentor.clock import SystemClock
from stentor.errors import InvalidEvent, UnknownTopic
from stentor.event import Outgoing
from stentor.message import Attribute, Message, Receipt

TOGETHER = 500
SOURCE = "/stentor/publish"


def _headers(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals:
            raise click.BadParameter(f"{value!r}: write name=value")
        found[name] = text
    return found


@click.command()
@click.argument("what", metavar="[MODULE:APP] TYPE JSON", nargs=-1, required=True)
@click.option("--topic", metavar="NAME", help="Where to, for a type that the app does not know; default: the type.")
@click.option("--key", metavar="KEY", help="Instead of the event's own key.")
@click.option("--delay", metavar="TIME", callback=duration, help='Hold it back: "30s", "2h".')
@click.option("--at", type=Moment(), help="Hold it back until then.")
@click.option("--id", metavar="ID", help="Its id, so that a repetition is recognised.")
@click.option("--time", type=Moment(), help="When it happened; default now.")
@click.option("--source", metavar="URI", help="Who says so; default the app.")
@click.option("--subject", metavar="TEXT", help="What it is about.")
@click.option(
    "--header", "headers", metavar="NAME=VALUE", multiple=True, callback=_headers, help="A CloudEvents extension."
)
@click.option("--version", type=click.IntRange(1), metavar="N", help="The version of its data.")
@broker_option
@json_option
def publish(
    what: tuple[str, ...],
    topic: str | None,
    key: str | None,
    version: int | None,
    url: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Publish an event, or many from standard input.

    With MODULE:APP the event is checked against its class, and the app's topics are declared; without, it is known by
    its name only. JSON is an object, or @FILE, or - for standard input; FILE and standard input hold one object a line.

    \b
      stentor publish shop.app order.placed '{"order_id": "1", "amount": 9.5}'
      stentor publish order.placed '{"order_id": "1"}' --topic orders --key 1
      stentor publish shop.app order.placed - < orders.jsonl
    """  # noqa: D301
    if len(what) not in (2, 3):
        raise click.UsageError("say [MODULE:APP] TYPE JSON; quote the JSON, so that the shell leaves it whole")
    type, data = what[-2:]
    many = data == "-" or data.startswith("@")
    if many and options["id"]:
        raise click.UsageError("--id is for one event")
    target = what[0] if len(what) == 3 else None
    options = {name: value for name, value in options.items() if value}

    def make(catalog: Catalog, text: str, line: int | None) -> Message:
        where = "" if line is None else f"line {line}: "
        try:
            value = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            raise InvalidEvent(f"{where}this is no JSON ({error}): {text.strip()[:80]}") from None
        try:
            known = topic is None and catalog.find(type) is not None
            event = catalog.named(type, value, version, topic, None if known else key)
            return catalog.encode(Outgoing(event, key=key, **options), catalog.stamp())
        except InvalidEvent as error:
            raise InvalidEvent(f"{where}{error}") from None

    asyncio.run(_publish(target, url, data, make, many=many, as_json=as_json))


async def _publish(target: str | None, url: str | None, data: str, make: Any, *, many: bool, as_json: bool) -> None:
    async with _connected(target, url) as (broker, catalog):
        if not many:
            [receipt] = await _send(broker, [make(catalog, data, None)])
            _tell(receipt, as_json)
            return
        count = 0
        lines = _lines(data)
        with progress("publishing", None) as advance:
            while some := list(islice(lines, TOGETHER)):
                receipts = await _send(broker, [make(catalog, text, line) for line, text in some])
                count += len(receipts)
                advance(count)
                if as_json:
                    for receipt in receipts:
                        print_json(receipt)
    if not as_json:
        click.echo(f"published {plural(count, 'event')}")


@asynccontextmanager
async def _connected(target: str | None, url: str | None) -> AsyncIterator[tuple[Broker, Catalog]]:
    if target is None:
        async with opened(url) as broker:
            yield broker, Catalog(SOURCE, SystemClock())
    else:
        app = load_app(target)
        learn_events(app, target)
        async with app.running(url=url, connect_only=True) as program:
            yield program.broker, app.catalog


async def _send(broker: Broker, messages: list[Message]) -> Sequence[Receipt]:
    try:
        return await broker.publish(messages)
    except UnknownTopic as error:
        known = [topic.name for topic in await broker.admin.topics() if not topic.name.startswith("stentor.")]
        raise UnknownTopic(f"{error}; say --topic: there are {', '.join(known) or 'none'}") from None


def _lines(data: str) -> Iterator[tuple[int, str]]:
    if data == "-":
        numbered = enumerate(sys.stdin, 1)
        yield from ((number, line) for number, line in numbered if line.strip())
        return
    path = Path(data[1:])
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise click.UsageError(f"{path}: {error.strerror}") from None


def _tell(receipt: Receipt, as_json: bool) -> None:
    if as_json:
        print_json(receipt)
    elif receipt.duplicate:
        click.echo(f"{receipt.id} was published to {receipt.topic} before; it is not stored twice")
    elif receipt.position is None:
        click.echo(f"{receipt.id} waits for its time; stop it with: stentor cancel {receipt.id}")
    else:
        click.echo(f"published {receipt.id} to {receipt.topic} at offset {receipt.position}")
