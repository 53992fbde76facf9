"""``stentor docs``: a document and a picture of services, and what changed in their events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from stentor.cli.exits import FAILED
from stentor.cli.load import load_app
from stentor.cli.options import broker_option
from stentor.cli.output import plural
from stentor.connect import BrokerUrl, broker_url


@click.command()
@click.option("--app", "apps", metavar="MODULE:APP", multiple=True, required=True, help="A service; may be repeated.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Where asyncapi.json and index.html go.")
@click.option("--diff", metavar="OLD", type=click.Path(path_type=Path), help="An asyncapi.json of before.")
@click.option(
    "--config", metavar="FILE", type=click.Path(path_type=Path),
    help="The settings of a gateway between the services: see `stentor gateway`.",
)  # fmt: skip
@click.option("--version", default="1.0.0", show_default=True, help="The version of what is described.")
@broker_option
@click.pass_context
def docs(
    ctx: click.Context, apps: tuple[str, ...], out: Path | None, diff: Path | None, config: Path | None, version: str,
    url: str | None,
) -> None:  # fmt: skip
    """Write an AsyncAPI document and a picture of services, or tell what changed.

    --diff compares with a document of before, and exits with 1 when a change breaks those who read or wrote events
    then: a field that is gone or of another type, another key or topic.

    \b
      stentor docs --app shop:app --app billing:app --out site
      stentor docs --app shop:app --app billing:app --diff asyncapi.json
    """  # noqa: D301
    from stentor.docs.asyncapi import document
    from stentor.docs.files import read, write
    from stentor.docs.overview import overview
    from stentor.docs.page import page
    from stentor.gateway.routes import load

    if out is None and diff is None:
        raise click.UsageError("say --out DIR, --diff OLD, or both")
    found = [load_app(target) for target in apps]
    old = None if diff is None else read(diff)
    if config is None:
        whole = overview(found, BrokerUrl(broker_url(url)))
    else:
        whole = overview(found, None, load(found, config))
    new = document(whole, version)
    if out is not None:
        text = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
        write(out, {"asyncapi.json": text, "index.html": page(whole, new)})
        events, services = plural(len(whole.events), "event"), plural(len(whole.services), "service")
        click.echo(f"{out}: asyncapi.json and index.html, {events} of {services}")
    if old is not None and _tell(old, new):
        ctx.exit(FAILED)


def _tell(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Print the changes; whether any of them breaks."""
    from stentor.docs.diff import changes

    found = changes(old, new)
    for change in found:
        click.echo(f"{click.style('breaks', fg='red') if change.breaking else '      '}  {change}")
    breaking = sum(change.breaking for change in found)
    if not found:
        click.echo("no event changed")
    elif breaking:
        click.echo(
            f"{plural(breaking, 'change')} would break somebody: give the event a higher version and an upcast, or a "
            "new type",
            err=True,
        )
    return breaking > 0
