"""``stentor bench`` as people use it."""

import json
import sqlite3

import pytest

from stentor.cli.bench import _command
from tests.cli.conftest import Stentor

SHORT = ("--during", "1s", "--repeats", "1")


@pytest.mark.slow
def test_the_built_in_app_on_a_file(shop: Stentor) -> None:
    args = ("--broker", "sqlite:///bench.db", *SHORT, "--rate", "200/s", "--fault", "poison", "--html", "report.html")
    text = shop("bench", *args)
    assert "the built-in app: poisson at 200/s, 1 worker" in text
    assert "poison: the handler refuses one event in 100 for good" in text
    assert "</svg>" in (shop.folder / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_an_app_with_its_own_events(shop: Stentor) -> None:
    """Two events of a file, by turns."""
    lines = [json.dumps({"type": "shop.ordered", "data": {"customer": c, "number": 1}}) for c in ("ada", "bob")]
    (shop.folder / "orders.jsonl").write_text("\n".join(lines))
    args = ("shop", "--events", "orders.jsonl", "--broker", "sqlite:///bench.db", *SHORT, "--rate", "100/s", "--json")
    report = json.loads(shop("bench", *args))
    [result] = report["results"]
    assert (result["events"], result["lost"], result["doubled"]) == (100, 0, 0)
    assert report["app"] == "shop"
    assert report["servers"]["sqlite:///bench.db"] == f"SQLite {sqlite3.sqlite_version}"


@pytest.mark.parametrize(
    ("args", "code", "wrong"),
    [
        ((), 2, "say where: --broker URL"),
        (("--broker", "sqlite:///b.db", "--fault", "restart"), 2, "--fault restart needs --restart COMMAND"),
        (("--broker", "sqlite:///b.db", "shop"), 2, "an app needs --events FILE"),
        (("--broker", "sqlite:///b.db", "--events", "x"), 2, "an app needs --events FILE"),
        (("--broker", "sqlite:///b.db", "--load", "none.csv"), 2, "there is no file 'none.csv'"),
        (("--broker", "sqlite:///b.db", "--speed", "2"), 2, "--speed is for a recorded load"),
        (("--broker", "sqlite:///b.db", "--html", "none/r.html"), 3, "none/r.html: No such file"),
        (("--broker", "sqlite:///b.db", "--rate", "1/h"), 3, "two are the least"),
        (("--broker", "sqlite:///b.db", "--load", "hole.jsonl"), 3, "line 51: nothing comes for 25 h before it"),
        (
            ("--broker", "memory://", "--load", "hole.jsonl", "--keep-gaps", "--speed", "10", "--fault", "kill"),
            3,
            "note: it runs for 15 h at least",
        ),
        (("--broker", "memory://", "--during", "1s"), 3, "lives inside one process; a bench has several"),
        (("--broker", "sqlite:///b.db", "shop", "--events", "e.jsonl", "--group", "none"), 3, "no group 'none'"),
        (("--broker", "sqlite:///b.db", "shop", "--events", "bad.jsonl"), 3, "no event of type 'x'"),
    ],
)
def test_bad_input_gets_one_clear_line(shop: Stentor, args: tuple[str, ...], code: int, wrong: str) -> None:
    (shop.folder / "e.jsonl").write_text('{"type": "shop.ordered", "data": {"customer": "a", "number": 1}}')
    hole = [json.dumps({"time": n / 10 + (n >= 50) * 90_000}) for n in range(100)]
    (shop.folder / "hole.jsonl").write_text("\n".join(hole))
    (shop.folder / "bad.jsonl").write_text('{"type": "x", "data": {}}')
    text = shop("bench", *args, code=code)
    assert wrong in " ".join(text.split())
    assert "Traceback" not in text


def test_the_report_holds_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    url, restart = "redis://ada:s3cret@h:6379?lease=2", "curl -u ada:s3cret 'http://h/?a=1&a=2'"
    monkeypatch.setattr("sys.argv", ["stentor", "bench", "--broker", url, f"--broker={url}", "--restart", restart])
    told = _command((url,), restart)
    assert told == "stentor bench --broker redis://h:6379 '--broker=redis://h:6379' --restart …"
