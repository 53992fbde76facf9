"""The map on a log: members that interleave as they like agree on every entry, and a stale fence never holds."""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stentor.brokers.logstore import HOLD, Dropped, Log, LogStore, State, Write
from stentor.brokers.storage import ShutOut
from stentor.errors import Unavailable


class MemoryLog:
    """One generation in memory; ``hold`` decides how long everything takes, ``cut`` whether it fails."""

    def __init__(self, server: "MemoryLogs") -> None:
        self.server = server
        self.records: list[bytes] = []
        self.dropped = False

    async def append(self, record: bytes) -> None:
        await self.server.hold()
        if self.dropped:
            raise Dropped("dropped")
        if self.server.cut():
            raise Unavailable("cut before")
        self.records.append(record)
        self.server.woken()
        await self.server.hold()
        if self.server.cut():
            raise Unavailable("the answer was lost")

    async def tail(self, start: int) -> AsyncGenerator[tuple[int, bytes], None]:
        while True:
            await self.server.hold()
            if self.dropped:
                raise Dropped("dropped")
            if self.server.cut():
                raise Unavailable("cut")
            if start < len(self.records):
                yield start, self.records[start]
                start += 1
            else:
                await self.server.news.wait()


class MemoryLogs:
    """A server whose members see each step at times of their own, by a seed."""

    def __init__(self, seed: int = 0, cuts: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.cuts = cuts
        self.logs: dict[int, MemoryLog] = {}
        self.pointer = 0
        self.news = asyncio.Event()

    async def hold(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 1, 2, 5, 30))):
            await asyncio.sleep(0)

    def cut(self) -> bool:
        return self.random.random() < self.cuts

    def woken(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    async def open(self, generation: int) -> Log:
        await self.hold()
        return self.logs.setdefault(generation, MemoryLog(self))

    async def newest(self) -> int:
        await self.hold()
        return self.pointer

    async def point(self, generation: int) -> None:
        self.pointer = max(self.pointer, generation)

    async def drop(self, generation: int) -> None:
        if (log := self.logs.pop(generation, None)) is not None:
            log.dropped = True
            self.woken()


def store(server: MemoryLogs, generation_bytes: int = 1 << 20) -> LogStore:
    return LogStore(server, generation_bytes=generation_bytes, part_bytes=64, rescue=0.01)


# ---- the state alone -----------------------------------------------------------------------------------------------

names = st.sampled_from("abc")
values = st.none() | st.binary(max_size=3)
writes = st.builds(
    Write,
    writer=st.just("w"),
    number=st.just(1),
    space=st.sampled_from(("s", "t")),
    changes=st.dictionaries(names, values, max_size=3),
    fence=st.none() | st.tuples(names, values),
)


@given(st.lists(writes))
def test_a_write_holds_exactly_where_its_fence_does(records: list[Write]) -> None:
    state = State()
    model: dict[tuple[str, str], bytes] = {}
    for write in records:
        holds = write.fence is None or model.get((write.space, write.fence[0])) == write.fence[1]
        assert state.apply(write) is holds
        if holds:
            for name, value in write.changes.items():
                model.pop((write.space, name), None)
                if value is not None:
                    model[write.space, name] = value
        assert {(s, n): v for s, entries in state.spaces.items() for n, v in entries.items()} == model
        assert state.size == sum(len(name) + len(value) + 8 for (_, name), value in model.items())


# ---- members ---------------------------------------------------------------------------------------------------------


async def count_up(member: LogStore, times: int) -> tuple[int, int]:
    """Add one to a counter by compare and set: how often that held, and how often nobody can tell."""
    held = unknown = 0
    for _ in range(times):
        now = member.get("s", "counter")
        try:
            held += await member.write("s", {"counter": b"%d" % (int(now or b"0") + 1)}, ("counter", now))
        except Unavailable:
            unknown += 1
    return held, unknown


async def same(members: list[LogStore]) -> None:
    """All members have read all there is, and have the same."""
    for member in members:
        await member.sync()
    for member in members[1:]:
        assert member.state.spaces == members[0].state.spaces


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), members=st.integers(1, 4), generation=st.sampled_from((300, 1500, 1 << 20)))
def test_members_agree_over_any_interleaving_and_generation(seed: int, members: int, generation: int) -> None:
    asyncio.run(agree(seed, members, generation))


async def agree(seed: int, members: int, generation: int) -> None:
    server = MemoryLogs(seed)
    stores = [store(server, generation) for _ in range(members)]
    for one in stores:
        await one.open()
    counts = await asyncio.gather(*(count_up(one, 25) for one in stores))
    held, unknown = (sum(column) for column in zip(*counts, strict=True))
    await same(stores)
    assert held + unknown >= 25  # of several that compare the same value one holds
    assert held <= int(stores[0].get("s", "counter") or b"0") <= held + unknown
    assert unknown == 0 or generation == 300, "only who is slower than a whole generation cannot tell"
    late = store(server, generation)
    await late.open()
    await same([*stores, late])
    if generation == 300:
        assert server.pointer >= 2
        assert len(server.logs) <= 3, "old generations are dropped"
    for one in [*stores, late]:
        await one.close()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), generation=st.sampled_from((400, 1 << 20)))
def test_cuts_and_lost_answers(seed: int, generation: int) -> None:
    asyncio.run(faults(seed, generation))


async def faults(seed: int, generation: int) -> None:
    """Answers are lost and reading is cut: a write may hold unseen, but none that was refused does."""
    server = MemoryLogs(seed, cuts=0.02)
    stores = [store(server, generation) for _ in range(3)]
    for one in stores:
        while True:
            try:
                await one.open()
                break
            except Unavailable:
                continue
    counts = await asyncio.gather(*(count_up(one, 15) for one in stores))
    held, unknown = (sum(column) for column in zip(*counts, strict=True))
    server.cuts = 0.0
    await same(stores)
    assert held <= int(stores[0].get("s", "counter") or b"0") <= held + unknown
    for one in stores:
        await one.close()


async def test_a_member_that_dies_after_the_seal_is_replaced() -> None:
    server = MemoryLogs()
    sealer, other = store(server, 200), store(server, 1 << 20)
    await sealer.open()
    await other.open()
    await other.write("s", {"kept": b"1"})

    async def dies(generation: int, mine: bool) -> None: ...

    sealer._snapshot = dies  # type: ignore[method-assign]
    await sealer.write("s", {"x": b"y" * 300})
    await other.write("s", {"after": b"2"})
    assert server.pointer == 1
    assert dict(other.entries("s")) == {"kept": b"1", "x": b"y" * 300, "after": b"2"}
    await sealer.close()
    await other.close()


async def test_a_member_that_slept_through_generations_begins_anew_and_cannot_write_by_the_old_state() -> None:
    server = MemoryLogs()
    changes: list[str] = []
    sleeper = LogStore(server, generation_bytes=200, part_bytes=64, rescue=0.01, changed=changes.append)
    worker = store(server, 200)
    await sleeper.open()
    await worker.open()
    await worker.write("s", {"owner": b"sleeper"})
    await sleeper.sync()
    # Asleep: what it follows stands still while the others go on for several generations.
    assert sleeper._follower is not None
    sleeper._follower.cancel()
    await asyncio.gather(sleeper._follower, return_exceptions=True)
    await worker.write("s", {"owner": b"worker"})
    for number in range(40):
        await worker.write("s", {"filling": b"x" * 50 + b"%d" % number})
    assert server.pointer > 3
    assert sleeper.get("s", "owner") == b"sleeper"
    sleeper._follower = sleeper._spawn(sleeper._follow())
    changes.clear()
    try:
        held = await sleeper.write("s", {"stolen": b"1"}, ("owner", b"sleeper"))
    except Unavailable:
        held = False
    assert not held
    await same([worker, sleeper])
    assert worker.get("s", "stolen") is None
    assert "" in changes
    assert all(generation >= server.pointer - 1 for generation in server.logs), "no generation was made anew"
    await sleeper.close()
    await worker.close()


async def test_a_snapshot_larger_than_a_part_is_cut_in_parts() -> None:
    server = MemoryLogs()
    one = store(server, 3000)
    await one.open()
    wanted = {f"name-{number}": b"%d" % number * 10 for number in range(200)}
    for name, value in wanted.items():
        await one.write("big", {name: value})
    assert server.pointer >= 1
    late = store(server)
    await late.open()
    assert dict(late.entries("big")) == wanted
    await one.close()
    await late.close()


async def test_a_write_that_nobody_can_read_is_unavailable_in_time() -> None:
    server = MemoryLogs()
    one = LogStore(server, patience=0.05)
    await one.open()
    assert one._follower is not None
    one._follower.cancel()
    await asyncio.gather(one._follower, return_exceptions=True)
    try:
        await one.write("s", {"a": b"1"})
    except Unavailable:
        pass
    else:
        raise AssertionError("a write was reported although it was not read back")
    await one.close()


async def test_a_write_that_is_refused_in_error_is_done_all_the_same() -> None:
    """A server says that the log is gone, to the writer only: it was not, and nobody else tells the member."""
    server = MemoryLogs()
    member = store(server)
    await member.open()
    append, refused = MemoryLog.append, 0

    async def not_known_yet(log: MemoryLog, record: bytes) -> None:
        nonlocal refused
        refused += 1
        if refused < 4:
            raise Dropped("not known yet")
        await append(log, record)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MemoryLog, "append", not_known_yet)
        async with asyncio.timeout(60):
            both = [member.write("s", {"counter": b"1"}), member.write("s", {"counter": b"2"}, ("counter", b"1"))]
            assert await asyncio.gather(*both) == [True, True]
    assert refused == 4
    assert member.get("s", "counter") == b"2"
    await member.close()


# ---- what is carried by another step --------------------------------------------------------------------------------


async def carried(member: LogStore, server: MemoryLogs, number: int, outputs: list[int]) -> bool:
    """Take a turn at a space as a transaction does: what it publishes and its record are stored in one step."""
    now = member.get("s", "counter")
    if not await member.write("s", {HOLD: b"1"}, ("counter", now)):
        return False

    async def send(log: MemoryLog, record: bytes) -> None:
        await server.hold()
        log.records.append(record)
        outputs.append(number)
        server.woken()
        await server.hold()

    [held] = await member.carry([("s", {"counter": b"%d" % number, HOLD: None}, ("counter", now))], send)
    return held


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), generation=st.sampled_from((300, 900)))
def test_what_is_carried_stands_in_the_generation_that_it_was_begun_in(seed: int, generation: int) -> None:
    asyncio.run(carry_on(seed, generation))


async def carry_on(seed: int, generation: int) -> None:
    """Others fill generations meanwhile: what was stored holds, and generations end all the same."""
    server = MemoryLogs(seed)
    carrier, other = store(server, generation), store(server, generation)
    await carrier.open()
    await other.open()
    outputs: list[int] = []

    async def fill() -> None:
        for number in range(40):
            with contextlib.suppress(Unavailable):  # slower than a whole generation, it cannot tell
                await other.write("t", {"filling": b"x" * 40 + b"%d" % number})

    filling = asyncio.create_task(fill())
    done = 0
    while done < 12 or not filling.done():
        try:
            done += await carried(carrier, server, done, outputs)
        except ShutOut:  # the same: its state says what became of it
            await carrier.sync()
            done = int(carrier.get("s", "counter") or b"-1") + 1
        except Unavailable:  # the store begins a new log, or the hold came too late for the old one
            continue
    await filling
    await same([carrier, other])
    assert outputs == list(range(done))
    assert carrier.get("s", "counter") == b"%d" % (done - 1)
    assert carrier.state.holds == 0
    for number in range(20):
        await other.write("t", {"filling": b"y" * 60 + b"%d" % number})
    assert server.pointer >= 1
    await carrier.close()
    await other.close()


async def test_what_is_carried_and_not_seen_shuts_its_member_out() -> None:
    server = MemoryLogs()
    member = LogStore(server, patience=0.05)
    await member.open()

    async def lost(log: MemoryLog, record: bytes) -> None:
        pass

    with pytest.raises(ShutOut, match="not seen within"):
        await member.carry([("s", {"a": b"1"}, ("counter", None))], lost)
    assert member.get("s", "a") is None
    await member.close()


async def test_what_is_carried_while_the_log_is_read_anew_is_not_sent_twice() -> None:
    """The member loses the log after the step was stored: it cannot tell, and must not say that nothing was done."""
    server = MemoryLogs()
    member = store(server)
    await member.open()

    async def send(log: MemoryLog, record: bytes) -> None:
        member._lost()

    with pytest.raises(ShutOut, match="was not seen"):
        await member.carry([("s", {"a": b"1"}, ("counter", None))], send)
    await member.close()
