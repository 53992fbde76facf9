"""The shop example: every broker by its URL, through kill -9, and from the embedded file to a server under load."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.shop.books import ROOT
from examples.shop.main import SERVICES, Wrong, books_of, check, declare, main, running, wait
from tests.real import brokers, url_of

pytestmark = pytest.mark.slow
ORDERS = 300
SERVERS = [pytest.param(name, marks=pytest.mark.server) for name in brokers()]
# What deaths do on each server is for the conformance suite; here one of them is enough.
KILLED: list[Any] = [("sqlite", service) for service in SERVICES]
KILLED += [pytest.param(name, "payments", marks=pytest.mark.server) for name in brokers()]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run puts into the environment is gone after the test."""
    for name in ("SHOP_FOLDER", "SHOP_ORDERS", "SHOP_RATE"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(("kind", "killed"), KILLED)
def test_every_order_is_through_although_a_service_is_killed(
    kind: str, killed: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    broker = url_of(kind, tmp_path / "shop.db", tmp_path_factory)
    code = main(["--broker", broker, "--orders", str(ORDERS), "--kill", killed])
    said = capfd.readouterr()
    assert code == 0, said.err
    assert f"killed {killed} (SIGKILL)" in said.out
    assert f"{ORDERS} orders are through" in said.out


def test_the_check_finds_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(Wrong, match="orders dealt with 0 orders, not 10"):
        check(tmp_path, 10)


def mirror(source: str, target: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stentor", "mirror", source, target, *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", SERVERS)
def test_the_shop_moves_to_a_server_under_load(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/guides/move.md says: mirror --follow while it runs, stop, mirror the rest, start with the new URL."""
    orders = 3000
    monkeypatch.setenv("SHOP_ORDERS", str(orders))
    monkeypatch.setenv("SHOP_RATE", "300")
    old, new = url_of("sqlite", tmp_path / "shop.db", tmp_path_factory), url_of(kind, tmp_path, tmp_path_factory)
    declare(old)
    declare(new)
    with running(old, tmp_path) as services:
        wait(services, tmp_path, 200)
        following = mirror(old, new, "--follow")
        assert following.stderr is not None
        assert "to go" in following.stderr.readline()  # it is at work, and will take a signal for the end
        wait(services, tmp_path, 900)
        assert following.poll() is None
        following.send_signal(signal.SIGTERM)
        _, trouble = following.communicate(timeout=60)
        assert following.returncode == 0, trouble
    with books_of("orders", tmp_path) as books:
        before = books.count()
    assert 900 <= before < orders, "it was moved under way"
    last = mirror(old, new, "--verify")
    said, trouble = last.communicate(timeout=120)
    assert last.returncode == 0, said + trouble
    assert "moved 4 groups: orders.outcomes, orders.place, payments.charge, shipping.ship" in said
    assert said.count("the same") >= 3
    with running(new, tmp_path) as services:
        wait(services, tmp_path, orders)
    assert check(tmp_path, orders) == 0, "nothing is handled twice: the services were stopped in order"
