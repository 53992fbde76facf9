"""Modelled and recorded times, and the histogram that workers fill."""

import json
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stentor.capacity import Histogram, arrivals, fitted, recorded
from stentor.errors import DefinitionError
from stentor.histogram import ACCURACY


@pytest.mark.parametrize("cv", [0, 0.1, 0.5, 0.9, 1, 1.5, 2])
def test_fitted_has_its_mean_and_variation(cv: float) -> None:
    found = fitted(0.02, cv)
    assert statistics.fmean(found) == pytest.approx(0.02)
    assert statistics.pstdev(found) / 0.02 == pytest.approx(cv, rel=0.02)
    assert found == sorted(found)
    assert found[0] > 0


@pytest.mark.parametrize(("mean", "cv"), [(0, 1), (-1, 1), (1, -1), (float("nan"), 1), (float("inf"), 1)])
def test_fitted_refuses_what_is_no_time(mean: float, cv: float) -> None:
    with pytest.raises(DefinitionError, match="mean above 0"):
        fitted(mean, cv)


@pytest.mark.parametrize("cv", [0, 0.5, 1, 2])
def test_arrivals_have_their_rate_and_variation(cv: float) -> None:
    found = arrivals(200, [0.01], 50_000, cv=cv, hot=0.1)
    assert found.rate == pytest.approx(200, rel=0.03)
    assert found.arrival_cv == pytest.approx(cv, rel=0.03, abs=1e-6)
    assert found.hottest == pytest.approx(0.1, rel=0.05)
    assert arrivals(200, [0.01], 50_000, cv=cv, hot=0.1) == found


@given(st.lists(st.floats(1e-7, 1e5), min_size=1, max_size=300), st.floats(0, 1))
def test_histogram_quantiles_are_within_the_accuracy(values: list[float], q: float) -> None:
    found = Histogram(values)
    exact = sorted(values)[int(q * (len(values) - 1))]
    assert found.quantile(q) == pytest.approx(exact, rel=ACCURACY * 1.001)


def test_histograms_add_up_and_survive_json() -> None:
    chance = random.Random(1)
    values = [chance.lognormvariate(-4, 1) for _ in range(10_000)]
    whole, parts = Histogram(values), Histogram(values[::2])
    parts.merge(Histogram.from_dict(json.loads(json.dumps(Histogram(values[1::2]).to_dict()))))
    assert parts.buckets == whole.buckets
    assert parts.mean == pytest.approx(statistics.fmean(values))
    assert parts.cv == pytest.approx(statistics.pstdev(values) / statistics.fmean(values))
    assert statistics.fmean(parts.points()) == pytest.approx(parts.mean, rel=0.03)


def test_an_empty_histogram_is_all_zero() -> None:
    found = Histogram()
    assert (found.mean, found.cv, found.quantile(0.5), found.points()) == (0, 0, 0, [])


@pytest.mark.parametrize("data", [{}, {"buckets": []}, {"buckets": {"a": 1}, "total": 1, "squares": 1}])
def test_what_is_no_histogram_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a histogram"):
        Histogram.from_dict(data)


def test_recorded_csv_and_json(tmp_path: Path) -> None:
    table = tmp_path / "run.csv"
    table.write_text("time,service,key\n2026-01-01T00:00:00Z,0.5,a\n2026-01-01T00:00:01Z,0.25,\n", "utf-8")
    lines = tmp_path / "run.jsonl"
    lines.write_text('{"time": 100, "service": 0.5, "key": "a"}\n\n{"time": 101, "service": 0.25}\n', "utf-8")
    assert recorded(table) == recorded(lines)
    assert recorded(lines).at == [0, 1]
    assert recorded(lines).keys == ["a", None]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"time": 1, "service": 1}\n', "1 events are too few"),
        ('{"time": 1, "service": 1}\n{"time": 1, "service": 1}\n', "the same time"),
        ('{"time": 2, "service": 1}\n{"time": 1, "service": 1}\n', "line 2: the time goes back from 2 to 1"),
        ('{"time": 1, "service": 0}\n', "line 1: a service time has to be above 0"),
        ('{"time": -1, "service": 1}\n', "line 1: time is -1"),
        ('{"time": "soon", "service": 1}\n', "line 1: time is 'soon'"),
        ('{"time": 1, "service": "NaN"}\n', "line 1: service is 'NaN'"),
        ('{"time": 1}\n', "line 1: there is no 'service'"),
        ('{"stentor_handled_total": 1, "service": 1}\n', "line 1: there is no 'time'"),
        ("[1, 2]\n", "line 1: a JSON object"),
        ("time,service\n1,2\n", "line 1: no JSON: .*; a file of events is CSV .*or has a JSON object a line"),
        ("# HELP x\n", "line 1: it looks like metrics of Prometheus, .*give the --url of a running program"),
        ("# TYPE x counter\n", "line 1: it looks like metrics"),
        ('up{job="a"} 1\n', "line 1: it looks like metrics"),
        ("process_cpu_seconds_total 12.5\n", "line 1: it looks like metrics"),
    ],
)
def test_bad_recordings_name_line_and_fault(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(DefinitionError, match=wrong):
        recorded(path)


def lines(path: Path, times: list[float]) -> Path:
    path.write_text("".join(json.dumps({"time": time, "service": 0.1}) + "\n" for time in times), "utf-8")
    return path


@pytest.mark.parametrize(
    ("times", "wrong"),
    [
        ([n / 10 + (n >= 500) * 90_000 for n in range(1000)], "line 501: nothing comes for 25 h before it"),
        ([n / 10 + (n >= 300) * 90_000 + (n >= 600) * 90_000 for n in range(1000)], "line 301: nothing comes for 25 h"),
        ([n / 10 + (n >= 999) * 90_000 for n in range(1000)], "line 1000: nothing .* else an event comes every 100 ms"),
        ([n + (n >= 15) * 60 for n in range(30)], "line 16: nothing comes for 61 s"),
    ],
)
def test_a_hole_is_found_with_its_line_and_its_length(tmp_path: Path, times: list[float], wrong: str) -> None:
    path = lines(tmp_path / "run.jsonl", times)
    with pytest.raises(DefinitionError, match=f"{wrong}.*cut the file there, or keep it with --keep-gaps"):
        recorded(path)
    assert recorded(path, gaps=True).at[-1] == pytest.approx(times[-1])


def test_what_load_has_by_itself_is_no_hole(tmp_path: Path) -> None:
    for cv in (0, 1, 4, 10):  # bunches
        recorded(lines(tmp_path / "run.jsonl", list(arrivals(10, [0.1], 5000, cv=cv).at)))
    nights = [day * 86_400 + 8 * 3600 + n * 3.6 for day in range(9) for n in range(10_000)]  # ten hours of fourteen
    recorded(lines(tmp_path / "run.jsonl", nights))
    recorded(lines(tmp_path / "run.jsonl", [0, 0.1, 0.2, 60]))  # so few tell nothing


def test_a_recording_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="No such file"):
        recorded(tmp_path / "none.csv")
