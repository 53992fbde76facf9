"""Times and rates as people read them."""

from __future__ import annotations


def span(seconds: float) -> str:
    """A length of time, short: 0.4 s, 12 s, 3 min, 5 h, 2 d."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def per_second(value: float) -> str:
    """Events a second, short."""
    return f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"


def short_time(value: float) -> str:
    """A short time with three digits: 12.3 ms, 1.20 s."""
    if not value:
        return "0 s"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s" if value < 120 else span(value)
