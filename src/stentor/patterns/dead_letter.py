"""Dead letters for operators: look at them, run them again, or drop them, on any broker.

A dead letter stays in its topic for good; looking at it consumes nothing. What became of it stands in the journal of
the partition its event came from: ``d/<id>`` once it was redriven or dropped, ``m/<id>`` while a wish waits for the
owner of the partition. Only the owner acts (see parking.py), so that an event comes back among the others of its key.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Literal

import msgspec
from msgspec import Struct

from stentor.broker import Broker
from stentor.errors import StentorError, UnknownGroup, UnknownTopic, Unsupported
from stentor.message import DeadLetter, ErrorRecord, dead_topic, decode_dead_letter
from stentor.parking import Wish, decode_wish, encode_wish

Status = Literal["open", "pending", "redriven", "dropped"]
"""open: nobody asked for anything; pending: a wish waits for the owner; redriven, dropped: it was carried out."""

Journals = dict[tuple[str, str, int], tuple[dict[str, bytes], dict[str, bytes]]]
PREFIX = dead_topic("")
TOGETHER = 64
"""Marks written at once, so that a broker with group commit stores them together."""


class UnknownDeadLetter(StentorError):
    """No dead letter has this id, or several ids begin like this."""


class Entry(Struct, frozen=True):
    """A dead letter, its place in the dead-letter topic, and what became of it.

    ``wish`` is what a pending one waits for: "redrive" or "drop".
    """

    letter: DeadLetter
    place: int
    status: Status
    wish: Literal["redrive", "drop", ""] = ""

    @property
    def error(self) -> ErrorRecord | None:
        """The last error, if there was one."""
        return self.letter.errors[-1] if self.letter.errors else None


class Filter(Struct, frozen=True, kw_only=True):
    """Which dead letters are meant; what is left out matches all.

    ``id`` may be the beginning of one. ``error`` is looked for in "<class>: <text>" of the last error and ``reason``
    in the reason, both whatever the case; ``since`` and ``until`` bound the time of death.
    """

    id: str | None = None
    group: str | None = None
    topic: str | None = None
    type: str | None = None
    key: str | None = None
    error: str | None = None
    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    status: Sequence[Status] = ("open", "pending")

    def matches(self, letter: DeadLetter) -> bool:
        """Whether a letter is meant, its status aside."""
        message = letter.message
        wanted = ((self.topic, message.topic), (self.type, message.type), (self.key, message.key))
        if any(want is not None and want != have for want, have in wanted):
            return False
        if self.id is not None and not letter.id.startswith(self.id):
            return False
        if self.reason is not None and self.reason.lower() not in letter.reason.lower():
            return False
        if self.error is not None:
            last = letter.errors[-1] if letter.errors else None
            if last is None or self.error.lower() not in f"{last.type}: {last.text}".lower():
                return False
        if self.since is not None and letter.time < self.since.timestamp():
            return False
        return self.until is None or letter.time <= self.until.timestamp()


class DeadLetters:
    """The dead letters on an open broker. Raises Unsupported where topics cannot be browsed."""

    def __init__(self, broker: Broker) -> None:
        if not broker.features.browse:
            raise Unsupported("dead-letter browsing", broker.features.name, "use the broker's own tools")
        self._broker = broker

    async def groups(self) -> list[str]:
        """The groups that have a dead-letter topic, also those that were dropped since."""
        topics = await self._broker.admin.topics()
        return [topic.name.removeprefix(PREFIX) for topic in topics if topic.name.startswith(PREFIX) and topic.events]

    async def find(self, which: Filter | None = None) -> AsyncIterator[Entry]:
        """The dead letters that a filter means, by default all open and pending ones; oldest first in each group.

        Raises UnknownGroup when the filter names a group that neither exists nor left dead letters.
        """
        which = which or Filter()
        journals: Journals = {}
        for group in await self._chosen(which):
            async for place, letter in self._letters(group):
                if which.matches(letter):
                    status, wish = await self._status(letter, journals)
                    if status in which.status:
                        yield Entry(letter, place, status, wish)

    async def get(self, id: str, group: str | None = None) -> Entry:
        """The dead letter of an id, or of the beginning of one. Raises UnknownDeadLetter, UnknownGroup."""
        found: Entry | None = None
        async for entry in self.find(Filter(id=id, group=group, status=("open", "pending", "redriven", "dropped"))):
            if entry.letter.id == id:
                return entry
            if found is not None and found.letter.id != entry.letter.id:
                raise UnknownDeadLetter(f"several dead letters begin with {id!r}; give more of the id")
            found = entry
        if found is None:
            raise UnknownDeadLetter(f"no dead letter {id!r}" + (f" in group {group}" if group else ""))
        return found

    async def redrive(
        self, which: Filter | str, *, dry_run: bool = False, progress: Callable[[int], None] | None = None
    ) -> dict[str, int]:
        """Ask that dead letters run again in their group; returns how many by group.

        Those redriven or dropped before, or asked for already, are passed over, so that repeating it changes nothing.
        It is back when the wishes are durable; the owners of the partitions act on them within seconds, or when the
        group runs next. ``progress`` is called with the number of wishes stored so far.

        Raises:
            UnknownDeadLetter: there is none of this id.
            UnknownGroup: the group is not declared (any more), so that nobody would act.
        """
        return await self._ask("redrive", which, dry_run, progress)

    async def drop(
        self, which: Filter | str, *, dry_run: bool = False, progress: Callable[[int], None] | None = None
    ) -> dict[str, int]:
        """Ask that dead letters be given up: never redriven, and a parked key goes on behind them; else as redrive."""
        return await self._ask("drop", which, dry_run, progress)

    async def _ask(
        self,
        wish: Literal["redrive", "drop"],
        which: Filter | str,
        dry_run: bool,
        progress: Callable[[int], None] | None,
    ) -> dict[str, int]:
        if isinstance(which, str):
            entry = await self.get(which)
            which = Filter(id=entry.letter.id, group=entry.letter.group)
        # The places first, the wishes after: what dies again meanwhile is no part of this.
        chosen: dict[str, list[int]] = {}
        async for entry in self.find(which):
            if entry.wish != wish:
                chosen.setdefault(entry.letter.group, []).append(entry.place)
        declared = {group.name for group in await self._broker.admin.groups()}
        for group in chosen:
            if group not in declared:
                raise UnknownGroup(
                    f"group {group!r} has dead letters but is not declared, so nobody would {wish} them; declare it "
                    f"again (a group takes over another's with was=), or leave it out"
                )
        if not dry_run:
            await self._mark(chosen, wish == "redrive", progress)
        return {group: len(places) for group, places in chosen.items()}

    async def _mark(self, chosen: dict[str, list[int]], redrive: bool, progress: Callable[[int], None] | None) -> None:
        done = 0
        admin = self._broker.admin
        for group, places in chosen.items():
            wanted, last, waiting = set(places), places[-1], []
            async with aclosing(self._letters(group, places[0])) as letters:
                async for place, letter in letters:
                    if place in wanted:
                        home = (group, letter.message.topic, letter.partition)
                        value = encode_wish(Wish(redrive=redrive, letter=letter))
                        waiting.append(admin.mark(*home, f"m/{letter.id}", value))
                    if len(waiting) == TOGETHER or place >= last:
                        await asyncio.gather(*waiting)
                        done += len(waiting)
                        waiting.clear()
                        if progress is not None:
                            progress(done)
                    if place >= last:
                        break

    async def _chosen(self, which: Filter) -> list[str]:
        groups = await self.groups()
        if which.group is None:
            return groups
        if which.group in groups:
            return [which.group]
        declared = [group.name for group in await self._broker.admin.groups()]
        if which.group not in declared:
            raise UnknownGroup(f"no group {which.group!r}; there are {', '.join(sorted(declared)) or 'none'}")
        return []

    async def _letters(self, group: str, start: int | None = None) -> AsyncGenerator[tuple[int, DeadLetter], None]:
        try:
            async for place, message in self._broker.browse(
                dead_topic(group), "earliest" if start is None else start, follow=False
            ):
                letter = decode_dead_letter(message.data)
                if letter.group != group:  # the group was renamed since
                    letter = msgspec.structs.replace(letter, group=group)
                yield place, letter
        except UnknownTopic:
            return

    async def _status(self, letter: DeadLetter, known: Journals) -> tuple[Status, Literal["redrive", "drop", ""]]:
        home = (letter.group, letter.message.topic, letter.partition)
        if home not in known:
            admin = self._broker.admin
            try:
                known[home] = await admin.journal(*home, "d/"), await admin.journal(*home, "m/")
            except UnknownGroup:
                known[home] = {}, {}
        done, marks = known[home]
        outcome = done.get(f"d/{letter.id}")
        if outcome is not None:
            return ("redriven" if outcome == b"redriven" else "dropped"), ""
        mark = marks.get(f"m/{letter.id}")
        if mark is None:
            return "open", ""
        return "pending", "redrive" if decode_wish(mark).redrive else "drop"
