"""A member of a group on a server: the partitions it owns, what it reads of them, and how it settles."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from zlib import crc32

import msgspec
from msgspec import Struct

from stentor.broker import FETCH_BYTES, Owner
from stentor.brokers.heartbeat import members_of
from stentor.brokers.storage import Entry, Held, ShutOut, Write
from stentor.brokers.track import Track, quota
from stentor.errors import LeaseLost, PublishUnknown, StentorError, StorageFull, Unavailable
from stentor.message import Delivery, Failure, Mark, Outcome, Partition, Settlement, new_id
from stentor.subscription import Subscription

if TYPE_CHECKING:
    from stentor.brokers.log import LogBroker


class Ownership(Struct, frozen=True, array_like=True):
    """Who owns a partition of a group: its bytes are the fence. No ``member``: it is free, and was let go in order."""

    epoch: int
    member: str = ""


class Place(Struct, array_like=True):
    """A group's place in a partition: all below ``prefix`` is settled, ``done`` above it too."""

    prefix: int
    done: list[int] = []
    replay: str = ""
    until: int = 0


_NOBODYS_FAULT = (Unavailable, PublishUnknown, StorageFull)

encode = msgspec.msgpack.encode
decode_ownership = msgspec.msgpack.Decoder(Ownership).decode
decode_place = msgspec.msgpack.Decoder(Place).decode


def _place(track: Track, settled: Sequence[int] = ()) -> bytes:
    prefix, done = track.with_settled(settled) if settled else (track.prefix, track.done)
    return encode(Place(prefix, sorted(done), track.replay, track.replay_until))


def free_owner(offset: int) -> dict[str, bytes | None]:
    """The entries of a space at its beginning."""
    return {"!owner": encode(Ownership(0)), "!place": encode(Place(offset))}


class LogConsumer:
    """A member of a group, with the partitions it owns."""

    def __init__(
        self,
        broker: LogBroker,
        subscription: Subscription,
        owner: Owner,
        group: str,
        partitions: dict[str, int],
        stored: dict[str, str],
    ) -> None:
        self.broker = broker
        self.subscription = subscription
        self.owner = owner
        self.group = group
        self.member = new_id()
        self.closed = False
        self.held: dict[Partition, Held] = {}
        self._stored = stored
        self._cells = [(name, index) for name, count in partitions.items() for index in range(count)]
        self._counts = partitions
        self._lock = asyncio.Lock()
        self._reader = broker.reader()
        self._balancing: asyncio.Task[None] | None = None
        self._nudge = asyncio.Event()
        self._lapses = 0
        """The lapses of the lease after which it was looked at what is still owned."""
        self._size = 2.0**20
        """The size of a message, a running mean that starts high: what one read brings must be bounded."""

    async def start(self) -> None:
        self.broker.consumers.append(self)
        self.broker.heartbeat.members[self.member] = self.group
        await self.broker.heartbeat.now()
        await self.balance()
        self._balancing = asyncio.create_task(self._keep_balance(), name=f"stentor balance {self.subscription.name}")

    @property
    def until(self) -> float:
        """When the lease runs out; once it did, others may own what was owned here until it was looked at."""
        heartbeat = self.broker.heartbeat
        return heartbeat.until if heartbeat.lapses == self._lapses else 0.0

    async def sure(self) -> None:
        while time.monotonic() > self.until and not (self.closed or self.broker.closed):
            self._nudge.set()
            await self.broker.clock.sleep(0.02)

    # ---- ownership --------------------------------------------------------------------------------------------------

    async def _keep_balance(self) -> None:
        while not self.closed:  # a client library may swallow the cancellation
            try:
                async with asyncio.timeout(min(self.broker.beat / 2, 0.5)):
                    await self._nudge.wait()
                    self._nudge.clear()
            except TimeoutError:
                pass
            try:
                await self.balance()
            except StentorError:
                await self.broker.clock.sleep(0.5)

    async def balance(self) -> None:
        """Let go of what others own by now or should own, take what is free, up to this member's share."""
        async with self._lock:
            if self.closed:
                return
            living = members_of(await self.broker.leases())
            if self.member not in living:  # silent for too long: come back
                await self.broker.heartbeat.now()
                living = members_of(await self.broker.leases())
                if self.member not in living:
                    return
            lapses = self.broker.heartbeat.lapses
            members = sorted(member for member, group in living.items() if group == self.group)
            spaces = [self.broker.space(self.group, name, index) for name, index in self._cells]
            await self.broker.before_claims(spaces, living, self.member)
            values = await self.broker.get([(space, "!owner") for space in spaces])
            cells = dict(zip(self._cells, values, strict=True))
            mine = {(held.name, held.index): held for held in self.held.values()}
            self.lose([held for cell, held in mine.items() if cells[cell] != held.fence])
            self._lapses = lapses
            mine = {cell: held for cell, held in mine.items() if held.partition in self.held}
            surplus: list[Held] = []
            gained: list[tuple[str, int, bytes]] = []
            for name, count in self._counts.items():
                owned = [cell for cell in mine if cell[0] == name]
                fair = self._share(members, name, count)
                surplus += [mine[cell] for cell in owned[fair:]]
                free = [
                    (name, index, value)
                    for index in range(count)
                    if (name, index) not in mine
                    and (value := cells[name, index]) is not None
                    and self._free(value, living)
                ]
                # What was ours and could not be given back, beyond the share too: nobody else may take it. It is held
                # again, and let go of in order.
                strays = [cell for cell in free if decode_ownership(cell[2]).member == self.member]
                others = [cell for cell in free if cell not in strays]
                gained += strays + others[: max(0, fair - len(owned) - len(strays))]
            if surplus:
                await self._give_up(surplus)
            if gained:
                claimed = [self.broker.space(self.group, name, index) for name, index, _ in gained]
                await self.broker.before_claims(claimed, living, self.member)
                await self._take(gained)

    def _share(self, members: list[str], topic: str, count: int) -> int:
        """How many partitions of a topic are this member's; topics begin with different members."""
        if self.subscription.single:
            return quota(members, self.member, count, single=True)
        turn = crc32(topic.encode()) % len(members)
        ranked = members[turn:] + members[:turn]
        rank = ranked.index(self.member)
        return count // len(ranked) + (1 if rank < count % len(ranked) else 0)

    def _free(self, value: bytes, living: dict[str, str]) -> bool:
        # Also what the server says is this member's and it does not hold: it begins anew, under a new epoch.
        member = decode_ownership(value).member
        return not member or member not in living or member == self.member

    async def _take(self, gained: Sequence[tuple[str, int, bytes]]) -> None:
        """Claim free partitions; the worker loads their journals before anything of them is read."""
        claims = []
        for name, index, value in gained:
            was = decode_ownership(value)
            fence = encode(Ownership(was.epoch + 1, self.member))
            space = self.broker.space(self.group, name, index)
            claims.append((name, index, was, fence, Write(space, ("!owner", value), {"!owner": fence})))
        won = await self.broker.write([write for *_, write in claims])
        claims = [claim for claim, ours in zip(claims, won, strict=True) if ours]
        places = await self.broker.get([(write.space, "!place") for *_, write in claims])
        fresh: list[Held] = []
        for (name, index, was, fence, write), stored in zip(claims, places, strict=True):
            place = Place(0) if stored is None else decode_place(stored)
            partition = Partition(name, index, was.epoch + 1, clean=not was.member)
            [(_, end)] = [(0, 0)] if partition.clean else await self.broker.bounds(self._stored[name], [index])
            track = Track(partition, place.prefix, place.done, known=end, replay=place.replay, replay_until=place.until)
            held = Held(name, self._stored[name], write.space, track, fence)
            fresh.append(held)
        # Only now, as from here on they are given back when something fails: what the server says is ours and is not
        # among the held is taken again.
        self.held.update({held.partition: held for held in fresh})
        try:
            await self.owner.assigned([held.partition for held in fresh])
        except StentorError:
            self.owner.lost([held.partition for held in fresh])
            await self._release(fresh)
            raise
        for held in fresh:
            if held.partition in self.held:
                self._reader.seek(held, held.track.prefix)

    async def _give_up(self, surplus: Sequence[Held]) -> None:
        """Let the worker finish what runs of partitions, then free them."""
        await self.owner.revoked([held.partition for held in surplus])
        await self._release(surplus)

    async def _release(self, released: Iterable[Held]) -> None:
        writes = []
        for held in released:
            if self.held.pop(held.partition, None) is None:
                continue
            self._reader.drop(held)
            was = decode_ownership(held.fence)
            changes: dict[str, bytes | None] = {"!owner": encode(Ownership(was.epoch))}
            if not held.track.moved:  # else it is ahead of what was stored, outputs and journal included
                changes["!place"] = _place(held.track)
            writes.append(Write(held.space, ("!owner", held.fence), changes))
        if writes:
            await self.broker.write(writes)

    def lose(self, lost: Sequence[Held]) -> None:
        """Others own these by now."""
        if not lost:
            return
        for held in lost:
            self.held.pop(held.partition, None)
            self._reader.drop(held)
        self.owner.lost([held.partition for held in lost])
        self._nudge.set()

    # ---- reading ----------------------------------------------------------------------------------------------------

    async def fetch(self, limit: int, wait: float) -> Sequence[Delivery]:
        if self.closed:
            return ()
        if self.broker.closed:
            raise Unavailable(f"{self.broker} was closed under its consumers")
        room = max(1, min(limit, int(FETCH_BYTES / self._size)))
        found: list[Delivery] = []
        size = 0
        reads = await self._reader.read(room, wait)
        if reads and time.monotonic() > self.until:
            await self.sure()
        for held, offset, message in reads:
            track = held.track
            if self.held.get(track.partition) is held and track.take(offset):
                seen = track.seen(offset) if track.suspects else False
                replay = track.replay if offset < track.replay_until else ""
                size += len(message.data)
                found.append(Delivery(message, track.partition, offset, seen, replay))
        if found:
            self._size = max(256.0, 0.5 * self._size + 0.5 * size / len(found))
        return found

    # ---- settling ---------------------------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Failure]:
        failures: list[Failure] = []
        accepted: list[Settlement] = []
        outputs: dict[int, list[Entry]] = {}
        for settlement in settlements:
            if settlement.partition not in self.held or self.closed:
                failures.append(Failure(settlement, LeaseLost(f"{settlement.partition!r} is no longer owned")))
                continue
            if settlement.outputs:
                try:
                    now = self.broker.clock.now()
                    outputs[id(settlement)] = [await self.broker.entry(m, now) for m in settlement.outputs]
                except StentorError as error:
                    failures.append(Failure(settlement, error))
                    continue
            accepted.append(settlement)
        if outputs and not self.broker.features.atomic:
            accepted = await self._publish(accepted, outputs, failures)
            outputs = {}
        await self._write(accepted, outputs, failures)
        return failures

    async def _publish(
        self, settlements: Sequence[Settlement], outputs: dict[int, list[Entry]], failures: list[Failure]
    ) -> list[Settlement]:
        """Outputs before the rest; the settlements whose outputs are all stored."""
        flat = [entry for settlement in settlements for entry in outputs.get(id(settlement), ())]
        results = iter(await self.broker.store(flat))
        stored = []
        for settlement in settlements:
            errors = [r for _ in outputs.get(id(settlement), ()) if not isinstance(r := next(results), int)]
            if not errors:
                stored.append(settlement)
            elif isinstance(errors[0], (Unavailable, PublishUnknown)):
                raise Unavailable(f"outputs are not confirmed: {errors[0]}")  # no event's fault; they are sent again
            else:
                failures.append(Failure(settlement, errors[0]))
        return stored

    async def _write(
        self, settlements: Sequence[Settlement], outputs: dict[int, list[Entry]], failures: list[Failure]
    ) -> None:
        """Records and places, a write for each partition that has any; with outputs nothing counts before it stands."""
        changes: dict[Partition, dict[str, bytes | None]] = {}
        entries: dict[Partition, list[Entry]] = {}
        acked: dict[Partition, list[int]] = {}
        for settlement in settlements:
            partition = settlement.partition
            held = self.held.get(partition)
            if held is None:
                continue  # lost while outputs were stored; told below
            if settlement.outcome is Outcome.ACK:
                if outputs:
                    acked.setdefault(partition, []).append(settlement.offset)
                else:
                    held.track.settle(settlement.offset)
            if settlement.records:
                changes.setdefault(partition, {}).update(settlement.records)
            if id(settlement) in outputs:
                entries.setdefault(partition, []).extend(outputs[id(settlement)])
        writes: dict[Partition, Write] = {}
        for partition in {settlement.partition for settlement in settlements} & self.held.keys():
            held = self.held[partition]
            change = changes.get(partition, {})
            if held.track.moved or partition in acked:
                change["!place"] = _place(held.track, acked.get(partition, ()))
            if change or partition in entries:
                writes[partition] = Write(held.space, ("!owner", held.fence), change, entries.get(partition, ()))
        try:
            stood = await self._carry(writes, acked)
        except StentorError as error:
            if not entries or isinstance(error, _NOBODYS_FAULT):
                raise
            await self._apart(settlements, outputs, failures, error)
            return
        failures += [
            Failure(settlement, LeaseLost(f"{settlement.partition!r} was taken over"))
            for settlement in settlements
            if settlement.partition not in stood and settlement.partition not in self.held
        ]

    async def _carry(self, writes: dict[Partition, Write], acked: dict[Partition, list[int]]) -> set[Partition]:
        """Those of them that stood; the others are lost."""
        if not writes:
            return set()
        written = {partition: self.held[partition] for partition in writes}
        for held in written.values():
            held.track.moved = False
        try:
            stands = await self.broker.write(list(writes.values()))
        except ShutOut:
            stands = [False] * len(writes)
            self.lose(list(self.held.values()))
        except BaseException:
            for held in written.values():
                held.track.moved = True
            raise
        stood = {partition for partition, ok in zip(writes, stands, strict=True) if ok}
        for partition in stood & acked.keys():
            track = written[partition].track
            for offset in acked[partition]:
                track.settle(offset)
            track.moved = False
        self.lose([self.held[partition] for partition in writes if partition not in stood and partition in self.held])
        return stood

    async def _apart(
        self,
        settlements: Sequence[Settlement],
        outputs: dict[int, list[Entry]],
        failures: list[Failure],
        refused: StentorError,
    ) -> None:
        """An output of some of these is refused for good: its event fails, the others are settled, in their order."""
        if len(settlements) == 1:
            failures.append(Failure(settlements[0], refused))
            return
        middle = len(settlements) // 2
        try:
            for part in (settlements[:middle], settlements[middle:]):
                own = {id(settlement) for settlement in part}
                await self._write(part, {key: made for key, made in outputs.items() if key in own}, failures)
        except StentorError:  # a part may be stored, so all of it must not be repeated
            self.lose(list(self.held.values()))
            failures += [Failure(s, LeaseLost(f"{s.partition!r} was given up")) for s in settlements]

    # ---- the journal ------------------------------------------------------------------------------------------------

    async def names(self, partition: Partition) -> list[str]:
        names = await self.broker.names(self._held(partition).space)
        return sorted(name for name in names if not name.startswith(("m/", "!")))

    async def read(self, partition: Partition, names: Sequence[str]) -> dict[str, bytes]:
        space = self._held(partition).space
        values = await self.broker.peek([(space, name) for name in names])
        return {name: value for name, value in zip(names, values, strict=True) if value is not None}

    def _held(self, partition: Partition) -> Held:
        held = self.held.get(partition)
        if held is None:
            raise LeaseLost(f"{partition!r} is no longer owned")
        return held

    async def marks(self) -> Sequence[Mark]:
        found: list[Mark] = []
        all_held = list(self.held.values())
        if not all_held:
            return found
        counts = await self.broker.get([(held.space, "!marks") for held in all_held])
        for held, count in zip(all_held, counts, strict=True):
            if count == held.marked or (count is None and held.marked == b"?"):
                continue
            names = sorted(name for name in await self.broker.names(held.space) if name.startswith("m/"))
            values = await self.broker.get([(held.space, name) for name in names])
            found += [Mark(held.partition, n, v) for n, v in zip(names, values, strict=True) if v is not None]
            if not names:
                held.marked = count
        return found

    # ---- leaving ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self._balancing is not None:
            self._balancing.cancel()
            await asyncio.gather(self._balancing, return_exceptions=True)
        async with self._lock:
            if self in self.broker.consumers:
                self.broker.consumers.remove(self)
            self.broker.heartbeat.members.pop(self.member, None)
            try:
                await self._release(list(self.held.values()))
                with contextlib.suppress(TimeoutError):  # the lease ends by itself where the server is away
                    async with asyncio.timeout(self.broker.lease):
                        await self.broker.heartbeat.now()
            finally:
                await self._reader.close()
