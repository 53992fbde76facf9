"""What a bench found: medians and ranges of its runs, and one page that can be sent to others."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from msgspec import Struct

from stentor.bench.member import POISON, SLOW
from stentor.bench.trial import Result
from stentor.broker import Features
from stentor.errors import ConfigError
from stentor.observe.text import per_second, short_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {
    "load": "the load as it is",
    "kill": "a worker is killed (SIGKILL) and started again after a third of the time",
    "restart": "the broker is restarted after a third of the time",
    "slow": f"one worker takes {SLOW * 1e3:g} ms longer for each event in the second third of the time",
    "poison": f"the handler refuses one event in {POISON} for good",
    "backlog": "events are published as fast as it goes while nobody handles them, then worked off",
    "ramp": "between which two rates the largest lies that is kept up with",
}


class Figure(Struct, frozen=True):
    """The median of some runs, with the least and the most of them."""

    median: float
    least: float
    most: float


def figure(values: Sequence[float]) -> Figure | None:
    """The figure of some values; None of none."""
    return Figure(median(values), min(values), max(values)) if values else None


class Row(Struct):
    """All runs of one kind on one broker."""

    broker: str
    url: str
    kind: str
    durable: str
    runs: int
    rate: float
    throughput: Figure | None
    published: Figure | None
    largest: Figure | None
    confirm: dict[str, Figure]
    latency: dict[str, Figure]
    recovered: Figure | None
    lost: int
    doubled: int
    disordered: int
    dead: int
    """The last four are of all runs together."""


class Report(Struct, kw_only=True):
    """A bench that has run: where, when, with what, and each run."""

    made: str
    """RFC 3339."""
    command: str
    stentor: str
    python: str
    machine: str
    servers: dict[str, str]
    """By URL: what stands there, with its version where it tells."""
    features: dict[str, Features]
    """By URL."""
    app: str
    load: str
    workers: int
    limit: float
    results: list[Result]


def rows(results: Sequence[Result]) -> list[Row]:
    """The runs together, by kind and broker."""
    together: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        together.setdefault((result.kind, result.url), []).append(result)
    order = list(KINDS)
    found = []
    for (kind, url), some in sorted(together.items(), key=lambda item: order.index(item[0][0])):
        first = some[0]

        def of(get: Callable[[Result], float | None], some: Sequence[Result] = some) -> Figure | None:
            return figure([value for one in some if (value := get(one)) is not None])

        def percentiles(get: Callable[[Result], dict[str, float]], some: Sequence[Result] = some) -> dict[str, Figure]:
            names = get(some[0])
            return {name: made for name in names if (made := figure([get(one)[name] for one in some if get(one)]))}

        found.append(
            Row(
                first.broker, url, kind, first.durable, len(some), first.rate, of(lambda one: one.throughput),
                of(lambda one: one.published or None), _largest(some),
                percentiles(lambda one: one.confirm), percentiles(lambda one: one.latency),
                of(lambda one: one.recovered), *(sum(getattr(one, name) for one in some) for name in _COUNTS),
            )
        )  # fmt: skip
    return found


def _largest(some: Sequence[Result]) -> Figure | None:
    """Of ramps: a run tells between which two rates the largest lies, and no more."""
    found = figure([one.largest for one in some if one.largest is not None])
    over = [one.exceeded for one in some if one.exceeded is not None]
    return found and Figure(found.median, found.least, max([found.most, *over]))


_COUNTS = ("lost", "doubled", "disordered", "dead")


# ---- the page -------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #8885; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; }
small { opacity: .7; } .bad { color: #d22; font-weight: 600; }
svg { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
"""

_READ = """<p>Medians of the runs, with the least and the most below. Latency counts from the time at which an event was
due, whatever became of those before it, until its handler had ended. “Survives” is what a confirmed event outlives:
compare brokers of the same word.</p>"""


def page(report: Report) -> str:
    """The report as one HTML page that needs nothing else.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    found = rows(report.results)
    parts = [
        f"<h1>{html.escape(report.app)} on {_names(found)}</h1>",
        f"<p>{html.escape(_setting(report))}</p>",
        f"<pre>{html.escape(report.command)}</pre>",
        _READ,
    ]
    for kind, text in KINDS.items():
        some = [row for row in found if row.kind == kind]
        if some:
            parts += [f"<h2>{kind}</h2><p>{html.escape(text)}</p>", _table(kind, some, report)]
            parts += _plots(kind, [one for one in report.results if one.kind == kind])
    parts.append("<h2>Servers</h2><ul>")
    parts += [f"<li>{html.escape(url)}: {html.escape(what)}</li>" for url, what in report.servers.items()]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>stentor bench: {html.escape(report.app)}</title><style>{_STYLE}</style>\n" + "\n".join(parts) + "</ul>"
    )


def _setting(report: Report) -> str:
    return (
        f"{report.load}; {report.workers} worker process{'es' if report.workers > 1 else ''}. "
        f"{report.made[:16].replace('T', ' ')} UTC, {report.machine}, Python {report.python}, Stentor {report.stentor}."
    )


def _names(found: Sequence[Row]) -> str:
    return html.escape(", ".join(dict.fromkeys(row.broker for row in found)))


def _table(kind: str, some: Sequence[Row], report: Report) -> str:
    names = list(columns(kind, report.limit))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = []
    for row in some:
        cells = []
        for name, value in columns(kind, report.limit, row).items():
            bad = ' class="bad"' if name in ("lost", "out of order") and value not in ("0", "") else ""
            text, _, span = value.partition(" (")
            cells.append(
                f"<td{bad}>{html.escape(text)}" + (f"<br><small>{span[:-1]}</small>" if span else "") + "</td>"
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def columns(kind: str, limit: float, row: Row | None = None) -> dict[str, str]:
    """The columns of a kind's table, with the cells of a row."""
    made: list[tuple[str, Callable[[Row], str]]] = [("broker", lambda r: r.broker), ("survives", lambda r: r.durable)]
    if kind == "ramp":
        made += [(f"most with p99 below {short_time(limit)}", lambda r: _between(r.largest))]
    elif kind == "backlog":
        made += [
            ("published", lambda r: _show(r.published, per_second)),
            ("worked off", lambda r: _show(r.throughput, per_second)),
        ]
    else:
        made += [
            ("λ", lambda r: per_second(r.rate)),
            ("X", lambda r: _show(r.throughput, per_second)),
            ("confirmed p50", lambda r: _show(r.confirm.get("p50"), short_time)),
            ("handled p50", lambda r: _show(r.latency.get("p50"), short_time)),
            ("p95", lambda r: _show(r.latency.get("p95"), short_time)),
            ("p99", lambda r: _show(r.latency.get("p99"), short_time)),
            ("max", lambda r: _show(r.latency.get("max"), short_time)),
        ]
    if kind in ("kill", "slow", "restart"):
        made.append(("as before after", lambda r: _show(r.recovered, short_time)))
    made += [("lost", lambda r: f"{r.lost:,}"), ("doubled", lambda r: f"{r.doubled:,}")]
    made.append(("out of order", lambda r: f"{r.disordered:,}"))
    made.append(("given up", lambda r: f"{r.dead:,}"))
    return {name: get(row) if row is not None else "" for name, get in made}


def _show(value: Figure | None, text: Callable[[float], str]) -> str:
    if value is None:
        return ""
    shown = text(value.median)
    if value.least == value.most:
        return shown
    return f"{shown} ({text(value.least)} to {text(value.most)})"


def _between(value: Figure | None) -> str:
    return "" if value is None else f"{per_second(value.least)} to {per_second(value.most)}"


def _plots(kind: str, results: Sequence[Result]) -> Iterator[str]:
    """Latency over the share of events, and due against handled over time: of the middle run of each broker."""
    middle: dict[str, Result] = {}
    for url in dict.fromkeys(result.url for result in results):
        some = sorted((one for one in results if one.url == url), key=lambda one: one.throughput)
        middle[url] = some[len(some) // 2]
    if kind != "backlog" and any(one.curve for one in middle.values()):
        yield _draw(lambda axes: _curves(axes, list(middle.values())))
    if kind not in ("ramp", "load"):
        yield _draw(lambda axes: _behind(axes, list(middle.values())))


def _draw(fill: Callable[[Axes], None]) -> str:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise ConfigError("the page needs matplotlib for its plots: pip install 'stentor[plot]'") from None
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stentor"}):
        canvas = Canvas(figsize=(9, 4), layout="constrained")
        axes = canvas.add_subplot()
        fill(axes)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _curves(axes: Axes, results: Sequence[Result]) -> None:
    for one in results:
        points = [(1 / (1 - share), took * 1e3) for share, took in one.curve if share < 1]
        axes.plot([x for x, _ in points], [y for _, y in points], label=one.broker)
    axes.set(xscale="log", yscale="log", xlabel="share of the events", ylabel="within, ms")
    axes.set_xticks([1, 2, 10, 100, 1000, 10_000], ["0", "50 %", "90 %", "99 %", "99.9 %", "99.99 %"])


def _behind(axes: Axes, results: Sequence[Result]) -> None:
    for one in results:
        axes.plot([at for at, _, _ in one.timeline], [due - done for _, due, done in one.timeline], label=one.broker)
        if one.fault_at is not None:
            axes.axvline(one.fault_at, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="s", ylabel="events that are due and not handled")
    axes.set_ylim(bottom=0)
