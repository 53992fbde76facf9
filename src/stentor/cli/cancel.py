"""``stentor cancel``: drop a delayed event."""

from __future__ import annotations

import click

from stentor.broker import Broker
from stentor.cli.exits import NotFound
from stentor.cli.options import broker_option
from stentor.cli.session import with_broker
from stentor.errors import Unsupported


@click.command()
@click.argument("id")
@broker_option
def cancel(id: str, url: str | None) -> None:
    """Drop a delayed event that has not fallen due.

    ID is what its publish gave.
    """
    if not with_broker(url, lambda broker: _cancel(broker, id)):
        raise NotFound(
            f"no delayed event {id!r} waits: it has fallen due, was cancelled before, or was never published"
        )
    click.echo(f"cancelled {id}")


async def _cancel(broker: Broker, id: str) -> bool:
    if not broker.features.cancel:
        raise Unsupported("cancel", broker.features.name, "let the handler decide whether the event still counts")
    return await broker.admin.cancel(id)
