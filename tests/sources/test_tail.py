"""`Tail`: exactly the lines that were written, over rotation, truncation and the death of the reader."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from stentor import App, Event
from stentor.sources import tail
from stentor.testing.conformance.stage import until
from tests.sources.reading import Reader

LINES = 10_000
WRITER = """
import itertools, os, random, shutil, sys, time
path, count, ways = sys.argv[1], int(sys.argv[2]), sys.argv[3]
chance = random.Random(1)
log = open(path, "ab", buffering=0)
rotate_at = 200

def shift():
    last = max((n for n in range(1, 100) if os.path.exists(f"{path}.{n}")), default=0)
    for n in range(last, 0, -1):
        os.rename(f"{path}.{n}", f"{path}.{n + 1}")

for n in range(1, count):
    line = b'{"n": %d, "pad": "%s"}\\n' % (n, b"x" * chance.randrange(80))
    cut = chance.randrange(len(line)) if chance.random() < 0.05 else 0
    if cut:  # half a line is there for a moment
        log.write(line[:cut])
        time.sleep(0.0005)
    log.write(line[cut:])
    if n == rotate_at:
        rotate_at += chance.randrange(20, 1500)
        shift()
        if chance.choice(ways.split()) == "copy":
            shutil.copyfile(path, f"{path}.1")
            os.truncate(path, 0)
        else:
            os.rename(path, f"{path}.1")
            log.close()
            log = open(path, "ab", buffering=0)
    if n % 50 == 0:
        time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ways", ["rename", "copy", "rename copy"])
async def test_exactly_the_lines_written_over_rotation_under_load_and_kills_of_the_reader(
    tmp_path: Path, ways: str
) -> None:
    path = tmp_path / "log" / "shop.log"
    path.parent.mkdir()
    arguments = f"{str(path)!r}, to=Line, format='jsonl', every='20ms', linger='200ms'"
    reader = Reader(tmp_path, "stentor.sources.tail", "Tail", arguments)
    path.write_text('{"n": 0}\n')
    reader.start()
    assert await reader.published(1) == [0]  # else what is rotated before its first start would not be read
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(LINES), ways])  # noqa: ASYNC220
    try:
        while writer.poll() is None:
            await asyncio.sleep(1.0)
            reader.kill()
            reader.start()
        assert writer.returncode == 0
        await reader.published(LINES)
        await asyncio.sleep(0.5)  # one that comes twice would come behind the last
    finally:
        writer.kill()
        writer.wait()
        reader.kill()
    assert len(list(path.parent.iterdir())) > 10, "it was not rotated"
    assert reader.stored() == list(range(LINES))


class Line(Event, topic="lines", key=None, type="test.tail.line"):
    n: int


async def test_a_log_that_is_renamed_just_when_the_reader_comes_back_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of the files and the opening of one, a name may have come to stand for another file."""
    path = tmp_path / "shop.log"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(10)))
    app = App("reader", broker=f"sqlite:///{tmp_path}/events.db")
    app.publishes(Line)
    app.add(tail.Tail(path, to=Line, format="jsonl", every="10ms", linger="50ms"))

    async def read() -> list[bytes]:
        return [message.data async for _, message in app.broker.browse("lines", "earliest", follow=False)]

    async def are(count: int) -> bool:
        return len(await read()) >= count

    async with app:
        await until(lambda: are(10))
    opened = tail._open

    def renamed_before(at: Path, inode: int) -> BinaryIO | None:
        rotated = tmp_path / "shop.log.1"
        if not rotated.exists():
            path.rename(rotated)
            path.write_text('{"n": 10}\n{"n": 11}\n')
        return opened(at, inode)

    monkeypatch.setattr(tail, "_open", renamed_before)
    async with app:
        await until(lambda: are(12))
        assert await read() == [b'{"n":%d}' % n for n in range(12)]
