"""An app under load, on one broker or several: what `stentor bench` runs, and the report that it makes."""

from stentor.bench.load import KINDS, Load, modelled, trace
from stentor.bench.member import Job, play, work_app
from stentor.bench.report import Figure, Report, Row, rows
from stentor.bench.trial import Bench, Result

__all__ = [
    "KINDS", "Bench", "Figure", "Job", "Load", "Report", "Result", "Row", "modelled", "play", "rows", "trace",
    "work_app",
]  # fmt: skip
