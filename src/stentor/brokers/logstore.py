"""A small durable map on a log: for servers that can append and read in order, and compare nothing.

Every member appends what it wants to write and reads all that anybody appended, in the log's one order. A write with a
fence is applied only if the compared entry has the expected value at that place of the order, so all members agree
which writes hold, and a writer learns it by reading its own. A log that has become long is sealed: the next generation
begins with a snapshot, written by whoever is first.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from itertools import count
from secrets import token_hex
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from stentor.brokers.storage import ShutOut
from stentor.errors import BrokerError, Unavailable

HOLD = "!hold"
"""While a space has an entry of this name, no generation ends: what is being carried has to stand in it."""
CALM = 1.0
"""Seconds that members put no HOLD after a seal was void, at most."""
Fence = tuple[str, bytes | None]
"""A name and the value that it must have, None for none, where the write stands in the order."""


class Dropped(Unavailable):
    """A generation that was read or appended to is gone: a later one holds the state."""


class Log(Protocol):
    """One generation."""

    async def append(self, record: bytes) -> object:
        """Store a record behind all others; back when it is durable. What is called first stands first.

        Raises Unavailable (maybe stored), or Dropped (not stored).
        """
        ...

    def tail(self, start: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Every record from an offset on (0 is the first), with its offset, in order, and those to come, for ever.

        Raises Unavailable, or Dropped.
        """
        ...


class Logs(Protocol):
    """All generations of one log; how they are kept is the broker's."""

    async def open(self, generation: int) -> Log:
        """A generation, made where it is missing. Raises Unavailable."""
        ...

    async def newest(self) -> int:
        """The highest generation that was ever given to ``point``, else 0. Raises Unavailable."""
        ...

    async def point(self, generation: int) -> None:
        """Let ``newest`` be at least this for everybody; back when that is durable. Raises Unavailable."""
        ...

    async def drop(self, generation: int) -> None:
        """Remove a generation, which need not exist. Raises Unavailable."""
        ...


# ---- records and what they amount to -------------------------------------------------------------------------------


class Write(Struct, tag="w", array_like=True, gc=False):
    """Changes to one space: a value by name, None to remove it; ``writer`` and ``number`` name the write."""

    writer: str
    number: int
    space: str
    changes: dict[str, bytes | None]
    fence: Fence | None = None


class Seal(Struct, tag="s", array_like=True, gc=False):
    """The end of a generation: what stands behind it is void."""

    writer: str


class Part(Struct, tag="p", array_like=True, gc=False):
    """Entries of one space in a snapshot."""

    snapshot: str
    space: str
    entries: dict[str, bytes]


class Opened(Struct, tag="o", array_like=True, gc=False):
    """The snapshot is complete; the first one of a generation begins it, writes before it are void."""

    snapshot: str


Record = Write | Seal | Part | Opened
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Record]).decode
_EMPTY: dict[str, bytes] = {}


class State:
    """The spaces and their entries; ``size`` is about the bytes of a snapshot of them, ``holds`` counts HOLD."""

    def __init__(self) -> None:
        self.spaces: dict[str, dict[str, bytes]] = {}
        self.size = 0
        self.holds = 0

    def apply(self, write: Write) -> bool:
        """Carry out a write; False, and nothing changes, where its fence does not hold."""
        space = self.spaces.get(write.space, _EMPTY)
        if write.fence is not None and space.get(write.fence[0]) != write.fence[1]:
            return False
        if not write.changes:
            return True
        if space is _EMPTY:
            space = self.spaces[write.space] = {}
        for name, value in write.changes.items():
            old = space.pop(name, None)
            if name == HOLD:
                self.holds += (value is not None) - (old is not None)
            if old is not None:
                self.size -= len(name) + len(old) + 8
            if value is not None:
                space[name] = value
                self.size += len(name) + len(value) + 8
        if not space:
            del self.spaces[write.space]
        return True

    def parts(self, snapshot: str, limit: int) -> Iterator[bytes]:
        """The records of a snapshot, each of about ``limit`` bytes at most or with one entry."""
        for name, space in self.spaces.items():
            entries: dict[str, bytes] = {}
            size = 0
            for entry, value in space.items():
                if entries and size + len(value) > limit:
                    yield _encode([Part(snapshot, name, entries)])
                    entries, size = {}, 0
                entries[entry] = value
                size += len(entry) + len(value)
            yield _encode([Part(snapshot, name, entries)])
        yield _encode([Opened(snapshot)])


# ---- a member ------------------------------------------------------------------------------------------------------


class LogStore:
    """One member's copy of the map, kept up to date by a task from ``open`` to ``close``.

    Reading is from memory and as late as the log is; ``sync`` waits for all that others had written by now.
    ``changed(space)`` is called for each change that was applied, with "" when anything may have changed.
    """

    def __init__(
        self,
        logs: Logs,
        *,
        changed: Callable[[str], None] = lambda space: None,
        generation_bytes: int = 16 * 1024 * 1024,
        part_bytes: int = 256 * 1024,
        patience: float = 15.0,
        rescue: float = 2.0,
    ) -> None:
        self.state = State()
        self._logs = logs
        self._changed = changed
        self._generation_bytes = generation_bytes
        self._part_bytes = part_bytes
        self._patience = patience
        self._rescue = rescue
        """Seconds after which another member writes the snapshot that the sealing one owes."""
        self._me = token_hex(8)
        self._numbers = count(1)
        self._generation = 0
        self._log: Log | None = None
        self._next = 0
        self._bytes = 0
        self._limit = generation_bytes
        self._sealing = False
        self._again = False
        """This member's seal was void; it seals again when nothing is held."""
        self._calm = 0.0
        self._parts: dict[str, State] = {}
        self._live = asyncio.Event()
        """The generation has begun, so that writes to it hold."""
        self._pending: dict[int, asyncio.Future[bool | None]] = {}
        self._idle: set[int] = set()
        """Those of the pending that change nothing, so that repeating them is safe."""
        self._queue: list[Write] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._follower: asyncio.Task[None] | None = None
        self._trouble: Exception | None = None

    # ---- life ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Read all that is there. Raises Unavailable when that takes longer than four times the patience."""
        await self._reload()
        self._follower = self._spawn(self._follow())
        try:
            await self._write("", {}, None, 4 * self._patience)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop reading; writes under way fail with Unavailable."""
        self._follower = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail(Unavailable("the store was closed"))

    @property
    def trouble(self) -> Exception | None:
        """Why the log cannot be read now; None while it can."""
        return self._trouble

    # ---- reading ------------------------------------------------------------------------------------------------

    def get(self, space: str, name: str) -> bytes | None:
        """A value, None where there is none."""
        return self.state.spaces.get(space, _EMPTY).get(name)

    def entries(self, space: str) -> Mapping[str, bytes]:
        """All of a space: a view, to be read before the next await."""
        return self.state.spaces.get(space, _EMPTY)

    def spaces(self, prefix: str = "") -> list[str]:
        """The names of the spaces that hold something and start with a prefix."""
        return [name for name in self.state.spaces if name.startswith(prefix)]

    async def sync(self) -> None:
        """Return when all that was durable at the call has been read. Raises Unavailable."""
        await self.write("", {})

    # ---- writing ------------------------------------------------------------------------------------------------

    async def write(self, space: str, changes: Mapping[str, bytes | None], fence: Fence | None = None) -> bool:
        """Change entries of one space, all or none; False where the fence did not hold.

        Writes take effect in the order of the calls. Raises Unavailable when it is not known whether it was done.
        """
        return await self._write(space, dict(changes), fence, self._patience)

    async def calm(self) -> None:
        """To be awaited before a HOLD: a generation that is to end gets a moment in which nothing is held."""
        rest = self._calm - asyncio.get_running_loop().time()
        if rest > 0:
            await asyncio.sleep(rest)

    async def carry(
        self,
        changes: Sequence[tuple[str, dict[str, bytes | None], Fence]],
        send: Callable[[Any, bytes], Coroutine[Any, Any, None]],
    ) -> list[bool]:
        """Writes whose one record ``send`` stores in a log, together with what it stores besides; which of them held.

        Their spaces have to have a HOLD, which the writes remove. Raises what ``send`` raises, Unavailable when nothing
        was sent, or ShutOut when it was, and is not seen.
        """
        log = self._log
        if log is None or not self._live.is_set():
            raise Unavailable("the store begins a new log")
        writes = [Write(self._me, next(self._numbers), space, changed, fence) for space, changed, fence in changes]
        waiting = [asyncio.get_running_loop().create_future() for _ in writes]
        self._pending.update(zip((write.number for write in writes), waiting, strict=True))
        try:
            await send(log, _encode(writes))
            try:
                async with asyncio.timeout(self._patience):
                    outcomes = await asyncio.gather(*waiting)
            except TimeoutError:
                raise ShutOut(f"what was stored is not seen within {self._patience:g} s") from None
            except BrokerError as error:
                raise ShutOut(f"what was stored was not seen: {error}") from None
        finally:
            for write in writes:
                self._pending.pop(write.number, None)
        if None in outcomes:
            raise ShutOut("what was stored does not stand in the log that counts")
        return [bool(outcome) for outcome in outcomes]

    async def _write(self, space: str, changes: dict[str, bytes | None], fence: Fence | None, patience: float) -> bool:
        try:
            async with asyncio.timeout(patience):
                while True:
                    outcome = await self._attempt(Write(self._me, next(self._numbers), space, changes, fence))
                    if outcome is not None:
                        return outcome
        except TimeoutError:
            why = f": {self._trouble}" if self._trouble else ""
            raise Unavailable(f"a write was not seen in the log within {patience:g} s{why}") from None

    async def _attempt(self, write: Write) -> bool | None:
        """Whether a write held; None where it came to stand outside of a generation, hence never will."""
        await self._live.wait()
        future: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
        self._pending[write.number] = future
        if not write.changes:
            self._idle.add(write.number)
        self._queue.append(write)
        if len(self._queue) == 1:  # what is written in one turn of the loop goes into one record
            asyncio.get_running_loop().call_soon(self._flush)
        try:
            return await future
        finally:
            self._pending.pop(write.number, None)
            self._idle.discard(write.number)

    def _flush(self) -> None:
        writes, self._queue = self._queue, []
        log = self._log
        if log is None or not self._live.is_set():
            for write in writes:
                self._resolve(write.number, None)
            return
        group: list[Write] = []
        size = 0
        for write in writes:
            cost = sum(len(name) + len(value or b"") for name, value in write.changes.items())
            if group and size + cost > self._part_bytes:
                self._spawn(self._append(log, group))
                group, size = [], 0
            group.append(write)
            size += cost
        self._spawn(self._append(log, group))

    async def _append(self, log: Log, writes: list[Write]) -> None:
        try:
            await log.append(_encode(writes))
        except Dropped:
            for write in writes:
                self._resolve(write.number, None)
            # The follower may not see it: a server that has just begun does not know each log at once.
            if log is self._log and self._follower is not None:
                self._lost()
                self._follower.cancel()
                self._follower = self._spawn(self._follow(gone=True))
        except BrokerError as error:
            await asyncio.sleep(0.1)
            for write in writes:
                if write.number in self._idle:
                    self._resolve(write.number, None)
                elif (future := self._pending.get(write.number)) is not None and not future.done():
                    future.set_exception(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="stentor logstore")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _resolve(self, number: int, outcome: bool | None) -> None:
        future = self._pending.get(number)
        if future is not None and not future.done():
            future.set_result(outcome)

    def _fail(self, error: Exception) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error)

    # ---- following the log --------------------------------------------------------------------------------------

    async def _reload(self) -> None:
        """Begin again with the newest generation."""
        self._begin(await self._logs.newest())
        self.state = State()

    def _begin(self, generation: int) -> None:
        self._generation = generation
        self._log = None
        self._next = self._bytes = 0
        self._limit = self._generation_bytes
        self._sealing = self._again = False
        self._calm = 0.0
        self._parts = {}
        self._live.clear()

    async def _follow(self, *, gone: bool = False) -> None:
        """Read on; where the log is gone, from the newest generation's beginning."""
        wait = 0.05
        while True:
            try:
                if gone:
                    await self._reload()
                    gone = False
                    self._changed("")
                async with contextlib.aclosing(self._records()) as records:
                    async for record in records:
                        wait = 0.05
                        self._trouble = None
                        self._take(record)
            except Dropped:
                gone = True
                self._lost()
            except BrokerError as error:
                self._trouble = error
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311
                wait = min(2.0, wait * 2)

    def _lost(self) -> None:
        self._live.clear()
        for number in self._idle:
            self._resolve(number, None)
        self._fail(Unavailable("the log went on without this member"))

    async def _records(self) -> AsyncGenerator[Record, None]:
        """The records of the generation from where it stands, until it is sealed or cannot be read."""
        generation = self._generation
        log = await self._logs.open(generation)
        self._log = log
        # Opening makes a dropped generation anew. What is dropped is below the newest, so whoever is attached and then
        # sees no newer one is attached to the real one.
        await self._check(generation)
        if generation == 0:
            self._live.set()
        checked = False
        async with contextlib.aclosing(log.tail(self._next)) as tail:
            async for offset, data in tail:
                if not checked:
                    checked = True
                    await self._check(generation)
                self._next = offset + 1
                self._bytes += len(data)
                for record in _decode(data):
                    yield record
                    if self._generation != generation:
                        return

    async def _check(self, generation: int) -> None:
        newest = await self._logs.newest()
        if generation < newest - 1:
            await self._logs.drop(generation)
        if generation < newest:
            raise Dropped(f"generation {generation} is past")

    def _take(self, record: Record) -> None:
        match record:
            case Write():
                outcome = self.state.apply(record) if self._live.is_set() else None
                if self._again and not self.state.holds and self._log is not None:
                    self._again = False
                    self._spawn(self._seal(self._log))
                if outcome and record.changes:
                    self._changed(record.space)
                if record.writer == self._me:
                    self._resolve(record.number, outcome)
                    if self._bytes > self._limit and not self._sealing and self._log is not None:
                        self._sealing = True
                        self._spawn(self._seal(self._log))
            case Part():
                if not self._live.is_set():
                    part = self._parts.setdefault(record.snapshot, State())
                    part.apply(Write("", 0, record.space, dict(record.entries)))
            case Opened():
                if not self._live.is_set():
                    self.state = self._parts.pop(record.snapshot, State())
                    self._parts = {}
                    self._limit = max(self._generation_bytes, 4 * self.state.size)
                    self._live.set()
                    self._changed("")
                    if record.snapshot.startswith(self._me):
                        self._spawn(self._tidy(self._generation))
            case Seal() if self.state.holds:
                self._calm = asyncio.get_running_loop().time() + CALM
                self._again = self._again or record.writer == self._me
            case Seal():
                self._begin(self._generation + 1)
                self._spawn(self._snapshot(self._generation, record.writer == self._me))
                # Writes that were not read by now stand behind the seal.
                for number in list(self._pending):
                    self._resolve(number, None)

    async def _seal(self, log: Log) -> None:
        try:
            await log.append(_encode([Seal(self._me)]))
        except BrokerError:
            self._sealing = False

    async def _snapshot(self, generation: int, mine: bool) -> None:
        """Write the snapshot that begins a generation, unless somebody else does in time."""
        state = self.state
        wait = 0.0 if mine else self._rescue * random.uniform(1.0, 2.0)  # noqa: S311
        while self._generation == generation and not self._live.is_set():
            if wait:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._live.wait()
                if self._generation != generation or self._live.is_set():
                    return
            try:
                log = await self._logs.open(generation)
                for record in state.parts(f"{self._me}.{next(self._numbers)}", self._part_bytes):
                    await log.append(record)
            except BrokerError:
                pass  # it is tried again, or somebody else does it
            wait = self._rescue

    async def _tidy(self, generation: int) -> None:
        """Point to the generation that began; drop those that nobody reads any more, save the last for the slow."""
        with contextlib.suppress(BrokerError):
            await self._logs.point(generation)
            for past in range(max(0, generation - 4), generation - 1):
                await self._logs.drop(past)
