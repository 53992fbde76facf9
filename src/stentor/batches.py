"""Batch handlers: many events in one call, each with an end of its own.

A batch begins at once when none of its handler runs; while one does, what comes is gathered, and begins when that one
ends, or beside it when it is full. It is the rule of Nagle (RFC 896) for small packets, and needs no timer: at low load
a batch is one event, and under load it grows with what the handler takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from stentor.context import Context, current
from stentor.errors import BatchFailed, LeaseLost, StentorError
from stentor.lanes import Lane
from stentor.message import Delivery, Message, Outcome, Settlement
from stentor.plan import Route
from stentor.rate import learn

if TYPE_CHECKING:
    from stentor.worker import Worker


def arm(worker: Worker, route: Route) -> None:
    """Let a runner take the next batch when it may begin: it is full, or it has waited and none runs."""
    batch = route.handler.batch
    if batch is None or route.armed or not route.pending:
        return
    if len(route.pending) >= batch.size or (not route.running and (route.waited or not batch.wait)):
        route.armed, route.waited = True, False
        worker.ready.append(route)
        worker.poke()
    elif batch.wait and not route.waiting and not route.waited:
        route.waiting = True
        worker.clock.call_later(batch.wait, partial(_waited, worker, route))


def _waited(worker: Worker, route: Route) -> None:
    route.waiting, route.waited = False, bool(route.pending)
    arm(worker, route)


async def run_batch(worker: Worker, route: Route, task: asyncio.Task[None]) -> None:
    """Run a batch handler on what waits for it: one event of a key at a time, many keys at once."""
    assert route.handler.batch is not None
    route.armed = False
    lanes: list[Lane] = []
    while route.pending and len(lanes) < route.handler.batch.size:
        lane = route.pending.popleft()
        if not lane.share.gone and lane.head is not None and (worker.pace is None or worker.pace.begin(lane)):
            lanes.append(lane)
    if not lanes:
        arm(worker, route)
        return
    route.running += 1
    arm(worker, route)
    for lane in lanes:
        lane.busy = True
        lane.since = worker.loop.time()
        lane.share.running += 1
    worker.running += 1
    worker.runners[task] = lanes[0]
    try:
        members = await _members(worker, route, lanes)
        if members:
            await _invoke_batch(worker, route, members)
    except asyncio.CancelledError:
        for lane in lanes:
            worker.release(lane)
        raise
    finally:
        for lane in lanes:
            lane.share.running -= 1
        worker.running -= 1
        worker.runners[task] = None
        route.running -= 1
        arm(worker, route)
        if worker.stopping or any(lane.share.gone for lane in lanes):
            worker.note_shares()
            worker.note_quiet()


async def _members(worker: Worker, route: Route, lanes: list[Lane]) -> list[tuple[Lane, Delivery, Any]]:
    """The lanes of a batch with their decoded events; what is unreadable, filtered out or dead is ended here."""
    members = []
    begun = await _begin(worker, route, lanes)
    for lane in lanes:
        if not begun.get(lane, True):
            continue
        delivery = lane.head
        assert delivery is not None
        try:
            message = delivery.message
            event = message if route.spec is None else worker.catalog.read(route.spec, message)
            handler = route.handler
            if (handler.where is not None and not handler.where(event)) or (
                handler.where_sql is not None and not handler.where_sql(message.attributes())
            ):
                worker.counts.skipped += 1
                worker.end(lane.share, delivery, lane)
                continue
        except Exception as error:
            worker.failed(lane, route, delivery, error)
            continue
        members.append((lane, delivery, event))
    return members


async def _begin(worker: Worker, route: Route, lanes: list[Lane]) -> dict[Lane, bool]:
    """Record the starts of what was seen before, all in one settling: after a crash that may be every member."""
    seen = [
        (lane, lane.head, attempt)
        for lane in lanes
        if lane.head is not None and (attempt := lane.share.tries.get(lane.head.offset)) is not None
    ]
    begun = await asyncio.gather(
        *(worker.parking.begin(lane, route, delivery, attempt) for lane, delivery, attempt in seen)
    )
    return {lane: good for (lane, _, _), good in zip(seen, begun, strict=True)}


async def _invoke_batch(  # noqa: C901  the ways in which a batch ends, side by side
    worker: Worker, route: Route, members: list[tuple[Lane, Delivery, Any]]
) -> None:
    attempts = [lane.share.tries.get(delivery.offset) for lane, delivery, _ in members]
    first = members[0][1]
    attempt = max(a.before + 1 if a else 1 for a in attempts)
    context = Context(worker, first, attempt, None, [delivery for _, delivery, _ in members])
    errors: dict[int, BaseException] = {}
    events = [event for _, _, event in members]
    timeout = route.handler.timeout
    token = current.set(context)
    began = worker.loop.time()
    try:
        try:
            async with worker.clock.timeout(timeout) if timeout else nullcontext():
                result = await route.invoke(events, context)
        finally:
            current.reset(token)
            worker.meter.left -= 1
            if worker.meter.left <= 0:
                worker.meter.took(began, first.message, len(members))
        if worker.limiter is not None:
            learn(worker, worker.limiter, began)
        if worker.circuit is not None:
            worker.circuit.worked()
        if result is not None:
            context.add(result)
    except BatchFailed as failed:
        errors = dict(failed.errors)
        wrong = [index for index in errors if not 0 <= index < len(members)]
        if wrong:
            errors = dict.fromkeys(range(len(members)), IndexError(f"BatchFailed names {wrong}, not in the batch"))
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        if worker.limiter is not None and isinstance(error, TimeoutError):
            learn(worker, worker.limiter, began)
        if worker.circuit is not None and worker.circuit.concerns(error):
            errors = dict.fromkeys(range(len(members)), error)  # nobody's fault
        elif len(members) > 1:
            # Whose fault it is shows one by one; the others lose no attempt.
            for member in members:
                await _invoke_batch(worker, route, [member])
            return
        else:
            errors = {0: error}
    for index in errors:
        lane, delivery, _ = members[index]
        worker.failed(lane, route, delivery, errors[index])
    good = [member for index, member in enumerate(members) if index not in errors]
    outputs: Sequence[Message] = context.outputs
    if outputs and len(good) > 1:
        # They are the outputs of all: the others are acked after them, or each runs again for its own.
        lane, delivery, _ = good[0]
        refused = await _settle_first(worker, lane, delivery, outputs)
        if refused is not None:
            for member in good[isinstance(refused, LeaseLost) :]:
                await _invoke_batch(worker, route, [member])
            return
        good, outputs = good[1:], ()
    for lane, delivery, _ in good:
        worker.counts.handled += 1
        worker.end(lane.share, delivery, lane, outputs)
        outputs = ()


async def _settle_first(
    worker: Worker, lane: Lane, delivery: Delivery, outputs: Sequence[Message]
) -> StentorError | None:
    """End the first member of a batch with the outputs of them all; returns what was wrong, if that was refused."""
    share = lane.share
    attempt = share.tries.get(delivery.offset)
    outcome, records = (Outcome.ACK, {}) if attempt is None else worker.parking.cleared(attempt)
    done: asyncio.Future[StentorError | None] = worker.loop.create_future()
    settlement = Settlement(share.partition, delivery.offset, outcome, outputs, records)
    lane.ending = True
    worker.add(settlement, lambda error: None if done.done() else done.set_result(error))
    error = await done
    lane.ending = False
    if error is None:
        worker.counts.handled += 1
        share.tries.pop(delivery.offset, None)
        worker.advance(lane)
    return error
