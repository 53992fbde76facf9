"""What measuring costs: the memory broker with a handler that does next to nothing, measured and not."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import Bar, Case, Figures, Results, Row
from benchmarks.memory import stentor_batches


def measured(folder: Path) -> Figures:
    return stentor_batches(folder)


def unmeasured(folder: Path) -> Figures:
    """The worker counts down to a sample that never comes, and times no settling."""
    from stentor.meter import Meter

    def never(self: Meter, *_: object) -> None:
        self.left = 1 << 60

    Meter.took = Meter.tick = Meter.settle = never  # type: ignore[assignment,method-assign]
    return stentor_batches(folder)


def bars(results: Results) -> list[Bar]:
    share = results.ratios("measured", "not measured", "us")
    return [Bar("time with measurement by time without", share, 1.02, at_least=False)]


ROW = Row(
    name="meter",
    title="what measuring service times, waits and keys costs, memory broker",
    cases=[Case("measured", measured), Case("not measured", unmeasured)],
    columns={"us": "µs an event"},
    base="not measured",
    bars=bars,
)
