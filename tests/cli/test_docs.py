"""``stentor docs``: what it writes, what it compares, and what it says of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.shop.main import SERVICES
from tests.cli.conftest import Stentor

ROOT = Path(__file__).parents[2]


def test_it_writes_and_compares(shop: Stentor) -> None:
    said = shop("docs", "--app", "shop:app", "--broker", "kafka://me:secret@host:9092", "--out", "made/site")
    assert said == "made/site: asyncapi.json and index.html, 2 events of 1 service\n"
    text = (shop.folder / "made" / "site" / "asyncapi.json").read_text("utf-8")
    page = (shop.folder / "made" / "site" / "index.html").read_text("utf-8")
    assert json.loads(text)["servers"]["broker"]["host"] == "host:9092"
    assert "secret" not in text + page
    assert page.startswith("<!doctype html>")
    old = "made/site/asyncapi.json"
    assert shop("docs", "--app", "shop:app", "--diff", old) == "no event changed\n"
    source = (shop.folder / "shop.py").read_text("utf-8")
    (shop.folder / "shop.py").write_text(source.replace("number: int", "number: str"), "utf-8")
    said = shop("docs", "--app", "shop:app", "--diff", old, "--out", "made/site", code=1)
    assert said.startswith("2 changes would break somebody: ")
    assert shop("docs", "--app", "shop:app", "--diff", old) == "no event changed\n", "it was written anew all the same"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "say --out DIR, --diff OLD, or both"),
        (["--diff", "nowhere.json"], 3, "error: nowhere.json: No such file or directory"),
        (["--diff", "shop.py"], 3, "error: shop.py is no JSON: "),
        (["--diff", "other.json"], 3, "error: other.json is no document that `stentor docs` wrote"),
        (["--out", "shop.py"], 3, "error: shop.py: File exists"),
        (["--out", "site", "--config", "nowhere.toml"], 3, "error: nowhere.toml: No such file or directory"),
        (["--out", "site", "--broker", "nothing"], 3, "is no URL"),
        (["--out", "site", "--app", "shop:app"], 3, "two apps are called 'shop'"),
    ],
)
def test_bad_input(shop: Stentor, args: list[str], code: int, said: str) -> None:
    (shop.folder / "other.json").write_text('{"asyncapi": "3.1.0", "components": {"messages": {"a": {}}}}', "utf-8")
    found = shop("docs", "--app", "shop:app", *args, code=code)
    assert said in found
    assert "Traceback" not in found
    assert not (shop.folder / "site").exists(), "nothing half done"


def test_the_files_shown_in_the_docs_are_what_it_writes(tmp_path: Path) -> None:
    apps = [part for name in SERVICES for part in ("--app", f"examples.shop.{name}:app")]
    command = ["docs", *apps, "--broker", "kafka://kafka.example:9092", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "stentor", *command], cwd=ROOT, check=True, capture_output=True)
    for name in ("asyncapi.json", "index.html"):
        assert (ROOT / "docs" / "guides" / "shop" / name).read_bytes() == (tmp_path / name).read_bytes(), command
