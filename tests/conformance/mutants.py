"""Brokers that break the contract, each in one way, and the suite on the one that $CONFORMANCE_MUTANT names.

Run by test_mutations.py, in processes of their own.
"""

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stentor.broker import Broker
from stentor.brokers import sqlite, sqlite_consumer
from stentor.brokers.sqlite import SqliteBroker
from stentor.brokers.sqlite_admin import SqliteAdmin
from stentor.brokers.sqlite_consumer import SqliteConsumer
from stentor.clock import Clock
from stentor.connect import connect
from stentor.message import Message, Receipt, Settlement
from stentor.subscription import Slots
from stentor.testing.conformance import Faults, Rules

Mutation = Callable[[], None]
MUTANTS: dict[str, tuple[Mutation, str]] = {}
"""By name: what breaks the broker, and the tests (an expression for -k) one of which must fail."""


def mutant(tests: str) -> Callable[[Mutation], Mutation]:
    def decorate(function: Mutation) -> Mutation:
        MUTANTS[function.__name__] = (function, tests)
        return function

    return decorate


def around(cls: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a method by one that gets the original first."""
    original = getattr(cls, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    setattr(cls, name, method)


@mutant("r03_a_declared_group_misses_nothing")
def acks_are_not_written() -> None:
    around(SqliteConsumer, "_moved", lambda original, *args: [])


class Scattered(Slots):
    def of(self, key: str | None) -> int:
        return random.randrange(64)


@mutant("r04_order_of_a_key")
def keys_are_spread_at_random() -> None:
    def spread(original: Any, self: Any, *args: Any) -> None:
        original(self, *args)
        self._slots = Scattered(64)

    around(SqliteBroker, "__init__", spread)


@mutant("r01_order_of_publish or r04_order_of_a_key")
def lists_are_stored_backwards() -> None:
    def store(original: Any, self: Any, tx: Any, messages: Any, rows: Any, now: float) -> Any:
        return original(self, tx, messages[::-1], rows[::-1], now)[::-1]

    around(SqliteBroker, "store", store)


@mutant("r04_a_stale_settle_is_refused or r08_stale_settles_are_refused")
def epochs_are_not_checked() -> None:
    class Anything(dict[int, int]):
        def get(self, key: int, default: Any = None) -> Any:
            return _Equal()

    class _Equal:
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 0

    async def settle(original: Any, self: Any, settlements: Sequence[Settlement]) -> Any:
        owned, self._owned = self._owned, Anything(self._owned)
        try:
            return await original(self, settlements)
        finally:
            self._owned = owned

    around(SqliteConsumer, "settle", settle)
    around(SqliteConsumer, "_stolen", lambda original, *args: set())
    around(SqliteConsumer, "lose", lambda original, *args: None)


@mutant("r04_a_stale_settle_is_refused or r04_a_paused_process")
def outputs_are_stored_before_the_check() -> None:
    async def settle(original: Any, self: Any, settlements: Sequence[Settlement]) -> Any:
        for settlement in settlements:
            if settlement.outputs:
                await self.broker.publish(settlement.outputs)
        return await original(self, settlements)

    around(SqliteConsumer, "settle", settle)


@mutant("r02_outputs_across or r12_outputs_across or r02_a_refused_output or r02_one_refused")
def outputs_are_dropped() -> None:
    def settling(original: Any, self: Any, written: Any, *args: Any) -> Any:
        return original(self, [(settlement, []) for settlement, _ in written], *args)

    around(SqliteConsumer, "_settling", settling)


@mutant("r03_a_declared_group_misses_nothing")
def declaring_again_begins_again() -> None:
    def declare(original: Any, self: Any, tx: Any, subscription: Any) -> None:
        original(self, tx, subscription)
        tx.db.execute("UPDATE stentor_place SET prefix = 1, done = x''")

    around(SqliteBroker, "_declare_group", declare)


@mutant("r03_where_a_new_group_starts")
def declaring_fixes_no_start() -> None:
    def declare(original: Any, self: Any, tx: Any, subscription: Any) -> None:
        original(self, tx, subscription)
        if subscription.start == "latest":
            tx.db.execute(
                "UPDATE stentor_place SET prefix = 1 WHERE grp = (SELECT id FROM stentor_group WHERE name = ?)",
                (subscription.name,),
            )

    around(SqliteBroker, "_declare_group", declare)


@mutant("r02_what_was_settled_out_of_order")
def the_done_set_is_lost() -> None:
    setattr(sqlite_consumer, "encode_done", lambda done: b"")  # noqa: B010  an import of that module


@mutant("r05_attempts_and_delays or r04_retries_move")
def the_journal_is_not_written() -> None:
    def settling(original: Any, self: Any, written: Any, *args: Any) -> Any:
        for settlement, _ in written:
            settlement.records = {}
        return original(self, written, *args)

    around(SqliteConsumer, "_settling", settling)


@mutant("r05_attempts_across_crashes or r05_an_event_that_kills")
def starts_are_not_written() -> None:
    def settling(original: Any, self: Any, written: Any, *args: Any) -> Any:
        for settlement, _ in written:
            settlement.records = {n: v for n, v in settlement.records.items() if not n.startswith("a/")}
        return original(self, written, *args)

    around(SqliteConsumer, "_settling", settling)


@mutant("r05_an_event_that_kills")
def a_takeover_counts_as_clean() -> None:
    async def take(original: Any, self: Any, gained: Any) -> None:
        await original(self, [(slot, epoch, True, places, last) for slot, epoch, _, places, last in gained])

    around(SqliteConsumer, "take", take)


@mutant("r02_a_worker_is_killed and started or r11_everything_restarts")
def a_takeover_begins_at_the_end() -> None:
    async def take(original: Any, self: Any, gained: Any) -> None:
        changed = []
        for slot, epoch, clean, places, last in gained:
            begin = [(number, prefix if clean else last + 1, b"", *more) for number, prefix, _, *more in places]
            changed.append((slot, epoch, clean, begin, last))
        await original(self, changed)

    around(SqliteConsumer, "take", take)


@mutant("r12_an_id_given_twice")
def duplicates_are_stored() -> None:
    def store(original: Any, self: Any, tx: Any, messages: Any, rows: Any, now: float) -> Any:
        for message in messages:
            message.fresh = True
        return original(self, tx, messages, rows, now)

    around(SqliteBroker, "store", store)


@mutant("r12_another_source")
def duplicates_are_found_by_id_alone() -> None:
    def store(original: Any, self: Any, tx: Any, messages: Any, rows: Any, now: float) -> Any:
        for message in messages:
            message.source = "/"
        return original(self, tx, messages, rows, now)

    around(SqliteBroker, "store", store)


@mutant("r07_never_early")
def delays_are_ignored() -> None:
    async def publish(original: Any, self: Any, messages: Sequence[Message]) -> Any:
        for message in messages:
            message.due = 0.0
        return await original(self, messages)

    around(SqliteBroker, "publish", publish)


@mutant("r07_cancel")
def cancelling_does_nothing() -> None:
    async def cancel(original: Any, self: Any, id: str) -> bool:
        return True

    around(SqliteAdmin, "cancel", cancel)


@mutant("r02_a_producer_is_killed or r01_published_is_there")
def publish_returns_before_the_commit() -> None:
    async def publish(original: Any, self: Any, messages: Sequence[Message]) -> Any:
        async def later() -> None:
            await asyncio.sleep(0.02)
            await original(self, messages)

        self.later = asyncio.create_task(later())
        return [Receipt(message.id, message.topic, None) for message in messages]

    around(SqliteBroker, "publish", publish)


@mutant("r01_a_list_is_stored")
def lists_are_stored_one_by_one() -> None:
    async def publish(original: Any, self: Any, messages: Sequence[Message]) -> Any:
        return [receipt for message in messages for receipt in await original(self, [message])]

    around(SqliteBroker, "publish", publish)


@mutant("r10_a_stop_with_a_thousand")
def closing_gives_nothing_back() -> None:
    async def close(original: Any, self: Any) -> None:
        for tracks in self._tracks.values():
            for track in tracks:
                if track is not None:
                    track.prefix, track.moved = track.next, True
        await original(self)

    around(SqliteConsumer, "close", close)


@mutant("r04_members_come or r04_members_join or r10_sigterm")
def partitions_are_given_up_without_draining() -> None:
    async def give_up(original: Any, self: Any, slots: list[int]) -> None:
        await self.broker.file.submit(self._releasing(slots))
        self.lose(slots)

    around(SqliteConsumer, "give_up", give_up)


@mutant("r03_retention_spares")
def retention_looks_at_age_alone() -> None:
    def trim(original: Any, self: Any, tx: Any, now: float) -> None:
        tx.db.execute("DELETE FROM stentor_event WHERE ts < ?", (now - 60.0,))

    around(SqliteBroker, "_trim", trim)


@mutant("r09_publishers_wait")
def nobody_waits_for_room() -> None:
    around(SqliteBroker, "_over_limit", lambda original, *args: False)


@mutant("r06_redrive_under_continue")
def marks_are_lost() -> None:
    async def mark(original: Any, self: Any, *args: Any) -> None:
        pass

    around(SqliteAdmin, "mark", mark)


@mutant("r08_outputs_of_a_replay or r08_an_existing_group")
def replays_are_not_marked() -> None:
    fetch = SqliteConsumer._collect

    def collect(self: Any, limit: int) -> Any:
        found = fetch(self, limit)
        for delivery in found:
            delivery.replay = ""
        return found

    SqliteConsumer._collect = collect  # type: ignore[method-assign]


@mutant("r08_parked_events_and_attempts")
def a_replay_keeps_what_is_parked() -> None:
    around(SqliteAdmin, "_clear", lambda original, *args: None)


def make(url: str, clock: Clock) -> Broker:
    """The mutant's broker, here and in the suite's processes."""
    name = os.environ.get("CONFORMANCE_MUTANT", "")
    if name and not getattr(SqliteBroker, "mutated", False):
        MUTANTS[name][0]()
        SqliteBroker.mutated = True  # type: ignore[attr-defined]
    return connect(url, clock)


class TestMutant(Rules, Faults):
    factory = "tests.conformance.mutants:make"

    @pytest.fixture(autouse=True)
    def keep_house_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite, "HOUSEKEEPING", 0.2)

    @pytest.fixture
    def broker_url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/events.db?lease=1&beat=0.25"

    @pytest.fixture
    def full_url(self, broker_url: str) -> str:
        return f"{broker_url}&max_bytes={self.full}"

    def make_broker(self, url: str, clock: Clock) -> Broker:
        return make(url, clock)
