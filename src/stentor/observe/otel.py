"""The figures of a program for OpenTelemetry: those of /metrics, by the API alone; the reader's SDK exports them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from stentor import __version__
from stentor.app import App
from stentor.errors import ConfigError
from stentor.health import COUNTS, Health
from stentor.rate import concurrency
from stentor.worker import Worker

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation

    Callback = Callable[[CallbackOptions], Iterable[Observation]]

TIMES = {
    "handler": ("service", "What handlers took."), "waiting": ("waiting", "From events' own times to handlers."),
    "settle": ("settling", "What the broker took for batches of settlements."),
}  # fmt: skip
"""By name: the histogram of a worker's meter, given as its sum and its count."""


def export(app: App, meter: Meter | None = None) -> None:
    """Let OpenTelemetry read what an app counts and measures, whenever it runs; call it once for an app.

    ``meter``: default that of the global meter provider. Counters and gauges are called ``stentor.<name>`` and have the
    attribute ``group``, those of the lag ``topic`` too. They are read when the SDK asks, in a thread of its own, and
    cost nothing between. What only the broker knows (the lag) is asked for then, and told the next time.

    Raises:
        ConfigError: opentelemetry-api is not installed.
    """
    try:
        from opentelemetry.metrics import get_meter
    except ImportError:
        raise ConfigError("figures for OpenTelemetry need opentelemetry-api: pip install 'stentor[otel]'") from None
    found = _Figures(app)
    meter = get_meter("stentor", __version__) if meter is None else meter
    for name, text in COUNTS:
        meter.create_observable_counter(f"stentor.{name}", [found.of(attrgetter(f"counts.{name}"))], "{event}", text)
    for name, (of, text) in TIMES.items():
        meter.create_observable_counter(f"stentor.{name}.time", [found.of(attrgetter(f"meter.{of}.total"))], "s", text)
        meter.create_observable_counter(
            f"stentor.{name}.count", [found.of(attrgetter(f"meter.{of}.count"))], "{event}",
            f"Those of stentor.{name}.time.",
        )  # fmt: skip
    gauges: dict[str, tuple[Callable[[Worker], float], str, str]] = {
        "in_flight": (
            lambda worker: sum(share.inflight for share in worker.shares.values()),
            "{event}",
            "Deliveries fetched and not settled yet.",
        ),
        "running": (lambda worker: worker.running, "{handler}", "Handlers that run now."),
        "concurrency": (concurrency, "{handler}", "Handlers that may run at once."),
        "partitions": (lambda worker: worker.partitions, "{partition}", "Partitions that this process owns."),
        "held": (lambda worker: worker.hold.reason is not None, "1", "1 while the group begins nothing new."),
        "worker_failed": (lambda worker: worker.failure is not None, "1", "1 when the worker stopped by itself."),
        "hottest_key_share": (lambda worker: worker.meter.keys.share, "1", "Share of the commonest key."),
    }
    for name, (figure, unit, text) in gauges.items():
        meter.create_observable_gauge(f"stentor.{name}", [found.of(figure)], unit, text)
    meter.create_observable_gauge("stentor.lag", [found.lag("events")], "{event}", "Events that wait in the log.")
    meter.create_observable_gauge("stentor.lag.age", [found.lag("seconds")], "s", "Age of the oldest that waits.")
    meter.create_observable_gauge("stentor.parked", [found.lag("parked")], "{event}", "Events that wait in journals.")


class _Figures:
    """Callbacks that read whatever program of the app runs when they are called."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._health: Health | None = None
        self._asking: asyncio.Task[Any] | None = None

    def _workers(self) -> list[Worker]:
        program = self._app.program
        return [] if program is None else list(program.workers)

    def of(self, figure: Callable[[Worker], float]) -> Callback:
        from opentelemetry.metrics import Observation

        return lambda _: [Observation(figure(worker), {"group": worker.group}) for worker in self._workers()]

    def lag(self, figure: str) -> Callback:
        from opentelemetry.metrics import Observation

        def observed(_: CallbackOptions) -> Iterable[Observation]:
            program, workers = self._app.program, self._workers()
            if program is None or not workers:
                return []
            if self._health is None or self._health.program is not program:
                self._health = Health(program)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                workers[0].loop.call_soon_threadsafe(self._ask, self._health)
            return [
                Observation(getattr(lag, figure), {"group": lag.group, "topic": lag.topic})
                for lag in self._health.last_lag
            ]

        return observed

    def _ask(self, health: Health) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(health.lag(), name="stentor lag")
