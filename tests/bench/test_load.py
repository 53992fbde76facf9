"""When a bench publishes, and what."""

from pathlib import Path

import pytest

from stentor.bench import modelled, trace, work_app
from stentor.bench.load import recorded_events
from stentor.bench.member import Work
from stentor.capacity.times import Times
from stentor.errors import DefinitionError


@pytest.mark.parametrize(("kind", "cv"), [("constant", 0.0), ("poisson", 1.0), ("bursts", 4.0)])
def test_a_modelled_load_has_its_rate_and_its_bunches(kind: str, cv: float) -> None:
    load = modelled(kind, 1000, 20)
    assert len(load.at) == 20_000
    assert load.rate == pytest.approx(1000)
    assert Times(at=load.at, service=()).arrival_cv == pytest.approx(cv, rel=0.15, abs=1e-6)
    assert load.at == modelled(kind, 1000, 20).at, "all brokers get the same load"
    other = load.at_rate(250, 4)
    assert (len(other.at), other.kind) == (1000, kind)


def test_a_recorded_load_keeps_its_pattern_at_any_speed(tmp_path: Path) -> None:
    file = tmp_path / "times.jsonl"
    file.write_text("\n".join(f'{{"time": "2026-05-04T09:00:{n:02}Z"}}' for n in (0, 1, 1, 10, 20)))
    assert trace(file).at == [0, 1, 1, 10, 20]
    assert trace(file, 10).at == pytest.approx([0, 0.1, 0.1, 1, 2])
    assert trace(file).at_rate(2, 2.4).at == pytest.approx([0, 0.1, 0.1, 1, 2])
    assert trace(file).at_rate(2, 4).at == pytest.approx([0, 0.1, 0.1, 1, 2, 2.5, 2.6, 2.6, 3.5]), "again and again"
    assert len(trace(file).at_rate(1000, 4).at) == pytest.approx(4000, abs=2), "also where a ramp goes far"
    with pytest.raises(DefinitionError, match="fewer than two events"):
        trace(file).at_rate(2, 0.5)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"time": 1}\n{"time": 0}', "line 2: the time goes back from 1 to 0; sort the file by time"),
        ('{"time": 1}\n{"tim": 2}', "line 2: there is no 'time', which each event needs"),
        ('{"time": -1}', "time is -1; it has to be a number of seconds that is not negative"),
        ('{"time": 1}', "1 events are too few"),
    ],
)
def test_a_bad_trace_gets_one_clear_line(text: str, wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "times.jsonl"
    file.write_text(text)
    with pytest.raises(DefinitionError, match=wrong):
        trace(file)


def test_a_load_of_nothing_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"0\.1 events/s for 5 s are 0 events; two are the least"):
        modelled("constant", 0.1, 5)
    with pytest.raises(DefinitionError, match="take one of constant, poisson, bursts"):
        modelled("random", 1, 5)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "there is no event in it"),
        ("{", "line 1: an event is an object with type and data"),
        ('{"type": "io.stentor.bench.work"}', "line 1: an event is an object with type and data"),
        ('{"type": "x.y", "data": {}}', "the app has no event of type 'x.y'"),
        ('\n{"type": "io.stentor.bench.work", "data": {"key": 3}}', "line 2: "),
    ],
)
def test_bad_events_get_one_clear_line(text: str, wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text(text)
    app = work_app(0, 1, 1)
    app.catalog.add(Work)
    with pytest.raises(DefinitionError, match=wrong):
        recorded_events(file, app.catalog)
