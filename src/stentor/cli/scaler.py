"""``stentor scaler``: tells KEDA how many processes a group needs."""

from __future__ import annotations

import asyncio
import signal

import click

from stentor.cli import logs
from stentor.cli.options import broker_option
from stentor.cli.session import opened


@click.command()
@click.option("--listen", metavar="HOST:PORT", default="0.0.0.0:50051", show_default=True, help="Where KEDA asks.")
@broker_option
def scaler(listen: str, url: str | None) -> None:
    """Tell KEDA how many processes a group needs, as an external scaler.

    A trigger of a ScaledObject has type external, this address as scalerAddress, and in its metadata group (the full
    name), lag (how old the oldest waiting event may be, 10s), and, to scale by what comes in as well, url (the
    processes' HTTP, by a name that stands for all their addresses) and busy (0.7). With ahead (the time that a new
    process takes to start) what is foreseen to come then counts too, once the forecast was closer for a day than to say
    that all stays as it is.
    """
    logs.set_up("info", as_json=False)
    asyncio.run(_serve(listen, url))


async def _serve(listen: str, url: str | None) -> None:
    from stentor.scaling.keda import Scaler, serve

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with opened(url) as broker, serve(Scaler(broker), listen) as port:
        click.echo(f"answering KEDA at port {port} for the groups of {broker.features.name}")
        await stop.wait()
