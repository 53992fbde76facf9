"""Several processes that run one app: started, watched, restarted and stopped together, and as many as are needed.

The first worker declares topics and groups; the others start when it is ready. Each holds one end of a socket, where
it is asked for its figures (``link.py``); a worker whose supervisor dies reads the end of it and stops in order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from stentor.cli.exits import BROKER, DEFINITION, FAILED, INTERRUPTED, USAGE
from stentor.cli.link import Link
from stentor.cli.watch import changed_files
from stentor.clock import seconds
from stentor.message import Lag
from stentor.scaling.need import Look, Scale, look, need

if TYPE_CHECKING:
    from stentor.cli.run import Bounds, Options

log = logging.getLogger("stentor.run")
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
SETTLED = 10.0
"""A worker that ran so long starts again at once when it dies."""
BEYOND_GRACE = 15.0
"""What a worker may need after its grace period, to settle and close."""


LOOK = 2.0
"""Seconds between two looks at what the workers measure."""
QUICK = 0.5
"""Seconds that a worker has to answer a reader of figures, who does not wait long."""
SLOW = 5.0
"""... and the supervisor itself, which changes nothing in a hurry."""


class _Worker:
    """A place for a process, and what runs there now."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: asyncio.subprocess.Process | None = None
        self.link: Link | None = None
        self.ready = False
        self.leave = asyncio.Event()

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            try:
                self.process.send_signal(number)
            except ProcessLookupError:
                return

    async def ask(self, what: str, patience: float) -> Any:
        return None if self.link is None else await self.link.ask(what, patience)


class Supervisor:
    """Keeps worker processes running until it is told to stop: ``bounds.least``, or with ``scale`` as many as it says.

    ``lag``: seconds that an event may wait before more workers are needed.
    """

    def __init__(
        self,
        target: str,
        options: Options,
        bounds: Bounds,
        logging_options: list[str],
        *,
        reload: bool,
        scale: Scale | None = None,
        lag: float = 0.0,
    ) -> None:
        self._target = target
        self._options = options
        self._bounds = bounds
        self._logging = logging_options
        self._reload = reload
        self._scale = scale
        self._lag = lag
        self._grace = seconds(options.grace) + BEYOND_GRACE
        self._workers: dict[int, _Worker] = {}
        self._keepers: asyncio.TaskGroup
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._codes: list[int] = []

    async def run(self) -> int:
        """Run until a signal, or until the app proves unable to start; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked)
        plural = "s" if self._bounds.most > 1 else ""
        log.info("supervising %s worker%s, pid %d", self._bounds, plural, os.getpid())
        watch = asyncio.create_task(self._watch()) if self._reload else None
        try:
            async with asyncio.TaskGroup() as self._keepers:
                self._resize(self._bounds.least)
                if self._scale is not None:
                    self._keepers.create_task(self._follow(self._scale))
        finally:
            if watch is not None:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
        return max(self._codes, default=0)

    def _asked(self) -> None:
        if self._stopping.is_set():
            for worker in self._workers.values():
                worker.signal(signal.SIGKILL)
            os._exit(INTERRUPTED)
        self._stopping.set()
        self._terminate()

    def _terminate(self) -> None:
        for worker in self._workers.values():
            worker.signal(signal.SIGTERM)

    # ---- how many -------------------------------------------------------------------------------------------------

    def _staying(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if not worker.leave.is_set()]

    def _resize(self, count: int) -> None:
        """Have so many workers: start some, or ask those that came last to stop in order."""
        for index in range(1, count + len(self._workers) + 1):
            if len(self._staying()) < count and index not in self._workers:
                worker = self._workers[index] = _Worker(index)
                self._keepers.create_task(self._keep(worker))
        for worker in sorted(self._staying(), key=lambda worker: worker.index)[count:]:
            worker.leave.set()
            worker.signal(signal.SIGTERM)

    async def _follow(self, scale: Scale) -> None:
        """Look every few seconds at what the workers measure, and change their number when it is time."""
        before: Look | None = None
        while not self._stopping.is_set():
            await self._first(self._stopping, timeout=LOOK)
            after = await self._look()
            if before is not None and after is not None and not self._stopping.is_set():
                count, why = scale.look(need(before, after, self._lag), after.workers)
                if count != after.workers:
                    log.info("from %d to %d worker%s: %s", after.workers, count, "s" if count > 1 else "", why)
                    self._resize(count)
                    after = None  # what comes or goes is no measure
            before = after

    async def _look(self) -> Look | None:
        """What all workers measured until now; None while one of them starts."""
        staying = self._staying()
        if not all(worker.ready for worker in staying):
            return None
        told = await asyncio.gather(*(worker.ask("figures", SLOW) for worker in self._workers.values()))
        moment = time.monotonic()
        figures = [one for one in told if one]
        known = {one["worker"] for one in figures}
        silent = sum(worker.index not in known for worker in staying)
        lags = None
        for worker in staying:  # all of them would tell the same
            if worker.index in known:
                lags = await worker.ask("lag", SLOW)
                break
        return look(moment, figures, msgspec.convert(lags or [], list[Lag]), len(staying), silent)

    async def _others(self, asker: _Worker) -> list[dict[str, Any]]:
        """What the other workers tell, for a reader of the figures of all."""

        async def one(worker: _Worker) -> dict[str, Any]:
            figures = await worker.ask("figures", QUICK) if worker.ready else None
            state = "starting" if not worker.ready else "silent" if figures is None else "ready"
            return {
                "worker": worker.index, "state": "stopping" if worker.leave.is_set() else state, "figures": figures
            }  # fmt: skip

        return await asyncio.gather(*(one(worker) for worker in self._workers.values() if worker is not asker))

    # ---- one worker -----------------------------------------------------------------------------------------------

    async def _keep(self, worker: _Worker) -> None:
        """Run a worker, again and again, until it shall leave."""
        if worker.index > 1:
            await self._first(self._ready, self._stopping)
        wait = FIRST_WAIT
        while not self._stopping.is_set() and not worker.leave.is_set():
            self._changed.clear()
            began = time.monotonic()
            code = await self._once(worker)
            if self._stopping.is_set():
                self._codes.append(FAILED if code < 0 else code)
            elif worker.leave.is_set():
                log.info("worker %d has left", worker.index)
            elif self._changed.is_set():
                continue
            elif self._reload:
                log.warning("worker %d ended with %s; it starts again when a file changes", worker.index, _ending(code))
                await self._first(self._changed, self._stopping, worker.leave)
            elif code in (USAGE, DEFINITION, BROKER) and not self._ready.is_set():
                self._codes.append(code)  # it would fail in the same way again
                self._stopping.set()
            else:
                wait = FIRST_WAIT if time.monotonic() - began > SETTLED else wait
                log.error("worker %d ended with %s; again in %.3g s", worker.index, _ending(code), wait)
                await self._first(self._stopping, worker.leave, timeout=wait)
                wait = min(wait * 2, LONGEST_WAIT)
        self._workers.pop(worker.index)

    async def _once(self, worker: _Worker) -> int:
        """Start a process and wait for its end; returns its exit code, negative for a signal."""
        ours, theirs = socket.socketpair()
        with theirs:
            worker.process = process = await asyncio.create_subprocess_exec(
                *self._command(worker.index, theirs.fileno()), pass_fds=(theirs.fileno(),), start_new_session=True
            )
        link = Link({"others": partial(self._others, worker)})
        await link.open(ours)
        worker.link = link
        if self._stopping.is_set() or worker.leave.is_set():
            worker.signal(signal.SIGTERM)
        starting = asyncio.create_task(self._await_ready(worker, link))
        ended = asyncio.create_task(process.wait())
        try:
            await self._first(self._stopping, worker.leave, also=ended)
            if not ended.done():
                done, _ = await asyncio.wait([ended], timeout=self._grace)
                if not done:
                    log.error("worker %d did not stop within its grace period; killing it", worker.index)
                    worker.signal(signal.SIGKILL)
            return await ended
        finally:
            worker.ready, worker.link = False, None
            starting.cancel()
            link.close()

    async def _await_ready(self, worker: _Worker, link: Link) -> None:
        if await link.ask("ready"):
            worker.ready = True
            self._ready.set()

    @staticmethod
    async def _first(
        *events: asyncio.Event, also: asyncio.Task[int] | None = None, timeout: float | None = None
    ) -> None:
        """Wait for the first of several events (or a task, which goes on)."""
        waits: list[asyncio.Task[object]] = [asyncio.create_task(event.wait()) for event in events]
        everything: list[asyncio.Task[object]] = [*waits, *([also] if also is not None else [])]
        await asyncio.wait(everything, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _command(self, index: int, link: int) -> list[str]:
        given = self._options
        command = [sys.executable, "-m", "stentor", "run", self._target, "--grace", given.grace, *self._logging]
        command += ["--broker", given.url] if given.url else []
        for name in given.only:
            command += ["--only", name]
        for name in given.skip:
            command += ["--except", name]
        if given.new_groups:
            command.append("--new-groups")
        if given.http and index == 1:
            command += ["--http", given.http]
        if self._bounds.most > 1:
            command += ["--worker", str(index)]
        return [*command, "--supervised", str(link)]

    # ---- reload ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        async for files in changed_files():
            shown = ", ".join(sorted(files)[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
            log.info("%s changed: starting again", shown)
            self._changed.set()
            self._terminate()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
