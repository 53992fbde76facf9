"""`stentor mirror` on the command line: what it prints, how it ends, what it refuses."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing

from tests.cli.conftest import Stentor

OLD, NEW = "sqlite:///stentor.db", "sqlite:///new.db"
ORDER = '{"customer": "ada", "number": 7}'


def test_from_follow_to_verify(shop: Stentor, handled: Callable[..., None]) -> None:
    handled(("ada", 1), ("ben", 2), ("dora", 3))
    following = shop.start("mirror", OLD, NEW, "--follow")
    following.until("to go")
    while any(lag["events"] for lag in shop.json("lag") if lag["group"] == "stentor.mirror"):
        pass
    following.send(signal.SIGTERM)
    assert following.end() == 0
    assert following.lines[-1] == "copied 5 events"

    shop("publish", "shop", "shop.ordered", ORDER, "--delay", "1h")
    said = shop("mirror", OLD, NEW, "--verify")
    assert said.splitlines()[:2] == ["copied 2 events", "moved 1 group: shop.charge"], "the delayed and the dead one"
    assert [line.split() for line in said.splitlines()[3:]] == [
        ["orders", "3", "3", "1", "the", "same"],
        ["payments", "2", "2", "0", "the", "same"],
        ["stentor.dead.shop.charge", "1", "1", "0", "the", "same"],
    ]
    assert [letter["key"] for letter in shop.json("dead", "list", "--broker", NEW)] == ["dora"]
    assert shop.json("mirror", OLD, NEW) == [{"copied": 0, "left": 0, "groups": []}]


def test_a_difference_is_named_and_fails(shop: Stentor, handled: Callable[..., None]) -> None:
    handled(("ada", 1))
    shop("mirror", OLD, NEW)
    shop("publish", "shop", "shop.ordered", ORDER, "--broker", NEW)
    assert "the same; 1 only at the target" in shop("mirror", OLD, NEW, "--verify")
    said = shop("mirror", OLD, NEW, "--verify", "--json", "--topic", "orders").splitlines()
    assert '"extra":1' in said[1]
    with closing(sqlite3.connect(shop.folder / "new.db")) as db, db:
        db.execute("DELETE FROM stentor_event WHERE topic = (SELECT id FROM stentor_topic WHERE name = 'payments')")
    command = [sys.executable, "-m", "stentor", "mirror", OLD, NEW, "--verify"]
    done = subprocess.run(command, cwd=shop.folder, env=shop.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "1 missing" in done.stdout) == (1, True), done.stdout + done.stderr


def test_what_is_refused(shop: Stentor, handled: Callable[..., None]) -> None:
    handled(("ada", 1))
    assert "are the same" in shop("mirror", OLD, OLD, code=2)
    assert "--verify is for the end" in shop("mirror", OLD, NEW, "--follow", "--verify", code=2)
    assert "no topic nowhere" in shop("mirror", OLD, NEW, "--topic", "nowhere", code=5)
    assert "lives inside one process" in shop("mirror", OLD, "memory://", code=3)
    assert "there is no" in shop("mirror", "sqlite:///none.db", NEW, code=4)
    shop("mirror", OLD, NEW)
    assert "mirrored before, and not to" in shop("mirror", OLD, "sqlite:///other.db", code=1)
