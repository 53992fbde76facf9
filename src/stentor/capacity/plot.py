"""Latency over load as a picture: where the knee is, and where this program stands."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from stentor.capacity.plan import Setup, answer, limits
from stentor.errors import ConfigError, DefinitionError

_LOADS = [0.05, *(n / 20 for n in range(2, 18)), 0.875, 0.9, 0.925, 0.95, 0.97]


def draw(setup: Setup, path: Path) -> None:
    """Draw p50, p95 and p99 (simulated) over the arrival rate into an .svg, .png or .pdf file.

    Raises:
        ConfigError: matplotlib is not installed.
        DefinitionError: The file's name ends in something else, or it cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'stentor[plot]'") from None
    if path.suffix not in {".svg", ".png", ".pdf"}:
        raise DefinitionError(f"{path}: a plot is a .svg, .png or .pdf file")
    limit = limits(setup)[0]
    rates = [load * limit.rate for load in _LOADS]
    lines: dict[str, list[float]] = {}
    for rate in rates:
        for name, value in (answer(replace(setup, rate=rate)).simulated or {}).items():
            lines.setdefault(name, []).append(value * 1e3)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in lines.items():
        axes.plot(rates, values, label=name)
    axes.axvline(setup.rate, linestyle="--", color="black", linewidth=1, label=f"λ = {setup.rate:,.0f}/s")
    axes.axvline(limit.rate, color="crimson", linewidth=1, label=f"limit: {limit.name}, {limit.rate:,.0f}/s")
    axes.set(xlabel="arrivals, events/s", ylabel="from arrival to end, ms", yscale="log")
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise DefinitionError(f"{path}: {error.strerror}") from None
