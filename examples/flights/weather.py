"""A weather service as services are: it knows the hourly observations of 2013, and at times it does not answer."""

import csv
import random
from dataclasses import dataclass
from pathlib import Path

from examples.flights.record import value


@dataclass(frozen=True, slots=True)
class Observation:
    """An hour at an airport; None where the station recorded nothing."""

    wind: float | None = None
    """Miles an hour."""
    visibility: float | None = None
    """Miles."""
    rain: float | None = None
    """Inches, melted if it was snow."""

    @property
    def bad(self) -> bool:
        """Whether an airport slows down in it."""
        return (
            (self.wind is not None and self.wind >= 25)
            or (self.visibility is not None and self.visibility < 3)
            or (self.rain is not None and self.rain > 0)
        )


class Stations:
    """The observations of the airports, from weather.csv."""

    def __init__(self, folder: Path) -> None:
        def number(text: str) -> float | None:
            return None if value(text) is None else float(text)

        with (folder / "weather.csv").open(newline="") as lines:
            self._hours = {
                (row["origin"], row["time_hour"]): Observation(
                    number(row["wind_speed"]), number(row["visib"]), number(row["precip"])
                )
                for row in csv.DictReader(lines)
            }

    def at(self, origin: str, hour: str) -> Observation:
        """What was observed in an hour, written like 2013-01-31T17:00:00Z."""
        return self._hours.get((origin, hour), Observation())


class ServiceUnavailable(Exception):
    """No answer now; a little later there may be one."""


class WeatherService:
    """The observations behind a connection that fails in a share of calls, the same ones in every run (``seed``)."""

    def __init__(self, stations: Stations, *, failing: float = 0.1, seed: int = 2013) -> None:
        self._stations = stations
        self._failing = failing
        self._seed = seed

    async def ask(self, origin: str, hour: str, *, call: str) -> Observation:
        """The observation of an hour; ``call`` names this very request.

        Raises:
            ServiceUnavailable: it does not answer.
        """
        if random.Random(f"{self._seed} {call}").random() < self._failing:
            raise ServiceUnavailable(f"the weather service does not answer call {call}")
        return self._stations.at(origin, hour)
