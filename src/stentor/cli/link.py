"""What a supervisor and its workers say to each other: questions and answers, a line of JSON each, over a socket.

A supervisor asks a worker whether it is "ready" (the answer comes when it is), for its "figures" and for the "lag"; a
worker asks for the figures of the "others".
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

log = logging.getLogger("stentor.run")
LINE = 64 * 1024 * 1024
"""Bytes of an answer, at most."""


class Link:
    """One end of the socket; ``answers`` has what the other end may ask, ``ended`` is called when it is gone."""

    def __init__(
        self, answers: Mapping[str, Callable[[], Awaitable[Any]]], ended: Callable[[], None] = lambda: None
    ) -> None:
        self._answers = answers
        self._ended = ended
        self._asked: dict[str, tuple[float, asyncio.Future[Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, own: socket.socket) -> None:
        """Use a connected socket, which is closed with the link."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=own, limit=LINE)
        self._start(self._listen())

    async def ask(self, what: str, patience: float | None = None) -> Any:
        """The answer; None when there is none within ``patience`` seconds, or no other end.

        Who has not answered yet is not asked again, and not waited for once the patience is over.
        """
        loop = asyncio.get_running_loop()
        if what not in self._asked:
            if self._writer.is_closing():
                return None
            self._asked[what] = loop.time(), loop.create_future()
            self._send("ask", what)
        since, answer = self._asked[what]
        left = None if patience is None else max(0.0, since + patience - loop.time())
        await asyncio.wait([answer], timeout=left)
        return answer.result() if answer.done() else None

    def close(self) -> None:
        """Close the socket; the other end reads that."""
        for task in self._tasks:
            task.cancel()
        self._writer.close()
        self._unanswered()

    def _send(self, verb: str, what: str, value: Any = None) -> None:
        self._writer.write(msgspec.json.encode([verb, what, value]) + b"\n")

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                verb, what, value = msgspec.json.decode(line)
                if verb == "ask":
                    self._start(self._answer(what))
                elif what in self._asked:
                    self._asked.pop(what)[1].set_result(value)
        except (OSError, ValueError):  # a reset, or half a line of one that was killed: it is gone as well
            pass
        self._writer.close()
        self._unanswered()
        self._ended()

    async def _answer(self, what: str) -> None:
        try:
            value = await self._answers[what]()
        except Exception:
            log.exception("no answer to %r", what)
            value = None
        self._send("answer", what, value)

    def _unanswered(self) -> None:
        for _, answer in self._asked.values():
            if not answer.done():
                answer.set_result(None)
        self._asked.clear()
