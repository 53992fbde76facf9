"""A project folder with a small app, and the command line run in it as people run it: in processes of their own."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import stentor

SOURCE = str(Path(stentor.__file__).parents[1])
PATIENCE = 120.0
SHOP = """
import os
from stentor import App, Context, Event, Retry

class Ordered(Event, topic="orders", key="customer", type="shop.ordered"):
    customer: str
    number: int

class Paid(Event, topic="payments", key="customer", type="shop.paid"):
    customer: str
    number: int

app = App("shop")

@app.on(Ordered, retry=Retry(attempts=2, first="20ms"))
async def charge(order: Ordered, ctx: Context) -> Paid:
    if order.customer == "dora" and not os.path.exists("mended"):
        raise ConnectionError(f"no bank for order {order.number}")
    ctx.log.info("charged %s %d", order.customer, order.number)
    return Paid(customer=order.customer, number=order.number)
"""


class Stentor:
    """The command ``stentor`` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("STENTOR", "PYTEST"))}
        self.environment = {**kept, "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80"}
        self.running: list[Running] = []

    def __call__(self, *args: str, code: int = 0, stdin: str = "") -> str:
        """Run a command to its end; its standard output, or for a failing one what it complains of."""
        done = subprocess.run(
            [sys.executable, "-m", "stentor", *args], cwd=self.folder, env=self.environment, input=stdin,
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stderr if code else done.stdout

    def json(self, *args: str) -> list[Any]:
        """What a command prints with --json."""
        return [json.loads(line) for line in self(*args, "--json").splitlines()]

    def start(self, *args: str) -> "Running":
        """Start a command that goes on."""
        process = Running([sys.executable, "-m", "stentor", *args], self.folder, self.environment)
        self.running.append(process)
        return process


class Running:
    """A command that goes on; what it says is read as it comes."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._coming: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._coming.put(line.rstrip("\n"))
        self._coming.put(None)

    def until(self, text: str) -> str:
        """The next line that holds a text."""
        while True:
            try:
                line = self._coming.get(timeout=PATIENCE)
            except queue.Empty:
                raise AssertionError(f"no {text!r} within {PATIENCE:g} s, but\n" + "\n".join(self.lines)) from None
            if line is None:
                raise AssertionError(f"it ended without {text!r}:\n" + "\n".join(self.lines))
            self.lines.append(line)
            if text in line:
                return line

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for the end; the exit code."""
        while (line := self._coming.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Stentor]:
    """The command line in an empty folder."""
    made = Stentor(tmp_path)
    yield made
    for process in made.running:
        process.close()


@pytest.fixture
def shop(command: Stentor) -> Stentor:
    """The command line in a folder with shop.py."""
    (command.folder / "shop.py").write_text(SHOP)
    return command


@pytest.fixture
def handled(shop: Stentor) -> Callable[..., None]:
    """Publish orders and let a worker handle them, until nothing is left to do."""

    def handle(*orders: tuple[str, int]) -> None:
        lines = "\n".join(json.dumps({"customer": customer, "number": number}) for customer, number in orders)
        shop("publish", "shop", "shop.ordered", "-", stdin=lines)
        worker = shop.start("run", "shop")
        worker.until("ready")
        while any(lag["events"] + lag["parked"] for lag in shop.json("lag")):
            pass
        worker.send(signal.SIGTERM)
        assert worker.end() == 0

    return handle
