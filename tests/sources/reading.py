"""What tests of sources share: a reader process that can be killed, and what it published in the end."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from stentor import App, Event


class Line(Event, topic="lines", type="com.example.line"):
    n: int


PROGRAM = """
from stentor import App
from tests.sources.reading import Line
from {module} import {name}

app = App("reading", broker={url!r})
app.add({name}({arguments}))
app.run()
"""


class Reader:
    """A process that runs an app with one source, on a file."""

    def __init__(self, folder: Path, module: str, name: str, arguments: str) -> None:
        self.path = folder / "events.db"
        url = f"sqlite:///{self.path}?lease=1&beat=0.25"
        self._program = PROGRAM.format(module=module, name=name, arguments=arguments, url=url)
        self._log = folder / "reader.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self._log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", self._program], cwd=Path(__file__).parents[2], stderr=output,
                stdout=output,
            )  # fmt: skip

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stored(self) -> list[int]:
        """The numbers of all lines in the file, in their order."""
        with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(self.path)) as file:
            rows = file.execute("SELECT body FROM stentor_event WHERE type = 'com.example.line' ORDER BY seq")
            return [msgspec.json.decode(body, type=Line).n for (body,) in rows]
        return []

    async def published(self, count: int, patience: float = 60.0) -> list[int]:
        """``stored``, as soon as ``count`` different numbers are there."""
        deadline = time.monotonic() + patience
        while len(set(found := self.stored())) < count:
            if time.monotonic() > deadline:
                missing = sorted(set(range(count)) - set(found))
                raise AssertionError(f"{len(missing)} are missing: {missing[:20]}\n{self._log.read_text()[-3000:]}")
            await asyncio.sleep(0.1)
        return found


async def events_of(app: App, *types: type[Any], count: int, patience: float = 30.0) -> list[Any]:
    """Run an app until ``count`` events of these types were published."""
    found: list[Any] = []
    enough = asyncio.Event()

    async def collect(event: Any) -> None:
        found.append(event)
        if len(found) >= count:
            enough.set()

    for cls in types:
        app.on(cls, group=f"collect-{cls.__name__}")(collect)
    async with app, asyncio.timeout(patience):
        await enough.wait()
    return found


@contextlib.asynccontextmanager
async def running(
    takes: tuple[type[Any], ...], *sources: Any, url: str = "memory://", app: App | None = None
) -> AsyncIterator[list[Any]]:
    """The events of some types that sources make, as they come; an app of its own unless one is given."""
    found: list[Any] = []
    app = app or App("reading", broker=url)
    for source in sources:
        app.add(source)

    @app.on(*takes)
    async def collect(event: Any) -> None:
        found.append(event)

    async with app:
        yield found


async def until(ready: Callable[[], Any], patience: float = 60.0) -> None:
    async with asyncio.timeout(patience):
        while not ready():
            await asyncio.sleep(0.01)
