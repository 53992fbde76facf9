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
from typing import Any

import click
from msgspec import Struct

from stentor import __version__
from stentor.app import App
from stentor.cli import logs
from stentor.cli.exits import INTERRUPTED, OK
from stentor.cli.load import load_app
from stentor.cli.options import broker_option, duration
from stentor.cli.output import plural, span
from stentor.cli.session import describe
from stentor.errors import ConfigError, DefinitionError
from stentor.program import Program

log = logging.getLogger("stentor.run")


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
    "--workers", "-w", metavar="N", type=click.IntRange(1, 1024), default=1, help="Processes that share the work."
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
    workers: int,
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
    if supervised is None and (workers > 1 or reload):
        from stentor.cli.supervise import Supervisor

        if workers > 1:
            _check_shared(target, url, workers)
        logging_options = ["--log-level", log_level, *(["--log-json"] if log_json else [])]
        ctx.exit(asyncio.run(Supervisor(target, options, workers, logging_options, reload=reload).run()))
    app = load_app(target)
    ctx.exit(asyncio.run(_run(app, options, supervised, worker)))


def _check_shared(target: str, url: str | None, workers: int) -> None:
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

    def __init__(self, link: int | None) -> None:
        self.asked = asyncio.Event()
        self.failure: BaseException | None = None
        self.started = False
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._supervisor = None if link is None else socket.socket(fileno=link)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._signal)
        if self._supervisor is not None:
            self._loop.add_reader(self._supervisor, self._heard)

    def ready(self) -> None:
        """Tell the supervisor, if there is one."""
        self.started = True
        if self._supervisor is not None:
            self._supervisor.send(b"ready")

    def fatal(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self.asked.set()

    def _signal(self) -> None:
        if self.asked.is_set():
            log.warning("stopped at once by a second signal")
            os._exit(INTERRUPTED)
        self.asked.set()
        if not self.started and self._task is not None:
            self._task.cancel()

    def _heard(self) -> None:
        """The supervisor says nothing; what can be read is the end, because it died."""
        if self._supervisor is not None:
            self._loop.remove_reader(self._supervisor)
        log.warning("the supervisor is gone")
        self._signal()


async def _run(app: App, options: Options, link: int | None, worker: int | None) -> int:
    began = time.monotonic()
    stop = _Stop(link)
    if not app.groups():
        raise DefinitionError(f"app {app.name!r} has no handler, timer or source, so there is nothing to run")
    try:
        async with app.running(
            url=options.url, grace=options.grace, new_groups=options.new_groups, on_fatal=stop.fatal, connect_only=True
        ) as program:
            if worker in (None, 1):
                _announce(program, options)
            await program.start(options.only, options.skip)
            async with _http(app, options.http):
                stop.ready()
                log.info("ready after %s, pid %d", span(time.monotonic() - began), os.getpid())
                counts = [running.counts for running in program.workers]
                await stop.asked.wait()
                log.info("stopping: what runs may take another %s; the rest is given back", options.grace)
    except asyncio.CancelledError:
        if stop.started or not stop.asked.is_set():
            raise
        return OK
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
