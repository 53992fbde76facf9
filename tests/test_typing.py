"""mypy --strict and pyright accept the good snippets, and reject in the bad ones exactly the lines marked ``# E``."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNIPPETS = sorted((ROOT / "tests" / "typing").glob("*.py"))
SOURCE = ROOT / "src"

Lines = dict[str, dict[int, str]]


def marked(path: Path) -> set[int]:
    return {number for number, line in enumerate(path.read_text().splitlines(), 1) if line.rstrip().endswith("# E")}


def mypy() -> Lines:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"]
    command += ["--config-file", "", "--python-version", "3.11", "--disable-error-code", "import-untyped"]
    done = subprocess.run(
        [*command, *map(str, SNIPPETS)], capture_output=True, text=True, cwd=ROOT, check=False,
        env={"MYPYPATH": str(SOURCE), "PATH": "", "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache" / "snippets")},
    )  # fmt: skip
    assert not done.stderr, done.stderr
    found: Lines = {}
    for line in done.stdout.splitlines():
        match = re.match(r"(?P<path>[^:]+):(?P<line>\d+): error: (?P<text>.*)", line)
        if match:
            found.setdefault(Path(match["path"]).name, {})[int(match["line"])] = match["text"]
    return found


def pyright(tmp_path: Path) -> Lines:
    settings = {
        "extraPaths": [str(SOURCE)],
        "pythonVersion": "3.11",
        "typeCheckingMode": "strict",
        "reportMissingTypeStubs": False,
        "reportUnusedExpression": False,
        "reportUnusedClass": False,
        "reportUnusedFunction": False,
    }
    for path in SNIPPETS:  # pyright looks only at what is below its settings
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    found: Lines = {}
    answer = json.loads(done.stdout)
    assert answer["summary"]["filesAnalyzed"] == len(SNIPPETS), done.stdout
    for item in answer["generalDiagnostics"]:
        if item["severity"] == "error":
            found.setdefault(Path(item["file"]).name, {})[item["range"]["start"]["line"] + 1] = item["message"]
    return found


@pytest.fixture(scope="module", params=["mypy", "pyright"])
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    return mypy() if request.param == "mypy" else pyright(tmp_path_factory.mktemp("pyright"))


@pytest.mark.parametrize("path", SNIPPETS, ids=lambda path: path.stem)
def test_a_checker_rejects_the_marked_lines_and_no_others(errors: Lines, path: Path) -> None:
    found = errors.get(path.name, {})
    assert (path.stem.startswith("bad_")) == bool(marked(path))
    accepted = sorted(marked(path) - set(found))
    rejected = {line: text for line, text in found.items() if line not in marked(path)}
    assert (accepted, rejected) == ([], {})
