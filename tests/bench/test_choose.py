"""Which queue for a load: needs, scores with their ranges, and what would change the choice."""

from pathlib import Path

import msgspec
import pytest

from stentor.bench import Figure, Report, Result
from stentor.bench.choose import NEEDS, Measured, Wish, choose, from_report, known, shipped
from stentor.connect import connect
from stentor.errors import DefinitionError

FILE = connect("sqlite:///x.db").features
SERVER = msgspec.structs.replace(FILE, name="redis", atomic=False)


def measured(broker: str, **options: object) -> Measured:
    given = {"broker": broker, "server": broker, "features": FILE if broker == "sqlite" else SERVER, "events": 100}
    return Measured(**(given | options))  # type: ignore[arg-type]


def exactly(value: float, by: float = 0.0) -> Figure:
    return Figure(value, value - by, value + by)


def test_what_cannot_do_what_is_needed_is_out_with_the_reason() -> None:
    brokers = [measured("sqlite", largest=exactly(900, 50)), measured("redis"), measured("kafka", largest=exactly(500))]
    found = choose(brokers, Wish(needs=["hosts", "transactions", "replica"], rate=880))
    assert found.places == []
    assert found.failed == {
        "sqlite": ["hosts", "replica", "880/s"], "redis": ["transactions"], "kafka": ["transactions", "880/s"],
    }  # fmt: skip
    found = choose(brokers, Wish(rate=400, needs=["replica"]))
    assert found.failed == {"sqlite": ["replica"]}
    assert found.unknown == {"redis": ["replica", "400/s"], "kafka": ["replica"]}


def test_what_every_broker_does_may_be_asked_for_too() -> None:
    found = choose([measured("sqlite"), measured("redis")], Wish(needs=["delay", "order"]))
    assert found.failed == found.unknown == {}
    assert found.needs == {broker: {"delay": True, "order": True} for broker in ("sqlite", "redis")}


def test_skills_are_a_need_where_that_is_asked() -> None:
    brokers = [measured("sqlite"), measured("redis")]
    assert choose(brokers, Wish(needs=["skills"], have=["redis"])).failed == {"sqlite": ["skills"]}
    assert choose(brokers, Wish(have=["redis"])).failed == {}
    with pytest.raises(DefinitionError, match="the need of skills asks for --have NAME"):
        choose(brokers, Wish(needs=["skills"]))


def test_each_two_neighbours_whose_ranges_meet_are_named() -> None:
    brokers = [
        measured("redis", largest=exactly(1000)), measured("kafka", largest=exactly(700, 50)),
        measured("nats", largest=exactly(650, 50)), measured("rabbitmq", largest=exactly(610, 20)),
        measured("rocketmq", largest=exactly(300)),
    ]  # fmt: skip
    found = choose(brokers, Wish())
    assert found.tied == []
    assert found.alike == [("kafka", "nats"), ("nats", "rabbitmq")]


def test_a_p99_counts_only_for_a_rate_that_was_measured() -> None:
    one = measured("redis", p99=exactly(0.05), rate=500)
    assert choose([one], Wish(p99=0.06)).failed == {}
    assert choose([one], Wish(p99=0.04)).failed == {"redis": ["p99 40 ms"]}
    assert choose([one], Wish(p99=0.04, rate=5000)).unknown == {"redis": ["5,000/s", "p99 40 ms"]}


def test_half_as_good_is_half_the_score() -> None:
    fast, slow = measured("redis", largest=exactly(1000)), measured("kafka", largest=exactly(500))
    found = choose([slow, fast], Wish())
    assert [place.broker for place in found.places] == ["redis", "kafka"]
    score = found.places[1].scores["performance"]
    assert score is not None
    assert (score.value, score.raw) == (0.5, "500/s kept up with")
    between = choose([measured("kafka", largest=Figure(500, 480, 550))], Wish()).places[0].scores["performance"]
    assert between is not None
    assert between.raw == "480 to 550/s kept up with"


def test_what_a_kill_did_not_touch_is_best_and_not_unknown() -> None:
    untouched, back = measured("redis", recovered=exactly(0)), measured("kafka", recovered=exactly(10))
    found = choose([untouched, back], Wish())
    one, other = (place.scores["fault tolerance"] for place in found.places)
    assert one is not None
    assert other is not None
    assert (one.value, one.raw) == (1, "as before 0 s after a kill")
    assert other.value == pytest.approx(0.005)


def test_nobody_is_ranked_where_the_ranges_meet() -> None:
    first, second = measured("redis", largest=exactly(1000, 100)), measured("kafka", largest=exactly(950, 100))
    assert choose([first, second], Wish()).tied == ["kafka"]
    assert choose([first, measured("kafka", largest=exactly(700, 100))], Wish()).tied == []


def test_what_nobody_measured_is_unknown_and_weighs_nothing() -> None:
    found = choose([measured("redis"), measured("kafka")], Wish())
    for place in found.places:
        unknown = [name for name, score in place.scores.items() if score is None]
        assert unknown == ["performance", "fault tolerance", "integration"]
        assert place.total.value == pytest.approx((1 + 2 / 3 + 0) / 3)  # scalability, reliability, cost
    assert choose([measured("redis", events=0)], Wish()).places[0].scores["reliability"] is None
    priced = choose([measured("redis"), measured("kafka")], Wish(prices={"redis": 5}))
    assert priced.places[0].scores["cost"] is None, "the price of one of two says nothing"


def test_one_wrong_event_is_no_reliability() -> None:
    score = choose([measured("redis", wrong=1)], Wish()).places[0].scores["reliability"]
    assert score is not None
    assert (score.value, score.raw) == (0.0, "1 of 100 wrong; survives: host")


def test_it_says_at_which_weight_another_one_comes_first() -> None:
    fast = measured("redis", largest=exactly(1000), recovered=exactly(4))
    steady = measured("kafka", largest=exactly(500), recovered=exactly(1))
    found = choose([fast, steady], Wish())
    assert found.places[0].broker == "kafka"
    [turn, other] = [line for line in found.turns if line.startswith("redis")]
    assert turn.startswith("redis comes first if performance weighs 0.2")
    assert other == "redis comes first if fault tolerance weighs 0.11 or less (now 0.17)"
    assert choose([fast, steady], Wish(weights={"performance": 2})).places[0].broker == "redis"


def test_prices_and_what_runs_already_count() -> None:
    brokers = [measured("redis"), measured("kafka")]
    assert choose(brokers, Wish(prices={"redis": 300, "kafka": 40})).places[0].broker == "kafka"
    assert choose(brokers, Wish(have=["kafka"])).places[0].broker == "kafka"


@pytest.mark.parametrize(
    ("wish", "wrong"),
    [
        (Wish(needs=["order", "speed"]), "there is no need 'speed'; there are order, delay, replay, "),
        (Wish(weights={"looks": 1}), "there is no criterion 'looks'; there are performance, "),
        (Wish(have=["sqs"]), "there is no broker 'sqs'; there are redis"),
        (Wish(prices={"sqs": 3}), "there is no broker 'sqs'"),
        (Wish(weights={"cost": -1}), "a weight is 0 or more"),
    ],
)
def test_a_bad_wish_gets_one_clear_line(wish: Wish, wrong: str) -> None:
    with pytest.raises(DefinitionError, match=wrong):
        choose([measured("redis")], wish)


def report(*results: Result) -> Report:
    urls = {result.url: result.broker for result in results}
    return Report(
        made="2026-01-02T03:04:05Z", command="c", stentor="1", python="3", machine="m", servers=urls,
        features=dict.fromkeys(urls, SERVER), app="a", load="l", workers=1, limit=0.5, results=list(results),
    )  # fmt: skip


def result(kind: str, **options: object) -> Result:
    given = {"broker": "redis", "url": "redis://h", "kind": kind, "events": 10, "rate": 100.0, "throughput": 90.0}
    return Result(**(given | options))  # type: ignore[arg-type]


def test_a_report_becomes_measurements(tmp_path: Path) -> None:
    made = report(
        result("load", latency={"p99": 0.1}), result("load", latency={"p99": 0.3}), result("ramp", largest=5000.0),
        result("backlog", published=70.0), result("kill", recovered=3.0, lost=1),
    )  # fmt: skip
    file = tmp_path / "report.json"
    file.write_bytes(msgspec.json.encode(made))
    [one] = known(file).brokers
    assert one.p99 == Figure(0.2, 0.1, 0.3)
    assert (one.largest, one.drained, one.published) == (exactly(5000), exactly(90), exactly(70))
    assert (one.recovered, one.events, one.wrong) == (exactly(3), 50, 1)
    with pytest.raises(DefinitionError, match="redis stands in the report with two URLs"):
        from_report(report(result("load"), result("load", url="redis://other")))
    file.write_text("{}")
    with pytest.raises(DefinitionError, match="is no report of `stentor bench --json`"):
        known(file)


def test_what_is_shipped_says_of_the_brokers_what_they_say_of_themselves() -> None:
    """A feature that a broker gains or loses has to be measured anew: `python3 tasks.py seven`."""
    urls = {
        "sqlite": "sqlite:///x.db", "redis": "redis://h", "postgresql": "postgresql://h/d",
        "nats": "nats://h?durable=host", "rabbitmq": "amqp://h", "rocketmq": "rocketmq://h", "kafka": "kafka://h",
    }  # fmt: skip
    brokers = {one.broker: one for one in shipped().brokers}
    assert set(brokers) == set(urls)
    for name, url in urls.items():
        assert brokers[name].features == connect(url).features
        assert brokers[name].largest is not None
        assert brokers[name].recovered is not None
        assert brokers[name].wrong == 0
    assert choose(list(brokers.values()), Wish(needs=list(NEEDS)[:2])).places
