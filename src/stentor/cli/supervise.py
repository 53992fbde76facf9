"""Several processes that run one app: started, watched, restarted and stopped together.

The first worker declares topics and groups; the others start when it is ready. Each holds one end of a socket: it says
"ready" there, and a worker whose supervisor dies reads the end of it and stops in order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from stentor.cli.exits import BROKER, DEFINITION, FAILED, INTERRUPTED, USAGE
from stentor.cli.watch import changed_files
from stentor.clock import seconds

if TYPE_CHECKING:
    from stentor.cli.run import Options

log = logging.getLogger("stentor.run")
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
SETTLED = 10.0
"""A worker that ran so long starts again at once when it dies."""
BEYOND_GRACE = 15.0
"""What a worker may need after its grace period, to settle and close."""


class Supervisor:
    """Keeps ``count`` worker processes running until it is told to stop."""

    def __init__(self, target: str, options: Options, count: int, logging_options: list[str], *, reload: bool) -> None:
        self._target = target
        self._options = options
        self._count = count
        self._logging = logging_options
        self._reload = reload
        self._grace = seconds(options.grace) + BEYOND_GRACE
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._codes: list[int] = []

    async def run(self) -> int:
        """Run until a signal, or until the app proves unable to start; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked)
        log.info("supervising %d worker%s, pid %d", self._count, "s" if self._count > 1 else "", os.getpid())
        watch = asyncio.create_task(self._watch()) if self._reload else None
        keepers = [asyncio.create_task(self._keep(index)) for index in range(1, self._count + 1)]
        try:
            await asyncio.gather(*keepers)
        finally:
            if watch is not None:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
        return max(self._codes, default=0)

    def _asked(self) -> None:
        if self._stopping.is_set():
            for process in self._processes.values():
                self._signal(process, signal.SIGKILL)
            os._exit(INTERRUPTED)
        self._stopping.set()
        self._terminate()

    def _terminate(self) -> None:
        for process in self._processes.values():
            self._signal(process, signal.SIGTERM)

    @staticmethod
    def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
        if process.returncode is None:
            try:
                process.send_signal(number)
            except ProcessLookupError:
                return

    # ---- one worker -----------------------------------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        """Run worker ``index``, again and again."""
        if index > 1:
            await self._first(self._ready, self._stopping)
        wait = FIRST_WAIT
        while not self._stopping.is_set():
            self._changed.clear()
            began = time.monotonic()
            code = await self._once(index)
            if self._stopping.is_set():
                self._codes.append(FAILED if code < 0 else code)
                return
            if self._changed.is_set():
                continue
            if self._reload:
                log.warning("worker %d ended with %s; it starts again when a file changes", index, _ending(code))
                await self._first(self._changed, self._stopping)
                continue
            if code in (USAGE, DEFINITION, BROKER) and not self._ready.is_set():
                self._codes.append(code)  # it would fail in the same way again
                self._stopping.set()
                return
            wait = FIRST_WAIT if time.monotonic() - began > SETTLED else wait
            log.error("worker %d ended with %s; again in %.3g s", index, _ending(code), wait)
            await self._first(self._stopping, timeout=wait)
            wait = min(wait * 2, LONGEST_WAIT)

    async def _once(self, index: int) -> int:
        """Start a worker and wait for its end; returns its exit code, negative for a signal."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *self._command(index, theirs.fileno()), pass_fds=(theirs.fileno(),), start_new_session=True
                )
            self._processes[index] = process
            if self._stopping.is_set():
                self._signal(process, signal.SIGTERM)
            ours.setblocking(False)
            listening = asyncio.create_task(self._listen(ours))
            ended = asyncio.create_task(process.wait())
            try:
                await self._first(self._stopping, also=ended)
                if not ended.done():
                    done, _ = await asyncio.wait([ended], timeout=self._grace)
                    if not done:
                        log.error("worker %d did not stop within its grace period; killing it", index)
                        self._signal(process, signal.SIGKILL)
                return await ended
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
                self._processes.pop(index, None)

    async def _listen(self, link: socket.socket) -> None:
        if await asyncio.get_running_loop().sock_recv(link, 64):
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
        if self._count > 1:
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
