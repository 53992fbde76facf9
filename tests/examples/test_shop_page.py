"""The shop's page in a real browser: what customers order, what they are told, and that a restart loses nothing."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import servers
import servers.npm
from examples.shop.books import ROOT
from examples.shop.main import declare, running
from tests.real import unavailable

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(240)]


class Browser:
    """Chromium, driven by page.mjs."""

    def __init__(self, url: str, folder: Path) -> None:
        servers.apt("chromium", program="chromium")
        playwright, node, chromium = servers.npm.package(servers.npm.PLAYWRIGHT), shutil.which("node"), "chromium"
        if node is None:
            raise servers.Missing("node is not installed")
        script = Path(__file__).with_name("page.mjs")
        self._process = subprocess.Popen(
            [node, script, url, folder, playwright, shutil.which(chromium) or chromium],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def do(self, *task: object) -> Any:
        """Have it do something; what it answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, task)) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "failed" not in answer, f"{task}: {answer['failed']}"
        return answer["done"]

    def close(self) -> None:
        self._process.communicate(timeout=30)


class Site:
    """The page's app in a process of its own, on one port through restarts."""

    def __init__(self, broker: str, folder: Path) -> None:
        self._port = servers.free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._command = [
            sys.executable, "-m", "stentor", "run", "examples.shop.page:app", "--broker", broker,
            "--http", f"127.0.0.1:{self._port}",
        ]  # fmt: skip
        self._log = folder / "page.log"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not servers.listens(self._port):
            assert time.monotonic() < deadline, self._log.read_text()
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("SHOP_ORDERS", "1")
    monkeypatch.setenv("SHOP_FOLDER", str(tmp_path))
    broker = f"sqlite:///{tmp_path}/shop.db"
    declare(broker)
    with running(broker, tmp_path):
        site = Site(broker, tmp_path)
        site.start()
        try:
            yield site
        finally:
            site.kill()


@pytest.fixture
def browser(shop: Site, tmp_path: Path) -> Iterator[Browser]:
    try:
        browser = Browser(shop.url, tmp_path)
    except servers.Missing as missing:
        unavailable(missing)
    yield browser
    browser.close()


def test_customers_order_and_see_their_own_through_a_kill(shop: Site, browser: Browser, tmp_path: Path) -> None:
    browser.do("open", "ada")
    browser.do("open", "bob")
    for item in ("lamp", "globe"):
        browser.do("order", "ada", item)
    browser.do("state", "ada", "shipped", 1)
    browser.do("state", "ada", "refused", 1)  # a globe is more than the bank allows
    assert browser.do("rows", "ada") == [["globe", "refused"], ["lamp", "shipped"]]
    assert browser.do("rows", "bob") == []
    shop.kill()
    browser.do("line", "ada", "away")
    browser.do("order", "ada", "kettle")  # kept by the page until the shop is back
    shop.start()
    browser.do("state", "ada", "shipped", 2)
    assert browser.do("rows", "ada") == [["kettle", "shipped"], ["globe", "refused"], ["lamp", "shipped"]]
    browser.do("order", "bob", "chair")
    browser.do("state", "bob", "shipped", 1)
    assert browser.do("rows", "bob") == [["chair", "shipped"]]
    assert browser.do("errors") == []
    browser.do("picture", "ada")
    assert (tmp_path / "page.png").stat().st_size > 5000
    if keep := os.environ.get("STENTOR_TEST_PICTURES"):
        shutil.copy(tmp_path / "page.png", keep)
