"""What an idle worker with four handlers holds in memory, and how long imports take; each in a fresh interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.measure import Bar, Case, Figures, Results, Row, fresh, resident

STARTED = 3.0
"""Seconds after which a worker has started and is idle."""

_IMPORT = """\
import importlib.util, sys, time
if importlib.util.find_spec({module!r}) is None:
    sys.exit(3)
start = time.perf_counter()
import {module}
print((time.perf_counter() - start) * 1000, len(sys.modules))
"""


def imported(module: str, _: Path) -> Figures:
    """Milliseconds of one import, byte code and file cache warm, and the modules that are loaded after it."""
    command = [sys.executable, "-c", _IMPORT.format(module=module)]
    subprocess.run(command, capture_output=True, check=False)  # it may have to write byte code
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        raise ModuleNotFoundError(f"no module {module}", name=module)
    done.check_returncode()
    taken, modules = done.stdout.split()
    return {"import": float(taken), "modules": float(modules)}


def _running(command: list[str]) -> Figures:
    """The resident memory of a program once it idles; it is asked to stop afterwards."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(STARTED)
        if process.poll() is not None:
            assert process.stderr is not None
            raise RuntimeError(f"it ended: {process.stderr.read().strip().splitlines()[-1:]}")
        memory = resident(process.pid)
        os.kill(process.pid, signal.SIGTERM)
    return {"memory": memory}


def interpreter(_: Path) -> Figures:
    """An interpreter with asyncio and sqlite3, idle: what is there before any framework."""
    return _running([sys.executable, "-c", "import asyncio, sqlite3; asyncio.run(asyncio.sleep(60))"])


def worker(folder: Path) -> Figures:
    broker = f"sqlite:///{fresh(folder, 'idle.db').absolute()}"
    return _running([sys.executable, "-m", "stentor", "run", "benchmarks.idle:app", "--broker", broker])


def bars(results: Results) -> list[Bar]:
    return [
        Bar("MiB, idle worker with 4 handlers", results.values("Stentor, running", "memory"), 45, at_least=False),
        Bar("ms, import stentor", results.values("import stentor", "import"), 100, at_least=False),
    ]


ROW = Row(
    name="footprint",
    title="memory of an idle worker with 4 handlers on sqlite, and imports",
    cases=[
        Case("bare interpreter", interpreter, note="asyncio and sqlite3, idle"),
        Case("Stentor, running", worker, note="stentor run"),
        Case("import asyncio", partial(imported, "asyncio"), note="for scale"),
        Case("import stentor", partial(imported, "stentor")),
        Case("import faststream", partial(imported, "faststream"), "faststream[nats]"),
        Case("import taskiq", partial(imported, "taskiq"), "taskiq"),
        Case("import huey", partial(imported, "huey"), "huey"),
        Case("import bubus", partial(imported, "bubus"), "bubus"),
    ],
    columns={"memory": "RSS MiB", "import": "import ms", "modules": "modules"},
    base="bare interpreter",
    bars=bars,
)
