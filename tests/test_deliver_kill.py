"""Two services in two processes: the one that receives is killed while events come."""

import asyncio
import random
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from stentor import App, Event, Outgoing, Retry

EVENTS, KEYS, KILLS = 2000, 20, 3
PROGRAM = """
import os
from stentor import App, Event, Message

class Counted(Event, topic="counted", key="key", type="com.test.counted"):
    key: str
    number: int

folder = os.path.dirname(__file__)
flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
arrived, handled = (os.open(f"{folder}/{name}", flags) for name in ("arrived", "handled"))
app = App("billing", broker=f"sqlite:///{folder}/billing.db")

@app.on(Counted)
async def book(event: Counted, message: Message) -> None:
    os.write(handled, f"{event.key} {event.number} {message.id}\\n".encode())

async def asgi(scope, receive, send):
    if scope["type"] == "http" and scope["method"] == "POST":
        headers = dict(scope["headers"])
        os.write(arrived, b"%s %s %s\\n" % (headers[b"ce-partitionkey"], headers[b"ce-subject"], headers[b"ce-id"]))
    await app.asgi(scope, receive, send)
"""


class Counted(Event, topic="counted", key="key", type="com.test.counted"):
    key: str
    number: int


class Service:
    """The receiving service, as a process on a port that stays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "billing.py").write_text(PROGRAM)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        root = str(Path(__file__).parents[1])
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "uvicorn", "billing:asgi", "--port", str(self.port), "--app-dir", str(self.folder)),
            *("--log-level", "error"), cwd=root, env={"PYTHONPATH": f"{root}:{root}/src", "PATH": ""},
        )  # fmt: skip

    async def kill(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        await self.process.wait()

    def lines(self, name: str) -> list[tuple[str, int, str]]:
        """Key, number and id of what arrived or was handled."""
        file = self.folder / name
        if not file.exists():
            return []
        return [(key, int(number), id) for key, number, id in map(str.split, file.read_text().splitlines())]

    async def reached(self, count: int) -> None:
        async with asyncio.timeout(100):
            while len({id for _, _, id in self.lines("handled")}) < count:
                await asyncio.sleep(0.05)


@asynccontextmanager
async def service(folder: Path) -> AsyncIterator[Service]:
    found = Service(folder)
    await found.start()
    try:
        yield found
    finally:
        await found.kill(signal.SIGTERM)


@pytest.mark.slow
async def test_the_receiver_is_killed_under_load(tmp_path: Path) -> None:
    async with service(tmp_path) as billing:
        app = App("shop", broker=f"sqlite:///{tmp_path}/shop.db")
        app.deliver(
            Counted, to=f"http://127.0.0.1:{billing.port}/events", retry=Retry(attempts=20, first="50ms"), timeout="5s"
        )
        async with app:
            counts: dict[str, int] = defaultdict(int)
            published: dict[str, tuple[str, int]] = {}
            for kill in range(KILLS + 1):
                events = []
                for _ in range(EVENTS // (KILLS + 1)):
                    key = f"k-{random.randrange(KEYS)}"
                    events.append((key, counts[key]))
                    counts[key] += 1
                receipts = await app.publish(
                    [Outgoing(Counted(key=key, number=number), subject=str(number)) for key, number in events]
                )
                published |= {receipt.id: event for receipt, event in zip(receipts, events, strict=True)}
                if kill < KILLS:
                    await billing.reached(EVENTS // (KILLS + 1) * kill + 50)
                    await billing.kill(signal.SIGKILL)
                    await billing.start()
            await billing.reached(EVENTS)
            assert app.program is not None
            assert app.program.workers[0].counts.dead == 0
    arrived, handled = billing.lines("arrived"), billing.lines("handled")
    assert {id: (key, number) for key, number, id in handled} == published  # nothing lost, no other id
    assert all(published[id] == (key, number) for key, number, id in arrived)  # repeats have the ids of the first
    for lines in (arrived, handled):
        for key, count in counts.items():
            numbers = [number for k, number, _ in lines if k == key]
            assert list(dict.fromkeys(numbers)) == list(range(count))  # in order, by first occurrences
            if lines is arrived:  # what the receiver had handled in its last moments it handles again, from the first
                assert all(later >= earlier for earlier, later in pairwise(numbers))  # never back
    print(f"{len(arrived) - len(published)} arrived again, {len(handled) - len(published)} were handled again")
