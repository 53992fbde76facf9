"""Which queue for this load: hard needs first, then six scores from what was measured, with their ranges.

Nothing is invented: a score whose figure nobody measured is unknown, and has no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import msgspec
from msgspec import Struct

from stentor.bench.report import Figure, Report, rows
from stentor.broker import Durable, Features, weaker
from stentor.errors import DefinitionError

CRITERIA = ("performance", "scalability", "reliability", "fault tolerance", "integration", "cost")
LEVELS: dict[Durable, float] = {"process": 1 / 3, "host": 2 / 3, "replica": 1.0}
"""What reliability is worth at most, by what a confirmed event survives."""
NOISE = 0.05
"""Seconds: no event counts as late after a fault that took less."""
NEEDS: dict[str, tuple[str, Callable[[Measured], bool | None]]] = {
    "order": ("the events of a key are handled in order", lambda _: True),
    "delay": ("an event can be published for a later time", lambda _: True),
    "replay": ("a group can be set back", lambda one: one.features.replay),
    "cancel": ("a delayed event can be taken back", lambda one: one.features.cancel),
    "dedupe": ("a second publish of the same id is not stored", lambda one: one.features.dedupe),
    "transactions": ("an event's outputs and its ack are one step", lambda one: one.features.atomic),
    "one-order": ("all events of a topic have one order", lambda one: one.features.one_order),
    "hosts": ("several machines share it", lambda one: one.hosts),
    "host": ("a confirmed event survives the machine's crash", lambda one: not weaker(one.durable, "host")),
    "replica": (
        "a confirmed event survives the loss of a machine",
        lambda one: None if one.hosts and weaker(one.durable, "replica") else not weaker(one.durable, "replica"),
    ),
}
"""By name: what it means, and whether a broker does it; None where it was not tried. Those that the contract asks of
every broker are here for those who ask."""
SKILLS = "skills"
"""One more need: that it is a broker which they have."""


class Measured(Struct, kw_only=True):
    """What is known of a broker: its features, and the figures of a bench. Seconds, and events a second."""

    broker: str
    server: str
    features: Features
    largest: Figure | None = None
    """The largest rate that was kept up with, from there to the least that was too much."""
    drained: Figure | None = None
    """Worked off of a backlog."""
    published: Figure | None = None
    p99: Figure | None = None
    """At the rate of the bench."""
    rate: float = 0.0
    """That rate."""
    recovered: Figure | None = None
    """After a kill -9 of the only worker."""
    events: int = 0
    wrong: int = 0
    """Of these: lost, or out of order."""

    @property
    def durable(self) -> Durable:
        """What a confirmed event survived in the runs."""
        return self.features.durable

    @property
    def hosts(self) -> bool:
        """Several machines can share it."""
        return self.features.shared and self.broker != "sqlite"


class Known(Struct, kw_only=True):
    """Measurements of several brokers, in one go on one machine."""

    made: str
    machine: str
    command: str
    brokers: list[Measured]


class Score(Struct, frozen=True):
    """From 0 to 1, with the range that the measurements allow, and the figure behind it."""

    value: float
    least: float
    most: float
    raw: str


class Place(Struct, kw_only=True):
    """A broker with its scores; None where nobody measured."""

    broker: str
    scores: dict[str, Score | None]
    total: Score


class Choice(Struct, kw_only=True):
    """The brokers that do what is needed, best first, and why the others do not."""

    places: list[Place]
    tied: list[str]
    """Those that cannot be told from the first: their ranges meet its."""
    alike: list[tuple[str, str]]
    """Each two neighbours whose ranges meet: their order says nothing."""
    needs: dict[str, dict[str, bool | None]]
    """By broker and need: whether it does it; None where it was not tried."""
    failed: dict[str, list[str]]
    unknown: dict[str, list[str]]
    """Needs that were not tried, by broker; it stays in."""
    turns: list[str]
    """What weight would make another one win."""


def shipped() -> Known:
    """The measurements that come with Stentor."""
    return msgspec.json.decode(files("stentor.bench").joinpath("measured.json").read_bytes(), type=Known)


def known(path: Path) -> Known:
    """Those of a report of ``stentor bench --json``. Raises DefinitionError."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DefinitionError(f"{path} is no report of `stentor bench --json`: {error}") from None
    return from_report(report)


def from_report(report: Report) -> Known:
    """The measurements of a bench, by broker. Raises DefinitionError: a broker stands there twice."""
    found: dict[str, Measured] = {}
    urls: dict[str, str] = {}
    for row in rows(report.results):
        if urls.setdefault(row.broker, row.url) != row.url:
            raise DefinitionError(f"{row.broker} stands in the report with two URLs; compare one of each kind")
        some = [result for result in report.results if (result.kind, result.url) == (row.kind, row.url)]
        features = report.features[row.url]
        one = found.setdefault(
            row.broker, Measured(broker=row.broker, server=report.servers[row.url], features=features)
        )
        one.events += sum(result.events for result in some)
        one.wrong += row.lost + row.disordered
        if row.kind == "load":
            one.p99, one.rate = row.latency.get("p99"), row.rate
        elif row.kind == "ramp":
            one.largest = row.largest
        elif row.kind == "backlog":
            one.drained, one.published = row.throughput, row.published
        elif row.kind == "kill":
            one.recovered = row.recovered
    return Known(made=report.made, machine=report.machine, command=report.command, brokers=list(found.values()))


# ---- the choice -----------------------------------------------------------------------------------------------------


class Wish(Struct, kw_only=True):
    """What somebody needs and weighs. ``rate`` in events a second, ``p99`` in seconds, prices in money a month."""

    needs: Sequence[str] = ()
    rate: float | None = None
    p99: float | None = None
    have: Sequence[str] = ()
    """Brokers that they run already."""
    prices: Mapping[str, float] = {}
    weights: Mapping[str, float] = {}
    """By criterion; those not named weigh 1."""


def choose(brokers: Sequence[Measured], wish: Wish) -> Choice:
    """Rank the brokers for a wish. Raises DefinitionError: a need, criterion or broker is not known."""
    _check(brokers, wish)
    failed: dict[str, list[str]] = {}
    unknown: dict[str, list[str]] = {}
    needs = {one.broker: dict(_verdicts(one, wish)) for one in brokers}
    for one in brokers:
        for need, verdict in needs[one.broker].items():
            if verdict is not True:
                (failed if verdict is False else unknown).setdefault(one.broker, []).append(need)
    left = [one for one in brokers if one.broker not in failed]
    unknown = {name: needs for name, needs in unknown.items() if name not in failed}
    scores = _scores(left, wish)
    weights = {name: wish.weights.get(name, 1.0) for name in CRITERIA}
    places = _ranked(scores, weights)
    tied = [place.broker for place in places[1:] if place.total.most >= places[0].total.least]
    alike = [(a.broker, b.broker) for a, b in pairwise(places) if b.total.most >= a.total.least]
    return Choice(
        places=places, tied=tied, alike=alike, needs=needs, failed=failed, unknown=unknown,
        turns=_turns(scores, weights),
    )  # fmt: skip


def _check(brokers: Sequence[Measured], wish: Wish) -> None:
    names = [one.broker for one in brokers]
    for what, given, good in (
        ("need", wish.needs, [*NEEDS, SKILLS]), ("criterion", wish.weights, list(CRITERIA)),
        ("broker", wish.have, names), ("broker", wish.prices, names),
    ):  # fmt: skip
        for name in given:
            if name not in good:
                raise DefinitionError(f"there is no {what} {name!r}; there are {', '.join(good)}")
    if SKILLS in wish.needs and not wish.have:
        raise DefinitionError("the need of skills asks for --have NAME: the brokers that you know")
    if any(not weight >= 0 for weight in wish.weights.values()):
        raise DefinitionError("a weight is 0 or more")


def _verdicts(one: Measured, wish: Wish) -> list[tuple[str, bool | None]]:
    found = [(need, one.broker in wish.have if need == SKILLS else NEEDS[need][1](one)) for need in wish.needs]
    if wish.rate is not None:
        found.append((f"{wish.rate:,.6g}/s", None if one.largest is None else one.largest.least >= wish.rate))
    if wish.p99 is not None:
        known = one.p99 is not None and (wish.rate is None or wish.rate <= one.rate)
        found.append((f"p99 {wish.p99 * 1e3:,.6g} ms", one.p99.most <= wish.p99 if known and one.p99 else None))
    return found


def _scores(left: Sequence[Measured], wish: Wish) -> dict[str, dict[str, Score | None]]:
    """By broker and criterion."""
    largest = _compared([one.largest for one in left], "{:,.0f}/s kept up with", between=True)
    drained = _compared([one.drained for one in left], "{:,.0f}/s worked off")
    quick = _compared([one.p99 for one in left], "99 % handled within {:.3g} s", less=True)
    back = _compared([one.recovered for one in left], "as before {:.3g} s after a kill", less=True, floor=NOISE)
    cost = _cost(left, wish)
    found: dict[str, dict[str, Score | None]] = {}
    for n, one in enumerate(left):
        sound = float(one.wrong == 0) * LEVELS[one.durable]
        found[one.broker] = {
            "performance": _mean([largest[n], drained[n], quick[n]]),
            "scalability": _exact(float(one.hosts), "several machines" if one.hosts else "one machine"),
            "reliability": _exact(sound, f"{one.wrong} of {one.events:,} wrong; survives: {one.durable}")
            if one.events
            else None,
            "fault tolerance": back[n],
            "integration": _exact(float(one.broker in wish.have), "runs already" if one.broker in wish.have else "new")
            if wish.have
            else None,
            "cost": cost[n],
        }
    return found


def _compared(
    figures: Sequence[Figure | None], text: str, *, less: bool = False, floor: float = 1e-9, between: bool = False
) -> list[Score | None]:
    """Each beside the best: 1 is as good as the best median, 0.5 half as good; below the floor all are alike."""
    medians = [max(floor, figure.median) for figure in figures if figure is not None]
    if not medians:
        return [None] * len(figures)
    best = min(medians) if less else max(medians)

    def score(figure: Figure) -> Score:
        ends = (max(floor, end) for end in (figure.median, figure.least, figure.most))
        value, one, other = (min(1.0, best / end if less else end / best) for end in ends)
        shown = text.format(figure.median)
        if between and figure.least < figure.most:
            shown = f"{figure.least:,.0f} to {text.format(figure.most)}"
        return Score(value, min(one, other), max(one, other), shown)

    return [None if figure is None else score(figure) for figure in figures]


def _exact(value: float, raw: str) -> Score:
    return Score(value, value, value, raw)


def _mean(some: Sequence[Score | None]) -> Score | None:
    known = [one for one in some if one is not None]
    if not known:
        return None
    value, least, most = (sum(getattr(one, name) for one in known) / len(known) for name in ("value", "least", "most"))
    return Score(value, least, most, "; ".join(one.raw for one in known))


def _cost(left: Sequence[Measured], wish: Wish) -> list[Score | None]:
    """Money a month, if it is known of all; without prices machines beside the program's: none for a file, else one."""
    if wish.prices:
        costs = [wish.prices.get(one.broker) for one in left]
        unit = "{:,.6g} a month"
    else:
        costs = [float(one.hosts) for one in left]
        unit = "machines beside the program's: {:.0f}"
    given = [cost for cost in costs if cost is not None]
    if len(given) < len(costs) or not given:
        return [None] * len(left)
    dearest = max(given)
    return [_exact(1 - cost / dearest if dearest else 1.0, unit.format(cost)) for cost in given]


def _ranked(scores: Mapping[str, Mapping[str, Score | None]], weights: Mapping[str, float]) -> list[Place]:
    places = []
    for broker, some in scores.items():
        known = [(weights[name], score) for name, score in some.items() if score is not None]
        weight = sum(part for part, _ in known) or 1.0
        value, least, most = (
            sum(part * getattr(score, name) for part, score in known) / weight for name in ("value", "least", "most")
        )
        total = Score(value, least, most, "")
        places.append(Place(broker=broker, scores=dict(some), total=total))
    return sorted(places, key=lambda place: -place.total.value)


def _turns(scores: Mapping[str, Mapping[str, Score | None]], weights: Mapping[str, float]) -> list[str]:
    """For each criterion the share of all weight, next to its own, at which another broker comes first."""
    whole = sum(weights.values())
    if len(scores) < 2 or not whole:
        return []
    first = _ranked(scores, weights)[0].broker
    found = []
    for name in CRITERIA:
        own = weights[name] / whole
        rest = whole - weights[name]
        for steps, word in ((range(round(own * 100) + 1, 100), "more"), (range(round(own * 100) - 1, -1, -1), "less")):
            for percent in steps:
                share = percent / 100
                changed = {**weights, name: share * rest / (1 - share) if rest else weights[name]}
                winner = _ranked(scores, changed)[0].broker
                if winner != first:
                    found.append(f"{winner} comes first if {name} weighs {share:.2f} or {word} (now {own:.2f})")
                    break
    return found
