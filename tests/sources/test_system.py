"""The host, its journal and signals as sources: changes are told once, and nothing between two runs is left out."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from stentor import Event
from stentor.errors import ConfigError, DefinitionError
from stentor.sources import system
from stentor.sources.system import Host, Journal, Signals
from tests.sources import reading
from tests.sources.reading import until

JOURNALD = Path("/lib/systemd/systemd-journald")


class HostChanged(Event, topic="hosts", key="host", type="com.example.host"):
    host: str
    what: str
    state: str
    value: float | None = None


class Entry(Event, topic="entries", type="com.example.entry"):
    text: str
    unit: str | None = None


class Asked(Event, topic="asked", type="com.example.asked"):
    signal: str
    pid: int


def entry(row: dict[str, Any]) -> Entry | None:
    return Entry(text=row["MESSAGE"]) if row.get("_TRANSPORT") != "driver" else None


running = partial(reading.running, (HostChanged, Entry, Asked))


async def test_levels_are_told_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [0.1]
    monkeypatch.setattr(psutil, "getloadavg", lambda: (loads[0] * (psutil.cpu_count() or 1), 0, 0))
    host = socket.gethostname()
    url = f"sqlite:///{tmp_path}/events.db"
    full = psutil.disk_usage("/").percent / 100
    looks: list[dict[str, Any]] = []
    look = Host._look

    def looked(self: Host, known: dict[str, Any]) -> Any:
        looks.append(known)
        return look(self, known)

    monkeypatch.setattr(Host, "_look", looked)

    def source() -> Host:
        return Host(to=HostChanged, load=2.0, memory=1.0, disks={"/": full / 2}, every="10ms")

    async with running(source(), url=url) as found:
        await until(lambda: found)
        assert [(e.host, e.what, e.state) for e in found] == [(host, "disk /", "high")]
        assert found[0].value == pytest.approx(full, abs=0.05)
        for load, state in ((2.5, "high"), (1.95, None), (1.0, "normal")):
            loads[0], before = load, len(found)
            if state is None:  # at the threshold: not told each time
                seen = len(looks)
                await until(lambda: len(looks) > seen + 3)  # noqa: B023
                assert len(found) == before
                continue
            await until(lambda: len(found) > before)  # noqa: B023
            assert (found[-1].what, found[-1].state, found[-1].value) == ("load", state, load)
    loads[0] = 3.0
    async with running(source(), url=url) as found:  # what was told is not told again
        await until(lambda: found)
        assert [(e.what, e.state) for e in found] == [("load", "high")]


async def test_the_kernels_kills_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = system._kills
    assert real() is not None or not system.VMSTAT.exists()
    stat = tmp_path / "vmstat"
    monkeypatch.setattr(system, "VMSTAT", stat)
    counted: list[int | None] = []

    def count() -> int | None:
        counted.append(real())
        return counted[-1]

    monkeypatch.setattr(system, "_kills", count)
    url = f"sqlite:///{tmp_path}/events.db"

    def kills(count: int) -> None:
        (tmp_path / "new").write_text(f"pgfault 7\noom_kill {count}\nswap_ra 0\n")
        (tmp_path / "new").replace(stat)

    kills(5)
    async with running(Host(to=HostChanged, every="10ms"), url=url) as found:
        await until(lambda: len(counted) > 3)
        assert found == []  # what was before is not told
    kills(7)
    async with running(Host(to=HostChanged, every="10ms"), url=url) as found:
        await until(lambda: len(found) == 1)
        kills(1)  # after a reboot
        await until(lambda: len(found) == 2)
        assert [(e.what, e.state, e.value) for e in found] == [("oom", "killed", 2), ("oom", "killed", 1)]


async def test_states_of_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for systemctl, as no systemd runs where tests do."""
    program = tmp_path / "systemctl"
    program.write_text(
        '#!/bin/sh\n[ "$*" = "show --property=ActiveState --value -- a.service b.service" ] || exit 2\n'
        f"[ -e {tmp_path}/down ] && {{ echo no bus >&2; exit 1; }}\ncat {tmp_path}/states\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def states(text: str) -> None:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(tmp_path / "states")

    states("active\n\nfailed\n")
    async with running(Host(to=HostChanged, services=["a.service", "b.service"], every="20ms")) as found:
        await until(lambda: len(found) == 2)
        states("active\n\nactive\n")
        await until(lambda: len(found) == 3)
        assert [(e.what, e.state) for e in found] == [
            ("service a.service", "active"), ("service b.service", "failed"), ("service b.service", "active"),
        ]  # fmt: skip


@pytest.fixture
def namespace() -> Iterator[str]:
    """A journal of its own, kept by a real systemd-journald."""
    if not JOURNALD.exists() or os.geteuid() or shutil.which("journalctl") is None:
        pytest.skip("systemd-journald, journalctl and root are needed to keep a journal of the test's own")
    name = f"t{secrets.token_hex(4)}"
    machine = Path("/etc/machine-id").read_text().strip()
    places = [Path("/run/systemd", f"journal.{name}")]
    places += [Path(top, "log/journal", f"{machine}.{name}") for top in ("/run", "/var")]
    daemon = subprocess.Popen([JOURNALD, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield name
    finally:
        daemon.kill()
        daemon.wait()
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def write(namespace: str, *texts: str) -> None:
    """Entries of the journal, by its own socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        for text in texts:
            journal.sendto(
                f"MESSAGE={text}\nPRIORITY=3\nSYSLOG_IDENTIFIER=test\n".encode(),
                f"/run/systemd/journal.{namespace}/socket",
            )


@pytest.mark.slow
async def test_entries_of_a_journal_come_once(namespace: str, tmp_path: Path) -> None:
    await until(Path(f"/run/systemd/journal.{namespace}/socket").exists)
    url = f"sqlite:///{tmp_path}/events.db"
    write(namespace, "one", "two")

    def source() -> Journal:
        return Journal(to=entry, match=["SYSLOG_IDENTIFIER=test"], start="earliest", namespace=namespace)

    async with running(source(), url=url) as found:
        await until(lambda: len(found) == 2)
        write(namespace, *(f"three {n}" for n in range(1000)))
        await until(lambda: len(found) == 1002)
    write(namespace, "four")
    async with running(source(), url=url) as found:
        await until(lambda: found)
        assert [e.text for e in found] == ["four"]


async def test_a_journalctl_that_ends_is_said_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "journalctl"
    program.write_text("#!/bin/sh\necho no journal was found >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with running(Journal(to=entry)):
        await until(lambda: "journalctl ended: no journal was found" in caplog.text)


async def test_signals_are_events() -> None:
    async with running(Signals("SIGUSR1", "SIGUSR2", to=Asked)) as found:
        await until(lambda: signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGUSR1)
        await until(lambda: found)
        os.kill(os.getpid(), signal.SIGUSR2)
        await until(lambda: len(found) == 2)
        assert found == [Asked(signal="SIGUSR1", pid=os.getpid()), Asked(signal="SIGUSR2", pid=os.getpid())]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_what_makes_no_sense_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DefinitionError, match="memory is a part in use"):
        Host(to=HostChanged, memory=90)
    with pytest.raises(DefinitionError, match="there is no /nowhere"):
        Host(to=HostChanged, disks={"/nowhere": 0.9})
    with pytest.raises(DefinitionError, match="'SIGKILL' is no signal that can be an event"):
        Signals("SIGKILL", to=Asked)
    with pytest.raises(DefinitionError, match="name the signals"):
        Signals(to=Asked)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="there is no systemctl"):
        Host(to=HostChanged, services=["a.service"])
    with pytest.raises(ConfigError, match="there is no journalctl"):
        Journal(to=entry)
    monkeypatch.undo()
    if shutil.which("journalctl"):
        with pytest.raises(DefinitionError, match="'nginx' is no match"):
            Journal(to=entry, match=["nginx"])
