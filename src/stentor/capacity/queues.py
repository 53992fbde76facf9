"""Closed forms of queueing theory. Rates are in events a second, times in seconds, loads in Erlangs (rate · service).

Sources: Erlang (1917) for B and C; Kingman (1961) for one server; Allen (1990, "Probability, Statistics, and Queueing
Theory", section 5.5) for the Allen-Cunneen approximation; Little (1961). All of them speak of the steady state, which
exists only below full utilisation: at or above it a ``ValueError`` says by how much the backlog grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def little(rate: float, time: float) -> float:
    """Little's law: how many events are in a place that they reach at ``rate`` and leave after ``time`` on average."""
    return rate * time


def utilisation(rate: float, service: float, servers: int = 1) -> float:
    """ρ: the share of its time that a server is busy; 1 and more is overload."""
    return rate * service / servers


def stable(rate: float, service: float, servers: int = 1) -> float:
    """ρ, when a steady state exists.

    Raises:
        ValueError: ρ ≥ 1: waiting grows without end and no percentile of it exists.
    """
    busy = utilisation(rate, service, servers)
    if math.isclose(busy, 1):
        raise ValueError("utilisation is 1: a backlog is never worked off and no percentile of waiting exists")
    if busy > 1:
        grows = rate - servers / service
        raise ValueError(
            f"utilisation is {busy:.2f}: the backlog grows by {grows:,.1f} events/s and no percentile of waiting exists"
        )
    return busy


def erlang_b(load: float, servers: int) -> float:
    """The probability that all servers are busy when nothing may wait (M/M/c/c), for a load in Erlangs."""
    blocked = 1.0
    for n in range(1, servers + 1):  # the recursion stays in range where the sum of powers over factorials does not
        blocked = load * blocked / (n + load * blocked)
    return blocked


def erlang_c(load: float, servers: int) -> float:
    """The probability that an event has to wait (M/M/c), for a load in Erlangs below ``servers``."""
    if load >= servers:
        return 1.0
    blocked = erlang_b(load, servers)
    return blocked / (1 - load / servers * (1 - blocked))


def mmc_wait(rate: float, service: float, servers: int = 1) -> float:
    """Mean waiting of M/M/c in seconds, before service; with one server M/M/1. Raises ValueError at ρ ≥ 1."""
    busy = stable(rate, service, servers)
    return erlang_c(rate * service, servers) * service / (servers * (1 - busy))


def kingman_wait(rate: float, service: float, arrival_cv: float, service_cv: float) -> float:
    """Mean waiting of G/G/1 in seconds by Kingman, from coefficients of variation. Raises ValueError at ρ ≥ 1."""
    busy = stable(rate, service)
    return busy / (1 - busy) * (arrival_cv**2 + service_cv**2) / 2 * service


def allen_cunneen_wait(rate: float, service: float, servers: int, arrival_cv: float, service_cv: float) -> float:
    """Mean waiting of G/G/c in seconds: M/M/c times the mean of both squared variations. ValueError at ρ ≥ 1."""
    return mmc_wait(rate, service, servers) * (arrival_cv**2 + service_cv**2) / 2


def latency_quantile(
    quantile: float, rate: float, services: Sequence[float], servers: int, arrival_cv: float, service_cv: float
) -> float:
    """A quantile of waiting plus service, in seconds.

    The waiting of those that wait at all is taken as exponential with the mean that Allen-Cunneen gives, and convolved
    with the service times, which are given as equally likely values.

    Raises:
        ValueError: ρ ≥ 1.
    """
    service = math.fsum(services) / len(services)
    mean = allen_cunneen_wait(rate, service, servers, arrival_cv, service_cv)
    waits = erlang_c(rate * service, servers)
    left = 1 - quantile
    scale = mean / waits if waits > 0 else 0.0

    def later_than(time: float) -> float:
        total = 0.0
        for value in services:
            spare = time - value
            if spare < 0:
                total += 1
            elif scale > 0:
                total += waits * math.exp(-spare / scale)
        return total / len(services)

    low, high = 0.0, max(services)
    while later_than(high) > left:
        high *= 2
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if later_than(middle) > left:
            low = middle
        else:
            high = middle
    return high
