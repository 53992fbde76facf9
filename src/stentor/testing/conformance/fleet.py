"""Members of a group that can be killed, paused and stopped.

They are processes where the broker is shared between processes, else they live in this one and leave as killed ones do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

from stentor.plan import Counts
from stentor.program import Program
from stentor.testing.conformance.faults import FaultyBroker
from stentor.testing.conformance.ledger import Audit, Entry, Ledger
from stentor.testing.conformance.program import Script, play
from stentor.testing.conformance.stage import PATIENCE, Scene, Stage, until
from stentor.testing.conformance.stands import stands


class Member(Protocol):
    """A running worker."""

    who: str

    @property
    def dead(self) -> bool: ...

    async def kill(self) -> None:
        """SIGKILL."""
        ...

    async def stop(self) -> Counts:
        """SIGTERM; what it counted, once it has ended."""
        ...

    async def pause(self) -> None:
        """SIGSTOP, for longer than its lease."""
        ...

    async def stands(self) -> str:
        """Where its tasks stand, for a test that has waited for too long."""
        ...

    async def resume(self) -> None: ...


class ProcessMember:
    """A member in a process of its own."""

    def __init__(self, who: str, process: asyncio.subprocess.Process, ledger: Ledger, errors: Path) -> None:
        self.who = who
        self.process = process
        self._ledger = ledger
        self._errors = errors

    @property
    def dead(self) -> bool:
        return self.process.returncode is not None

    async def ready(self) -> None:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        assert line == b"ready\n", f"{self.who} did not start: {self._errors.read_text()[-2000:]}"

    async def kill(self) -> None:
        # Before it is: another may take over, and begin, sooner than this process would get to say it afterwards.
        self._ledger.write(Entry("gone", self.who))
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def stop(self) -> Counts:
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(2 * PATIENCE):
            line = await self.process.stdout.readline()
            code = await self.process.wait()
        assert code == 0, f"{self.who} ended with {code}: {self._errors.read_text()[-2000:]}"
        return msgspec.json.decode(line, type=Counts)

    async def pause(self) -> None:
        self._ledger.write(Entry("gone", self.who))  # before it is, as above
        self.process.send_signal(signal.SIGSTOP)

    async def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def stands(self) -> str:
        before = len(self._errors.read_bytes())
        self.process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(AssertionError):
            await until(lambda: self._errors.read_bytes()[before:].endswith(b"\n\n"), "it says where it stands", 5)
        return f"{self.who}:\n{self._errors.read_text()[-6000:]}"


class LocalMember:
    """A member in this process, on the broker that the test shares with it."""

    def __init__(self, script: Script, stage: Stage, ledger: Ledger, dying: asyncio.Lock) -> None:
        self.who = script.who
        self.dead = False
        self._ledger = ledger
        self._dying = dying
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self._crashing: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(play(script, stage.broker, self._crash, self._stop, self._started))

    def _started(self, program: Program, faulty: FaultyBroker) -> None:
        self._program, self._faulty = program, faulty
        self._ready.set()

    async def ready(self) -> None:
        waiting = asyncio.create_task(self._ready.wait())
        await asyncio.wait([self._task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert self._ready.is_set(), self._task.exception()

    async def _crash(self) -> None:
        """Die where the handler or the settling now stands; never returns."""
        self._crashing = asyncio.create_task(self.kill())
        await asyncio.get_running_loop().create_future()

    async def kill(self) -> None:
        async with self._dying:  # a broker in one process cannot lose two members at once
            await self._die()

    async def _die(self) -> None:
        self._faulty.gone = True
        self._ledger.write(Entry("gone", self.who))
        [worker] = self._program.workers
        worker.stopping = True
        for share in worker.shares.values():
            share.gone = True
        tasks = [*worker._tasks, *worker.runners, *worker.parking.loads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._program.workers.clear()
        for consumer in self._faulty.consumers:
            await consumer.abandon()
        self._stop.set()
        await self._task
        self.dead = True

    async def stop(self) -> Counts:
        self._stop.set()
        return await self._task

    async def pause(self) -> None:
        self._faulty.paused = True
        self._ledger.write(Entry("gone", self.who))
        for consumer in self._faulty.consumers:
            await consumer.abandon()

    async def resume(self) -> None:
        pass

    async def stands(self) -> str:
        return stands()


class Fleet:
    """The members of one test, their ledger, and what is published to them."""

    def __init__(self, stage: Stage, directory: Path, factory: str = "") -> None:
        self.stage = stage
        self.ledger = Ledger(directory / "ledger")
        self.published: list[tuple[str, int]] = []
        self.members: list[Any] = []
        self._directory = directory
        self._factory = factory
        self._dying = asyncio.Lock()

    def script(self, **options: Any) -> Script:
        given = {"url": self.stage.url, "ledger": str(self.ledger.path), "factory": self._factory, **options}
        return Script(**given)

    async def start(self, **options: Any) -> Member:
        """Start a member; options are those of Script."""
        script = self.script(who=f"m{len(self.members)}", **options)
        member: ProcessMember | LocalMember
        if self.stage.features.shared:
            errors = self._directory / f"{script.who}.log"
            member = ProcessMember(script.who, await self._spawn(script, errors), self.ledger, errors)
        else:
            member = LocalMember(script, self.stage, self.ledger, self._dying)
        self.members.append(member)
        await member.ready()
        return member

    async def _spawn(self, script: Script, errors: Path) -> asyncio.subprocess.Process:
        with errors.open("wb") as file:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "stentor.testing.conformance.program", msgspec.json.encode(script).decode(),
                stdout=asyncio.subprocess.PIPE, stderr=file,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )  # fmt: skip

    async def produce(self, count: int) -> None:
        """Run a producer that is killed right after its last publish."""
        process = await self._spawn(self.script(who="producer", produce=count), self._directory / "producer.log")
        code = await process.wait()
        assert code == -signal.SIGKILL, (self._directory / "producer.log").read_text()[-2000:]
        self.published += [(entry.key, entry.n) for entry in self.ledger.read("published")]

    async def publish(self, events: Sequence[Any]) -> None:
        await self.stage.publish(list(events))
        self.published += [(event.key, event.n) for event in events]

    async def settled_at_least(self) -> int:
        """So many events of those published are settled by now, or more."""
        return len(self.published) - await self.stage.waiting("work") - await self.stage.parked("work")

    def open_gate(self) -> None:
        self.script().gate.touch()

    def handled(self) -> set[tuple[str, int]]:
        return {(entry.key, entry.n) for entry in self.ledger.read("end")}

    def starts(self, key: str, n: int) -> list[int]:
        """The attempts at which an event was begun, in order."""
        return [e.attempt for e in self.ledger.read("start") if (e.key, e.n) == (key, n)]

    async def all_handled(self, but: int = 0, patience: float = 2 * PATIENCE) -> None:
        """Wait until everything published is handled, ``but`` so many."""
        await until(lambda: len(self.handled()) >= len(set(self.published)) - but, f"all handled but {but}", patience)

    def audit(self, given_up: Sequence[tuple[str, int]] = ()) -> Audit:
        return self.ledger.audit(self.published, given_up)

    async def close(self) -> None:
        for member in self.members:
            if isinstance(member, ProcessMember):
                if not member.dead:
                    member.process.send_signal(signal.SIGKILL)
                    await member.process.wait()
            elif not member._task.done():
                await member.kill()
        self.ledger.close()


class FleetScene(Scene):
    """What the classes about processes get: the fixture ``fleet``."""

    factory = ""
    """``module:function`` that makes the broker in the suite's processes, where ``make_broker`` is overridden."""

    @pytest.fixture
    async def fleet(self, stage: Stage, tmp_path: Path) -> AsyncIterator[Fleet]:
        directory = tmp_path / "fleet"
        directory.mkdir()
        fleet = Fleet(stage, directory, self.factory)
        try:
            yield fleet
        finally:
            await fleet.close()
