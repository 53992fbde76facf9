"""``stentor top``: what running programs do now: λ, X, ρ, how long events take and wait, lag, the hottest key."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from stentor.cli.options import duration, json_option
from stentor.cli.output import console, is_terminal, make_table, print_json, print_table
from stentor.clock import iso, seconds
from stentor.observe.text import per_second, short_time, span

if TYPE_CHECKING:
    from stentor.observe.flow import Flow

URL = "http://127.0.0.1:8000"
COLUMNS = (
    "~group", ">λ in", ">X out", ">ρ", ">running", ">takes p50", ">p99", ">waits p50", ">p99", ">lag", ">oldest",
    ">parked", ">retries", ">dead", "~hottest key",
)  # fmt: skip


@click.command()
@click.argument("urls", metavar="[URL]...", nargs=-1)
@click.option(
    "--interval", metavar="TIME", default="2s", callback=duration, show_default=True, help="Between two looks."
)
@click.option("--count", type=click.IntRange(1), help="Stop after so many looks; default: go on until Ctrl-C.")
@json_option
def top(urls: tuple[str, ...], interval: str, count: int | None, as_json: bool) -> None:
    """Show what running programs do now: arrivals, throughput, how busy, how long.

    URL is where a program serves HTTP (`stentor run --http`), default http://127.0.0.1:8000; name all processes of an
    app to see them as one. λ are the events that come in a second, X those that are done, ρ the share of the time for
    which handlers are busy. "takes" is the time in the handler, "waits" from the event's own time until then.
    "retries" are attempts a second that failed and come again, "dead" events a second that were given up.
    """
    looks = _looks(urls or (URL,), seconds(interval), count)
    if as_json:
        for flows in looks:
            now = iso(time.time())
            for flow in flows:
                print_json({"time": now, **_json(flow)})
    elif is_terminal():
        from rich.live import Live

        with Live(console=console(), auto_refresh=False) as live:
            for flows in looks:
                live.update(make_table(COLUMNS, map(_row, flows)), refresh=True)
    else:
        for flows in looks:
            print_table(COLUMNS, [_row(flow) for flow in flows])


def _looks(urls: Sequence[str], interval: float, count: int | None) -> Iterator[list[Flow]]:
    from stentor.observe.flow import between, read

    before = read(urls)
    while count is None or count > 0:
        time.sleep(interval)
        after = read(urls)
        yield between(before, after)
        before = after
        count = None if count is None else count - 1


def _row(flow: Flow) -> tuple[Any, ...]:
    busy = "red" if flow.utilisation >= 0.9 else "yellow" if flow.utilisation >= 0.7 else ""
    grows = "red" if flow.waits and flow.arrivals > 1.05 * flow.throughput else ""
    hottest = "-" if flow.hottest is None else f"{flow.hottest[1]:.1%} {flow.hottest[0]}"
    return (
        flow.group, per_second(flow.arrivals), per_second(flow.throughput), (f"{flow.utilisation:.2f}", busy),
        f"{flow.running}/{flow.concurrency * flow.processes}", *_times(flow.service.quantile, flow.service.count),
        *_times(flow.waiting.quantile, flow.waiting.count), (f"{flow.waits:,}", grows),
        span(flow.oldest) if flow.oldest else "-", (f"{flow.parked:,}", "yellow" if flow.parked else ""),
        (per_second(flow.retries), "yellow" if flow.retries else ""),
        (per_second(flow.dead), "red" if flow.dead else ""), hottest,
    )  # fmt: skip


def _times(quantile: Callable[[float], float], count: int) -> tuple[str, str]:
    return (short_time(quantile(0.5)), short_time(quantile(0.99))) if count else ("-", "-")


def _json(flow: Flow) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "group": flow.group, "arrivals": flow.arrivals, "throughput": flow.throughput,
        "utilisation": flow.utilisation, "processes": flow.processes, "running": flow.running,
        "concurrency": flow.concurrency, "partitions": flow.partitions, "waits": flow.waits, "oldest": flow.oldest,
        "parked": flow.parked, "retries": flow.retries, "dead": flow.dead,
        "hottest": None if flow.hottest is None else {"key": flow.hottest[0], "share": flow.hottest[1]},
    }  # fmt: skip
    for name in ("service", "waiting", "settling"):
        times = getattr(flow, name)
        quantiles = {f"p{q * 100:g}": times.quantile(q) for q in (0.5, 0.95, 0.99)}
        figures[name] = {"count": times.count, "mean": times.mean, "cv": times.cv, **quantiles}
    return figures
