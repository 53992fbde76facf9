"""Parking: events that cannot run now leave the log for the journal, and come back when they may.

A failure parks its event and what waits behind it, so that the broker sees only acks and a waiting key blocks nobody,
for any length of time. So do a held key, an event of a newer version, and a handler that runs for long.
"""

from __future__ import annotations

import asyncio
import heapq
import traceback
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from stentor.context import decode_progress, derived_id
from stentor.errors import LeaseLost, StentorError
from stentor.lanes import Lane, Parked, Share, Try, decode_parked, insert_sorted, offset_of, split_stored, stored_name
from stentor.message import DeadLetter, Delivery, ErrorRecord, Mark, Message, Outcome, Partition, Settlement, dead_topic

if TYPE_CHECKING:
    from stentor.plan import Route
    from stentor.worker import Worker

LONG_RUN = 5.0
"""Seconds after which a running event moves to the journal."""
LOAD = 32
"""Stored events of a key that are brought back at once."""
ERRORS_KEPT = 20


class Parking:
    """The journal side of a worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._due: list[tuple[float, int, Lane]] = []
        self._timer: Any = None
        self._sequence = 0
        self.loads: set[asyncio.Task[None]] = set()
        """Reads of the journal under way."""

    async def restore(self, partition: Partition) -> Share:
        """The share of a partition that is owned from now on, with all that its journal has of it."""
        share = Share(partition)
        consumer = self._worker.consumer
        names = await consumer.names(partition)
        lanes: dict[str, list[str]] = {}
        for name in names:
            if name.startswith("q/"):
                place, key = split_stored(name)
                lanes.setdefault(f"\0{place}" if key is None else key, []).append(name)
        opened = [name for name in names if name.startswith("a/")]
        held = {name[2:] for name in names if name.startswith("k/")}
        starts = await consumer.read(partition, opened) if opened else {}
        for name, value in starts.items():
            share.tries[offset_of(name[2:])] = Try(name[2:], starts=int(value))
        for name in names:
            if name.startswith("p/"):
                share.tries.setdefault(offset_of(name[2:]), Try(name[2:]))
        for key, stored in lanes.items():
            lane = Lane(share, None if key[0] == "\0" else key, None)
            lane.stored = deque(sorted(stored))
            self.keep(lane)
            lane.held = key in held
        for key in held - set(lanes):
            lane = share.lanes[key] = Lane(share, key, None)
            lane.held = True
        for lane in [*share.lanes.values(), *share.anonymous]:
            self.proceed(lane)
        return share

    def proceed(self, lane: Lane) -> None:
        """Nothing of the lane is in memory: fetch what the journal has of it when it is due, or drop the lane."""
        if lane.busy or lane.head is not None or lane.held or lane.loading:
            return
        if not lane.stored:
            self.drop(lane)
            return
        now = self._worker.clock.now()
        if lane.due > now:
            self._wait_until(lane)
            return
        lane.loading = True
        task = self._worker.loop.create_task(self._load(lane))
        self.loads.add(task)
        task.add_done_callback(self.loads.discard)

    def keep(self, lane: Lane) -> None:
        if lane.key is None:
            lane.share.anonymous.add(lane)
        else:
            lane.share.lanes[lane.key] = lane

    def drop(self, lane: Lane) -> None:
        if lane.key is None:
            lane.share.anonymous.discard(lane)
        else:
            lane.share.lanes.pop(lane.key, None)

    async def begin(self, lane: Lane, route: Route, delivery: Delivery, attempt: Try) -> bool:
        """Record the start of a delivery that was seen before; False if it is dead by the starts nobody saw end."""
        if attempt.fresh:
            attempt.fresh = False
            return True
        worker = self._worker
        limit = route.handler.retry.attempts
        if limit is not None and attempt.before >= limit:
            died = RuntimeError("the worker died while this event was handled")
            self.die(lane, delivery, died, "attempts", attempt.before)
            return False
        done = worker.loop.create_future()
        record: dict[str, bytes | None] = {f"a/{attempt.name}": str(attempt.starts + 1).encode()}
        worker.add(
            Settlement(lane.share.partition, delivery.offset, Outcome.NONE, (), record),
            lambda error: None if done.done() else done.set_result(error),
        )
        error = await done
        if error is not None:
            lane.busy = False
            return False
        attempt.started = True
        name = f"p/{attempt.name}"
        value = (await worker.consumer.read(lane.share.partition, [name])).get(name)
        attempt.state = None if value is None else decode_progress(value).state
        return True

    def record(self, error: BaseException) -> ErrorRecord:
        trace = "".join(traceback.format_exception(error)[-4:])[-4000:]
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        return ErrorRecord(self._worker.clock.now(), name, str(error)[:2000], trace)

    def park(
        self, lane: Lane, delivery: Delivery, attempt: Try | None, *, due: float = 0.0, waits: bool = False
    ) -> None:
        """Move the head, and what waits behind it, to the journal; the lane goes on when ``due`` has come."""
        share = lane.share
        share.tries.pop(delivery.offset, None)
        attempt = attempt or Try(f"{delivery.offset:020d}")
        name = attempt.stored or stored_name(delivery.offset, attempt.name[20:], delivery.message.key)
        if not self._worker.plan.ordered or lane.key is None:
            name = attempt.stored or stored_name(delivery.offset, attempt.name[20:], None)
        parked = Parked(
            message=delivery.message, failures=attempt.failures, errors=attempt.errors, due=due, waits=waits,
            replay=delivery.replay,
        )  # fmt: skip
        records: dict[str, bytes | None] = {name: parked.encode()}
        if attempt.starts or attempt.started:
            records[f"a/{attempt.name}"] = None
        outcome = Outcome.NONE if attempt.stored else Outcome.ACK
        lane.stored = insert_sorted(lane.stored, (name,))
        lane.due = float("inf") if waits else due
        lane.head = None
        self.keep(lane)

        def after(error: StentorError | None) -> None:
            lane.busy = False
            if error is None and not share.gone:
                self.proceed(lane)

        lane.busy = True
        lane.ending = False
        self._worker.add(Settlement(share.partition, delivery.offset, outcome, (), records), after)
        self.store_rest(lane)  # after it: a crash in between must not leave them in front of it

    def store(self, lane: Lane, deliveries: Sequence[Delivery]) -> None:
        """Move deliveries that wait in a lane to the journal."""
        share = lane.share
        names = []
        for delivery in deliveries:
            attempt = share.tries.pop(delivery.offset, None)
            if attempt is not None and attempt.stored:
                names.append(attempt.stored)
                if attempt.fresh:
                    share.fresh.add(attempt.stored)
                continue
            name = stored_name(delivery.offset, "", lane.key)
            if attempt is None:
                share.fresh.add(name)
            parked = Parked(message=delivery.message, failures=attempt.before if attempt else 0, replay=delivery.replay)
            records: dict[str, bytes | None] = {name: parked.encode()}
            if attempt is not None and attempt.starts:
                records[f"a/{attempt.name}"] = None
            self._worker.add(Settlement(share.partition, delivery.offset, Outcome.ACK, (), records), None)
            names.append(name)
        lane.stored = insert_sorted(lane.stored, names)
        self.keep(lane)

    def die(self, lane: Lane, delivery: Delivery, error: BaseException, reason: str, attempts: int) -> None:
        """Give an event up: its dead letter is durable before the ack, or there is no ack."""
        share, message = lane.share, delivery.message
        attempt = share.tries.pop(delivery.offset, None) or Try(f"{delivery.offset:020d}")
        outcome, records = self.cleared(attempt)
        errors = [*attempt.errors, self.record(error)][-ERRORS_KEPT:]
        letter = DeadLetter(
            id=derived_id(message, self._worker.plan.name, "dead", 0, delivery.replay + attempt.name[20:]),
            group=self._worker.plan.name,
            message=message,
            partition=share.partition.index,
            offset=delivery.offset,
            attempts=attempts,
            reason=reason,
            time=self._worker.clock.now(),
            errors=errors,
        )
        body = Message(
            id=letter.id, source=f"/{letter.group}", type="stentor.dead", topic=dead_topic(letter.group),
            data=letter.encode(), key=message.key, datacontenttype="application/msgpack",
        )  # fmt: skip
        held = (
            self._worker.plan.park
            and self._worker.plan.ordered
            and lane.key is not None
            and not self._worker.plan.broadcast
        )
        if held:
            records[f"k/{lane.key}"] = f"{delivery.offset:020d} {letter.id}".encode()
        self._worker.counts.dead += 1
        self._worker.log.error(
            "%s: gave up %s %s after %d attempts (%s): %s: %s; it is dead letter %s",
            self._worker.plan.name, message.type, message.id, attempts, reason, type(error).__name__, error, letter.id,
        )  # fmt: skip
        settlement = Settlement(share.partition, delivery.offset, outcome, (body,), records)

        def after(error: StentorError | None) -> None:
            if error is None:
                lane.due = 0.0
                if held:
                    lane.busy, lane.ending, lane.head, lane.held = False, False, None, True
                    self.store_rest(lane)
                    self.keep(lane)
                else:
                    self._worker.advance(lane)
            elif not isinstance(error, LeaseLost):
                self._worker.log.error(
                    "%s: cannot write dead letter %s: %s; trying again", self._worker.plan.name, letter.id, error
                )
                self._worker.clock.call_later(1.0, lambda: self._worker.add(settlement, after))

        lane.busy = lane.ending = True
        self._worker.add(settlement, after)

    def cleared(self, attempt: Try) -> tuple[Outcome, dict[str, bytes | None]]:
        """How a delivery with a history ends: its journal names are removed; acked only if the log still has it."""
        records: dict[str, bytes | None] = {f"p/{attempt.name}": None}
        if attempt.starts or attempt.started:
            records[f"a/{attempt.name}"] = None
        if not attempt.stored:
            return Outcome.ACK, records
        records[attempt.stored] = None
        return Outcome.NONE, records

    async def _load(self, lane: Lane) -> None:
        """Bring the first stored events of a lane into memory, or find when its first falls due."""
        share = lane.share
        try:
            names = list(lane.stored or ())[:LOAD]
            if self._worker.unsettled:  # what was stored a moment ago is in the journal only once that is settled
                await self._worker.write(share.partition, {})
            found = await self._worker.consumer.read(share.partition, names)
        except StentorError as error:
            lane.loading = False
            lane.due = self._worker.clock.now() + 1.0
            self._wait_until(lane)
            self._worker.log.warning("%s: cannot read the journal: %s", self._worker.plan.name, error)
            return
        lane.loading = False
        if share.gone or lane.busy or lane.head is not None or not lane.stored:
            return
        now = self._worker.clock.now()
        items: list[Delivery] = []
        for name in names:
            if not lane.stored or lane.stored[0] != name:
                break  # a redrive put an earlier one before it
            value = found.get(name)
            if value is None:
                lane.stored.popleft()
                share.fresh.discard(name)
                continue
            parked = decode_parked(value)
            if parked.due > now and not parked.waits:
                lane.due = parked.due
                break
            place, _ = split_stored(name)
            offset = offset_of(place)
            known = share.tries.get(offset)
            if known is not None and known.stored and known.stored != name:
                break  # a redriven copy of an event that is still under way: after it
            starts = known.starts if known is not None and known.name == place else 0
            attempt = Try(place, stored=name, failures=parked.failures, starts=starts, fresh=name in share.fresh)
            share.fresh.discard(name)
            attempt.errors = parked.errors
            share.tries[offset] = attempt
            lane.stored.popleft()
            items.append(Delivery(parked.message, share.partition, offset, True, parked.replay))
        if items:
            lane.due = 0.0
            lane.head = items[0]
            lane.rest = deque(items[1:]) or None
            self._worker.make_ready(lane)
            self._worker.poke()
        else:
            self.proceed(lane)

    def _wait_until(self, lane: Lane) -> None:
        if lane.due == float("inf"):
            return
        self._sequence += 1
        heapq.heappush(self._due, (lane.due, self._sequence, lane))
        if self._due[0][2] is lane:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._due:
            delay = max(0.0, self._due[0][0] - self._worker.clock.now())
            # In short steps: a wall clock that is set forward must not delay what is due by it.
            self._timer = self._worker.clock.call_later(min(delay, 1.0), self._fall_due)

    def _fall_due(self) -> None:
        now = self._worker.clock.now()
        while self._due and self._due[0][0] <= now:
            _, _, lane = heapq.heappop(self._due)
            if not lane.share.gone and not self._worker.stopping:
                lane.due = 0.0 if lane.due <= now else lane.due
                self.proceed(lane)
        self._set_timer()

    def escape(self) -> None:
        """Move events whose handler runs for long to the journal, so that the log can go on behind them."""
        now = self._worker.loop.time()
        for lane in self._worker.runners.values():
            if lane is None or lane.head is None or not lane.busy or lane.ending or lane.share.gone:
                continue
            if now - lane.since >= LONG_RUN:
                self._store_head(lane, lane.head)

    def store_all(self, lane: Lane) -> bool:
        """Move to the journal what a lane has in memory, running or not; False, and nothing done, if it cannot be now.

        The head goes first: were it left in the log, a crash would bring it again behind what the journal has.
        """
        if lane.ending:
            return False
        if lane.head is not None:
            self._store_head(lane, lane.head)
        self.store_rest(lane)
        return True

    def store_rest(self, lane: Lane) -> None:
        rest, lane.rest = lane.rest, None
        if rest:
            self.store(lane, rest)

    def _store_head(self, lane: Lane, delivery: Delivery) -> None:
        attempt = lane.share.tries.setdefault(delivery.offset, Try(f"{delivery.offset:020d}"))
        if attempt.stored:
            return
        attempt.stored = stored_name(delivery.offset, attempt.name[20:], lane.key)
        parked = Parked(
            message=delivery.message, failures=attempt.failures, errors=attempt.errors, replay=delivery.replay
        )
        record: dict[str, bytes | None] = {attempt.stored: parked.encode()}
        self._worker.add(Settlement(lane.share.partition, delivery.offset, Outcome.ACK, (), record), None)

    async def apply(self, marks: Sequence[Mark]) -> None:
        """Redrive or drop dead letters, as their marks ask, in the order of their events."""
        wishes = []
        for mark in marks:
            try:
                wishes.append((mark, decode_wish(mark.value)))
            except msgspec.MsgspecError as error:
                self._worker.log.warning("%s: mark %s is dropped: %s", self._worker.group, mark.name, error)
                await self._worker.write(mark.partition, {mark.name: None})
        for mark, wish in sorted(wishes, key=lambda entry: entry[1].letter.offset):
            await self._apply(mark, wish)

    async def _apply(self, mark: Mark, wish: Wish) -> None:
        """Carry out one wish; doing it twice changes nothing."""
        share = self._worker.shares.get(mark.partition)
        if share is None or share.gone:
            return
        letter = wish.letter
        key = letter.message.key if self._worker.plan.ordered else None
        status, hold = f"d/{letter.id}", f"k/{key}"
        known = await self._worker.consumer.read(mark.partition, [status, hold])
        records: dict[str, bytes | None] = {mark.name: None}
        stored = ""
        if status not in known:
            records[status] = b"redriven" if wish.redrive else b"dropped"
            if wish.redrive:
                stored = stored_name(letter.offset, f"~{letter.id[:12]}", key)
                records[stored] = Parked(message=letter.message).encode()
        freed = known.get(hold, b"")[21:] == letter.id.encode()
        if freed:
            records[hold] = None
        lane = share.lanes.get(key) if key is not None else None
        if lane is None:
            lane = Lane(share, key, None)
        if stored:
            if not self.store_all(lane):
                return  # the mark is still there at the next look
            lane.stored = insert_sorted(lane.stored, (stored,))
            lane.due = 0.0
            self.keep(lane)
        await self._worker.write(mark.partition, records)
        if freed:
            lane.held = False
        self.proceed(lane)


class Wish(msgspec.Struct, frozen=True):
    """What a mark asks for a dead letter: to run again, or to be forgotten."""

    redrive: bool
    letter: DeadLetter


encode_wish = msgspec.msgpack.Encoder().encode
decode_wish = msgspec.msgpack.Decoder(Wish).decode
