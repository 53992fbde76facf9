"""What is to be known about the year, and how a plain pass over the record finds it, for comparison."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from pathlib import Path

from examples.flights.events import Flight, FlightArrived, FlightCancelled, FlightDeparted
from examples.flights.record import Timeline, departure, value
from examples.flights.weather import Stations

LATE = 15
"""A departure more minutes than this behind schedule is late."""


@dataclass(slots=True)
class Delays:
    """Flights counted, and minutes of delay added up."""

    cancelled: int = 0
    departures: int = 0
    departure_minutes: int = 0
    arrivals: int = 0
    arrival_minutes: int = 0

    def count(self, event: Flight) -> None:
        match event:
            case FlightDeparted():
                self.departures += 1
                self.departure_minutes += event.delay
            case FlightArrived():
                self.arrivals += 1
                self.arrival_minutes += event.delay
            case FlightCancelled():
                self.cancelled += 1
            case _:
                raise TypeError(f"what is a {type(event).__name__}?")

    def __add__(self, other: "Delays") -> "Delays":
        return Delays(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def flights(self) -> int:
        return self.departures + self.cancelled

    @property
    def events(self) -> int:
        """The events behind these numbers."""
        return self.cancelled + self.departures + self.arrivals

    @property
    def mean_departure(self) -> float:
        return self.departure_minutes / max(1, self.departures)

    @property
    def mean_arrival(self) -> float:
        return self.arrival_minutes / max(1, self.arrivals)


@dataclass
class Figures:
    """The figures of the year."""

    delays: dict[tuple[str, str], Delays] = field(default_factory=dict[tuple[str, str], Delays])
    """By carrier and airport."""
    longest: dict[str, int] = field(default_factory=dict[str, int])
    """By tail number: the most late departures in a row."""
    asked: int = 0
    """Cancelled flights whose weather is known."""
    bad: int = 0
    """... and was bad."""

    def total(self, *, carrier: str | None = None, origin: str | None = None) -> Delays:
        """The delays of a carrier, of an airport, or of all."""
        chosen = (d for (c, o), d in self.delays.items() if carrier in (None, c) and origin in (None, o))
        return sum(chosen, Delays())

    def by_carrier(self) -> list[tuple[str, Delays]]:
        """The delays of each carrier, the busiest first."""
        return _busiest((carrier, self.total(carrier=carrier)) for carrier in {carrier for carrier, _ in self.delays})

    def by_origin(self) -> list[tuple[str, Delays]]:
        """The delays of each airport, the busiest first."""
        return _busiest((origin, self.total(origin=origin)) for origin in {origin for _, origin in self.delays})


def _busiest(places: Iterable[tuple[str, Delays]]) -> list[tuple[str, Delays]]:
    return sorted(places, key=lambda place: -place[1].flights)


def longest_run(delays: Iterable[int]) -> int:
    """The most late departures in a row."""
    run = longest = 0
    for delay in delays:
        run = run + 1 if delay > LATE else 0
        longest = max(longest, run)
    return longest


def plain_pass(folder: Path, days: int | None = None) -> Figures:
    """The figures as a loop over the file finds them, without an event."""
    stations = Stations(folder)
    figures = Figures()
    departures: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in Timeline(folder, days):
        delays = figures.delays.setdefault((row["carrier"], row["origin"]), Delays())
        late, arrival, tail = value(row["dep_delay"]), value(row["arr_delay"]), value(row["tailnum"])
        if late is None:
            delays.cancelled += 1
            figures.asked += 1
            figures.bad += stations.at(row["origin"], row["time_hour"]).bad
            continue
        delays.departures += 1
        delays.departure_minutes += int(late)
        if arrival is not None:
            delays.arrivals += 1
            delays.arrival_minutes += int(arrival)
        if tail is not None:
            departures[tail].append((departure(row, int(late)), int(late)))
    figures.longest = {tail: longest_run(late for _, late in sorted(d)) for tail, d in departures.items()}
    return figures
