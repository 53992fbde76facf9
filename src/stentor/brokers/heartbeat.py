"""The lease of a process, renewed by a thread of its own, so that a busy event loop loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from stentor.message import new_id

log = logging.getLogger("stentor.broker")


class Heart(Protocol):
    """A connection that renews leases; used in one thread. Any exception means that it is made anew."""

    def beat(self, name: str, value: bytes, lease: float) -> None:
        """Keep ``name`` alive, saying ``value``, for ``lease`` seconds from now."""
        ...

    def end(self, name: str) -> None:
        """Give the lease up."""
        ...

    def close(self) -> None: ...


def members_of(leases: dict[str, bytes]) -> dict[str, str]:
    """The group of every member alive."""
    return {name: group for value in leases.values() for name, group in msgspec.msgpack.decode(value).items()}


class Heartbeat:
    """One lease for all members of this process; its value says which member is of which group."""

    def __init__(self, heart: Callable[[], Heart], lease: float, beat: float) -> None:
        self.name = new_id()
        self.members: dict[str, str] = {}
        """By the name of a member: the id of its group."""
        self.lapses = 0
        """How often the lease had run out before it was renewed: others may have taken what was owned."""
        self._beaten = time.monotonic()
        self._heart = heart
        self._lease = lease
        self._beat = beat
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Event()
        self._ending = False
        self._lock = threading.Lock()
        self._waiting: list[asyncio.Future[None]] = []
        self._thread = threading.Thread(target=self._run, name="stentor heartbeat", daemon=True)
        self._thread.start()

    @property
    def until(self) -> float:
        """By ``time.monotonic``: when the lease runs out, as far as this process can tell."""
        return self._beaten + self._lease

    async def now(self) -> None:
        """Beat at once; back when it is done."""
        future: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            self._waiting.append(future)
        self._wake.set()
        await future

    async def stop(self) -> None:
        self._ending = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, 10)
        self._told(self._waiting)

    @staticmethod
    def _told(waiting: list[asyncio.Future[None]]) -> None:
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _run(self) -> None:
        heart: Heart | None = None
        while not self._ending:
            with self._lock:
                waiting = list(self._waiting)
            try:
                if heart is None:
                    heart = self._heart()
                began = time.monotonic()
                heart.beat(self.name, msgspec.msgpack.encode(dict(self.members)), self._lease)
                self.lapses += began - self._beaten > self._lease
                self._beaten = began
                if waiting:
                    with self._lock:
                        del self._waiting[: len(waiting)]
                    with contextlib.suppress(RuntimeError):  # the loop has ended
                        self._loop.call_soon_threadsafe(self._told, waiting)
                pause = self._beat
            except Exception as error:
                log.debug("the heartbeat failed: %s", error)
                if heart is not None:
                    with contextlib.suppress(Exception):
                        heart.close()
                heart = None
                pause = min(self._beat, 0.5)
            self._wake.wait(pause)
            self._wake.clear()
        if heart is not None:
            with contextlib.suppress(Exception):
                heart.end(self.name)
            with contextlib.suppress(Exception):
                heart.close()
