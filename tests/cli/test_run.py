"""``stentor run``: start lines, signals, several workers, reload, and the exit code that says how it ended."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import Stentor


def pid_in(line: str) -> int:
    found = re.search(r"pid (\d+)", line)
    assert found, line
    return int(found[1])


def test_start_lines_name_the_broker_by_its_absolute_path_and_each_group(shop: Stentor) -> None:
    worker = shop.start("run", "shop:app")
    worker.until("ready")
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    text = "\n".join(worker.lines)
    assert f"runs shop on sqlite {shop.folder / 'stentor.db'} (durable: host" in text
    assert "shop.charge  shop.ordered (concurrency 64)" in text
    assert "\x1b" not in text
    assert "stopped after" in worker.lines[-1]


def test_stops_in_order_at_ctrl_c_too(shop: Stentor) -> None:
    worker = shop.start("run", "shop", "--broker", "memory://")
    assert "ready" in worker.until("ready")
    worker.send(signal.SIGINT)
    assert worker.end() == 0


def test_json_logs(shop: Stentor) -> None:
    shop("publish", "shop", "shop.ordered", '{"customer": "ada", "number": 1}')
    worker = shop.start("run", "shop", "--log-json")
    entry = json.loads(worker.until("charged ada 1"))
    assert entry["level"] == "info"
    assert (entry["group"], entry["event_type"], entry["event_key"]) == ("shop.charge", "shop.ordered", "ada")
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert all(json.loads(line) for line in worker.lines)


def test_only_and_except_choose_groups(shop: Stentor) -> None:
    (shop.folder / "shop.py").write_text(
        (shop.folder / "shop.py").read_text() + "\n@app.on(Paid)\nasync def ship(paid: Paid) -> None: ...\n"
    )
    for option, name, kept, left in (
        ("--only", "ship", "shop.ship", "shop.charge "),
        ("--except", "shop.ship", "shop.charge", "shop.ship "),
    ):
        worker = shop.start("run", "shop", "--broker", "memory://", option, name)
        worker.until("ready")
        assert any(kept in line for line in worker.lines)
        assert not any(left in line for line in worker.lines)
        worker.send(signal.SIGTERM)
        assert worker.end() == 0
    assert "no group 'pack'" in shop("run", "shop", "--broker", "memory://", "--only", "pack", code=3)


def test_a_second_signal_ends_at_once(shop: Stentor) -> None:
    text = (shop.folder / "shop.py").read_text()
    slow = "    print('begun', flush=True)\n    import asyncio; await asyncio.sleep(600)\n    return Paid("
    (shop.folder / "shop.py").write_text(text.replace("    return Paid(", slow))
    shop("publish", "shop", "shop.ordered", '{"customer": "ada", "number": 1}')
    worker = shop.start("run", "shop")
    worker.until("begun")
    worker.send(signal.SIGINT)
    worker.until("stopping")
    worker.send(signal.SIGINT)
    assert worker.end() == 130


def test_a_stop_gives_back_what_outlasts_the_grace(shop: Stentor) -> None:
    text = (shop.folder / "shop.py").read_text()
    slow = "    print('begun', ctx.attempt, flush=True)\n    import asyncio; await asyncio.sleep(600)\n    return Paid("
    (shop.folder / "shop.py").write_text(text.replace("    return Paid(", slow))
    shop("publish", "shop", "shop.ordered", '{"customer": "ada", "number": 1}')
    for _ in range(2):  # a stop burns no attempt
        worker = shop.start("run", "shop", "--grace", "100ms")
        worker.until("begun 1")
        worker.send(signal.SIGTERM)
        assert worker.end() == 0
    [lag] = shop.json("lag")
    assert lag["events"] == 1


@pytest.mark.slow
def test_workers_share_the_work_and_a_killed_one_comes_back(shop: Stentor) -> None:
    supervisor = shop.start("run", "shop", "--workers", "2")
    pids = {pid_in(supervisor.until("ready")), pid_in(supervisor.until("ready"))}
    assert len(pids) == 2
    assert shop.json("groups", "list")[0]["members"] == 2
    os.kill(min(pids), signal.SIGKILL)
    supervisor.until("ended with SIGKILL; again in 0.5 s")
    assert pid_in(supervisor.until("ready")) not in pids
    orders = [json.dumps({"customer": f"c{n % 10}", "number": n}) for n in range(200)]
    shop("publish", "shop", "shop.ordered", "-", stdin="\n".join(orders))
    paid = shop("tail", "payments", "--from", "earliest", "--limit", "200", "--json").splitlines()
    numbers: dict[str, list[int]] = {}
    for event in map(json.loads, paid):
        numbers.setdefault(event["partitionkey"], []).append(event["data"]["number"])
    assert all(found == sorted(found) for found in numbers.values())
    supervisor.send(signal.SIGTERM)
    assert supervisor.end() == 0
    assert sum("stopped after" in line for line in supervisor.lines) == 2


@pytest.mark.slow
def test_workers_stop_when_their_supervisor_is_killed(shop: Stentor) -> None:
    supervisor = shop.start("run", "shop", "--workers", "2")
    supervisor.until("ready")
    supervisor.until("ready")
    supervisor.send(signal.SIGKILL)
    supervisor.until("stopped after")
    supervisor.until("stopped after")
    supervisor.end()


@pytest.mark.parametrize("workers", ["1", "3"])
def test_an_app_that_cannot_start_ends_with_its_own_code(shop: Stentor, workers: str) -> None:
    (shop.folder / "shop.py").write_text("app = nothing\n")
    assert "NameError" in shop("run", "shop", "--workers", workers, code=3)


def test_several_workers_need_a_broker_that_they_can_share(shop: Stentor) -> None:
    text = shop("run", "shop", "--broker", "memory://", "--workers", "2", code=3)
    assert "memory:// lives inside one process, so --workers 2 cannot share it" in text
    assert "--broker sqlite:///stentor.db" in text


def test_a_renamed_handler_is_asked_about(shop: Stentor) -> None:
    shop("declare", "shop")
    text = (shop.folder / "shop.py").read_text()
    (shop.folder / "shop.py").write_text(text.replace("def charge", "def bill"))
    error = shop("run", "shop", code=3)
    assert "shop.charge lost its handler while shop.bill is new" in error
    assert "--new-groups" in error
    worker = shop.start("run", "shop", "--new-groups")
    worker.until("ready")
    worker.send(signal.SIGTERM)
    assert worker.end() == 0


@pytest.mark.slow
def test_reload_starts_again_when_a_file_changes(shop: Stentor) -> None:
    path = shop.folder / "shop.py"
    worker = shop.start("run", "shop", "--reload")
    worker.until("ready")
    rewrite(path, path.read_text().replace("charged %s", "billed %s"))
    worker.until("shop.py changed: starting again")
    worker.until("ready")
    shop("publish", "shop", "shop.ordered", '{"customer": "ada", "number": 1}')
    worker.until("billed ada 1")
    good = path.read_text()
    rewrite(path, "app = (\n")
    worker.until("SyntaxError")
    worker.until("starts again when a file changes")
    rewrite(path, good)
    worker.until("ready")
    worker.send(signal.SIGINT)
    assert worker.end() == 0


def rewrite(path: Path, text: str) -> None:
    """Write a file in one step, so that no watcher sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


@pytest.mark.slow
def test_http_is_served_beside_the_app(shop: Stentor) -> None:
    httpx = pytest.importorskip("httpx")
    worker = shop.start("run", "shop", "--http", "127.0.0.1:0")
    line = worker.until("http://")
    worker.until("ready")
    url = line.split()[-1]
    assert httpx.get(f"{url}/readyz").status_code == 200
    event = {
        "specversion": "1.0", "id": "1", "source": "/test", "type": "shop.ordered", "partitionkey": "ada",
        "data": {"customer": "ada", "number": 7},
    }  # fmt: skip
    response = httpx.post(f"{url}/events", json=event, headers={"content-type": "application/cloudevents+json"})
    assert response.status_code == 202
    worker.until("charged ada 7")
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
