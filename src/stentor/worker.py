"""The worker: one group's member in this process. It fetches, runs handlers a key at a time, and settles in batches.

One delivery's way: ``_fetch`` -> ``_dispatch`` (finds its lane) -> ``_run`` (a runner: decode, filter, the user's
function) -> ``end`` or ``failed`` -> ``_settle``. What fails leaves the log for the journal (parking.py), so that the
broker sees only acks and a waiting key blocks nobody; ``Parking`` brings it back when it falls due.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from stentor.batches import arm, run_batch
from stentor.breaker import Circuit
from stentor.broker import Broker, Consumer
from stentor.catalog import Catalog
from stentor.clock import Clock
from stentor.context import (
    Context,
    Dead,
    Progress,
    RetryLater,
    Runtime,
    current,
    encode_progress,
    private,
)
from stentor.errors import LeaseLost, NewerVersion, StentorError, Undecodable
from stentor.handler import ThreadStillRuns
from stentor.lanes import Lane, Share, Try
from stentor.limiter import Limiter
from stentor.message import Delivery, Failure, Message, Outcome, Partition, Settlement
from stentor.meter import Meter
from stentor.parking import ERRORS_KEPT, Parking
from stentor.plan import Counts, Duties, Hold, Plan, Route
from stentor.priority import ALONE, Turn
from stentor.rate import Pace, learn

FETCH = 256
WINDOW = 1024
WINDOW_BYTES = 64 * 1024 * 1024
PAUSE = 0.01
"""Seconds between two batches of few plain acks: each is a write to disk that all members read, and nobody waits."""
FEW = 64
STRETCH = 0.01
"""Seconds for which handlers that never wait may keep the event loop from whoever else is to run."""
After = Callable[[StentorError | None], None]


class Worker:
    """Runs one group in this process; see the module for the way of one delivery."""

    def __init__(self, plan: Plan, broker: Broker, catalog: Catalog, clock: Clock, runtime: Runtime) -> None:
        self.plan = plan
        self.group = plan.name
        self.runtime = runtime
        self.counts = Counts()
        self.parking = Parking(self)
        self.failure: BaseException | None = None
        """Why the worker stopped by itself, if it did."""
        self.trouble: str | None = None
        """What keeps it from working now, in one line."""
        self.hold = Hold(clock, self.poke)
        self._broker = broker
        self.catalog = catalog
        self.clock = clock
        self.log = logging.getLogger(f"stentor.worker.{plan.name}")
        self.consumer: Consumer
        self.meter: Meter
        self.shares: dict[Partition, Share] = {}
        self.ready: deque[Lane | Route] = deque()
        self.runners: dict[asyncio.Task[None], Lane | None] = {}
        self._idle: list[asyncio.Future[None]] = []
        self._poking = False
        self._resting = 0
        self._turned = 0.0
        """When the event loop last came round while events were ready."""
        self._batches = any(r.handler.batch is not None for r in [*plan.routes.values(), *plan.topics.values()])
        self._batch: list[tuple[Settlement, After | None]] = []
        self._settling: list[tuple[Settlement, After | None]] = []
        self._revoking = 0
        self._inflight = 0
        self._bytes = 0
        self.running = 0
        self.limiter: Limiter | None = None
        self.pace = Pace(self, plan.rate, plan.key_rate) if plan.rate or plan.key_rate else None
        self.circuit = Circuit(self, plan.breaker) if plan.breaker is not None else None
        self.most = plan.concurrency
        """Handlers that may run at once, now."""
        self.turn: Turn | None = None
        """Where groups of a higher priority run in this process: whether it may begin now."""
        self.spell = ALONE
        """Handlers of one runner between two turns of the event loop, less one a power of two."""
        self.stopping = False
        self._room: asyncio.Future[None] | None = None
        self._ended = asyncio.Event()
        self._awaited = asyncio.Event()
        """What is to be settled should not wait for more."""
        self._quiet: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # ---- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.meter = Meter(self.clock, self.loop.time)
        if self.plan.auto:
            self.limiter = Limiter(self.loop.time)
            self.most = self.limiter.limit
        self.consumer = await self._broker.subscribe(self.plan.subscription, self)
        for name, run in (("fetch", self._fetch), ("settle", self._settle), ("tick", self._tick)):
            self._tasks.append(asyncio.create_task(self._guard(run), name=f"stentor {name} {self.plan.name}"))
        await self.consumer.start()
        if self.pace is not None:
            await self.pace.share(self._broker)

    async def _guard(self, run: Callable[[], Awaitable[None]]) -> None:
        try:
            await run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.log.exception("the worker of %s stopped", self.plan.name)
            self.failure = error
            self.runtime.fatal(error)

    async def stop(self, grace: float) -> None:
        """Stop intake, let what runs end within ``grace`` seconds, give the rest back."""
        self.stopping = True
        self._awaited.set()
        if not self._tasks:
            return
        fetch, settle, tick = self._tasks
        for task in (fetch, tick):
            task.cancel()
        await asyncio.gather(fetch, tick, return_exceptions=True)
        duties = [duty for share in self.shares.values() for duty in share.duties]
        for duty in duties:
            duty.cancel()
        await asyncio.gather(*duties, *self.parking.loads, return_exceptions=True)
        self.ready.clear()
        await self._until_quiet(grace)
        if self.running:
            self.log.warning("%s: %d handlers did not end within the grace period", self.plan.name, self.running)
            for runner, lane in list(self.runners.items()):
                if lane is not None:
                    runner.cancel()
            await self._until_quiet(None)
        for runner in self.runners:
            runner.cancel()
        await asyncio.gather(*self.runners, return_exceptions=True)
        settle.cancel()
        await asyncio.gather(settle, return_exceptions=True)
        await self.consumer.close()

    async def _until_quiet(self, grace: float | None) -> None:
        """Wait until no handler runs and nothing waits to be settled."""
        deadline = None if grace is None else self.loop.time() + grace
        while self.running or self._batch or self._settling:
            self._quiet = self.loop.create_future()
            left = None if deadline is None else deadline - self.loop.time()
            if left is not None and left <= 0:
                return
            try:
                async with asyncio.timeout(left):
                    await self._quiet
            except TimeoutError:
                return

    def note_quiet(self) -> None:
        if not (self.running or self._batch or self._settling):
            quiet, self._quiet = self._quiet, None
            if quiet is not None and not quiet.done():
                quiet.set_result(None)

    @property
    def busy(self) -> bool:
        """Whether anything is runnable now (retries that wait for their time are not)."""
        ready = self.ready and self.hold.reason is None and self.most
        return bool(ready or self.running or self.unsettled or self.parking.loads)

    @property
    def unsettled(self) -> bool:
        """Whether anything that was added is not durable yet."""
        return bool(self._batch or self._settling)

    @property
    def partitions(self) -> int:
        return len(self.shares)

    # ---- ownership: called by the consumer ----------------------------------------------------------------------

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            share = self.shares[partition] = await self.parking.restore(partition)
            duty = self.plan.duties.get(partition.topic)
            if duty is not None and partition.index == 0:
                share.duties.append(asyncio.create_task(Duties(self, partition).keep(duty)))

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        waits = []
        for partition in partitions:
            share = self.shares.get(partition)
            if share is None:
                continue
            share.gone = True
            for duty in share.duties:
                duty.cancel()
            waits += share.duties
            share.idle = self.loop.create_future()
            waits.append(share.idle)  # type: ignore[arg-type]
        self._revoking += 1
        self._awaited.set()
        try:
            self.note_shares()
            await asyncio.gather(*waits, return_exceptions=True)
        finally:
            self._revoking -= 1
        for partition in partitions:
            self._forget(partition)

    def lost(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            share = self.shares.get(partition)
            if share is not None:
                self.log.warning("%s: %r was lost; what runs of it cannot be settled", self.plan.name, partition)
                share.gone = True
                for duty in share.duties:
                    duty.cancel()
                self._forget(partition)

    def _forget(self, partition: Partition) -> None:
        share = self.shares.pop(partition, None)
        if share is not None:
            left = self._inflight - share.inflight
            self._bytes = self._bytes * left // self._inflight if left else 0
            self._inflight = left
            share.flying.clear()
            if share.idle is not None and not share.idle.done():
                share.idle.set_result(None)
            self._make_room()

    def note_shares(self) -> None:
        """Resolve what ``revoked`` waits for, once nothing of a share runs or is being settled."""
        if not self._revoking:
            return
        unsettled = {settlement.partition for settlement, _ in [*self._settling, *self._batch]}
        for partition, share in self.shares.items():
            idle = share.idle
            if idle is not None and not idle.done() and not share.running and partition not in unsettled:
                idle.set_result(None)

    # ---- intake -------------------------------------------------------------------------------------------------

    async def _fetch(self) -> None:
        while not self.stopping:
            await self.hold.over()
            room = min(FETCH, WINDOW - self._inflight)
            if room <= 0 or self._bytes > WINDOW_BYTES:
                self._room = self.loop.create_future()
                self._unclog()
                await self._room
                continue
            try:
                # After trouble it waits briefly, so that what is told of its health is true.
                deliveries = await self.consumer.fetch(room, 5.0 if self.trouble is None else 0.1)
            except StentorError as error:
                await self._troubled(error)
                continue
            self.trouble = None
            for delivery in deliveries:
                self._dispatch(delivery)
            if deliveries:
                self._wake_runner()
                # Let runners at it: a fetch that finds events at once never suspends by itself.
                await asyncio.sleep(0)

    async def _troubled(self, error: StentorError) -> None:
        if self.trouble is None:
            self.log.warning("%s: %s; trying again", self.plan.name, error)
        self.trouble = str(error)
        await self.clock.sleep(0.5)

    def _dispatch(self, delivery: Delivery) -> None:
        """Put a delivery into its lane, or behind what its key has in the journal."""
        share = self.shares.get(delivery.partition)
        if share is None or share.gone:
            return
        message = delivery.message
        if delivery.offset not in share.flying:
            share.flying.add(delivery.offset)
            self._inflight += 1
        self._bytes += len(message.data)
        if message.type not in self.plan.routes and message.topic not in self.plan.topics:
            self.counts.skipped += 1
            self.end(share, delivery, None)
            return
        key = message.key if self.plan.ordered else None
        if delivery.redelivered and delivery.offset not in share.tries:
            share.tries[delivery.offset] = Try(f"{delivery.offset:020d}")
        if key is None:
            self.make_ready(Lane(share, None, delivery))
            return
        lane = share.lanes.get(key)
        if lane is None:
            lane = share.lanes[key] = Lane(share, key, delivery)
            self.make_ready(lane)
        elif lane.held or lane.stored or lane.due:
            self.parking.store(lane, [delivery])
        elif lane.head is None and not lane.busy:
            lane.head = delivery
            self.make_ready(lane)
        elif lane.rest is None:
            lane.rest = deque((delivery,))
        else:
            lane.rest.append(delivery)

    def make_ready(self, lane: Lane) -> None:
        assert lane.head is not None
        route = self.plan.route(lane.head.message) if self._batches else None
        if route is None or route.handler.batch is None:
            self.ready.append(lane)
            return
        route.pending.append(lane)
        arm(self, route)

    def _unclog(self) -> None:
        """The window is full: move events that wait behind a running one to the journal, so that other keys go on."""
        if self.ready or self.running >= self.most:
            return
        for share in list(self.shares.values()):
            for lane in share.lanes.values():
                if lane.rest:
                    self.parking.store_all(lane)

    def _make_room(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    # ---- runners ------------------------------------------------------------------------------------------------

    def poke(self) -> None:
        """See at the next turn of the loop whether another runner is needed: only if one suspended with work left."""
        if not self._poking and self.ready:
            self._poking = True
            self.loop.call_soon(self._wake_runner)

    def _wake_runner(self) -> None:
        self._poking = False
        self._turned = self.loop.time()
        if not self.ready or self.stopping or self.hold.reason is not None or self.running >= self.most:
            return
        if self._resting:  # it goes on by itself; one more each time would make the turns of the loop long
            return
        while self._idle:
            idle = self._idle.pop()
            if not idle.done():
                idle.set_result(None)
                return
        if len(self.runners) < self.most:
            task = asyncio.create_task(self._run(), name=f"stentor runner {self.plan.name}")
            self.runners[task] = None
            task.add_done_callback(self._runner_ended)

    def _runner_ended(self, task: asyncio.Task[None]) -> None:
        self.runners.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            assert error is not None
            self.failure = error
            self.log.error("a runner of %s failed", self.plan.name, exc_info=error)
            self.runtime.fatal(error)

    async def _run(self) -> None:  # noqa: C901 - in one piece, as each part of it would be a frame above every handler
        """A runner: takes ready lanes and runs their heads, one after the other."""
        task = asyncio.current_task()
        assert task is not None
        ready, meter, hold, consumer, now = self.ready, self.meter, self.hold, self.consumer, self.loop.time
        turn = 0
        while True:
            turn += 1
            if ready and (turn & self.spell == 0 or now() > self._turned + STRETCH):
                self._resting += 1
                await asyncio.sleep(0)  # with nothing in hand: a lane that is neither ready nor done counts as stuck
                self._resting -= 1
                self._turned = now()
            may = self.turn is None or self.turn.mine()
            if not may or not ready or hold.reason is not None or self.running >= self.most:
                idle = self.loop.create_future()
                self._idle.append(idle)
                await idle
                turn = 0
                continue
            if now() > consumer.until:
                await consumer.sure()
                continue
            entry = ready.popleft()
            if ready and not self._poking:
                self.poke()
            if self.stopping:
                continue
            if type(entry) is Route:
                await run_batch(self, entry, task)
                continue
            lane: Lane = entry  # type: ignore[assignment]
            share = lane.share
            delivery = lane.head
            if share.gone or delivery is None or (self.pace is not None and not self.pace.begin(lane)):
                continue
            lane.busy = True
            share.running += 1
            self.running += 1
            self.runners[task] = lane
            attempt = share.tries.get(delivery.offset) if share.tries else None
            message = delivery.message
            route = self.plan.routes.get(message.type) or self.plan.topics[message.topic]
            context: Context | None = None
            try:
                if attempt is not None and not await self.parking.begin(lane, route, delivery, attempt):
                    continue
                lane.since = self.loop.time()
                event = private(message) if route.spec is None else self.catalog.read(route.spec, message)
                handler = route.handler
                if (handler.where is not None and not handler.where(event)) or (
                    handler.where_sql is not None and not handler.where_sql(message.attributes())
                ):
                    self.counts.skipped += 1
                    self.end(share, delivery, lane)
                    continue
                context = (
                    Context(self, delivery, 1, None)
                    if attempt is None
                    else Context(self, delivery, attempt.before + 1, attempt.state)
                )
                token = current.set(context)
                try:
                    if handler.timeout is None:
                        result = await route.invoke(event, context)
                    else:
                        async with self.clock.timeout(handler.timeout):
                            result = await route.invoke(event, context)
                finally:
                    current.reset(token)
                    meter.left -= 1
                    if meter.left <= 0:
                        meter.took(lane.since, message)
                if self.limiter is not None:
                    learn(self, self.limiter, lane.since)
                if self.circuit is not None:
                    self.circuit.worked()
                if result is not None:
                    context.add(result)
                self.counts.handled += 1
                self.end(share, delivery, lane, context.outputs)
            except asyncio.CancelledError:
                self.release(lane)
                raise
            except ThreadStillRuns as thread:
                await asyncio.wait([thread.future])
                if self.stopping and (route.handler.timeout is None):
                    self.release(lane)
                else:
                    self.failed(lane, route, delivery, TimeoutError(f"no end within {route.handler.timeout:g} s"))
            except BaseException as error:
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    self.release(lane)
                    raise
                if self.limiter is not None and isinstance(error, TimeoutError):
                    learn(self, self.limiter, lane.since)
                if isinstance(error, TimeoutError) and not error.args and route.handler.timeout is not None:
                    error = TimeoutError(f"no end within {route.handler.timeout:g} s")
                self.failed(lane, route, delivery, error)
            finally:
                share.running -= 1
                self.running -= 1
                self.runners[task] = None
                if share.gone or self.stopping:
                    self.note_shares()
                    self.note_quiet()

    async def progress(self, delivery: Delivery, progress: Progress) -> None:
        """Journal how far a handler has come; called by its Context."""
        share = self.shares.get(delivery.partition)
        if share is None:
            raise LeaseLost(f"{delivery.partition!r} is no longer owned")
        attempt = share.tries.setdefault(delivery.offset, Try(f"{delivery.offset:020d}"))
        await self.write(delivery.partition, {f"p/{attempt.name}": encode_progress(progress)})

    def release(self, lane: Lane) -> None:
        """A stop cut the handler off: the broker gives it to the next owner, as if it had not begun."""
        lane.busy = False
        attempt = None if lane.head is None else lane.share.tries.get(lane.head.offset)
        if attempt is not None and attempt.started:
            record = {f"a/{attempt.name}": str(attempt.starts).encode() if attempt.starts else None}
            self.add(Settlement(lane.share.partition, 0, Outcome.NONE, (), record), None)

    # ---- ends of a delivery -------------------------------------------------------------------------------------

    def end(self, share: Share, delivery: Delivery, lane: Lane | None, outputs: Sequence[Message] = ()) -> None:
        """A delivery is done: publish its outputs, ack it, and let its lane go on (after the outputs are durable)."""
        attempt = share.tries.pop(delivery.offset, None) if share.tries else None
        outcome = Outcome.ACK
        records: dict[str, bytes | None] = {}
        if attempt is not None:
            outcome, records = self.parking.cleared(attempt)
        settlement = Settlement(share.partition, delivery.offset, outcome, outputs, records)
        if lane is None:
            self.add(settlement, None)
        elif not outputs:
            self.add(settlement, None)
            self.advance(lane)
        else:

            def after(error: StentorError | None) -> None:
                if error is None:
                    self.advance(lane)
                elif not isinstance(error, LeaseLost):
                    # One refused output fails its delivery: it is this attempt's error.
                    if attempt is not None:
                        share.tries[delivery.offset] = attempt
                    self.counts.handled -= 1
                    route = self.plan.route(delivery.message)
                    assert route is not None
                    self.failed(lane, route, delivery, error)

            lane.ending = True
            self.add(settlement, after)

    def advance(self, lane: Lane) -> None:
        """The head is done: let the next of the key run."""
        lane.busy = lane.ending = False
        share = lane.share
        if share.gone:
            return
        if lane.rest:
            lane.head = lane.rest.popleft()
            self.make_ready(lane)
            self.poke()
            return
        lane.head = None
        self.parking.proceed(lane)

    def failed(self, lane: Lane, route: Route, delivery: Delivery, error: BaseException) -> None:
        """A handling ended in an error: retry it later, hold it, or give it up."""
        retry = route.handler.retry
        attempt = lane.share.tries.get(delivery.offset)
        count = (attempt.before if attempt else 0) + 1
        if isinstance(error, RetryLater):
            after = retry.wait(count) if error.after is None else error.after
            if error.count and retry.attempts is not None and count >= retry.attempts:
                last = error.__cause__ or RuntimeError("ctx.retry at the last attempt")
                self.parking.die(lane, delivery, last, "attempts", count)
            else:
                self._retry(lane, delivery, attempt, after, error.__cause__, counts=error.count)
        elif isinstance(error, Dead):
            self.parking.die(lane, delivery, error, error.reason, count)
        elif isinstance(error, NewerVersion) and route.spec is not None and route.spec.newer != "dead":
            self.log.warning("%s: %s; held until a newer program runs", self.plan.name, error)
            self.parking.park(lane, delivery, attempt, waits=True)
        elif isinstance(error, Undecodable):
            self.parking.die(lane, delivery, error, "undecodable", count)
        elif self.circuit is not None and (away := self.circuit.failed(error)) is not None:
            self._retry(lane, delivery, attempt, away, error, counts=False)
        elif retry.gives_up(error, count):
            reason = "attempts" if retry.attempts is not None and count >= retry.attempts else "never"
            self.parking.die(lane, delivery, error, reason, count)
        else:
            self.counts.failed += 1
            wait = retry.wait(count)
            self.log.warning(
                "%s: attempt %d of %s failed, again in %.3g s: %s: %s",
                self.plan.name, count, delivery.message.id, wait, type(error).__name__, error,
            )  # fmt: skip
            self._retry(lane, delivery, attempt, wait, error, counts=True)

    def _retry(
        self,
        lane: Lane,
        delivery: Delivery,
        attempt: Try | None,
        wait: float,
        error: BaseException | None,
        *,
        counts: bool,
    ) -> None:
        self.counts.retried += 1
        if attempt is None:
            attempt = lane.share.tries[delivery.offset] = Try(f"{delivery.offset:020d}")
        attempt.failures = attempt.before + (1 if counts else 0)
        if error is not None:
            attempt.errors = [*attempt.errors, self.parking.record(error)][-ERRORS_KEPT:]
        self.parking.park(lane, delivery, attempt, due=self.clock.now() + wait)

    # ---- settling -----------------------------------------------------------------------------------------------

    def add(self, settlement: Settlement, after: After | None) -> None:
        self._batch.append((settlement, after))
        self._ended.set()
        if after is not None or settlement.records or len(self._batch) >= FEW or self.stopping or self._revoking:
            self._awaited.set()

    async def _settle(self) -> None:
        """Settle whatever has ended since the last batch."""
        pause = PAUSE if self._broker.features.shared else 0.0
        rested = 0.0
        while True:
            if not self._batch:
                self.note_shares()
                self.note_quiet()
                self._ended.clear()
                await self._ended.wait()
            if (rest := rested - self.loop.time()) > 0 and not self._awaited.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rest):
                        await self._awaited.wait()
            rested = self.loop.time() + pause
            self._awaited.clear()
            batch = self._settling = self._batch
            self._batch = []
            began = self.loop.time()
            failures = await self._settled([settlement for settlement, _ in batch])
            self.meter.settle(self.loop.time() - began, len(batch))
            before = self._inflight
            failed = {id(failure.settlement): failure.error for failure in failures} if failures else {}
            refused: list[tuple[Settlement, After | None]] = []
            for settlement, after in batch:
                error = failed.get(id(settlement)) if failed else None
                if error is not None and not settlement.outputs and not isinstance(error, LeaseLost):
                    refused.append((settlement, after))
                    continue
                if settlement.outcome is Outcome.ACK and (error is None or isinstance(error, LeaseLost)):
                    share = self.shares.get(settlement.partition)
                    if share is not None and settlement.offset in share.flying:
                        share.flying.remove(settlement.offset)
                        self._inflight -= 1
                if isinstance(error, LeaseLost):
                    self.counts.refused += 1
                if after is not None:
                    after(error)
            self._settling = []
            if refused:  # no event's fault (there is no room, say), and nothing goes on without it
                self._batch[:0] = refused
                await self._troubled(failed[id(refused[0][0])])
            if self._revoking:
                self.note_shares()
            if before:  # sizes are not kept per delivery: what is settled had the mean size
                self._bytes = self._bytes * self._inflight // before
            if self._inflight <= WINDOW // 2:
                self._make_room()

    async def _settled(self, settlements: list[Settlement]) -> Sequence[Failure]:
        while True:
            try:
                if self.runtime.undeclared:
                    await self.runtime.declare()
                failures = await self.consumer.settle(settlements)
            except StentorError as error:
                await self._troubled(error)
            else:
                self.trouble = None
                return failures

    # ---- the journal --------------------------------------------------------------------------------------------

    async def write(
        self, partition: Partition, records: dict[str, bytes | None], outputs: Sequence[Message] = ()
    ) -> None:
        """Write journal records and outputs under a partition's epoch; back when durable. Raises BrokerError."""
        done: asyncio.Future[StentorError | None] = self.loop.create_future()
        self.add(
            Settlement(partition, 0, Outcome.NONE, outputs, records),
            lambda error: None if done.done() else done.set_result(error),
        )
        error = await done
        if error is not None:
            raise error

    async def _tick(self) -> None:
        """Once a second: apply marks, move what runs for long out of the log, look for a clogged window."""
        while True:
            await self.clock.pause(1.0)
            try:
                await self.parking.apply(await self.consumer.marks())
            except StentorError as error:
                self.log.warning("%s: cannot apply marks: %s", self.group, error)
            self.parking.escape()
            self.meter.tick(self.counts.handled + self.counts.retried + self.counts.dead)
            if self._room is not None:
                self._unclog()
            if self.pace is not None:
                await self.pace.share(self._broker)
