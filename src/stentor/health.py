"""What a running program says of itself: alive, ready, and its figures for Prometheus."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from stentor.errors import ConfigError
from stentor.histogram import Histogram
from stentor.message import Lag
from stentor.program import Program
from stentor.rate import concurrency

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

T = TypeVar("T")
Told = dict[str, Any]
"""What one process tells of itself: ``Health.figures``."""
BOUNDS = [factor * 10.0**power for power in range(-4, 2) for factor in (1, 2.5, 5)]
"""Seconds at which the histograms of /metrics are cut; /flow has them whole."""
PATIENCE = 2.0
"""Seconds that a broker has to answer; a half-open connection must not hold up a probe."""
FRESH = 1.0
"""Seconds for which the lag is kept: probes and scrapes may come often, and on some brokers it is dear."""

COUNTS = (
    ("handled", "Deliveries that a handler took care of."),
    ("failed", "Attempts that ended in an error and are retried."),
    ("retried", "Deliveries put back for a later attempt, asked for or after an error."),
    ("dead", "Deliveries given up and kept as dead letters."),
    ("skipped", "Deliveries that the group did not ask for, by type or by filter."),
    ("refused", "Settlements refused because another process owns the partition by now."),
)
"""What a worker counts, with what each count is of."""


def failures(program: Program) -> list[str]:
    """Why a program that runs is broken for good, in lines; empty when it is not."""
    found = [_failed(worker.group, worker.failure) for worker in program.workers if worker.failure is not None]
    if program.failure is not None and not found:
        found.append(f"{type(program.failure).__name__}: {program.failure}")
    return found


def _failed(group: str, error: BaseException) -> str:
    return f"the worker of {group} stopped: {type(error).__name__}: {error}"


def flow_entries(told: Sequence[Told], lag: Sequence[Lag]) -> list[dict[str, Any]]:
    """The groups of each process, as ``/flow`` has them: with what the whole group has still to do."""
    waits: dict[str, list[dict[str, Any]]] = {}
    for one in lag:
        entry = {"topic": one.topic, "events": one.events, "seconds": one.seconds, "parked": one.parked}
        waits.setdefault(one.group, []).append(entry)
    return [
        {"worker": process["worker"], "pid": process["pid"], **group, "lag": waits.get(group["name"], [])}
        for process in told
        for group in process["groups"]
    ]


class Health:
    """Answers for one program, and for the other workers of its supervisor; the next run of the app has a new one."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._lock = asyncio.Lock()
        self.last_lag: list[Lag] = []
        """The lag as it was told last."""
        self._lag_trouble: str | None = None
        self._asked: float | None = None

    async def _ask(self, what: str, answer: Awaitable[T]) -> tuple[T | None, str | None]:
        """What the broker answers, and None; or None, and one line that says why it does not."""
        try:
            async with self.program.clock.timeout(PATIENCE):
                return await answer, None
        except TimeoutError:
            return None, f"{what}: no answer within {PATIENCE:g} s"
        except Exception as error:  # whatever it is, a probe must get an answer
            return None, f"{what}: {type(error).__name__}: {error}"

    async def trouble(self) -> str | None:
        """What is wrong with the broker, in one line."""
        said, failed = await self._ask("broker", self.program.broker.health())
        return failed if failed is not None else said

    async def lag(self) -> tuple[list[Lag], str | None]:
        """The lag of this app's groups, at most a second old; and one line if the broker does not tell."""
        async with self._lock:  # many probes at once ask the broker once
            now = self.program.clock.monotonic()
            if self._asked is None or now - self._asked >= FRESH:
                found, self._lag_trouble = await self._ask("lag", self.program.broker.admin.lag())
                own = {worker.plan.subscription.name for worker in self.program.workers} | set(self.program.groups)
                self.last_lag = [lag for lag in found or () if lag.group in own]
                self._asked = self.program.clock.monotonic()
            return self.last_lag, self._lag_trouble

    def figures(self) -> Told:
        """What this process did and measured, as JSON can carry it: counts only grow, histograms add up."""
        program = self.program
        return {
            "worker": program.worker,
            "pid": os.getpid(),
            "cpu": time.process_time(),
            "groups": [
                {
                    "group": worker.group, "name": worker.plan.subscription.name,
                    "shared": not (worker.plan.broadcast or worker.plan.subscription.single),
                    "concurrency": concurrency(worker), "running": worker.running, "partitions": worker.partitions,
                    "inflight": sum(share.inflight for share in worker.shares.values()), "trouble": worker.trouble,
                    "held": worker.hold.reason,
                    "failed": None if worker.failure is None else _failed(worker.group, worker.failure),
                    "counts": asdict(worker.counts), **worker.meter.to_dict(),
                }
                for worker in program.workers
            ],
            "sources": [
                {"group": group, "source": source.name, "lag": source.counts.lag,
                 "events": source.counts.events, "errors": source.counts.errors}
                for group, declared in program.groups.items()
                for source in declared.sources
            ],
        }  # fmt: skip

    async def _all(self) -> tuple[list[Told], list[dict[str, Any]], list[str]]:
        """What this process and the other workers tell, the state of each worker, and in lines who does not answer."""
        mine = self.figures()
        if self.program.others is None:
            return [mine], [], []
        others = await self.program.others()
        silent = [f"worker {one['worker']} does not answer" for one in others or () if one["state"] == "silent"]
        if others is None:
            others, silent = [], ["the supervisor does not answer"]
        told = [mine, *(one["figures"] for one in others if one["figures"])]
        states = [{"worker": mine["worker"], "state": "ready"}]
        states += [{"worker": one["worker"], "state": one["state"]} for one in others]
        return told, states, silent

    async def alive(self) -> dict[str, Any]:
        """Whether something is broken for good; a worker that does not answer is named, and is no reason."""
        told, states, _ = await self._all()
        reasons = failures(self.program)
        reasons += [_of(one, group["failed"]) for one in told[1:] for group in one["groups"] if group["failed"]]
        state = {"status": "failed" if reasons else "ok", "app": self.program.name, "reasons": reasons}
        return {**state, "workers": states} if states else state

    async def ready(self) -> dict[str, Any]:
        """Whether events are taken and handled now, with the reasons if not, group by group."""
        program = self.program
        trouble = await self.trouble()
        lag, unknown = await self.lag()
        told, states, silent = await self._all()
        reasons = failures(program)
        reasons += [line for line in (trouble and f"{program.broker.features.name}: {trouble}", unknown) if line]
        reasons += silent
        groups = []
        for process in told:
            for one in process["groups"]:
                members = max((entry.members for entry in lag if entry.group == one["name"]), default=0)
                standing_by = one["partitions"] == 0 and members > 1
                if one["failed"] is None and one["partitions"] == 0 and not standing_by:
                    reasons.append(_of(process, f"{one['group']}: no partition is assigned yet"))
                if one["trouble"] is not None:
                    reasons.append(_of(process, f"{one['group']}: {one['trouble']}"))
                shown = {name: one[name] for name in ("group", "partitions", "trouble", "held", "failed")}
                groups.append({"worker": process["worker"], **shown, "members": members, "standing_by": standing_by})
        return {
            "status": "not ready" if reasons else "ready",
            "app": program.name,
            "reasons": reasons,
            "broker": {"name": program.broker.features.name, "trouble": trouble},
            "workers": states,
            "groups": groups,
            "lag": [
                {
                    "group": entry.group, "topic": entry.topic, "events": entry.events,
                    "seconds": round(entry.seconds, 3), "parked": entry.parked,
                }
                for entry in lag
            ],
            "oldest_unacked_seconds": None if unknown else round(max((entry.seconds for entry in lag), default=0.0), 3),
        }  # fmt: skip

    async def flow(self) -> dict[str, Any]:
        """What each process did and measured, group by group: counts that only grow, histograms that add up.

        Two of these make rates: see ``stentor.observe.flow``.
        """
        lag, unknown = await self.lag()
        told, states, _ = await self._all()
        return {
            "app": self.program.name, "time": self.program.clock.now(), "unknown": unknown, "workers": states,
            "groups": flow_entries(told, lag),
        }  # fmt: skip

    async def metrics(self, accept: str, http: Mapping[str, int], in_flight: int) -> tuple[bytes, str]:
        """The figures as Prometheus asks for them with ``accept``, and their content type.

        ``http`` counts what the ingress did: "published", "duplicate", and refusals by status.

        Raises:
            ConfigError: prometheus_client is not installed.
        """
        try:
            from prometheus_client.exposition import choose_encoder
        except ImportError:
            raise ConfigError("/metrics needs prometheus_client: pip install 'stentor[http]'") from None
        trouble = await self.trouble()
        lag, unknown = await self.lag()
        told, states, _ = await self._all()
        encode, content = choose_encoder(accept)
        families = [
            *_groups(told),
            *_times(told),
            *_sources(told),
            *_states(states),
            *_lags(lag),
            *_ingress(http, in_flight),
            *self._whole(trouble or unknown),
        ]
        return encode(_Collected(families)), content

    def _whole(self, trouble: str | None) -> Iterable[Metric]:
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        name = self.program.broker.features.name
        yield InfoMetricFamily("stentor", "The app and its broker.", {"app": self.program.name, "broker": name})
        yield GaugeMetricFamily(
            "stentor_broker_up", "1 when the broker answers and reports no trouble.", trouble is None
        )


# Figures of several workers are told apart by a label and not added up: a sum of counters goes down when a worker goes,
# and who reads it takes that for a restart and counts everything again.


def _labels(told: Sequence[Told], *names: str) -> list[str]:
    return [*names, "worker"] if told[0]["worker"] is not None else list(names)


def _place(process: Told, *names: str) -> list[str]:
    return [*names, str(process["worker"])] if process["worker"] is not None else list(names)


def _of(process: Told, line: str) -> str:
    return line if process["worker"] is None else f"worker {process['worker']}: {line}"


def _groups(told: Sequence[Told]) -> Iterable[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = _labels(told, "group")
    groups = [(_place(process, one["group"]), one) for process in told for one in process["groups"]]
    for name, text in COUNTS:
        counter = CounterMetricFamily(f"stentor_{name}", text, labels=labels)
        for place, one in groups:
            counter.add_metric(place, one["counts"][name])
        yield counter
    gauges: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
        ("in_flight", "Deliveries fetched and not settled yet.", lambda one: one["inflight"]),
        ("running", "Handlers that run now.", lambda one: one["running"]),
        ("partitions", "Partitions that this process owns.", lambda one: one["partitions"]),
        ("worker_failed", "1 when the worker stopped by itself.", lambda one: one["failed"] is not None),
        ("held", "1 while the group begins nothing new.", lambda one: one["held"] is not None),
        ("concurrency", "Handlers that may run at once.", lambda one: one["concurrency"]),
        ("hottest_key_share", "Share of the commonest key.",
         lambda one: max(one["keys"].values()) / one["keyed"] if one["keyed"] else 0.0),
    )  # fmt: skip
    for name, text, figure in gauges:
        gauge = GaugeMetricFamily(f"stentor_{name}", text, labels=labels)
        for place, one in groups:
            gauge.add_metric(place, figure(one))
        yield gauge


def _times(told: Sequence[Told]) -> Iterable[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    for name, text, of in (
        ("handler", "What a handler took.", "service"),
        ("waiting", "From an event's own time to the begin of its handler.", "waiting"),
        ("settle", "What the broker took for a batch of settlements.", "settling"),
    ):
        family = HistogramMetricFamily(f"stentor_{name}_seconds", text, labels=_labels(told, "group"))
        for process in told:
            for one in process["groups"]:
                histogram = Histogram.from_dict(one[of])
                buckets = [(repr(bound), histogram.at_most(bound)) for bound in BOUNDS]
                family.add_metric(_place(process, one["group"]), [*buckets, ("+Inf", histogram.count)], histogram.total)
        yield family


def _sources(told: Sequence[Told]) -> Iterable[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = _labels(told, "group", "source")
    events = CounterMetricFamily("stentor_source_events", "Events that a source published.", labels=labels)
    errors = CounterMetricFamily("stentor_source_errors", "Errors that a source met.", labels=labels)
    lag = GaugeMetricFamily("stentor_source_lag", "What waits where a source reads, in its own unit.", labels=labels)
    for process in told:
        for source in process["sources"]:
            place = _place(process, source["group"], source["source"])
            events.add_metric(place, source["events"])
            errors.add_metric(place, source["errors"])
            if source["lag"] is not None:
                lag.add_metric(place, source["lag"])
    return events, errors, lag


def _states(states: Sequence[dict[str, Any]]) -> Iterable[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    if states:
        up = GaugeMetricFamily("stentor_worker_up", "1 when the worker answers.", labels=["worker"])
        for one in states:
            up.add_metric([str(one["worker"])], one["state"] not in ("silent", "starting"))
        yield up


class _Collected:
    """Metric families as an encoder of prometheus_client wants them."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _lags(lag: list[Lag]) -> Iterable[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    labels = ["group", "topic"]
    events = GaugeMetricFamily("stentor_lag_events", "Events that wait in the log.", labels=labels)
    seconds = GaugeMetricFamily("stentor_lag_seconds", "Age of the oldest event that waits in the log.", labels=labels)
    parked = GaugeMetricFamily("stentor_parked", "Events in the journal: retried later, or held behind.", labels=labels)
    for entry in lag:
        place = [entry.group, entry.topic]
        events.add_metric(place, entry.events)
        seconds.add_metric(place, entry.seconds)
        parked.add_metric(place, entry.parked)
    return events, seconds, parked


def _ingress(http: Mapping[str, int], in_flight: int) -> Iterable[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    published = CounterMetricFamily("stentor_published", "Events stored durably, by the way they came.", labels=["via"])
    published.add_metric(["http"], http.get("published", 0))
    duplicates = CounterMetricFamily(
        "stentor_http_duplicates", "Events that came again and were not stored again.", value=http.get("duplicate", 0)
    )
    refused = CounterMetricFamily("stentor_http_refused", "Requests with a body that were refused.", labels=["status"])
    for status, count in sorted(http.items()):
        if status.isdigit():
            refused.add_metric([status], count)
    open_now = GaugeMetricFamily("stentor_http_in_flight", "Requests with a body that are under way.", value=in_flight)
    return published, duplicates, refused, open_now
