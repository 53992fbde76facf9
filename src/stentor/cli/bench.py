"""``stentor bench``: an app under load, on one broker or several."""

from __future__ import annotations

import asyncio
import platform
import shlex
import sqlite3
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from stentor import __version__
from stentor.app import App
from stentor.bench import KINDS, Bench, Job, Load, Report, Result, modelled, play, rows, trace, work_app
from stentor.bench.load import recorded_events
from stentor.bench.member import Work
from stentor.bench.report import KINDS as RUNS
from stentor.bench.report import columns, page
from stentor.bench.trial import FAULTS, machine, member_command
from stentor.broker import Features
from stentor.cli.capacity import Rate
from stentor.cli.exits import advise
from stentor.cli.load import learn_events, load_app
from stentor.cli.options import duration, gaps_option, json_option
from stentor.cli.output import plural, print_json, print_table
from stentor.clock import seconds
from stentor.connect import BrokerUrl, connect, load
from stentor.errors import BrokerError, DefinitionError
from stentor.observe.text import span

LONG = 120.0
"""Seconds of runs that are told before they begin."""


@click.command()
@click.argument("target", metavar="[MODULE:APP]", required=False)
@click.option("--broker", "urls", metavar="URL", multiple=True, help="Where to run it; may be repeated.")
@click.option("--events", "file", type=click.Path(path_type=Path), help="With an app: a file of its events.")
@click.option("--group", "groups", metavar="NAME", multiple=True, help="With an app: only these groups, else all.")
@click.option("--rate", type=Rate(), metavar="RATE", help="λ, events a second; default 500/s.")
@click.option("--load", "kind", metavar="|".join((*KINDS, "FILE")), default="poisson", show_default=True)
@click.option("--speed", type=float, default=1.0, help="A recorded load so many times as fast.")
@click.option(
    "--during", metavar="TIME", default="10s", callback=duration, show_default=True, help="Of a modelled load."
)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs of each kind.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
@click.option("--ramp", is_flag=True, help="Find the largest rate that is kept up with.")
@click.option("--p99", metavar="TIME", default="500ms", callback=duration, show_default=True, help="With --ramp.")
@click.option("--backlog", type=click.IntRange(2), metavar="N", help="Let so many events pile up, and work them off.")
@click.option("--fault", "faults", type=click.Choice(FAULTS), multiple=True, help="Run with a fault; may be repeated.")
@click.option("--restart", metavar="COMMAND", help="With --fault restart: the shell command that restarts the broker.")
@click.option("--service", metavar="TIME", callback=duration, help="Without an app: what its handler waits for.")
@click.option("--cv", default=1.0, show_default=True, help="How that varies: deviation over mean.")
@click.option("--concurrency", default=64, show_default=True, help="Without an app: handlers at once in a process.")
@click.option("--keys", type=click.IntRange(1), default=1000, show_default=True, help="Without an app.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write the report as one page.")
@click.option("--member", hidden=True)
@gaps_option
@json_option
def bench(
    target: str | None, urls: tuple[str, ...], file: Path | None, groups: tuple[str, ...], rate: float | None,
    kind: str, speed: float, during: str, repeats: int, workers: int, p99: str, backlog: int | None,
    faults: tuple[str, ...], restart: str | None, service: str | None, cv: float, concurrency: int, keys: int,
    html_file: Path | None, member: str | None, *, ramp: bool, keep_gaps: bool, as_json: bool,
) -> None:  # fmt: skip
    """Put an app under load, on one broker or several, with faults or without.

    MODULE:APP with --events FILE (JSON Lines as `stentor tail --json` prints them), or without both a built-in app
    whose handler waits for --service. Events are published at their times whatever became of those before. Each run is
    in a namespace of its own, whose topics stay: take brokers for tests.

    \b
      stentor bench --broker sqlite:///bench.db --broker redis://localhost --ramp
      stentor bench shop.app --events orders.jsonl --broker nats://localhost
      stentor bench --broker redis://localhost --fault kill --html report.html
    """  # noqa: D301
    if member is not None:
        job = msgspec.json.decode(member, type=Job)
        asyncio.run(play(load_app(job.target) if job.target else work_app(job.service, job.cv, job.concurrency), job))
        return
    if not urls:
        raise click.UsageError("say where: --broker URL, once or more; it publishes there, so there is no default")
    if "restart" in faults and not restart:
        raise click.UsageError("--fault restart needs --restart COMMAND, which restarts the broker")
    if (target is None) != (file is None):
        raise click.UsageError("an app needs --events FILE with its events, and only an app does")
    times = _load(kind, rate, speed, seconds(during), gaps=keep_gaps)
    wait = seconds(service) if service is not None else 0.0
    app = load_app(target) if target else work_app(wait, cv, concurrency)
    if target:
        learn_events(app, target)
    events = _recorded(app, file) if file is not None else _works(keys)
    job = Job(url="", ledger="", groups=[], target=target or "", service=wait, cv=cv, concurrency=concurrency)
    made = Bench(
        app=app, events=events, load=times, groups=_groups(app, groups), command=member_command(), job=job,
        workers=workers, limit=seconds(p99), during=seconds(during), restart=restart or "",
    )  # fmt: skip
    if ramp:
        times.at_rate(times.rate, made.step)  # refused before the runs, not after them
    if html_file is not None:
        _check_page(html_file)
    kinds = ["load", *faults, *(["backlog"] if backlog else []), *(["ramp"] if ramp else [])]
    least = times.at[-1] * (1 + len(faults)) * repeats * len(urls)
    if least >= LONG:
        advise(f"it runs for {span(least)} at least: the load takes {span(times.at[-1])} each time")
    report = asyncio.run(_run(made, urls, kinds, repeats, backlog or 0))
    if as_json:
        print_json(report)
    else:
        _show(report)
    if html_file is not None:
        html_file.write_text(page(report), "utf-8")


def _check_page(file: Path) -> None:
    """Whether the page can be made, before a quarter of an hour of runs. Raises ConfigError, DefinitionError."""
    load("matplotlib:get_backend", "plot", "--html")
    try:
        file.touch()
    except OSError as error:
        raise DefinitionError(f"{file}: {error.strerror}") from None


def _load(kind: str, rate: float | None, speed: float, during: float, *, gaps: bool) -> Load:
    if kind in KINDS:
        if speed != 1:
            raise click.UsageError("--speed is for a recorded load; a modelled one has --rate")
        return modelled(kind, rate or 500.0, during)
    path = Path(kind)
    if not path.exists():
        raise click.UsageError(f"--load is {', '.join(KINDS)} or a file of recorded times; there is no file {kind!r}")
    if rate is not None:
        raise click.UsageError("a recorded load has its own rate; --speed 10 makes it ten times as fast")
    if not speed > 0:
        raise click.UsageError(f"--speed has to be above 0, not {speed:g}")
    return trace(path, speed, gaps=gaps)


def _works(keys: int) -> Callable[[int], Any]:
    return lambda n: Work(key=f"k{n * 7919 % keys}", n=n, text="x" * 100)


def _recorded(app: App, file: Path) -> Callable[[int], Any]:
    for group in app.groups().values():
        for handler in group.handlers:
            for cls in handler.types:
                app.catalog.add(cls)
    events = recorded_events(file, app.catalog)
    return lambda n: events[n % len(events)]


def _groups(app: App, wanted: Iterable[str]) -> list[str]:
    """The groups to measure, by full name. Raises DefinitionError."""
    known = app.groups()
    full = {name: name for name in known} | {name.removeprefix(f"{app.name}."): name for name in known}
    for name in wanted:
        if name not in full:
            raise DefinitionError(f"{app.name} has no group {name!r}; it has {', '.join(known)}")
    chosen = [full[name] for name in wanted] or [name for name, group in known.items() if group.handlers]
    for name in chosen:
        if known[name].broadcast:
            raise DefinitionError(
                f"{name} is a broadcast: each process sees each event; name other groups with --group"
            )
        if any(handler.where is not None or handler.where_sql is not None for handler in known[name].handlers):
            raise DefinitionError(
                f"{name} has a handler with where=, so that nobody knows which events it is to handle; "
                "name other groups with --group"
            )
    if not chosen:
        raise DefinitionError(f"{app.name} has no handler, so there is nothing to measure")
    return chosen


async def _run(bench: Bench, urls: tuple[str, ...], kinds: list[str], repeats: int, backlog: int) -> Report:
    """All runs, the brokers in turn, so that what the machine does besides meets them alike."""
    there = {str(BrokerUrl(url)): await _server(url) for url in urls}
    results: list[Result] = []
    total = repeats * len(kinds) * len(urls)
    for _ in range(repeats):
        for kind in kinds:
            for url in urls:
                if sys.stderr.isatty():
                    click.echo(f"\r\x1b[K{len(results) + 1}/{total} {kind} on {BrokerUrl(url)}", err=True, nl=False)
                results.append(await bench.run(url, kind, backlog))
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)
    return Report(
        made=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        command=_command(urls, bench.restart), stentor=__version__, python=platform.python_version(), machine=machine(),
        servers={url: name for url, (name, _) in there.items()}, features={url: has for url, (_, has) in there.items()},
        app=bench.job.target or "the built-in app", load=bench.load.name, workers=bench.workers, limit=bench.limit,
        results=results,
    )  # fmt: skip


async def _server(url: str) -> tuple[str, Features]:
    """What stands behind a URL, as its review says; also finds out, before all runs, that it can be reached.

    Kafka tells its clients no version.
    """
    broker = connect(url)
    await broker.open()
    try:
        found = [finding.found for finding in await broker.review() if finding.check == "server"]
    except BrokerError:
        found = []
    finally:
        await broker.close()
    name = broker.features.name
    if name == "sqlite":
        found = [f"SQLite {sqlite3.sqlite_version}"]  # no server, but what this Python was built with
    return found[0] if found else name, broker.features


def _command(urls: Iterable[str], restart: str) -> str:
    """The command line without credentials, as the report is for others: those of URLs, and what a restart may hold."""
    words = shlex.join(sys.argv[1:])
    for url in urls:
        words = words.replace(shlex.quote(url), str(BrokerUrl(url))).replace(url, str(BrokerUrl(url)))
    return "stentor " + (words.replace(shlex.quote(restart), "…") if restart else words)


def _show(report: Report) -> None:
    found = rows(report.results)
    runs = max(row.runs for row in found)
    click.echo(f"{report.app}: {report.load}, {plural(report.workers, 'worker')}; {report.machine}")
    click.echo(f"medians of {runs} runs; --json and --html have the least and the most" if runs > 1 else "one run each")
    for kind, text in RUNS.items():
        some = [row for row in found if row.kind == kind]
        if not some:
            continue
        click.echo(f"\n{click.style(kind, bold=True)}: {text}")
        names = columns(kind, report.limit)
        shown = [tuple(cell.partition(" (")[0] for cell in columns(kind, report.limit, row).values()) for row in some]
        print_table([name if name in ("broker", "survives") else f">{name}" for name in names], shown)
    if any(row.lost or row.disordered for row in found):
        advise("events were lost or out of order; run it again with --json, and look at that run")
    if len({row.durable for row in found}) > 1:
        advise("the brokers differ in what a confirmed event survives, and so in what they do for it")
