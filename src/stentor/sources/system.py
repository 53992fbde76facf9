"""What happens to the host and to this process as events: load, memory, disks, services, out-of-memory kills; the
journal of systemd; signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from stentor.clock import Duration, seconds
from stentor.errors import ConfigError, DefinitionError, Unavailable
from stentor.event import EventLike
from stentor.message import new_id
from stentor.source import Publish, Row
from stentor.sources.rows import Reader, To

BACK = 0.95
"""Part of a threshold below which a value is normal again, so that one at the threshold is not told each time."""
CHUNK = 1024 * 1024
"""Bytes of a journal whose events are published at once."""
VMSTAT = Path("/proc/vmstat")


class Host:
    """Changes of the machine's state: ``Host(to=HostChanged, load=2.0, memory=0.9, disks={"/": 0.9})``.

    Each change is a row ``{"host": ..., "what": "load", "state": "high", "value": 2.4}``; ``what`` and ``state`` are

    - ``load``: high or normal, by the load average of a minute for each core; ``memory``, ``disk PATH``: by the part
      in use, 0 to 1;
    - ``service NAME``: what systemd says of it (active, failed, ...);
    - ``oom``: killed, whenever the kernel has killed processes for want of memory; the value says how many.

    The first look tells what is not normal, and each service's state. One process of those that run the app on a host
    looks, every ``every``.

    Raises:
        ConfigError: psutil is not installed, or services are named and there is no systemctl.
        DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        *,
        to: To,
        load: float | None = None,
        memory: float | None = None,
        disks: Mapping[str, float] | None = None,
        services: Sequence[str] = (),
        oom: bool = True,
        every: Duration = "10s",
        name: str | None = None,
    ) -> None:
        self._host = socket.gethostname()
        self.name = name or re.sub(r"[^\w.-]", "-", f"host-{self._host}")
        what = f"source {self.name}"
        self._reader = Reader(to, what)
        self._every = seconds(every, f"{what}: every")
        try:
            import psutil  # noqa: F401
        except ImportError:
            raise ConfigError(f"{what} needs psutil: pip install 'stentor[system]'") from None
        parts = {"memory": memory, **{f"disk {path}": part for path, part in (disks or {}).items()}}
        for name_, part in parts.items():
            if part is not None and not 0 < part <= 1:
                raise DefinitionError(f"{what}: {name_} is a part in use, above 0 and up to 1, not {part!r}")
        for path in disks or {}:
            if not Path(path).exists():
                raise DefinitionError(f"{what}: there is no {path}")
        if services and shutil.which("systemctl") is None:
            raise ConfigError(f"{what}: there is no systemctl that could tell of services")
        self._limits = {"load": load, **parts}
        self._services = list(services)
        self._oom = oom

    def read(self, row: Row) -> Sequence[EventLike]:
        """The events of a change."""
        return self._reader(row)

    async def run(self, publish: Publish) -> None:
        """Look until it is stopped. Raises Unavailable where systemctl does not answer; then it is run again."""
        known: dict[str, Any] = publish.position or {}
        while True:
            changes, now = await asyncio.to_thread(self._look, known)
            if now != known:
                rows = [Row(new_id(), f"{self._host} {change['what']}", change) for change in changes]
                await publish.rows(rows, position=now)
            known = now
            await asyncio.sleep(self._every)

    def _look(self, known: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What changed, and what is known now: the state of each thing, and how often the kernel has killed."""
        now = dict(known)
        changes = []
        for what, state, value in (*self._levels(known), *self._states()):
            now[what] = state
            if state != known.get(what, "normal"):
                changes.append({"host": self._host, "what": what, "state": state, "value": value})
        kills = _kills() if self._oom else None
        if kills is not None:
            now["oom"] = kills
            more = kills - known.get("oom", kills)
            if more:  # below none: the kernel began to count again
                value = more if more > 0 else kills
                changes.append({"host": self._host, "what": "oom", "state": "killed", "value": value})
        return changes, now

    def _levels(self, known: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
        import psutil

        for what, limit in self._limits.items():
            if limit is None:
                continue
            if what == "load":
                value = psutil.getloadavg()[0] / (psutil.cpu_count() or 1)
            elif what == "memory":
                value = psutil.virtual_memory().percent / 100
            else:
                value = psutil.disk_usage(what.removeprefix("disk ")).percent / 100
            high = value >= limit * (BACK if known.get(what) == "high" else 1.0)
            yield what, "high" if high else "normal", round(value, 3)

    def _states(self) -> list[tuple[str, str, None]]:
        if not self._services:
            return []
        command = ["systemctl", "show", "--property=ActiveState", "--value", "--", *self._services]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"source {self.name}: systemctl: {getattr(error, 'stderr', '') or error}") from None
        states = done.stdout.split()
        return [(f"service {name}", state, None) for name, state in zip(self._services, states, strict=True)]


def _kills() -> int | None:
    """How often the kernel has killed a process for want of memory since it started; None where it does not count."""
    try:
        found = re.search(r"^oom_kill (\d+)$", VMSTAT.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1])


class Journal:
    """Entries of systemd's journal: ``Journal(to=Entry, match=["_SYSTEMD_UNIT=nginx.service", "PRIORITY=3"])``.

    A row holds the entry's fields (``MESSAGE``, ``PRIORITY``, ``_SYSTEMD_UNIT``, ``__REALTIME_TIMESTAMP``, ...) as
    text. ``match`` is as journalctl takes it. It begins with what comes (``start="earliest"``: with all that is kept),
    and goes on behind the last entry whose events were durable.

    Raises:
        ConfigError: there is no journalctl. DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        *,
        to: To,
        match: Sequence[str] = (),
        start: Literal["earliest", "latest"] = "latest",
        namespace: str | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or re.sub(r"[^\w.-]", "-", f"journal-{socket.gethostname()}")
        what = f"source {self.name}"
        self._reader = Reader(to, what)
        if start not in ("earliest", "latest"):
            raise DefinitionError(f'{what}: start must be "earliest" or "latest", not {start!r}')
        if shutil.which("journalctl") is None:
            raise ConfigError(f"{what}: there is no journalctl")
        for text in match:
            if not re.fullmatch(r"[A-Z0-9_]+=.*", text, re.DOTALL):
                raise DefinitionError(f"{what}: {text!r} is no match; write _SYSTEMD_UNIT=nginx.service")
        self._start = start
        self._command = ["journalctl", "--output=json", "--follow", "--all", *match]
        if namespace is not None:
            self._command.insert(1, f"--namespace={namespace}")

    def read(self, row: Row) -> Sequence[EventLike]:
        """The events of an entry."""
        return self._reader(row)

    async def run(self, publish: Publish) -> None:
        """Follow until it is stopped. Raises Unavailable when journalctl ends; then it is run again."""
        place = publish.position
        if place is not None:
            begin = [f"--after-cursor={place}", "--no-tail"]
        else:
            begin = ["--no-tail"] if self._start == "earliest" else ["--lines=0"]
        process = await asyncio.create_subprocess_exec(
            *self._command, *begin, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            rest = b""
            while chunk := await process.stdout.read(CHUNK):
                *lines, rest = (rest + chunk).split(b"\n")
                if lines:
                    rows = [_entry(line) for line in lines]
                    await publish.rows(rows, position=rows[-1].id)
            said = (await process.stderr.read()).decode("utf-8", "replace").strip()
            raise Unavailable(f"source {self.name}: journalctl ended: {said or await process.wait()}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _entry(line: bytes) -> Row:
    """A line of ``journalctl -o json``: a field is text, a list of bytes where it is no UTF-8, or a list of several."""
    fields = {
        name: bytes(value).decode("utf-8", "replace") if isinstance(value, list) and _bytes(value) else value
        for name, value in msgspec.json.decode(line).items()
    }
    return Row(fields["__CURSOR"], f"the journal at {fields['__CURSOR']}", fields)


def _bytes(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(each, int) for each in value)


class Signals:
    """Signals that this process gets: ``Signals("SIGUSR1", "SIGHUP", to=Asked)``.

    A row is ``{"signal": "SIGHUP", "host": ..., "pid": ...}``: each process that runs the app makes events of its own.
    Signals that end a program stay with the program.

    Raises:
        DefinitionError: there is no such signal, or Stentor or Python needs it.
    """

    instances = "each"

    def __init__(self, *names: str, to: To, name: str = "signals") -> None:
        self.name = name
        self._reader = Reader(to, f"source {name}")
        self._signals = []
        for each in names:
            found = getattr(signal.Signals, each, None)
            if found is None or each in ("SIGINT", "SIGTERM", "SIGKILL", "SIGSTOP", "SIGCHLD"):
                raise DefinitionError(
                    f"source {name}: {each!r} is no signal that can be an event; try SIGUSR1 or SIGHUP"
                )
            self._signals.append(found)
        if not names:
            raise DefinitionError(f"source {name}: name the signals")

    def read(self, row: Row) -> Sequence[EventLike]:
        """The events of a signal."""
        return self._reader(row)

    async def run(self, publish: Publish) -> None:
        """Wait for signals until it is stopped. It must run in the main thread's event loop."""
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[signal.Signals] = asyncio.Queue()
        for number in self._signals:
            loop.add_signal_handler(number, came.put_nowait, number)
        host = socket.gethostname()
        try:
            while True:
                value = {"signal": (await came.get()).name, "host": host, "pid": os.getpid()}
                await publish.rows([Row(new_id(), f"{value['signal']} of {value['pid']}", value)])
        finally:
            for number in self._signals:
                loop.remove_signal_handler(number)
