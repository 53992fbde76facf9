"""λ, X and ρ of running programs: two readings of ``/flow`` of all processes of an app, and what lies between them.

A process tells counts that only grow and histograms that add up (``Health.flow``). Between two readings

- X, the throughput, is what all processes have ended, by the time between;
- λ, the arrival rate, is X plus what the backlog grew by in that time, as nothing else leaves it;
- ρ, the utilisation, is the time for which handlers were busy, by the time for which all that may run at once could.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from stentor.errors import Unavailable
from stentor.histogram import Histogram

PATIENCE = 5.0
"""Seconds that a process has to answer."""


class Reading(Struct, frozen=True):
    """What the processes said, by process and group, and when (monotonic seconds)."""

    moment: float
    told: dict[str, dict[str, dict[str, Any]]]


class Flow(Struct, frozen=True, kw_only=True):
    """A group between two readings; rates are in events a second, times in seconds."""

    group: str
    arrivals: float
    """λ"""
    throughput: float
    """X"""
    utilisation: float
    """ρ"""
    processes: int
    running: int
    """Handlers that run now, in all processes."""
    concurrency: int
    """Handlers that may run at once in one process."""
    partitions: int
    service: Histogram
    waiting: Histogram
    settling: Histogram
    waits: int
    """Events in the log that no process has ended."""
    oldest: float
    """Age of the oldest of them."""
    parked: int
    retries: float
    dead: float
    hottest: tuple[str, float] | None
    """The commonest key and its share, 0 to 1, since the processes began."""


def read(urls: Sequence[str]) -> Reading:
    """Ask every process. Raises Unavailable, with the URL, when one does not answer or tells something else."""
    moment = time.monotonic()
    told: dict[str, dict[str, dict[str, Any]]] = {}
    for url in urls:
        told.update(_ask(url))
    return Reading(moment, told)


def by_process(url: str, entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """What ``/flow`` has in one list, by process and group: where there are workers, all of them answer at one URL."""
    told: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        told.setdefault(f"{url} {entry['pid']}", {})[entry["group"]] = entry
    return told


def _ask(url: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What stands behind a URL tells, of the shape that the arithmetic below relies on."""
    place = f"{url.rstrip('/')}/flow"
    if not place.startswith(("http://", "https://")):
        raise Unavailable(f"{url} is no http:// or https:// URL of a running program")
    try:
        with urllib.request.urlopen(place, timeout=PATIENCE) as answer:  # noqa: S310  the scheme is checked above
            found = msgspec.json.decode(answer.read())
        for entry in msgspec.convert(found, _Answer).groups:
            for histogram in (entry.service, entry.waiting, entry.settling):
                Histogram.from_dict(histogram)
        return by_process(url, found["groups"])
    except (OSError, ValueError, http.client.HTTPException) as error:  # those of msgspec are ValueErrors
        why = error.reason if isinstance(error, urllib.error.URLError) and error.reason else error
        if isinstance(error, msgspec.DecodeError) and not isinstance(error, msgspec.ValidationError):
            why = f"it is no JSON ({error})"
        raise Unavailable(f"{place}: {why}; is it a program run with --http?") from None


class _Counts(Struct):
    handled: int
    dead: int
    skipped: int
    retried: int


class _Lag(Struct):
    events: int
    seconds: float
    parked: int


class _Entry(Struct):
    pid: int
    group: str
    counts: _Counts
    concurrency: int
    running: int
    partitions: int
    service: dict[str, Any]
    waiting: dict[str, Any]
    settling: dict[str, Any]
    keys: dict[str, int]
    keyed: int
    lag: list[_Lag]


class _Answer(Struct):
    groups: list[_Entry]


def between(before: Reading, after: Reading) -> list[Flow]:
    """What the groups did between two readings, by name."""
    names = {name: None for groups in after.told.values() for name in groups}
    return [_group(name, before, after) for name in sorted(names)]


def _group(name: str, before: Reading, after: Reading) -> Flow:
    seconds = max(after.moment - before.moment, 1e-9)
    told = [groups[name] for groups in after.told.values() if name in groups]
    times = {kind: Histogram() for kind in ("service", "waiting", "settling")}
    done = retries = dead = 0
    for process, groups in after.told.items():
        if name not in groups:
            continue
        now, then = groups[name], before.told.get(process, {}).get(name)
        if then is None:  # it is new, or did not answer before: what it ended is not all of this time
            continue
        if _ended(then) > _ended(now):  # it began anew in between
            then = None
        done += _ended(now) - (_ended(then) if then else 0)
        retries += now["counts"]["retried"] - (then["counts"]["retried"] if then else 0)
        dead += now["counts"]["dead"] - (then["counts"]["dead"] if then else 0)
        for kind, histogram in times.items():
            whole = Histogram.from_dict(now[kind])
            histogram.merge(whole.since(Histogram.from_dict(then[kind])) if then else whole)
    throughput = done / seconds
    grew = (_waits(after, name) - _waits(before, name)) / seconds
    could = sum(one["concurrency"] for one in told) * seconds
    return Flow(
        group=name, arrivals=max(0.0, throughput + grew), throughput=throughput,
        utilisation=times["service"].total / could if could else 0.0, processes=len(told),
        running=sum(one["running"] for one in told), concurrency=max(one["concurrency"] for one in told),
        partitions=sum(one["partitions"] for one in told), **times, waits=_waits(after, name),
        oldest=max((lag["seconds"] for one in told for lag in one["lag"] if lag["events"]), default=0.0),
        parked=max(sum(lag["parked"] for lag in one["lag"]) for one in told),
        retries=retries / seconds, dead=dead / seconds, hottest=_hottest(told),
    )  # fmt: skip


def _ended(told: dict[str, Any]) -> int:
    counts = told["counts"]
    return int(counts["handled"] + counts["dead"] + counts["skipped"])


def _waits(reading: Reading, name: str) -> int:
    """Each process tells the lag of the whole group, a moment apart: the last word counts."""
    found = [
        sum(lag["events"] + lag["parked"] for lag in groups[name]["lag"])
        for groups in reading.told.values()
        if name in groups
    ]
    return found[-1] if found else 0


def _hottest(told: Sequence[dict[str, Any]]) -> tuple[str, float] | None:
    counts: dict[str, int] = {}
    for one in told:
        for key, count in one["keys"].items():
            counts[key] = counts.get(key, 0) + count
    if not counts:
        return None
    key = max(counts, key=counts.__getitem__)
    return key, counts[key] / sum(one["keyed"] for one in told)
