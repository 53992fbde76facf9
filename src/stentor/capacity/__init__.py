"""What a program can carry: arrival rate λ, service rate μ, throughput X = min(λ, μ), and how long events wait."""

from stentor.capacity.forecast import Forecast, binned, forecast_errors
from stentor.capacity.plan import (
    Answer,
    Limit,
    Setup,
    answer,
    drain_time,
    lag_after,
    largest_rate,
    limits,
    partitions_for,
    workers_for,
)
from stentor.capacity.replay import Replayed, replay
from stentor.capacity.times import Times, arrivals, fitted, recorded
from stentor.histogram import Histogram

__all__ = [
    "Answer",
    "Forecast",
    "Histogram",
    "Limit",
    "Replayed",
    "Setup",
    "Times",
    "answer",
    "arrivals",
    "binned",
    "drain_time",
    "fitted",
    "forecast_errors",
    "lag_after",
    "largest_rate",
    "limits",
    "partitions_for",
    "recorded",
    "replay",
    "workers_for",
]
