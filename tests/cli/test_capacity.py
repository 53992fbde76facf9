"""``stentor capacity`` as people use it."""

import json
import re

import pytest

from tests.cli.conftest import Stentor

NUMBERS = ("--rate", "500/s", "--service", "20ms", "--concurrency", "16")


def test_numbers_by_hand(shop: Stentor) -> None:
    text = shop("capacity", *NUMBERS, "--p99", "200ms", "--backlog", "3000", "--outage", "1m")
    assert "at most 800/s: handlers" in text
    assert "from arrival to end" in text
    assert "30,000 events wait; worked off in 100 s" in text
    found = json.loads(shop("capacity", *NUMBERS, "--p99", "200ms", "--backlog", "3000", "--outage", "1m", "--json"))
    assert found["throughput"] == 500
    assert found["limit"]["name"] == "handlers"
    assert found["simulated"]["p99"] == pytest.approx(found["closed"]["p99"], rel=0.1)
    assert found["p99"]["workers"] == 1
    assert found["drain"]["seconds"] == pytest.approx(10)


def test_a_p99_names_the_partitions_that_its_workers_need(shop: Stentor) -> None:
    asked = ("--rate", "10000/s", "--service", "100ms", "--p99", "600ms")
    assert "16 workers, with 16 partitions (now 12)" in shop("capacity", *asked)
    assert json.loads(shop("capacity", *asked, "--json"))["p99"]["partitions"] == 16
    assert "1 worker, with 12 partitions as now" in shop("capacity", *NUMBERS, "--p99", "200ms")
    assert "no number of workers is enough" in shop("capacity", *NUMBERS, "--p99", "10ms")


def test_overload_has_no_percentiles(shop: Stentor) -> None:
    found = json.loads(shop("capacity", "--rate", "2k/s", *NUMBERS[2:], "--backlog", "1", "--json"))
    assert found["grows"] == pytest.approx(1200)
    assert found["simulated"] is None
    assert found["drain"]["seconds"] is None
    assert "never" in shop("capacity", "--rate", "2k/s", *NUMBERS[2:], "--backlog", "1")


def test_a_recorded_file(shop: Stentor) -> None:
    lines = [json.dumps({"time": n / 100, "service": 0.05, "key": f"k{n % 4}"}) for n in range(1000)]
    (shop.folder / "run.jsonl").write_text("\n".join(lines), "utf-8")
    found = json.loads(shop("capacity", "run.jsonl", "--json"))
    assert found["rate"] == pytest.approx(100)
    assert found["limit"]["name"] == "hot key"  # four keys of one event at a time each: 80/s
    assert found["limit"]["rate"] == pytest.approx(80)
    assert json.loads(shop("capacity", "run.jsonl", "--rate", "40/s", "--json"))["grows"] == 0


def test_a_recording_with_a_hole_is_taken_where_that_is_meant(shop: Stentor) -> None:
    lines = [json.dumps({"time": n / 10 + (n >= 50) * 90_000, "service": 0.01}) for n in range(100)]
    (shop.folder / "hole.jsonl").write_text("\n".join(lines))
    found = json.loads(shop("capacity", "hole.jsonl", "--keep-gaps", "--json"))
    assert found["rate"] == pytest.approx(99 / 90_010, rel=0.01)


def test_a_plot(shop: Stentor) -> None:
    shop("capacity", *NUMBERS, "--plot", "knee.svg")
    assert "</svg>" in (shop.folder / "knee.svg").read_text("utf-8")


def test_a_plot_in_the_terminal(shop: Stentor) -> None:
    text = shop("capacity", *NUMBERS, "--plot", "-")
    assert "\x1b" not in text, "plain where nobody looks"
    drawn = text[text.index("from arrival to end, by arrivals") :].splitlines()
    assert all(len(line) <= 80 for line in drawn)
    assert "┊ λ now: 500/s   │ limit: 800/s, handlers" in text
    assert re.search(r"◆ knee: from 7\d\d/s on p99 is over twice that without load", text)
    assert "--json and --plot - both want standard output" in shop(
        "capacity", *NUMBERS, "--plot", "-", "--json", code=2
    )


@pytest.mark.parametrize(
    ("args", "code", "wrong"),
    [
        ((), 2, "give --rate and --service, a FILE"),
        (("--rate", "soon", "--service", "1s"), 2, "'soon' is no rate above 0"),
        (("--rate", "0", "--service", "1s"), 2, "'0' is no rate above 0"),
        (("--rate", "1/s", "--service", "0s"), 3, "a mean above 0"),
        (("--rate", "1/s", "--service", "quick"), 2, "no duration"),
        (("--rate", "1/s", "--service", "1s", "--workers", "0"), 3, "workers has to be above 0"),
        (("--rate", "1/s", "--service", "1s", "--plot", "x.txt"), 3, "a plot is a .svg"),
        (("none.csv",), 3, "No such file"),
        ((*NUMBERS, "--backlog", "-5"), 3, "a backlog is 0 events or more, not -5"),
        ((*NUMBERS, "--arrival-cv", "-1"), 3, "arrival_cv has to be 0 or more, not -1.0"),
        (("hole.jsonl",), 3, "hole.jsonl, line 51: nothing comes for 25 h before it"),
        (("metrics.txt",), 3, "metrics.txt, line 1: it looks like metrics of Prometheus"),
    ],
)
def test_bad_input_gets_one_clear_line(shop: Stentor, args: tuple[str, ...], code: int, wrong: str) -> None:
    (shop.folder / "metrics.txt").write_text("# HELP up Whether it is.\nup 1\n")
    hole = [json.dumps({"time": n / 10 + (n >= 50) * 90_000, "service": 0.01}) for n in range(100)]
    (shop.folder / "hole.jsonl").write_text("\n".join(hole))
    text = shop("capacity", *args, code=code)
    assert wrong in " ".join(text.split())
    assert "Traceback" not in text
