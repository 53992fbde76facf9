"""Latency over load as a picture: where the knee is, and where this program stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from stentor.capacity.chart import chart
from stentor.capacity.plan import Limit, Setup, latencies, limits
from stentor.errors import ConfigError, DefinitionError
from stentor.observe.text import per_second, short_time

_LOADS = [0.05, *(n / 20 for n in range(2, 18)), 0.875, 0.9, 0.925, 0.95, 0.97]


class Curves(Struct, frozen=True, kw_only=True):
    """Seconds from arrival to end (simulated) over rates, and what there is to see."""

    rates: list[float]
    lines: dict[str, list[float]]
    limit: Limit
    knee: tuple[float, float] | None
    """The rate from which on p99 is twice what it is without load, and p99 there; None when it never is."""


def curves(setup: Setup) -> Curves:
    """Latency at loads from nearly none to nearly the limit."""
    limit = limits(setup)[0]
    rates = [load * limit.rate for load in _LOADS]
    found = [latencies(replace(setup, rate=rate)) for rate in rates]
    lines = {name: [one[name] for one in found] for name in found[0]}
    knee = None
    for n, value in enumerate(lines["p99"]):
        wanted = 2 * lines["p99"][0]
        if value >= wanted:
            share = (wanted - lines["p99"][n - 1]) / (value - lines["p99"][n - 1])
            knee = (rates[n - 1] + share * (rates[n] - rates[n - 1]), wanted)
            break
    return Curves(rates=rates, lines=lines, limit=limit, knee=knee)


def text(setup: Setup, width: int, paint: Callable[[str, str], str] = lambda _, text: text) -> str:
    """The curves as lines of text so many characters wide; ``paint`` colours a text by the curve's name."""
    found = curves(setup)
    most = max(found.limit.rate, setup.rate) * 1.02
    marks = {"┊": setup.rate, "│": found.limit.rate}
    if setup.rate >= found.limit.rate:
        marks = dict(reversed(marks.items()))  # what is over the limit is seen where both are one
    drawn = chart(
        found.rates, found.lines, marks, {"◆": found.knee} if found.knee else {}, most=most, width=width, paint=paint
    )
    knee = "p99 stays below twice that without load"
    if found.knee is not None:
        knee = f"knee: from {per_second(found.knee[0])} on p99 is over twice that without load"
    return "\n".join([
        "from arrival to end, by arrivals", drawn,
        f"  ┊ λ now: {per_second(setup.rate)}   │ limit: {per_second(found.limit.rate)}, {found.limit.name}",
        f"  ◆ {knee}",
    ])  # fmt: skip


def draw(setup: Setup, path: Path) -> None:
    """Draw p50, p95 and p99 (simulated) over the arrival rate into an .svg, .png or .pdf file.

    Raises:
        ConfigError: matplotlib is not installed.
        DefinitionError: The file's name ends in something else, or it cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'stentor[plot]'; or --plot - for one of text") from None
    if path.suffix not in {".svg", ".png", ".pdf"}:
        raise DefinitionError(f"{path}: a plot is a .svg, .png or .pdf file, or - for one of text")
    found = curves(setup)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in found.lines.items():
        axes.plot(found.rates, [value * 1e3 for value in values], label=name)
    axes.axvline(setup.rate, linestyle="--", color="black", linewidth=1, label=f"λ = {setup.rate:,.0f}/s")
    limit = found.limit
    axes.axvline(limit.rate, color="crimson", linewidth=1, label=f"limit: {limit.name}, {limit.rate:,.0f}/s")
    if found.knee is not None:
        rate, p99 = found.knee
        axes.plot(rate, p99 * 1e3, "D", color="black", label=f"knee: {rate:,.0f}/s, p99 {short_time(p99)}")
    axes.set(xlabel="arrivals, events/s", ylabel="from arrival to end, ms", yscale="log")
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise DefinitionError(f"{path}: {error.strerror}") from None
