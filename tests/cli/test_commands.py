"""Publish, tail, topics, groups, lag, replay, cancel, declare and doctor on one file, from processes of their own."""

import json
import signal
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from stentor.cli.doctor import _file_system, _sqlite_version
from stentor.cli.options import moment
from stentor.cli.output import size
from stentor.observe.text import span
from tests.cli.conftest import Stentor

ADA = '{"customer": "ada", "number": 1}'


def test_declare_is_the_deploy_step(shop: Stentor) -> None:
    for _ in range(2):
        text = shop("declare", "shop:app")
        assert f"shop on sqlite {shop.folder / 'stentor.db'} (durable: host" in text
        assert "shop.charge  reads orders" in text
    assert [group["name"] for group in shop.json("groups", "list")] == ["shop.charge"]
    names = [topic["name"] for topic in shop.json("topics")]
    assert "orders" in names
    assert not any(name.startswith("stentor.") for name in names)
    assert "stentor.dead.shop.charge" in [topic["name"] for topic in shop.json("topics", "--all")]


def test_publish_checks_an_event_of_an_app(shop: Stentor) -> None:
    assert " to orders at offset " in shop("publish", "shop", "shop.ordered", ADA)
    assert "Expected `int`, got `str`" in shop(
        "publish", "shop", "shop.ordered", '{"customer": "ada", "number": "x"}', code=1
    )
    assert "this is no JSON" in shop("publish", "shop", "shop.ordered", "{customer", code=1)
    [receipt] = shop.json("publish", "shop", "shop.ordered", ADA, "--id", "once")
    assert (receipt["id"], receipt["topic"], receipt["duplicate"]) == ("once", "orders", False)
    assert "was published to orders before" in shop("publish", "shop", "shop.ordered", ADA, "--id", "once")
    assert " to payments at offset " in shop("publish", "shop", "shop.paid", ADA), "an event that nobody handles"


def test_publish_by_name_needs_no_app(shop: Stentor) -> None:
    shop("declare", "shop")
    error = shop("publish", "shop.ordered", ADA, code=5)
    assert "say --topic: there are orders" in error
    shop(
        "publish",
        "shop.ordered",
        ADA,
        "--topic",
        "orders",
        "--key",
        "ada",
        "--source",
        "/till",
        "--subject",
        "one",
        "--header",
        "region=eu",
        "--time",
        "2026-05-01T12:00:00Z",
        "--version",
        "2",
    )
    [event] = map(json.loads, shop("tail", "--from", "earliest", "--no-follow", "--json").splitlines())
    wanted = {
        "type": "shop.ordered",
        "partitionkey": "ada",
        "source": "/till",
        "subject": "one",
        "region": "eu",
        "schemaversion": 2,
        "topic": "orders",
        "data": {"customer": "ada", "number": 1},
    }
    assert {name: event[name] for name in wanted} == wanted
    assert event["time"].startswith("2026-05-01T12:00:00")


def test_publish_many_from_standard_input_or_a_file(shop: Stentor) -> None:
    lines = "\n".join(json.dumps({"customer": "ada", "number": number}) for number in range(1200))
    assert shop("publish", "shop", "shop.ordered", "-", stdin=lines) == "published 1,200 events\n"
    (shop.folder / "orders.jsonl").write_text(lines + "\n\n")
    assert shop("publish", "shop", "shop.ordered", "@orders.jsonl") == "published 1,200 events\n"
    assert shop.json("lag")[0]["events"] == 2400
    error = shop("publish", "shop", "shop.ordered", "-", stdin=ADA + "\n{}\n", code=1)
    assert "line 2: " in error
    assert shop.json("lag")[0]["events"] == 2400
    assert "No such file" in shop("publish", "shop", "shop.ordered", "@nothing", code=2)


def test_cancel_drops_a_delayed_event(shop: Stentor) -> None:
    shop("publish", "shop", "shop.ordered", ADA, "--delay", "1h", "--id", "later")
    assert shop("cancel", "later") == "cancelled later\n"
    assert "no delayed event 'later' waits" in shop("cancel", "later", code=5)
    assert "delay and at exclude each other" in shop(
        "publish", "shop", "shop.ordered", ADA, "--delay", "1h", "--at", "2026-12-24", code=1
    )


def test_tail_follows_and_filters(shop: Stentor) -> None:
    shop("declare", "shop")
    tail = shop.start("tail", "--from", "earliest", "--key", "ben", "--where", "source = '/shop'", "--limit", "2")
    for number, customer in enumerate(("ada", "ben", "ada", "ben")):
        shop("publish", "shop", "shop.ordered", json.dumps({"customer": customer, "number": number}))
    assert tail.end() == 0
    assert [line.split("  ")[1:] for line in tail.lines] == [
        ["orders@2", "shop.ordered", "ben", '{"customer":"ben","number":1}'],
        ["orders@4", "shop.ordered", "ben", '{"customer":"ben","number":3}'],
    ]


def test_tail_sees_topics_that_appear_later(shop: Stentor) -> None:
    shop("publish", "shop", "shop.ordered", ADA)
    tail = shop.start("tail", "--json", "--from", "earliest", "--limit", "2")
    tail.until("shop.ordered")
    (shop.folder / "refunds.py").write_text(
        "from stentor import App, Event\n"
        "class Refunded(Event, topic='refunds', type='shop.refunded'):\n    number: int\n"
        "app = App('refunds')\napp.publishes(Refunded)\n"
    )
    shop("publish", "refunds", "shop.refunded", '{"number": 1}')
    assert json.loads(tail.until("refunds"))["data"] == {"number": 1}
    assert tail.end() == 0
    assert "no topic 'nowhere'; there are orders" in shop("tail", "nowhere", code=5)


def test_tail_ends_quietly_at_ctrl_c(shop: Stentor) -> None:
    shop("publish", "shop", "shop.ordered", ADA)
    tail = shop.start("tail", "--from", "earliest")
    tail.until("shop.ordered")
    tail.send(signal.SIGINT)
    assert tail.end() == 130
    assert len(tail.lines) == 1


def test_tail_makes_control_characters_harmless(shop: Stentor) -> None:
    shop("declare", "shop")
    shop("publish", "shop.ordered", '"\\u001b[2J"', "--topic", "orders")
    assert "\x1b" not in shop("tail", "--from", "earliest", "--no-follow")


def test_replay_sets_a_group_back(shop: Stentor, handled: Callable[..., None]) -> None:
    handled(("ada", 1), ("ada", 2), ("ben", 3))
    assert shop.json("lag")[0]["events"] == 0
    assert "would see 3 events" in shop("replay", "shop.charge", "--to", "earliest", "--dry-run")
    assert shop.json("lag")[0]["events"] == 0
    assert "say --yes" in shop("replay", "shop.charge", "--to", "earliest", code=2)
    assert "sees 3 events" in shop("replay", "shop.charge", "--to", "10m", "--yes")
    assert shop.json("lag")[0]["events"] == 3
    assert "sees 0 events" in shop("replay", "shop.charge", "--to", "latest", "--topic", "orders", "--yes")
    assert "does not read 'payments'" in shop("replay", "shop.charge", "--to", "0", "--topic", "payments", code=5)
    assert "no group 'charge'; there are shop.charge" in shop("replay", "charge", "--to", "earliest", code=5)


def test_groups_are_renamed_and_dropped(shop: Stentor) -> None:
    shop("publish", "shop", "shop.ordered", ADA)
    assert "is now called shop.bill" in shop("groups", "rename", "shop.charge", "shop.bill")
    error = shop("groups", "drop", "shop.bill", code=2)
    assert "It has 1 event still to handle, which it will never see." in " ".join(error.split())
    assert "shop.bill is dropped" in shop("groups", "drop", "shop.bill", "--yes")
    assert "no group 'shop.bill'; there are none" in shop("groups", "drop", "shop.bill", "--yes", code=5)
    assert shop("groups", "list").startswith("no groups")


def test_lag_watches(shop: Stentor) -> None:
    shop("publish", "shop", "shop.ordered", ADA)
    watch = shop.start("lag", "shop.charge", "--watch", "--interval", "50ms", "--json")
    assert json.loads(watch.until("charge"))["events"] == 1
    shop("publish", "shop", "shop.ordered", ADA)
    assert json.loads(watch.until('"events":2'))["members"] == 0
    watch.send(signal.SIGINT)
    assert watch.end() == 130
    lines = shop("lag").splitlines()
    assert lines[0].split() == ["group", "topic", "waiting", "oldest", "parked", "members"]
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert "no group 'nobody'" in shop("lag", "nobody", code=5)


def test_a_namespace_keeps_apart(shop: Stentor) -> None:
    url = "sqlite:///stentor.db?namespace=staging"
    shop("declare", "shop", "--broker", url)
    assert shop.json("groups", "list", "--broker", "sqlite:///stentor.db?namespace=live") == []
    assert [group["name"] for group in shop.json("groups", "list", "--broker", url)] == ["shop.charge"]
    assert "staging" in shop("doctor", "--broker", url)


def test_doctor_finds_what_weakens_durability(shop: Stentor) -> None:
    shop("declare", "shop")
    findings = {entry["check"]: entry for entry in shop.json("doctor", "shop")}
    assert {entry["verdict"] for entry in findings.values()} <= {"ok", "warn"}
    assert str(shop.folder / "stentor.db") in findings["broker"]["found"]
    assert findings["durability"]["found"].startswith("host")
    weak = shop.json("doctor", "--broker", "sqlite:///stentor.db?synchronous=normal")
    assert "synchronous=normal" in next(entry for entry in weak if entry["check"] == "durability")["advice"]
    assert "process" in shop("doctor", "--broker", "memory://")


def test_doctor_fails_when_something_is_broken(shop: Stentor) -> None:
    (shop.folder / "broken.db").write_bytes(b"no database at all" * 500)
    shop("doctor", "--broker", "sqlite:///broken.db", code=1)
    shop("doctor", "--broker", "sqlite:///no/such/folder/x.db", code=1)
    shop("doctor", "nothing:app", code=1)


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("3.40.1", "warn"), ("3.51.2", "warn"), ("3.51.3", "ok"), ("3.50.7", "ok"), ("3.44.6", "ok"), ("3.60.0", "ok")],
)
def test_doctor_knows_which_sqlite_has_the_wal_reset_race(version: str, verdict: str) -> None:
    assert _sqlite_version(tuple(map(int, version.split(".")))).verdict == verdict


def test_doctor_reads_this_machine(tmp_path: object) -> None:
    from pathlib import Path

    assert _file_system(Path("/proc")) in ("proc", "")
    assert _sqlite_version(sqlite3.sqlite_version_info).found.startswith(sqlite3.sqlite_version)


def test_times_as_people_write_them() -> None:
    assert abs(moment("10m") - (datetime.now(UTC) - timedelta(minutes=10))) < timedelta(seconds=5)
    assert abs(moment("1h30m ago") - (datetime.now(UTC) - timedelta(minutes=90))) < timedelta(seconds=5)
    assert moment("2026-05-01T12:30:00Z") == datetime(2026, 5, 1, 12, 30, tzinfo=UTC)
    assert moment("2026-05-01").utcoffset() is not None, "a time without a zone is local"
    for bad in ("soon", "", "-5m", "10x", "2026-13-01"):
        with pytest.raises(ValueError, match="is no time"):
            moment(bad)


def test_lengths_and_sizes_are_short() -> None:
    assert [span(s) for s in (0.04, 0.94, 12, 119, 300, 7300, 300000)] == [
        "0.0 s",
        "0.9 s",
        "12 s",
        "119 s",
        "5 min",
        "2 h",
        "3 d",
    ]
    assert [size(n) for n in (None, 0, 1023, 1536, 250 << 10, 5 << 40)] == [
        "-",
        "0 B",
        "1023 B",
        "1.5 KiB",
        "250 KiB",
        "5.0 TiB",
    ]
