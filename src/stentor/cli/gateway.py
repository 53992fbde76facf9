"""``stentor gateway``: Envoy or APISIX as the event bus between services, and the relay that broadcasts."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from stentor.cli.exits import advise
from stentor.cli.load import load_app
from stentor.cli.output import plural
from stentor.cli.watch import changed_files
from stentor.errors import ConfigError
from stentor.gateway.routes import Model, load

F = TypeVar("F", bound=Callable[..., Any])


def _model_options(function: F) -> F:
    apps = click.option(
        "--app", "apps", metavar="MODULE:APP", multiple=True, required=True, help="A service; may be repeated."
    )
    config = click.option(
        "--config", metavar="FILE", default="gateway.toml", show_default=True, type=click.Path(path_type=Path),
        help="Addresses, identities, limits.",
    )  # fmt: skip
    return apps(config(function))


def _load(apps: tuple[str, ...], config: Path) -> Model:
    model = load([load_app(target) for target in apps], config)
    for note in model.notes:
        advise(note)
    return model


@click.group()
def gateway() -> None:
    """Make Envoy or APISIX the event bus between services.

    Routes are taken from the apps; the file says what only the deployment knows.

    \b
      stentor gateway envoy --app shop:app --app billing:app --out gateway
      envoy -c gateway/bootstrap.json
    """  # noqa: D301


@gateway.command()
@_model_options
@click.option("--out", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Where the files go.")
@click.option("--check", is_flag=True, help="Have envoy validate all of it, before anything is written.")
@click.option("--watch", is_flag=True, help="Write again whenever the file or a .py file changes, until Ctrl-C.")
def envoy(apps: tuple[str, ...], config: Path, out: Path, check: bool, watch: bool) -> None:
    """Write Envoy's bootstrap and the files that it watches."""
    from stentor.gateway import files

    changes = changed_files(".", [config])  # from before the first look at them
    model = _load(apps, config)
    if check:
        files.check(model)
    changed = files.write(model, out)
    routes, services = plural(len(model.routes), "route"), plural(len(model.services), "service")
    click.echo(f"{out}: {routes} to {services}" + ("" if changed else ", as before"))
    if watch:
        command = ["gateway", "envoy", "--config", str(config), "--out", str(out), *(["--check"] if check else [])]
        command += [part for app in apps for part in ("--app", app)]
        asyncio.run(_again(command, changes))


async def _again(command: list[str], changes: AsyncIterator[set[str]]) -> None:
    """Run a command in a process of its own after each change: an app that cannot be loaded changes nothing."""
    async for _ in changes:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "stentor", *command)
        await process.wait()


@gateway.command()
@_model_options
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Where apisix.yaml goes.")
@click.option(
    "--check", metavar="FILE|URL",
    help="Its schemas: of a running APISIX's control API (http://HOST:9090), or a file saved from /v1/schema there.",
)  # fmt: skip
@click.option("--push", metavar="URL", help="Give it to an APISIX in API-driven mode; $APISIX_ADMIN_KEY is its key.")
def apisix(apps: tuple[str, ...], config: Path, out: Path | None, check: str | None, push: str | None) -> None:
    """Write APISIX's standalone configuration, or push it.

    Nothing is written that was not checked: --out needs --check. What is pushed is checked by APISIX itself, and taken
    as a whole or not at all.
    """
    from stentor.gateway import apisix, files

    if out is None and push is None and check is None:
        raise click.UsageError("say --out DIR, --push URL, or --check alone")
    if out is not None and check is None:
        raise click.UsageError(
            "--out needs --check: APISIX drops a route that it finds invalid, and the events take another way"
        )
    model = _load(apps, config)
    made = apisix.configuration(model)
    apisix.check(made, apisix.read_schemas(check) if check is not None else None)
    if model.settings.jwt is not None:
        advise("APISIX checks a token's signature and time, neither its issuer nor its audience")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        files.replace(out / "apisix.yaml", apisix.to_yaml(made))
    if push is not None:
        key = os.environ.get("APISIX_ADMIN_KEY")
        if not key:
            raise ConfigError("--push needs the admin key in $APISIX_ADMIN_KEY")
        apisix.push(made, push, key)
    click.echo(f"{out or push or config}: {plural(len(made['routes']), 'route')} of APISIX, checked")
