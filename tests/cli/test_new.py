"""``stentor new`` and ``stentor demo``: what they make runs, and what they say is so."""

import re
import signal
import subprocess
import sys

import pytest

from tests.cli.conftest import Stentor


def test_a_new_project_passes_its_tests_and_runs(command: Stentor) -> None:
    text = command("new", "my-shop")
    assert "my-shop/my_shop/app.py" in text
    folder = command.folder / "my-shop"
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"], cwd=folder,
        env=command.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "2 passed" in tests.stdout
    readme = (folder / "README.md").read_text()
    project = Stentor(folder)
    publish = re.search(r"^\$ stentor publish (\S+) (\S+) '(.+)'$", readme, re.MULTILINE)
    assert publish, readme
    assert "published" in project("publish", *publish.groups())
    worker = project.start("run", "my_shop.app")
    worker.until("to ada@example.org: Welcome, ada!")
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    worker.close()


def test_new_leaves_alone_what_is_there(command: Stentor) -> None:
    (command.folder / "shop").mkdir()
    (command.folder / "shop" / "mine.txt").write_text("mine")
    assert "exists already and is not empty" in command("new", "shop", code=2)
    assert [path.name for path in (command.folder / "shop").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_new_project_is_well_typed(command: Stentor) -> None:
    command("new", "shop")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(command.folder / "cache"), "shop", "tests"],
        cwd=command.folder / "shop", env={**command.environment, "MYPYPATH": command.environment["PYTHONPATH"]},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_demo_tells_its_story_in_plain_lines(command: Stentor) -> None:
    command.environment["TMPDIR"] = str(command.folder)
    text = command("demo")
    assert "\x1b" not in text
    said = [line[9:] for line in text.splitlines() if re.match(r" *[\d.]+ s  ", line)]
    dead = said.index("order 9 of Dora: dead letter after 4 attempts")
    assert sum("order 9 of Dora: attempt" in line for line in said[:dead]) == 4
    redriven = said.index("redriven: 1 dead letter")
    assert said[redriven + 1 :] == [f"order {number} of Dora: paid" for number in (9, 14, 19, 24, 29)]
    summary = dict(re.findall(r"^  (\w[\w ]*?)  +(.+)$", text[text.index("  orders ") :], re.MULTILINE))
    assert summary["orders"] == "30 of 30 placed, paid and shipped"
    assert summary["order"] == "kept for 5 of 5 customers"
    assert summary["dead letters"].startswith("1, with 4 orders held behind")
    failed = sum(": attempt " in line for line in said)
    assert summary["retries"] == f"{30 + failed} calls to the bank, of which {failed} failed"
    assert 10 < float(summary["time"].removesuffix(" s")) < 30
    assert not list(command.folder.glob("stentor-demo-*"))


def test_the_demo_shows_its_program(command: Stentor) -> None:
    source = command("demo", "--source")
    compile(source, "shop.py", "exec")
    assert "@app.on(PaymentTaken)" in source
