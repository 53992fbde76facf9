"""The layers of src/stentor hold, files stay readable, and `import stentor` stays light.

A module is in one layer and imports only its own layer and lower ones. Imports under TYPE_CHECKING and inside functions
count too: who needs a name depends on its module, whenever that is loaded. A new module gets its place in LAYERS, a new
folder in FOLDERS, a new library in LIBRARIES.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "stentor"

LAYERS = [  # lowest first
    {"errors", "clock", "histogram"},
    {"message", "event", "catalog", "cesql", "cloudevents"},
    {"subscription", "retry", "broker", "connect", "parts"},
    {
        "context",
        "handler",
        "lanes",
        "plan",
        "parking",
        "meter",
        "limiter",
        "rate",
        "priority",
        "breaker",
        "batches",
        "worker",
        "schedule",
        "source",
    },
    {"group", "app", "program", "asgi", "exchange", "identity", "ingress", "health", "serve"},
]
FOLDERS = {  # each with the highest of LAYERS that it may import; above them it imports other folders, without a cycle
    "brokers": 2,
    "sources": 4,
    "patterns": 4,
    "sinks": 4,
    "gateway": 4,
    "security": 4,
    "capacity": 4,
    "bench": 4,
    "observe": 4,
    "scaling": 4,
    "docs": 4,
    "testing": 4,
    "cli": 4,
}
ALONE = {"brokers"}  # folders that import no other folder
FACADE = {"", "__main__"}  # `stentor` itself, which shows the names of the lower layers, and `python -m stentor`

_POSTGRESQL_SOURCE = {"sources.cdc_postgresql", "sources.cdc_postgresql_stream"}
_MYSQL_SOURCE = {"sources.cdc_mysql", "sources.cdc_mysql_log"}
LIBRARIES = {  # who may import which library, by module or folder; a broker's client has one module
    "msgspec": {"*"},
    "typing_extensions": {"*"},  # under TYPE_CHECKING only: it is not installed with Stentor
    "cronsim": {"schedule"},
    "attr": {"event"},
    "attrs": {"event"},
    "pydantic": {"event"},
    "click": {"cli", "__main__"},
    "rich": {"cli"},
    "uvicorn": {"serve"},
    "prometheus_client": {"health", "observe"},
    "opentelemetry": {"observe.otel"},
    "pytest": {"testing", "cli.new"},
    "psutil": {"testing", "sources.system"},
    "matplotlib": {"capacity.plot", "bench.report"},
    "cryptography": {"sources.signatures", "security.signing"},
    "jsonschema": {"gateway.apisix"},
    "confluent_kafka": {"brokers.kafka", "brokers.kafka_client", "brokers.kafka_transactions", "sources.kafka"},
    "aio_pika": {"sources.rabbitmq", "sinks.rabbitmq"},
    "fastavro": {"sources.foreign"},
    "nats": {"brokers.nats", "brokers.nats_client"},
    "psycopg": {"brokers.postgresql", "brokers.postgresql_client", *_POSTGRESQL_SOURCE},
    "pymysql": _MYSQL_SOURCE,
    "pymysqlreplication": {"sources.cdc_mysql_log"},
    "watchfiles": {"sources.files"},
    "fsspec": {"sources.files"},
    "feedparser": {"sources.polling"},
    "sqlalchemy": {"sources.polling"},
    "paho": {"sources.mqtt"},
    "redis": {"brokers.redis"},
    "hiredis": {"brokers.redis"},
    "grpc": {"scaling.keda"},
    "aiohttp": {"sinks", "sources.polling"},
    "google": {"scaling.keda", "sources.foreign"},
}
HEAVY = [  # what `import stentor` must not load: optional, or slow to load and needed by few
    *("attr", "attrs", "click", "cronsim", "django", "fastapi", "http.server", "multiprocessing", "prometheus_client"),
    *("pydantic", "pytest", "rich", "sqlite3", "starlette", "unittest", "urllib.request", "uvicorn", "xml"),
]
LINES_OF_A_FILE = 700
LINES_IN_ALL = 15_000
LINES_OF_BROKERS = 11_100  # beside those: see docs/decisions/0004
LINES_OF_ADAPTERS = 9_000  # of ADAPTERS, likewise
ADAPTERS = ("sources", "sinks", "gateway")
LINES_OF_TOOLS = 7_000  # of TOOLS and their commands, which no running app loads: see docs/decisions/0016
TOOLS = ("bench", "capacity", "scaling", "docs")
COMMANDS_OF_TOOLS = ("bench", "capacity", "choose", "docs", "scaler")


def modules(source: Path) -> dict[str, Path]:
    """Every module of the package by its name within it: "", "app", "brokers", "brokers.sqlite"."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
                base += [module] if module else []
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name
            case _:
                pass


def violations(source: Path) -> Iterator[str]:
    """Every import that breaks the rules above, one line each."""
    known = modules(source)
    homes = {name.split(".")[0] for name in known}
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    uses: dict[str, set[str]] = {folder: set() for folder in FOLDERS}
    for name, path in known.items():
        home = name.split(".")[0]
        where = f"stentor/{path.relative_to(source)}"
        if home not in level and home not in FOLDERS and home not in FACADE:
            yield f"{where} is in no layer: add {home!r} to LAYERS or FOLDERS in tests/test_layers.py"
            continue
        highest = FOLDERS.get(home, level.get(home, len(LAYERS)))
        package = ".".join(["stentor", *name.split(".")[: None if path.name == "__init__.py" else -1]]).rstrip(".")
        for line, full in imported(path, package):
            top, *rest = full.split(".")
            if top != "stentor":
                who = LIBRARIES.get(top, set())
                if top not in sys.stdlib_module_names and not who & {"*", home, name}:
                    yield f"{where}:{line} imports {top}: LIBRARIES in tests/test_layers.py does not allow it there"
                continue
            target = rest[0] if len(rest) > 1 or set(rest) & homes else ""  # else `from stentor import App`
            if target in FOLDERS:
                if home in level or home in ALONE - {target}:
                    yield f"{where}:{line} imports {full}, which is above it"
                elif home in FOLDERS and home != target:
                    uses[home].add(target)
            elif target in FACADE:
                if home in level or home in ALONE:
                    yield f"{where}:{line} imports {full} from `stentor` itself: name the module that defines it"
            elif target not in level:
                yield f"{where}:{line} imports {full}, which is in no layer"
            elif level[target] > highest:
                yield f"{where}:{line} imports {full}, which is above it"
    try:
        TopologicalSorter(uses).prepare()
    except CycleError as cycle:
        yield f"folders import each other in a circle: {' -> '.join(cycle.args[1][::-1])}"


def test_a_lower_layer_never_imports_a_higher_one() -> None:
    assert list(violations(SOURCE)) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("helper.py", "", "stentor/helper.py is in no layer: add 'helper'"),
        ("errors.py", "from stentor.app import App", "stentor/errors.py:1 imports stentor.app.App, which is above"),
        ("errors.py", "from stentor import app", "imports stentor.app, which is above"),
        ("errors.py", "from . import app", "imports stentor.app, which is above"),
        ("errors.py", "import stentor.app", "imports stentor.app, which is above"),
        ("event.py", "def f() -> None:\n    from .app import App", "stentor/event.py:2 imports stentor.app.App"),
        (
            "event.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import stentor.app",
            "event.py:3 imports",
        ),
        ("event.py", "import importlib\nimportlib.import_module('stentor.app')", "imports stentor.app, which is above"),
        ("app.py", "from stentor.cli import main", "imports stentor.cli.main, which is above"),
        ("app.py", "from stentor import Event", "name the module that defines it"),
        ("brokers/x.py", "from ..app import App", "stentor/brokers/x.py:1 imports stentor.app.App, which is above"),
        ("brokers/x.py", "from stentor.cli import main", "imports stentor.cli.main, which is above"),
        ("brokers/x.py", "import rich", "LIBRARIES in tests/test_layers.py does not allow it there"),
        ("sinks/x.py", "from stentor.cli import main", "in a circle: sinks -> cli -> sinks"),
    ],
)
def test_each_breach_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    tree = {
        "__init__.py": "from stentor.app import App",
        "app.py": "import msgspec\nfrom stentor.errors import E\nfrom . import event",
        "errors.py": "",
        "event.py": "from .errors import E",
        "brokers/__init__.py": "",
        "brokers/one.py": "from stentor.brokers.two import T\nfrom ..event import Event",
        "brokers/two.py": "",
        "cli/__init__.py": "import rich\nfrom stentor import App, sinks",
        "sinks/__init__.py": "import stentor.app",
    }
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert list(violations(tmp_path)) == []
    (tmp_path / file).write_text(text)
    [found] = violations(tmp_path)
    assert complaint in found


def test_files_stay_readable() -> None:
    lengths = {path.relative_to(SOURCE): path.read_bytes().count(b"\n") for path in modules(SOURCE).values()}
    assert {str(path): lines for path, lines in lengths.items() if lines > LINES_OF_A_FILE} == {}
    suite = Path("testing", "conformance")  # tests that ship with the package, and grow with the contract
    brokers = sum(lines for path, lines in lengths.items() if path.parts[0] == "brokers")
    adapters = sum(lines for path, lines in lengths.items() if path.parts[0] in ADAPTERS)
    commands = {Path("cli", f"{name}.py") for name in COMMANDS_OF_TOOLS}
    tools = sum(lines for path, lines in lengths.items() if path.parts[0] in TOOLS or path in commands)
    others = sum(lines for path, lines in lengths.items() if suite not in path.parents) - brokers - adapters - tools
    assert brokers <= LINES_OF_BROKERS
    assert adapters <= LINES_OF_ADAPTERS
    assert tools <= LINES_OF_TOOLS
    assert others <= LINES_IN_ALL


def test_importing_stentor_is_light() -> None:
    program = "import sys; before = set(sys.modules); import stentor; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "stentor" in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []
