"""``stentor run``: one process that runs an app, or several under a supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections import Counter
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import Any

import click
import msgspec
from msgspec import Struct

from stentor import __version__
from stentor.app import App
from stentor.cli import logs
from stentor.cli.exits import INTERRUPTED, OK
from stentor.cli.link import Link
from stentor.cli.load import load_app
from stentor.cli.options import broker_option, duration
from stentor.cli.output import plural
from stentor.cli.session import describe
from stentor.clock import seconds
from stentor.errors import ConfigError, DefinitionError
from stentor.health import Health
from stentor.observe.text import span
from stentor.program import Program

log = logging.getLogger("stentor.run")
MOST = 1024
PATIENCE = 1.0
"""Seconds that a supervisor has to tell what its other workers do; it waits for each of them for half of it."""


class Bounds(Struct, frozen=True):
    """How many workers there may be."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}..{self.most}" if self.scaled else str(self.least)

    @property
    def scaled(self) -> bool:
        return self.least < self.most


class Workers(click.ParamType[Bounds]):
    """A number of processes, or its bounds: 4, 1..4, or auto for one up to as many as there are cores."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Bounds:
        if isinstance(value, Bounds):
            return value
        if value == "auto":
            return Bounds(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        least, dots, most = value.partition("..")
        try:
            found = Bounds(int(least), int(most if dots else least))
        except ValueError:
            self.fail(f"{value!r} is no number of workers; write 4, 1..4 or auto", param, ctx)
        if not 1 <= found.least <= found.most <= MOST:
            self.fail(f"{value!r}: workers are 1 to {MOST:,}, the lower bound first", param, ctx)
        return found


class Options(Struct, frozen=True, kw_only=True):
    """What a running process was told on the command line."""

    url: str | None
    only: tuple[str, ...]
    skip: tuple[str, ...]
    http: str | None
    grace: str
    new_groups: bool


@click.command()
@click.argument("target", metavar="MODULE:APP")
@broker_option
@click.option("--only", metavar="NAME", multiple=True, help="Run only this group; may be repeated.")
@click.option("--except", "skip", metavar="NAME", multiple=True, help="Leave this group out; may be repeated.")
@click.option(
    "--workers",
    "-w",
    metavar="N|MIN..MAX|auto",
    type=Workers(),
    default="1",
    show_default=True,
    help="Processes that share the work; between bounds they come and go with it; auto: 1 up to the cores.",
)
@click.option(
    "--lag",
    metavar="TIME",
    default="10s",
    callback=duration,
    show_default=True,
    help="Workers come when an event waits longer.",
)
@click.option(
    "--cooldown",
    metavar="TIME",
    default="1m",
    callback=duration,
    show_default=True,
    help="Workers go when fewer were enough for so long.",
)
@click.option("--reload", is_flag=True, help="Start again when a .py file changes; for development.")
@click.option("--http", metavar="HOST:PORT", help="Serve event ingress, health and metrics; worker 1 does.")
@click.option(
    "--grace", metavar="TIME", default="30s", callback=duration, show_default=True, help="For what runs at a stop."
)
@click.option("--new-groups", is_flag=True, help="Accept new groups although others lost their handler.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.option("--log-json", is_flag=True, help="Log JSON Lines.")
@click.option("--supervised", type=int, hidden=True)
@click.option("--worker", type=int, hidden=True)
@click.pass_context
def run(
    ctx: click.Context,
    target: str,
    url: str | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    workers: Bounds,
    lag: str,
    cooldown: str,
    reload: bool,
    http: str | None,
    grace: str,
    new_groups: bool,
    log_level: str,
    log_json: bool,
    supervised: int | None,
    worker: int | None,
) -> None:
    """Run an app until SIGTERM or Ctrl-C, then stop in order.

    MODULE:APP names the app, for example shop.app:app; :APP may be left out where the module has one. At a stop nothing
    new is begun, what runs may end within --grace, and the rest is given back. A second signal ends it at once.
    """
    logs.set_up(log_level, as_json=log_json, worker=worker)
    options = Options(url=url, only=only, skip=skip, http=http, grace=grace, new_groups=new_groups or reload)
    if supervised is None and (workers.most > 1 or reload):
        from stentor.cli.supervise import Supervisor
        from stentor.scaling.need import Scale

        if workers.most > 1:
            _check_shared(target, url, workers)
        logging_options = ["--log-level", log_level, *(["--log-json"] if log_json else [])]
        scale = Scale(workers.least, workers.most, seconds(cooldown)) if workers.scaled else None
        supervisor = Supervisor(target, options, workers, logging_options, reload=reload, scale=scale, lag=seconds(lag))
        ctx.exit(asyncio.run(supervisor.run()))
    app = load_app(target)
    ctx.exit(asyncio.run(_run(app, options, supervised, worker)))


def _check_shared(target: str, url: str | None, workers: Bounds) -> None:
    """Refuse several processes on a broker that lives in one. Raises ConfigError, or CannotLoad."""
    from stentor.connect import BrokerUrl, broker_url, connect

    full = broker_url(url or load_app(target)._url)
    if not connect(full).features.shared:
        raise ConfigError(
            f"{BrokerUrl(full)} lives inside one process, so --workers {workers} cannot share it; take a broker that "
            "several processes can use, for example --broker sqlite:///stentor.db"
        )


class _Stop:
    """What asks a running process to stop: SIGINT, SIGTERM, a worker that fails, or the end of its supervisor.

    Before ``started`` is set it cancels the start; a second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.failure: BaseException | None = None
        self.started = asyncio.Event()
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signal)

    async def supervised(self, fd: int, app: App) -> Link:
        """Answer the supervisor at the other end of a socket, from the start on: it may die before we are ready."""

        def health() -> Health:
            program = app.program
            assert program is not None, "asked for figures before it said that it is ready"
            return Health(program)

        async def figures() -> Any:
            return health().figures()

        async def lag() -> Any:
            return msgspec.to_builtins((await health().lag())[0])

        link = Link({"ready": self.started.wait, "figures": figures, "lag": lag}, self._orphaned)
        await link.open(socket.socket(fileno=fd))
        return link

    def fatal(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self.asked.set()

    def _signal(self) -> None:
        if self.asked.is_set():
            log.warning("stopped at once by a second signal")
            os._exit(INTERRUPTED)
        self.asked.set()
        if not self.started.is_set() and self._task is not None:
            self._task.cancel()

    def _orphaned(self) -> None:
        log.warning("the supervisor is gone")
        self._signal()


async def _run(app: App, options: Options, fd: int | None, worker: int | None) -> int:
    began = time.monotonic()
    stop = _Stop()
    if not app.groups():
        raise DefinitionError(f"app {app.name!r} has no handler, timer or source, so there is nothing to run")
    link = None if fd is None else await stop.supervised(fd, app)
    try:
        async with app.running(
            url=options.url, grace=options.grace, new_groups=options.new_groups, on_fatal=stop.fatal, connect_only=True
        ) as program:
            if worker in (None, 1):
                _announce(program, options)
            if link is not None and worker is not None:
                program.worker, program.others = worker, partial(link.ask, "others", PATIENCE)
            await program.start(options.only, options.skip)
            async with _http(app, options.http):
                stop.started.set()
                log.info("ready after %s, pid %d", span(time.monotonic() - began), os.getpid())
                counts = [running.counts for running in program.workers]
                await stop.asked.wait()
                log.info("stopping: what runs may take another %s; the rest is given back", options.grace)
    except asyncio.CancelledError:
        if stop.started.is_set() or not stop.asked.is_set():
            raise
        return OK
    finally:
        if link is not None:
            link.close()
    total: Counter[str] = Counter()
    for count in counts:
        total.update({name: getattr(count, name) for name in ("handled", "failed", "dead")})
    log.info(
        "stopped after %s: %s handled, %s, %s", span(time.monotonic() - began), f"{total['handled']:,}",
        plural(total["failed"], "failed attempt"), plural(total["dead"], "dead letter"),
    )  # fmt: skip
    if stop.failure is not None:
        raise stop.failure
    return OK


def _http(app: App, place: str | None) -> AbstractAsyncContextManager[Any]:
    if place is None:
        return nullcontext()
    try:
        from stentor.serve import serve
    except ImportError as error:
        raise ConfigError(f"--http needs more than the core ({error}); pip install 'stentor[http]'") from None
    return serve(app, place)


def _announce(program: Program, options: Options) -> None:
    """The start lines: what runs where, and a line for each group."""
    groups = program.choose(options.only, options.skip)
    log.info("stentor %s runs %s on %s", __version__, program.name, describe(program.url, program.broker))
    width = max(map(len, groups), default=0)
    for name in groups:
        log.info("  %s  %s", name.ljust(width), program.note(name, program.groups[name]).removeprefix(f"{name}: "))
