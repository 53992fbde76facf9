"""Bad input on the command line: one clear line, what to do, and the exit code that the help documents."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from stentor.cli import SECTIONS, Stentor, cli
from stentor.cli.exits import EXIT_CODES
from tests.cli.conftest import Stentor as Command


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("shopp", "there is no module 'shopp' in"),
        ("shopp", "did you mean shop?"),
        ("nowhere.shop:app", "run from the project's folder, or install the project"),
        ("shop:ap", "shop has no 'ap'; it has shop:app"),
        ("shop:Ordered", "shop:Ordered is a class, not a stentor App; shop has shop:app"),
        ("shop:os", "shop:os is a module, not a stentor App"),
        ("two", "two has two:a, two:b; say which: MODULE:APP"),
        ("empty", "empty has no App; say which"),
        ("needs", "No module named 'not_installed'; install it"),
        ("raises", 'File "'),
        ("raises", "raises could not be imported: KeyError: 'missing'"),
        ("leaves", "leaves could not be imported: SystemExit: 7"),
        ("clash", "two classes claim the event type 'x': clash.A and clash.B"),
        ("untyped", "parameter 'event' has no annotation"),
        ("idle", "has no handler, timer or source"),
        ("no-module", "'no-module' is no module and app; write for example shop.app:app"),
    ],
)
def test_what_is_no_app(shop: Command, target: str, said: str) -> None:
    head = "from stentor import App, Event\nclass A(Event, topic='a', type='x'):\n    n: int\n"
    for name, text in {
        "two": "from stentor import App\na = App('a')\nb = App('b')\n",
        "empty": "",
        "needs": "import not_installed\n",
        "raises": "def f():\n    return {}['missing']\nf()\n",
        "leaves": "raise SystemExit(7)\n",
        "clash": head + "class B(Event, topic='a', type='x'):\n    n: int\n"
        "app = App('c')\n@app.on(A)\nasync def a(e: A): ...\n@app.on(B)\nasync def b(e: B): ...\n",
        "untyped": head + "app = App('u')\n@app.on(A)\nasync def a(event): ...\n",
        "idle": "from stentor import App\napp = App('idle')\n",
    }.items():
        (shop.folder / f"{name}.py").write_text(text)
    error = shop("run", target, "--broker", "memory://", code=3)
    assert said in error
    assert "importlib" not in error
    assert error.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["runn"], 2, "there is no command 'runn'; did you mean 'run'?"),
        (["lag"], 4, "there is no {folder}/stentor.db yet: run or declare an app first"),
        (["lag", "--broker", "memory://"], 3, "memory:// lives inside one process"),
        (["lag", "--broker", "stentor.db"], 3, "'stentor.db' is no URL; write for example sqlite:///stentor.db"),
        (["lag", "--broker", "nope://x"], 3, "no broker for nope://"),
        (["lag", "--broker", "sqlite:///x.db?fast=1"], 3, "unknown option fast; sqlite knows"),
        (["lag", "--broker", "sqlite:///other.db"], 4, "other.db"),
        (["dead", "redrive"], 2, "say which: IDs, a filter such as --group or --error, or --all"),
        (["dead", "redrive", "1", "--all"], 2, "exclude each other"),
        (["replay", "g", "--to", "10x"], 2, 'is no time; write "10m" (ago)'),
        (["tail", "--where", "a b", "--broker", "sqlite:///x.db"], 3, "--where:"),
        (["tail", "--from", "17"], 2, "an offset is a place in one topic"),
        (["publish", "t"], 2, "say [MODULE:APP] TYPE JSON"),
        (["run", "shop", "--grace", "soon"], 2, "is no duration"),
        (["new", "Shop!"], 2, "cannot name a package"),
        (["new", "json"], 2, "would hide the module of that name"),
    ],
)
def test_one_line_and_an_exit_code(command: Command, args: list[str], code: int, said: str) -> None:
    (command.folder / "other.db").write_text("this is no database, but it is long enough to be taken for one" * 100)
    error = command(*args, code=code)
    assert said.format(folder=command.folder) in " ".join(error.split())
    assert "Traceback" not in error


def test_the_help_is_light_and_tells_all() -> None:
    program = (
        "import sys; from stentor.cli import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print(*sys.modules)"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not {"rich", "sqlite3", "uvicorn", "stentor.cli.run", "stentor.cli.dead"} & loaded
    shown = " ".join(done.stdout.split())
    for code, text in EXIT_CODES.items():
        assert f"{code} {text}" in shown


def test_running_does_not_load_rich(shop: Command) -> None:
    path = shop.folder / "shop.py"
    look = "async def look() -> None:\n    import sys\n    print('rich', 'rich' in sys.modules, flush=True)\n"
    path.write_text(f"{path.read_text()}\n@app.every('50ms')\n{look}")
    worker = shop.start("run", "shop", "--broker", "memory://")
    assert worker.until("rich ") == "rich False"


@pytest.mark.parametrize("name", [name for section in SECTIONS.values() for name in section])
def test_each_command_is_listed_with_its_own_first_line(name: str) -> None:
    assert isinstance(cli, Stentor)
    listed = {name: text for section in SECTIONS.values() for name, text in section.items()}
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0
    assert " ".join(done.output.split("\n\n")[1].split()).startswith(listed[name])
    assert max(map(len, done.output.splitlines())) <= 80


def test_without_a_command_it_shows_the_help() -> None:
    done = CliRunner().invoke(cli, [])
    assert done.exit_code == 0
    assert "Exit codes:" in done.output


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).output.startswith("stentor ")
