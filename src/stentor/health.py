"""What a running program says of itself: alive, ready, and its figures for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from stentor.errors import ConfigError
from stentor.message import Lag
from stentor.program import Program

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

T = TypeVar("T")
PATIENCE = 2.0
"""Seconds that a broker has to answer; a half-open connection must not hold up a probe."""
FRESH = 1.0
"""Seconds for which the lag is kept: probes and scrapes may come often, and on some brokers it is dear."""


def failures(program: Program) -> list[str]:
    """Why a program that runs is broken for good, in lines; empty when it is not."""
    found = [_failed(worker.group, worker.failure) for worker in program.workers if worker.failure is not None]
    if program.failure is not None and not found:
        found.append(f"{type(program.failure).__name__}: {program.failure}")
    return found


def _failed(group: str, error: BaseException) -> str:
    return f"the worker of {group} stopped: {type(error).__name__}: {error}"


class Health:
    """Answers for one program; makes a new one for the next run of the app."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._lock = asyncio.Lock()
        self._lag: list[Lag] = []
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
                self._lag = [lag for lag in found or () if lag.group in own]
                self._asked = self.program.clock.monotonic()
            return self._lag, self._lag_trouble

    async def ready(self) -> dict[str, Any]:
        """Whether events are taken and handled now, with the reasons if not, group by group."""
        program = self.program
        trouble = await self.trouble()
        lag, unknown = await self.lag()
        reasons = failures(program)
        reasons += [line for line in (trouble and f"{program.broker.features.name}: {trouble}", unknown) if line]
        groups = []
        for worker in program.workers:
            name = worker.plan.subscription.name
            members = max((entry.members for entry in lag if entry.group == name), default=0)
            standing_by = worker.partitions == 0 and members > 1
            if worker.failure is None and worker.partitions == 0 and not standing_by:
                reasons.append(f"{worker.group}: no partition is assigned yet")
            if worker.trouble is not None:
                reasons.append(f"{worker.group}: {worker.trouble}")
            groups.append({
                "group": worker.group,
                "partitions": worker.partitions,
                "members": members,
                "standing_by": standing_by,
                "trouble": worker.trouble,
                "failed": None if worker.failure is None else _failed(worker.group, worker.failure),
            })  # fmt: skip
        return {
            "status": "not ready" if reasons else "ready",
            "app": program.name,
            "reasons": reasons,
            "broker": {"name": program.broker.features.name, "trouble": trouble},
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
        encode, content = choose_encoder(accept)
        families = [*self._groups(), *_lags(lag), *_ingress(http, in_flight), *self._whole(trouble or unknown)]
        return encode(_Collected(families)), content

    def _groups(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        workers = self.program.workers
        for name, text in (
            ("handled", "Deliveries that a handler took care of."),
            ("failed", "Attempts that ended in an error and are retried."),
            ("retried", "Deliveries put back for a later attempt, asked for or after an error."),
            ("dead", "Deliveries given up and kept as dead letters."),
            ("skipped", "Deliveries that the group did not ask for, by type or by filter."),
            ("refused", "Settlements refused because another process owns the partition by now."),
        ):
            counter = CounterMetricFamily(f"stentor_{name}", text, labels=["group"])
            for worker in workers:
                counter.add_metric([worker.group], getattr(worker.counts, name))
            yield counter
        flying = GaugeMetricFamily("stentor_in_flight", "Deliveries fetched and not settled yet.", labels=["group"])
        running = GaugeMetricFamily("stentor_running", "Handlers that run now.", labels=["group"])
        owned = GaugeMetricFamily("stentor_partitions", "Partitions that this process owns.", labels=["group"])
        failed = GaugeMetricFamily("stentor_worker_failed", "1 when the worker stopped by itself.", labels=["group"])
        for worker in workers:
            flying.add_metric([worker.group], sum(share.inflight for share in worker.shares.values()))
            running.add_metric([worker.group], worker.running)
            owned.add_metric([worker.group], worker.partitions)
            failed.add_metric([worker.group], worker.failure is not None)
        yield from (flying, running, owned, failed)

    def _whole(self, trouble: str | None) -> Iterable[Metric]:
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        name = self.program.broker.features.name
        yield InfoMetricFamily("stentor", "The app and its broker.", {"app": self.program.name, "broker": name})
        yield GaugeMetricFamily(
            "stentor_broker_up", "1 when the broker answers and reports no trouble.", trouble is None
        )


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
    refused = CounterMetricFamily("stentor_http_refused", "Requests to /events that were refused.", labels=["status"])
    for status, count in sorted(http.items()):
        if status.isdigit():
            refused.add_metric([status], count)
    open_now = GaugeMetricFamily("stentor_http_in_flight", "Requests to /events that are under way.", value=in_flight)
    return published, duplicates, refused, open_now
