"""``stentor capacity``: what a program carries, how long events wait, and how many workers it needs."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from stentor.capacity import (
    Answer,
    Setup,
    Times,
    answer,
    drain_time,
    fitted,
    lag_after,
    largest_rate,
    limits,
    partitions_for,
    recorded,
)  # fmt: skip
from stentor.capacity import workers_for as fewest_workers
from stentor.cli.exits import NotFound, advise
from stentor.cli.options import duration, gaps_option, json_option
from stentor.cli.output import is_terminal, plural, print_json, print_table
from stentor.clock import seconds
from stentor.event import PARTITIONS
from stentor.observe.text import per_second, short_time, span

if TYPE_CHECKING:
    from stentor.observe.flow import Flow

_RATE = re.compile(r"([\d_.,]+(?:e\d+)?)\s*(k|m)?\s*(?:/\s*(s|sec|min|m|h|d))?", re.IGNORECASE)
_PER = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
_TIMES = {"": 1, "k": 1_000, "m": 1_000_000}


class Rate(click.ParamType[float]):
    """Events a second: ``500``, ``500/s``, ``2k/s``, ``30000/min``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = _RATE.fullmatch(value.strip())
        try:
            assert found is not None
            number = float(found[1].replace(",", "").replace("_", ""))
            assert number > 0
        except (AssertionError, ValueError):
            self.fail(f'{value!r} is no rate above 0; write "500/s", "2k/s" or "30000/min"', param, ctx)
        return number * _TIMES[(found[2] or "").lower()] / _PER[(found[3] or "s").lower()]


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--url", "urls", metavar="URL", multiple=True, help="Of a running process (`run --http`); name all of them."
)
@click.option("--group", metavar="NAME", help="With --url: the group, where there are several.")
@click.option("--during", metavar="TIME", default="10s", callback=duration, show_default=True, help="With --url.")
@click.option("--rate", type=Rate(), metavar="RATE", help='λ, arrivals: "500/s", "2k/s", "30000/min".')
@click.option("--service", metavar="TIME", callback=duration, help="What a handler takes on average.")
@click.option("--cv", default=1.0, show_default=True, help="How service times vary: deviation over mean.")
@click.option("--arrival-cv", type=float, help="How gaps between arrivals vary: 0 a clock, 1 at random (the default).")
@click.option("--concurrency", default=64, show_default=True, help="Handlers that run at once in a process.")
@click.option("--workers", default=1, show_default=True, help="Processes.")
@click.option("--partitions", default=PARTITIONS, show_default=True, help="Partitions of the topic.")
@click.option("--hot", type=float, help="Share of the events that have the commonest key, 0 to 1.")
@click.option("--ceiling", type=Rate(), metavar="RATE", help="The most that one process takes, however short its work.")
@click.option("--source", type=Rate(), metavar="RATE", help="The most that the source makes.")
@click.option("--broker-rate", type=Rate(), metavar="RATE", help="The most that the broker carries.")
@click.option("--p99", metavar="TIME", callback=duration, help="Ask: how many workers, and which load, for this p99?")
@click.option("--backlog", type=float, metavar="EVENTS", help="Ask: how long until so many events are worked off?")
@click.option("--outage", metavar="TIME", callback=duration, help="Ask: what waits after an outage of so long?")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw latency over load into a .svg or .png file; - here."
)
@gaps_option
@json_option
def capacity(
    file: Path | None, rate: float | None, service: str | None, cv: float, arrival_cv: float | None, hot: float | None,
    p99: str | None, backlog: float | None, outage: str | None, plot: Path | None, *, urls: tuple[str, ...],
    group: str | None, during: str, keep_gaps: bool, as_json: bool, **size: Any,
) -> None:  # fmt: skip
    """Predict throughput and latency, and how many workers a load needs.

    From numbers (--rate and --service), from a FILE of recorded events (CSV or JSON Lines with "time", "service" in
    seconds, and "key" or not), or from a running program (--url), which is watched for a while. An option given beside
    a FILE or --url wins over what they say.
    """
    if urls and file is not None:
        raise click.UsageError("give a FILE or --url, not both")
    if as_json and str(plot) == "-":
        raise click.UsageError("--json and --plot - both want standard output; give one, or a file to draw into")
    times = None if file is None else recorded(file, gaps=keep_gaps)
    size["broker"] = size.pop("broker_rate")
    if urls:
        setup = _running(_watched(urls, group, seconds(during)), rate, service, cv, arrival_cv, hot, size)
    else:
        setup = _setup(times, rate, service, cv, arrival_cv, hot, size)
    replayed = times if rate is None and service is None else None
    found = answer(setup, replayed)
    asked = _ask(setup, p99, backlog, outage)
    if plot is not None and str(plot) != "-":
        from stentor.capacity.plot import draw

        draw(setup, plot)
    if as_json:
        print_json({**msgspec.to_builtins(found), "limits": msgspec.to_builtins(limits(setup)), **asked})
        return
    _show(setup, found, asked)
    if plot is not None and str(plot) == "-":
        _plot(setup)


def _setup(
    times: Times | None, rate: float | None, service: str | None, cv: float, arrival_cv: float | None,
    hot: float | None, size: dict[str, Any],
) -> Setup:  # fmt: skip
    if times is None and (rate is None or service is None):
        raise click.UsageError(
            "give --rate and --service, a FILE of recorded events, or the --url of a running program"
        )
    services = fitted(seconds(service), cv) if service is not None else times.service if times else []
    return Setup(
        rate=rate or (times.rate if times else 0.0),
        service=services,
        arrival_cv=arrival_cv if arrival_cv is not None else times.arrival_cv if times else 1.0,
        hot=hot if hot is not None else times.hottest if times else 0.0,
        **size,
    )


def _watched(urls: tuple[str, ...], group: str | None, during: float) -> Flow:
    """What a group of a running program does. Raises Unavailable, NotFound."""
    from stentor.observe.flow import between, read

    before = read(urls)
    time.sleep(during)
    flows = {flow.group: flow for flow in between(before, read(urls))}
    busy = [flow for flow in flows.values() if flow.service.count]
    if group is None and len(busy) == 1:
        return busy[0]
    if group not in flows:
        known = ", ".join(flow.group for flow in busy or flows.values())
        raise NotFound(f"name one of the groups with --group: {known or 'there is none'}")
    if not flows[group].service.count:
        raise NotFound(f"{group} handled nothing within {during:g} s; give it load, or --during more")
    return flows[group]


def _running(
    flow: Flow, rate: float | None, service: str | None, cv: float, arrival_cv: float | None, hot: float | None,
    size: dict[str, Any],
) -> Setup:  # fmt: skip
    """A program as it runs; how the gaps between arrivals vary is not seen from outside, and taken to be at random."""
    measured = {"concurrency": flow.concurrency, "workers": flow.processes, "partitions": max(1, flow.partitions)}
    given = click.get_current_context().get_parameter_source
    default = click.core.ParameterSource.DEFAULT
    size |= {name: value for name, value in measured.items() if given(name) is default}
    return Setup(
        rate=rate or flow.arrivals or flow.throughput,
        service=fitted(seconds(service), cv) if service is not None else flow.service.points(),
        arrival_cv=1.0 if arrival_cv is None else arrival_cv,
        hot=hot if hot is not None else flow.hottest[1] if flow.hottest else 0.0,
        **size,
    )


def _ask(setup: Setup, p99: str | None, backlog: float | None, outage: str | None) -> dict[str, Any]:
    """The questions beyond the load itself, as JSON has them: infinity is null."""
    asked: dict[str, Any] = {}
    if p99 is not None:
        wanted = seconds(p99)
        workers = fewest_workers(setup, wanted)
        asked["p99"] = {
            "seconds": wanted, "workers": workers, "partitions": workers and partitions_for(setup, workers),
            "largest_rate": largest_rate(setup, wanted),
        }  # fmt: skip
    if backlog is not None:
        asked["drain"] = {"events": backlog, "seconds": _finite(drain_time(setup, backlog))}
    if outage is not None:
        waiting, left = lag_after(setup, seconds(outage))
        asked["outage"] = {"seconds": seconds(outage), "events": waiting, "drain_seconds": _finite(left)}
    return asked


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _show(setup: Setup, found: Answer, asked: dict[str, Any]) -> None:
    limit = found.limit
    where = f"{setup.concurrency} in each of {setup.at_work}, {plural(setup.partitions, 'partition')}"
    busy = f"{found.in_flight:,.1f} events at once; {found.waits:.1%} wait for a handler"
    rows = [
        ("arrivals (λ)", per_second(found.rate), f"gaps vary by {setup.arrival_cv:.2f}"),
        ("service", short_time(setup.mean), f"varies by {setup.service_cv:.2f}"),
        ("handlers", f"{setup.lanes:,}", where),
        ("throughput (X)", per_second(found.throughput), f"at most {per_second(limit.rate)}: {limit.name}"),
        ("utilisation (ρ)", f"{found.utilisation:.2f}", busy),
    ]
    print_table(("", ">", ""), rows)
    if found.closed and found.simulated:
        click.echo()
        names = [f">{name}" for name in found.closed]
        ways = {"simulated": found.simulated, "closed form": found.closed}
        print_table(
            ("from arrival to end", *names), [(way, *map(short_time, values.values())) for way, values in ways.items()]
        )
    click.echo()
    bounds = [(one.name, per_second(one.rate), one.advice) for one in limits(setup)]
    print_table(("limit", ">rate", "~what raises it"), bounds)
    lines = list(_answers(setup, asked))
    if lines:
        click.echo()
        print_table(("question", "~answer"), lines)
    for note in found.notes:
        advise(note)


def _plot(setup: Setup) -> None:
    from stentor.capacity.plot import text

    colours = {"p50": "green", "p95": "yellow", "p99": "red"} if is_terminal() else {}
    width = min(shutil.get_terminal_size().columns, 120)
    click.echo(f"\n{text(setup, width, lambda name, text: click.style(text, fg=colours.get(name)))}")


def _answers(setup: Setup, asked: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "p99" in asked:
        wanted, workers, partitions, rate = asked["p99"].values()
        if workers is None:
            enough = "no number of workers is enough"
        else:
            now = "as now" if partitions == setup.partitions else f"(now {setup.partitions:,})"
            enough = f"{plural(workers, 'worker')}, with {plural(partitions, 'partition')} {now}"
        yield f"needed for a p99 of {short_time(wanted)}", enough
        yield (
            f"the largest load for a p99 of {short_time(wanted)}",
            per_second(rate) if rate else "none: one event takes longer",
        )
    if "drain" in asked:
        yield f"to work off {asked['drain']['events']:,.0f} events", _span(asked["drain"]["seconds"])
    if "outage" in asked:
        outage, events, left = asked["outage"].values()
        yield f"after an outage of {span(outage)}", f"{events:,.0f} events wait; worked off in {_span(left)}"


def _span(value: float | None) -> str:
    return "never: the load is as large as what it carries" if value is None else span(value)
