"""The command: run the app until the year is over, show how far it is, compare the outcome with a plain pass."""

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console

from examples.flights.app import Settings, app, parse_speed, replayed
from examples.flights.figures import Figures, plain_pass
from examples.flights.record import NoRecord
from examples.flights.results import Results
from examples.flights.screen import Screen, show_summary
from stentor import StentorError

KILL_AT = 0.4
"""The share of the events after which --kill strikes."""
console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)


class CannotRun(Exception):
    """What was asked for makes no sense; the message says what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Run the example; 0 when the figures are right, 1 when not, 2 when it cannot run, 130 when interrupted."""
    options = parse(arguments)
    os.environ.update(options_as_environment(options))
    try:
        settings = Settings.now()
        broker = options.broker or f"sqlite:///{settings.folder.absolute() / 'broker.db'}"
        if not options.resume:
            start_anew(settings, options.broker)
        console.print("Reading the record of flights ...")
        expected = plain_pass(settings.find_record(), settings.days)
        if options.kill:
            return run_and_kill(settings, broker, expected)
        return asyncio.run(run(settings, broker, expected))
    except (CannotRun, NoRecord, StentorError) as error:
        print(f"flights: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flights: stopped; --resume goes on from here", file=sys.stderr)
        return 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="flights", description="Replay every flight that left New York in 2013.")
    parser.add_argument("--speed", default="max", help='"max" (default), or how much faster than the record: 60x')
    parser.add_argument("--days", type=int, help="only the first days of the year")
    parser.add_argument("--kill", action="store_true", help="kill -9 the program on the way, and start it again")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run broke off")
    parser.add_argument("--broker", metavar="URL", help="default: an SQLite file in the folder of the run")
    parser.add_argument("--folder", type=Path, help="where the results and the log go; default .data/flights")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a folder with flights.csv(.zip) and weather.csv")
    options = parser.parse_args(arguments)
    try:
        parse_speed(options.speed)
    except ValueError:
        parser.error(f'--speed {options.speed}: write "max", or a factor such as 60x')
    return options


def options_as_environment(options: argparse.Namespace) -> dict[str, str]:
    """The options as the app, and a child process, reads them."""
    named = {
        "FLIGHTS_SPEED": options.speed, "FLIGHTS_DAYS": options.days, "FLIGHTS_FOLDER": options.folder,
        "FLIGHTS_DATA": options.data,
    }  # fmt: skip
    return {name: str(given) for name, given in named.items() if given is not None}


def start_anew(settings: Settings, broker: str | None) -> None:
    """Forget an earlier run. A broker of the user's own is left alone."""
    parts = urlsplit(broker or "")
    if parts.scheme == "sqlite" and (file := Path(unquote(parts.path)[1:])).exists():
        raise CannotRun(f"{file} holds a run already: --resume goes on with it, or name another file")
    for name in ("results.db", "broker.db"):
        for leftover in settings.folder.glob(f"{name}*"):
            leftover.unlink()


async def run(settings: Settings, broker: str, expected: Figures) -> int:
    """Run the app in this process until nothing is left to do."""
    logging.basicConfig(
        filename=settings.folder / "flights.log", format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    total = expected.total()
    results = Results(settings.results)
    already, begin = results.counted, time.monotonic()
    async with app.running(url=broker) as program:
        console.print(
            f"{app.name} runs on {program.broker}; the log is {settings.folder / 'flights.log'}", soft_wrap=True
        )
        with Screen(console, total.events, total.cancelled) as screen:
            at_rest = False
            while not at_rest:
                await asyncio.sleep(0.25)
                at_rest = replayed.finished and await nothing_waits()
                retries = sum(worker.counts.retried for worker in program.workers)
                screen.show(published=replayed.events, counted=results.counted, asked=results.asked, retries=retries)
    seconds = time.monotonic() - begin
    found, repeated = results.figures(), results.repeated
    results.close()
    show_summary(console, found, expected)
    console.print(
        f"{total.events - already:,} events in {seconds:.1f} s, {(total.events - already) / seconds:,.0f} a second; "
        f"{repeated:,} came again after a crash and were counted once.",
        soft_wrap=True,
    )
    console.print("All figures are those of the plain pass." if found == expected else "The figures are WRONG.")
    return int(found != expected)


async def nothing_waits() -> bool:
    """Whether every group has handled all there is, retries included."""
    return all(
        lag.events == lag.parked == 0 for lag in await app.broker.admin.lag() if lag.group.startswith("flights.")
    )


def run_and_kill(settings: Settings, broker: str, expected: Figures) -> int:
    """Run in a child process, kill it on the way, run another to the end; the exit code of that one."""
    if broker.startswith("memory:"):
        raise CannotRun("--kill needs a broker that outlives the process; memory:// does not")
    command = [sys.executable, "-m", "examples.flights", "--resume", "--broker", broker]
    results = Results(settings.results)
    with subprocess.Popen(command) as child:
        while (counted := results.counted) < KILL_AT * expected.total().events:
            if child.poll() is not None:
                raise CannotRun("the program ended before it could be killed; see above")
            time.sleep(0.02)
        child.kill()
    results.close()
    console.print(f"\nKilled it (SIGKILL) at {counted:,} events counted. Starting it again.\n")
    return subprocess.run(command, check=False).returncode
