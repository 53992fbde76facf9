"""The events that the suite publishes."""

from __future__ import annotations

from stentor.event import Event, Topic


class Job(Event, topic="jobs", key="key", type="conformance.job"):
    """A piece of work, the ``n``-th of its key."""

    key: str
    n: int
    body: str = ""
    parts: list[int] = []  # noqa: RUF012  msgspec copies it


class Order(Event, topic="jobs", key="key", type="conformance.order"):
    """A second type on the topic of Job."""

    key: str
    n: int


class Made(Event, topic="made", key="key", type="conformance.made"):
    """What a handler makes of a Job."""

    key: str
    n: int


class Loose(Event, topic="loose", type="conformance.loose"):
    """An event without a key."""

    n: int


class Lonely(Event, topic="lonely", key="key", type="conformance.lonely"):
    """An event on a topic that no group reads."""

    key: str


class Short(Event, topic=Topic("short", retention="1s"), key="key", type="conformance.short"):
    """An event on a topic that keeps what is settled for one second only."""

    key: str
    n: int


class Brief(Event, topic=Topic("brief", retention="1s"), key="key", type="conformance.brief"):
    """An event that nobody reads and nobody keeps."""

    key: str


ALWAYS = (Job, Made)
"""What every app of the suite knows; topics of the others are declared where a test needs them, as that may be dear."""


def jobs(keys: int | str, each: int) -> list[Job]:
    """``each`` jobs for every key, the keys in turn."""
    names = [f"k{i}" for i in range(keys)] if isinstance(keys, int) else keys.split()
    return [Job(key=key, n=n) for n in range(each) for key in names]
