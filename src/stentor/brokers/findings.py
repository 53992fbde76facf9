"""What ``stentor doctor`` says of a server, in the words that all brokers share."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from stentor.broker import Finding, Verdict

APART = 1.0
"""Seconds by which two clocks may differ."""


def version(name: str, found: str, least: tuple[int, ...]) -> Finding:
    """The server's version, which must be ``least`` or newer."""
    wanted = ".".join(map(str, least))
    numbers = tuple(int(part) for part in found.partition("-")[0].split(".") if part.isdigit())
    if numbers >= least:
        return Finding("server", "ok", f"{name} {found}")
    return Finding("server", "fail", f"{name} {found}", f"it has to be {wanted} or newer")


def setting(name: str, value: str | None, good: Collection[str], why: str, verdict: Verdict = "warn") -> Finding:
    """A setting of the server; ``why`` says what comes of other values than the good ones."""
    if value is None:
        return Finding(name, "warn", "this user may not read it", f"see that it is {' or '.join(good)}: else {why}")
    if value in good:
        return Finding(name, "ok", value)
    return Finding(name, verdict, f"{value}: {why}", f"set it to {' or '.join(good)}")


def clock(theirs: float, before: float, after: float) -> Finding:
    """The server's clock beside ours, where it was asked between two moments of ours (Unix seconds)."""
    apart = max(before - theirs, theirs - after, 0.0)
    if apart <= APART:
        return Finding("server's clock", "ok", datetime.fromtimestamp(theirs).astimezone().strftime("%H:%M:%S %Z"))
    way = "behind" if theirs < before else "ahead of"
    return Finding(
        "server's clock", "warn", f"{apart:.0f} s {way} this machine's",
        "delays and starts by time follow clocks: synchronise both (NTP)",
    )  # fmt: skip


def room(name: str, used: int, most: int, full: str, unit: str = "") -> Finding:
    """How much of something is used, of ``most`` (0 or less: without a limit); ``full`` says what comes at the end."""
    text = f"{used:,}{f' of {most:,}' if most > 0 else ''}{unit} used"
    if most <= 0 or used <= 0.8 * most:
        return Finding(name, "ok", text)
    return Finding(name, "warn", text, f"at the limit {full}")
