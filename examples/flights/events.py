"""What happens to a flight, as events. All of one aircraft share a key, so they are handled in the order of its day."""

from datetime import datetime

from stentor import Event


def aircraft(flight: "Flight") -> str:
    """The unit of order: the tail number; for a flight without one (the rule for bad rows) its flight number."""
    return flight.tail or f"{flight.carrier} {flight.flight}"


class Flight(Event, key=aircraft):
    """What all of them carry. It has no topic, so it is abstract: only its subclasses are published."""

    number: int
    """Its place in the replay, from 1: the same in every run, so it tells a repetition from something new."""
    at: datetime
    carrier: str
    flight: int
    tail: str | None
    origin: str
    dest: str


class FlightDeparted(Flight, topic="flights", type="com.example.flight.departed"):
    delay: int
    """Minutes behind schedule, negative when early."""


class FlightArrived(Flight, topic="flights", type="com.example.flight.arrived"):
    delay: int


class FlightCancelled(Flight, topic="flights", type="com.example.flight.cancelled"):
    """It never left; ``at`` is when it should have."""


class WeatherReported(Event, topic="weather", key="origin", type="com.example.weather.reported"):
    """What the weather service knew about the hour of a cancelled flight."""

    number: int
    """Of the cancellation."""
    origin: str
    bad: bool
