"""What a supervisor and a worker ask each other, over a real socket."""

import asyncio
import socket
from typing import Any

from stentor.cli.link import Link


async def test_who_does_not_answer_is_asked_once_and_waited_for_once() -> None:
    asked = 0
    go = asyncio.Event()

    async def figures() -> str:
        nonlocal asked
        asked += 1
        await go.wait()
        return "1" * 1_000_000

    async def broken() -> Any:
        raise ZeroDivisionError

    ours, theirs = socket.socketpair()
    here, there = Link({}), Link({"figures": figures, "broken": broken})
    await here.open(ours)
    await there.open(theirs)
    assert await here.ask("figures", 0.2) is None
    assert await here.ask("figures", 0.0) is None
    assert await here.ask("broken", 20.0) is None
    assert asked == 1
    late = asyncio.create_task(here.ask("figures"))
    go.set()
    assert len(await late) == 1_000_000
    assert len(await here.ask("figures", 20.0)) == 1_000_000
    assert asked == 2
    here.close()
    there.close()


async def test_the_end_of_the_other_is_an_answer_as_well() -> None:
    ours, theirs = socket.socketpair()
    ended = asyncio.Event()
    link = Link({}, ended.set)
    await link.open(ours)
    waiting = asyncio.create_task(link.ask("ready"))
    await asyncio.sleep(0)
    theirs.send(b'["answer", "rea')  # it is killed as it writes
    theirs.close()
    assert await waiting is None
    await asyncio.wait_for(ended.wait(), 60)
    assert await link.ask("ready") is None
    link.close()
