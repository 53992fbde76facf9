"""The flights example: its figures are those of a plain pass over the record, also through kill -9."""

import csv
import io
import itertools
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from examples.flights.events import FlightArrived, FlightCancelled, FlightDeparted
from examples.flights.figures import Figures
from examples.flights.main import main
from examples.flights.record import NoRecord, Timeline, find_record
from examples.flights.results import Results
from tests.real import brokers, url_of

ROOT = Path(__file__).parents[2]
HEADER = """year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,
origin,dest,air_time,distance,hour,minute,time_hour"""
COLUMNS = HEADER.replace("\n", "").split(",")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run puts into the environment is gone after the test."""
    for name in ("FLIGHTS_FOLDER", "FLIGHTS_DATA", "FLIGHTS_SPEED", "FLIGHTS_DAYS"):
        monkeypatch.setenv(name, "")


def flight(scheduled: datetime, delay: int | None, tail: str | None, **more: object) -> dict[str, object]:
    """A row of the record; ``scheduled`` in UTC, five hours ahead of New York's winter."""
    local = scheduled - timedelta(hours=5)
    row: dict[str, object] = dict.fromkeys(COLUMNS, "NA") | {
        "year": local.year, "month": local.month, "day": local.day, "hour": local.hour, "minute": local.minute,
        "time_hour": scheduled.strftime("%Y-%m-%dT%H:00:00Z"), "carrier": "UA", "flight": 1, "origin": "EWR",
        "dest": "IAH", "tailnum": tail or "NA",
    }  # fmt: skip
    if delay is not None:
        row |= {"dep_delay": delay, "dep_time": 1, "arr_delay": delay - 3, "arr_time": 1, "air_time": 100}
    return row | more


def made_year(count: int) -> list[dict[str, object]]:
    """Flights of some days on either side of New Year's Eve, by date as the record has them; some rows are bad."""
    chance = random.Random(7)
    rows = []
    for _ in range(count):
        day = datetime(2013, chance.choice((1, 2, 10)), chance.randint(1, 5), tzinfo=UTC)
        scheduled = day + timedelta(hours=10, minutes=chance.randrange(18 * 60))
        tail = f"N{chance.randrange(30)}" if chance.random() > 0.05 else None
        delay = None if tail is None or chance.random() < 0.05 else chance.choice((-9, 0, 14, 15, 16, 40, 700))
        more: dict[str, object] = {
            "carrier": chance.choice(("UA", "B6", "EV")),
            "origin": chance.choice(("EWR", "JFK")),
        }
        if delay is not None and chance.random() < 0.1:
            more |= {"arr_delay": "NA", "air_time": "NA"}  # it landed elsewhere
        rows.append(flight(scheduled, delay, tail, **more))
    return sorted(rows, key=lambda row: (str(row["month"]), int(str(row["day"])), chance.random()))


def write_record(folder: Path, rows: Iterable[dict[str, object]]) -> Path:
    folder.mkdir()
    with (folder / "flights.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    with (folder / "weather.csv").open("w", newline="") as file:
        file.write("origin,wind_speed,visib,precip,time_hour\n")
        for month, hour, origin in itertools.product((1, 2, 10), range(24), ("EWR", "JFK")):
            visibility = "NA" if hour == 3 else 10 if hour % 2 else 0.5
            file.write(f"{origin},12.5,{visibility},0,2013-{month:02}-02T{hour:02}:00:00Z\n")
    return folder


def check(found: Figures, folder: Path) -> None:
    """Compare with the record, read here in the plainest way and by no code of the example."""
    if (folder / "flights.csv").exists():
        text = (folder / "flights.csv").read_text()
    else:
        with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
            text = archive.read("flights.csv").decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    with (folder / "weather.csv").open(newline="") as file:
        weather = {(row["origin"], row["time_hour"]): row for row in csv.DictReader(file)}
    left = [row for row in rows if row["dep_delay"] != "NA"]
    landed = [row for row in rows if row["arr_delay"] != "NA"]
    cancelled = [row for row in rows if row["dep_delay"] == "NA"]
    total = found.total()
    assert total.flights == len(rows)
    assert total.cancelled == len(cancelled)
    assert (total.departures, total.departure_minutes) == (len(left), sum(int(row["dep_delay"]) for row in left))
    assert (total.arrivals, total.arrival_minutes) == (len(landed), sum(int(row["arr_delay"]) for row in landed))
    assert Counter({carrier: d.flights for carrier, d in found.by_carrier()}) == Counter(r["carrier"] for r in rows)
    for carrier, origin in {(row["carrier"], row["origin"]) for row in rows}:
        late = [int(r["dep_delay"]) for r in left if (r["carrier"], r["origin"]) == (carrier, origin)]
        assert found.total(carrier=carrier, origin=origin).departure_minutes == sum(late)

    runs: defaultdict[str, list[tuple[datetime, bool]]] = defaultdict(list)
    for row in left:
        minutes = int(row["minute"]) + int(row["dep_delay"])
        at = datetime.fromisoformat(row["time_hour"]) + timedelta(minutes=minutes)
        runs[row["tailnum"]].append((at, int(row["dep_delay"]) > 15))
    assert found.longest == {
        tail: max([len(list(run)) for late, run in itertools.groupby(sorted(times), lambda x: x[1]) if late], default=0)
        for tail, times in runs.items()
    }

    def bad(row: dict[str, str]) -> bool:
        seen = weather.get((row["origin"], row["time_hour"]))
        if seen is None:
            return False
        wind, visibility, rain = (
            None if seen[c] == "NA" else float(seen[c]) for c in ("wind_speed", "visib", "precip")
        )
        return (wind or 0) >= 25 or (visibility is not None and visibility < 3) or (rain or 0) > 0

    assert found.asked == len(cancelled)
    assert found.bad == sum(map(bad, cancelled))


def figures(folder: Path) -> Figures:
    results = Results(folder / "results.db")
    try:
        return results.figures()
    finally:
        results.close()


SERVERS = [pytest.param(name, marks=[pytest.mark.server, pytest.mark.slow]) for name in brokers()]


@pytest.mark.parametrize("broker", ["memory", "sqlite", *SERVERS])
def test_the_figures_of_a_made_record(
    tmp_path: Path, broker: str, capfd: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The program is the same on every broker: the URL alone says which."""
    record = write_record(tmp_path / "record", made_year(400))
    more = [] if broker == "sqlite" else ["--broker", url_of(broker, tmp_path, tmp_path_factory)]
    assert main(["--data", str(record), "--folder", str(tmp_path / "run"), *more]) == 0
    assert "All figures are those of the plain pass." in capfd.readouterr().out
    check(figures(tmp_path / "run"), record)


def test_days_and_resuming_a_finished_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = write_record(tmp_path / "record", made_year(100))
    chosen = ["--data", str(record), "--folder", str(tmp_path / "run"), "--days", "3", "--speed", "1000000x"]
    assert main(chosen) == 0
    once = figures(tmp_path / "run")
    assert main([*chosen, "--resume"]) == 0
    assert figures(tmp_path / "run") == once
    assert 0 < once.total().flights < 100
    assert "0 came again" in capfd.readouterr().out


def test_the_timeline_is_in_order_and_can_be_entered_anywhere(tmp_path: Path) -> None:
    timeline = Timeline(write_record(tmp_path / "record", made_year(300)))
    events = list(timeline.events())
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert all(a.at <= b.at for a, b in itertools.pairwise(events))
    assert list(timeline.events(done=123)) == events[123:]


def test_a_flight_without_a_tail_number_is_ordered_by_its_flight_number(tmp_path: Path) -> None:
    at = datetime(2013, 1, 1, 12, tzinfo=UTC)
    rows = [flight(at, None, None, flight=7), flight(at, None, "N1", flight=8)]
    first, second = Timeline(write_record(tmp_path / "record", rows)).events()
    assert isinstance(first, FlightCancelled)
    assert [type(event).__event__.key_of(event) for event in (first, second)] == ["UA 7", "N1"]  # type: ignore[attr-defined]


def test_what_comes_twice_counts_once(tmp_path: Path) -> None:
    record = write_record(tmp_path / "record", made_year(50))
    events = list(Timeline(record).events())
    results = Results(tmp_path / "results.db")
    for part in (events[:30], events[10:], events, list(reversed(events)), events + events):
        results.count(part)
        departed = (e for e in part if isinstance(e, FlightDeparted) and e.tail is not None)
        results.extend_runs(sorted(departed, key=lambda event: event.number))
    total = results.figures().total()
    assert total.departures == sum(isinstance(event, FlightDeparted) for event in events)
    assert total.arrivals == sum(isinstance(event, FlightArrived) for event in events)
    assert results.counted == len(events)
    assert results.repeated == 20 + 4 * len(events)
    once = Results(tmp_path / "once.db")
    once.extend_runs([e for e in events if isinstance(e, FlightDeparted) and e.tail is not None])
    assert results.figures().longest == once.figures().longest
    results.close()
    once.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kill", "--broker", "memory://"], "--kill needs a broker that outlives the process"),
        (["--broker", "sqlite:///{folder}/there.db"], "holds a run already"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = write_record(tmp_path / "record", made_year(5))
    (tmp_path / "there.db").touch()
    given = [argument.format(folder=tmp_path) for argument in arguments]
    assert main(["--data", str(record), "--folder", str(tmp_path / "run"), *given]) == 2
    assert message in capsys.readouterr().err


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("examples.flights.record.CACHE", tmp_path)
    monkeypatch.setattr("examples.flights.record.VERSION", "0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NoRecord, match="give --data a folder"):
        find_record()


@pytest.fixture
def full_record() -> Path:
    try:
        return find_record()
    except NoRecord as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["sqlite", *SERVERS])
def test_kill_9_on_every_broker(tmp_path: Path, broker: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    record = write_record(tmp_path / "record", made_year(4000))
    run = subprocess.run(
        [
            *(sys.executable, "-m", "examples.flights", "--kill", "--folder", tmp_path / "run", "--data", record),
            *("--broker", url_of(broker, tmp_path / "flights.db", tmp_path_factory)),
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "Killed it (SIGKILL)" in run.stdout
    check(figures(tmp_path / "run"), record)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_year_through_kill_9(tmp_path: Path, full_record: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "examples.flights", "--kill", "--folder", tmp_path / "run", "--data", full_record],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "Killed it (SIGKILL)" in run.stdout
    found = figures(tmp_path / "run")
    check(found, full_record)
    total = found.total()
    assert (total.flights, total.cancelled, total.departures, total.arrivals) == (336_776, 8_255, 328_521, 327_346)
    assert f"{total.mean_departure:.3f} {total.mean_arrival:.3f}" == "12.639 6.895"
    assert [(c, d.flights) for c, d in found.by_carrier()[:3]] == [("UA", 58_665), ("B6", 54_635), ("EV", 54_173)]
    assert sum(row["tailnum"] == "NA" for row in Timeline(full_record)) == 2_512
