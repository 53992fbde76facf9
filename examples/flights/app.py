"""The program: a source that replays the record, and the handlers of its events.

It runs as any Stentor app does, `stentor run examples.flights.app:app`; `python -m examples.flights` also shows how far
it is and compares the outcome with a plain pass over the file. Both are set by $FLIGHTS_FOLDER (where the results go),
$FLIGHTS_DATA (the folder of the record), $FLIGHTS_SPEED ("max" or "60x") and $FLIGHTS_DAYS (of the year; else all).
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated

from examples.flights.events import Flight, FlightArrived, FlightCancelled, FlightDeparted, WeatherReported
from examples.flights.record import CACHE, Timeline, find_record, private_folder
from examples.flights.results import Results
from examples.flights.weather import ServiceUnavailable, Stations, WeatherService
from stentor import App, Batch, Context, Depends, Group, Publish, Retry

CHUNK = 500
app = App("flights")


@dataclass(frozen=True)
class Settings:
    """What the environment says."""

    folder: Path
    record: Path | None
    speed: float | None
    """Recorded seconds in a second; None is flat out."""
    days: int | None

    @classmethod
    def now(cls) -> "Settings":
        """Read anew each time: tests and child processes have settings of their own."""
        record, days = os.environ.get("FLIGHTS_DATA"), os.environ.get("FLIGHTS_DAYS")
        return cls(
            folder=private_folder(Path(os.environ.get("FLIGHTS_FOLDER") or CACHE / "flights")),
            record=Path(record) if record else None,
            speed=parse_speed(os.environ.get("FLIGHTS_SPEED") or "max"),
            days=int(days) if days else None,
        )

    def find_record(self) -> Path:
        """The record's folder, downloaded if need be; raises NoRecord."""
        return self.record or find_record()

    @property
    def results(self) -> Path:
        """The file of the read model."""
        return self.folder / "results.db"


def parse_speed(text: str) -> float | None:
    """The factor of "60x", None for "max"; raises ValueError for anything else."""
    if text == "max":
        return None
    factor = float(text.removesuffix("x"))
    if not factor > 0:
        raise ValueError(f"a speed is above zero, not {text}")
    return factor


# ---- the source ------------------------------------------------------------------------------------------------------


@dataclass
class Replayed:
    """How far the source is, if it runs in this process: for the screen."""

    events: int = 0
    finished: bool = False


replayed = Replayed()


class Pace:
    """Recorded time, sped up: from the first event that is asked for, at ``speed``, or without waiting at all."""

    def __init__(self, speed: float | None) -> None:
        self._speed = speed
        self._begin: tuple[float, float] | None = None

    def moment(self, event: Flight) -> float:
        """When an event falls due, in recorded seconds; flat out, all are due at once."""
        return event.at.timestamp() if self._speed else 0.0

    async def until(self, moment: float) -> None:
        """Wait until a moment has come."""
        if self._speed:
            now = time.monotonic()
            begin, recorded = self._begin = self._begin or (now, moment)
            await asyncio.sleep(begin + (moment - recorded) / self._speed - now)


@app.source()
async def replay(publish: Publish) -> None:
    """Publish the year's events, from where the last run broke off: the position is the number of the last one."""
    settings = Settings.now()
    replayed.events, replayed.finished = publish.position or 0, False
    timeline = await asyncio.to_thread(lambda: Timeline(settings.find_record(), settings.days))
    events = timeline.events(done=replayed.events)
    pace = Pace(settings.speed)
    # Parsing in a thread, a chunk at a time: a restart passes over what is done without holding up the event loop.
    while chunk := await asyncio.to_thread(lambda: list(islice(events, CHUNK))):
        for at, due in groupby(chunk, pace.moment):
            await pace.until(at)
            group = list(due)
            await publish(group, position=group[-1].number)  # both or neither are there after a crash
            replayed.events = group[-1].number
    replayed.finished = True


# ---- the handlers ----------------------------------------------------------------------------------------------------


async def open_results() -> AsyncIterator[Results]:
    results = await asyncio.to_thread(Results, Settings.now().results)
    yield results
    results.close()


async def open_weather_service() -> WeatherService:
    return WeatherService(await asyncio.to_thread(lambda: Stations(Settings.now().find_record())))


ReadModel = Annotated[Results, Depends(open_results, scope="app")]
Weather = Annotated[WeatherService, Depends(open_weather_service, scope="app")]

# Batch handlers write hundreds of events in one transaction. While one batch is written the next one fills, so more
# than one at a time would only make them smaller.
delays = Group("flights.delays", ordering="none", concurrency=1)
late_aircraft = Group("flights.late_aircraft", concurrency=1)
cancellations = Group("flights.cancellations", ordering="none")


@app.on(FlightDeparted, FlightArrived, FlightCancelled, group=delays, batch=Batch(CHUNK))
def count(flights: list[FlightDeparted | FlightArrived | FlightCancelled], results: ReadModel) -> None:
    """Delays by carrier and airport. Sums need no order, and a flight without a tail number counts as any other."""
    results.count(flights)


@app.on(FlightDeparted, group=late_aircraft, where=lambda flight: flight.tail is not None, batch=Batch(CHUNK))
def follow(departures: list[FlightDeparted], results: ReadModel) -> None:
    """The longest run of late departures of each aircraft. It needs the order that the key gives: the tail number's."""
    results.extend_runs(departures)


@app.on(
    FlightCancelled,
    group=cancellations,
    retry=Retry(attempts=10, first="200ms", longest="5s", only=(ServiceUnavailable,)),
)
async def ask_why(flight: FlightCancelled, weather: Weather, ctx: Context) -> WeatherReported:
    """What was the weather? The service fails at times; Stentor asks again later, and meanwhile nobody waits."""
    hour = flight.at.strftime("%Y-%m-%dT%H:00:00Z")
    seen = await weather.ask(flight.origin, hour, call=f"{flight.number}.{ctx.attempt}")
    return WeatherReported(number=flight.number, origin=flight.origin, bad=seen.bad)


@app.on(WeatherReported, group=Group("flights.weather", ordering="none", concurrency=1), batch=Batch(CHUNK))
def keep(reports: list[WeatherReported], results: ReadModel) -> None:
    results.keep_weather(reports)
