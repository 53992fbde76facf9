"""What a bench says of its runs: by what members wrote, and with real ones."""

import importlib
import os
import sys
from pathlib import Path

import pytest

from stentor import Event
from stentor.bench import Bench, Job, Report, Result, modelled, rows, work_app
from stentor.bench.member import _RECORD, Work, poisoned
from stentor.bench.report import Figure, columns, page
from stentor.bench.trial import Offer, Stand, keeps_up, member_command, percentiles
from stentor.connect import connect
from stentor.errors import ConfigError, DefinitionError

KEYS = 2


def bench(**options: object) -> Bench:
    given = {
        "app": work_app(0, 1, 64), "events": lambda n: Work(key=f"k{n % KEYS}", n=n), "groups": ["bench.work"],
        "load": modelled("constant", 100, 2), "command": member_command(), "during": 1.0,
        "job": Job(url="sqlite:///x.db", ledger="", groups=[]),
    }  # fmt: skip
    return Bench(**(given | options))  # type: ignore[arg-type]


def stand(tmp_path: Path) -> Stand:
    job = Job(url="sqlite:///x.db", ledger="", groups=["bench.work"])
    ledger = tmp_path / "ledger"
    ledger.touch()
    made = bench()
    made.app.catalog.add(Work)
    return Stand(made, job, ledger, connect("sqlite:///x.db"))


def write(found: Stand, offer: Offer, *ends: tuple[int, float]) -> None:
    """Members write that these events ended so many seconds after they were due."""
    with found._ledger.open("ab") as file:
        for n, took in ends:
            ended = offer.began + offer.at[n] + took
            file.write(_RECORD.pack(n, 0, ended - 0.001, ended))


def test_what_is_lost_doubled_and_out_of_order_is_found(tmp_path: Path) -> None:
    found = stand(tmp_path)
    offer = found.prepare([n / 10 for n in range(10)])
    write(found, offer, (0, 0.01), (2, 0.01), (1, 0.02), (4, 0.01), (3, 0.01), (4, 0.05), (6, 0.01), (8, 0.01), (7, 0))
    #                                                                  again               5 and 9 never, no key twice
    result = found.judge(offer, "load")
    assert (result.lost, result.doubled, result.disordered) == (2, 1, 0)
    write(found, offer, (5, 0.9))  # after 7, which has its key
    result = found.judge(offer, "load")
    assert (result.lost, result.doubled, result.disordered) == (1, 1, 1)
    assert result.latency["max"] == pytest.approx(0.9)
    assert result.latency["p50"] == pytest.approx(0.01)
    assert result.timeline[-1][1:] == (10, 9)


def test_half_a_record_is_read_when_it_is_whole(tmp_path: Path) -> None:
    found = stand(tmp_path)
    offer = found.prepare([0.0, 1.0])
    write(found, offer, (0, 0.1), (1, 0.1))
    whole = found._ledger.read_bytes()
    found._ledger.write_bytes(whole[:-5])
    assert found.look() == 1
    found._ledger.write_bytes(whole)
    assert found.look() == 1
    assert found.judge(offer, "load").lost == 0


def test_a_dead_letter_is_not_lost(tmp_path: Path) -> None:
    found = stand(tmp_path)
    offer = found.prepare([n / 100 for n in range(200)])
    write(found, offer, *((n, 0.01) for n in range(200) if not poisoned(n)))
    assert (found.judge(offer, "poison").lost, found.judge(offer, "poison").dead) == (2, 0)
    found.dead |= {(n, 0) for n in range(200) if poisoned(n)}
    result = found.judge(offer, "poison")
    assert (result.lost, result.dead) == (0, 2)
    assert result.timeline[-1][1:] == (198, 198)


def test_the_time_until_it_is_as_before_is_measured_from_the_fault(tmp_path: Path) -> None:
    found = stand(tmp_path)
    offer = found.prepare([n / 10 for n in range(30)])
    took = [0.01] * 10 + [1.5, 1.4, 1.0, 0.5, 0.2] + [0.01] * 15
    write(found, offer, *enumerate(took))
    result = found.judge(offer, "kill", fault_at=1.0)
    assert result.recovered == pytest.approx(1.5)


def test_one_late_event_does_not_say_when_it_is_as_before(tmp_path: Path) -> None:
    found = stand(tmp_path)
    offer = found.prepare([n / 100 for n in range(900)])
    took = dict.fromkeys(range(900), 0.01) | {500: 0.9, 700: 0.8}  # now and then one is late, fault or not
    write(found, offer, *took.items())
    assert found.judge(offer, "restart", fault_at=3.0).recovered == 0
    (tmp_path / "again").mkdir()
    again = stand(tmp_path / "again")
    took |= {n: 4.0 - n / 100 for n in range(295, 400)}  # and nothing ends between 2.95 and 4 s
    offer = again.prepare([n / 100 for n in range(900)])
    write(again, offer, *took.items())
    assert again.judge(offer, "restart", fault_at=3.0).recovered == pytest.approx(1.0)


def test_it_is_not_as_before_while_a_part_of_the_events_waits(tmp_path: Path) -> None:
    """One of four workers is killed, and the keys that it had wait for two seconds."""
    found = stand(tmp_path)
    offer = found.prepare([n / 100 for n in range(900)])
    write(found, offer, *((n, 5.0 - n / 100 if n % 4 == 0 and 300 <= n < 500 else 0.01) for n in range(900)))
    assert found.judge(offer, "kill", fault_at=3.0).recovered == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["constant", "poisson"])
@pytest.mark.parametrize(("rate", "kept"), [(300, True), (380, True), (440, False), (532, False)])
def test_a_rate_is_kept_up_with_as_long_as_the_backlog_does_not_grow(kind: str, rate: float, *, kept: bool) -> None:
    """Of 400/s, in a step so short that even at 532/s nothing waits for as long as a limit of p99 allows."""
    load = modelled(kind, rate, 2)
    free, took = 0.0, []
    for at in load.at:
        free = max(free, at) + 1 / 400
        took.append((at, free - at))
    assert max(late for _, late in took) < 0.7
    assert keeps_up(took) == kept


def test_one_stall_in_a_step_is_no_backlog_that_grows() -> None:
    load = modelled("constant", 1000, 2)
    assert keeps_up([(at, max(0.01, 1.9 - at) if at > 1.7 else 0.01) for at in load.at])
    assert not keeps_up([])


def test_percentiles_of_nothing_are_none() -> None:
    assert percentiles([]) == {}
    assert percentiles([3.0]) == dict.fromkeys(("p50", "p90", "p95", "p99", "p999", "max"), 3.0)


def result(**options: object) -> Result:
    given = {
        "broker": "redis", "url": "redis://h", "kind": "load", "events": 9, "rate": 100.0, "throughput": 99.0,
        "latency": {"p50": 0.01, "p95": 0.02, "p99": 0.03, "max": 0.04}, "curve": [(0.0, 0.001), (0.99, 0.03)],
        "timeline": [(1.0, 9, 9)],
    }  # fmt: skip
    return Result(**(given | options))  # type: ignore[arg-type]


def test_runs_come_together_as_median_and_range() -> None:
    [row] = rows([result(throughput=x, lost=n) for n, x in enumerate((90.0, 99.0, 100.0))])
    assert row.throughput == Figure(99, 90, 100)
    assert (row.runs, row.lost) == (3, 3)
    assert columns("load", 0.5, row)["X"] == "99/s (90/s to 100/s)"


def test_a_ramp_says_between_which_rates_the_largest_lies() -> None:
    [row] = rows([result(kind="ramp", largest=x, exceeded=400 * 1.1) for x in (400.0, 400.0)])
    assert row.largest == Figure(400.0, 400.0, 400 * 1.1)
    assert columns("ramp", 0.5, row)["most with p99 below 500 ms"] == "400/s to 440/s"


def test_the_page_stands_alone_and_says_what_was_lost() -> None:
    report = Report(
        made="2026-01-02T03:04:05Z", command="stentor bench <x>", stentor="1", python="3", machine="m",
        servers={"redis://h": "Redis 7"},
        features={}, app="shop", load="poisson", workers=2, limit=0.5,
        results=[result(), result(kind="kill", fault_at=1.0, recovered=0.5, lost=3)],
    )  # fmt: skip
    text = page(report)
    assert '<td class="bad">3</td>' in text
    assert "stentor bench &lt;x&gt;" in text
    assert "src=" not in text
    assert "<link" not in text
    assert text.count("<svg") == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["load", "kill", "slow", "poison", "ramp", "backlog"])
async def test_a_run_on_a_file_loses_nothing(kind: str, tmp_path: Path) -> None:
    made = bench(workers=2)
    result = await made.run(f"sqlite:///{tmp_path}/bench.db", kind, 500)
    assert (result.lost, result.disordered) == (0, 0)
    if kind == "ramp":
        assert result.largest
        assert result.largest > 100
    elif kind == "backlog":
        assert result.events == 500
        assert result.published > 0
    else:
        assert result.events == 200
        assert result.latency["p50"] < result.latency["max"]
    assert result.dead == (2 if kind == "poison" else 0)
    if kind != "kill":
        assert result.doubled == 0


@pytest.mark.slow
async def test_a_ramp_finds_what_its_handlers_can_do(tmp_path: Path) -> None:
    """Eight at once of 20 ms each are 400/s at most."""
    made = bench(
        app=work_app(0.02, 0, 8), load=modelled("poisson", 100, 2), events=lambda n: Work(key=f"k{n}", n=n),
        job=Job(url="", ledger="", groups=[], service=0.02, cv=0, concurrency=8),
    )  # fmt: skip
    result = await made.run(f"sqlite:///{tmp_path}/bench.db", "ramp")
    assert result.largest is not None
    assert result.exceeded is not None
    assert 280 < result.largest < 410
    assert 300 < result.exceeded <= result.largest * 1.1


@pytest.mark.slow
async def test_a_broker_that_is_restarted_gets_all_events(tmp_path: Path) -> None:
    """The file's own restart is nothing; that the command runs, and at its time, is what counts."""
    made = bench(restart=f"touch {tmp_path}/done")
    result = await made.run(f"sqlite:///{tmp_path}/bench.db", "restart")
    assert (tmp_path / "done").exists()
    assert (result.lost, result.doubled) == (0, 0)
    assert result.fault_at == pytest.approx(made.load.at[-1] / 3)


class Paid(Event, topic="payments", key="key", type="test.bench.paid"):
    key: str


@pytest.mark.slow
async def test_each_group_is_asked_for_what_it_handles_and_what_it_gives_up_is_told(tmp_path: Path) -> None:
    """Two groups, an event for each by turns; the second gives up every one of its own."""
    module = tmp_path / "shop.py"
    module.write_text(
        "from stentor import App, Context, Retry\nfrom stentor.bench.member import Work\n"
        "from tests.bench.test_trial import Paid\napp = App('shop')\n"
        "@app.on(Work)\nasync def work(event: Work) -> None: ...\n"
        "@app.on(Paid, retry=Retry(attempts=1))\nasync def pay(event: Paid) -> None: raise ValueError('planned')\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        app = importlib.import_module("shop").app
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["shop"]
    for cls in (Work, Paid):
        app.catalog.add(cls)
    command = ["env", f"PYTHONPATH={os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}", *member_command()]
    made = bench(
        app=app, groups=["shop.work", "shop.pay"], command=command,
        events=lambda n: Paid(key=f"k{n}") if n % 2 else Work(key=f"k{n}", n=n),
        job=Job(url="", ledger="", groups=[], target="shop:app"),
    )  # fmt: skip
    result = await made.run(f"sqlite:///{tmp_path}/bench.db", "load")
    assert (result.events, result.lost, result.dead, result.doubled) == (200, 0, 100, 0)


@pytest.mark.slow
async def test_what_goes_wrong_is_one_error(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bench.db"
    with pytest.raises(ConfigError, match="a worker did not start: no such app"):
        await bench(command=[sys.executable, "-c", "raise SystemExit('no such app')"]).run(url, "load")
    with pytest.raises(DefinitionError, match=r"none of bench\.work handles test\.bench\.paid"):
        await bench(events=lambda n: Paid(key="k")).run(url, "load")
    with pytest.raises(ConfigError, match="leave namespace= out"):
        await bench().run(f"{url}?namespace=mine", "load")
    with pytest.raises(ConfigError, match="--restart ended with 3: it is not there"):
        await bench(restart="echo it is not there; exit 3").run(url, "restart")
