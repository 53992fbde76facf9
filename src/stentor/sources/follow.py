"""Following topics for many clients: one reader a topic and process, and clients that come back where they were.

A place is where a client is in a topic: the position of the last event that is behind it, or, where none is known yet
(or positions say nothing, as on Kafka), a time from which on it may lack events. A client that comes back reads by
itself until it is about where the reader is. Then it joins: what the reader reads from there on is queued, and what
lies before that it reads by itself. So nothing is left out or told twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from functools import cached_property

from stentor.broker import Start
from stentor.clock import iso
from stentor.cloudevents import attributes, to_structured
from stentor.errors import StentorError
from stentor.message import Attribute, Message
from stentor.program import Program

QUEUE = 256
"""Events that wait for a client at most; one that is slower is let go, and comes back where it was."""
REMEMBERED = 10_000
"""Events that a client has read and would be told again, at most, where positions are not comparable."""
END = 2**63
"""Behind every position."""
PATIENCE = 1.0
"""Seconds in which a new reader looks at what was stored just now."""
MARGIN = 5.0
"""Seconds by which a time is put back, for clocks that differ: events may be told twice, none is left out."""

Place = int | datetime
Places = dict[str, Place]


class Dropped(Exception):
    """The client is let go, and should come back; the text says why."""


class Told:
    """An event on its way to clients: what they share of it is made once."""

    def __init__(self, topic: str, position: int, message: Message, read: datetime) -> None:
        self.topic = topic
        self.position = position
        self.message = message
        self.read = read

    @cached_property
    def attributes(self) -> dict[str, Attribute]:
        return attributes(self.message)

    @cached_property
    def json(self) -> bytes:
        return to_structured(self.message)


class Reader:
    """Reads one topic of a running app, for all clients that are level with it."""

    def __init__(self, program: Program, topic: str) -> None:
        self.topic = topic
        self.last: int | None = None
        """The position of the last event that was read; None before the first."""
        self.clients: set[Client] = set()
        self.users = 0
        """Clients that are level with it, or on their way."""
        self.since = _just_now(program)
        self._program = program
        self._ready = asyncio.Event()
        self._failure: BaseException | None = None
        self.task = asyncio.create_task(self._run(), name=f"stentor follows {topic}")

    async def ready(self) -> None:
        """Back when whatever is stored from now on will be read. Raises Dropped."""
        await self._ready.wait()
        if self._failure is not None:
            raise Dropped(f"{self.topic} cannot be read: {self._failure}")

    async def _run(self) -> None:
        try:
            # What was stored just now is read, and told to nobody; so the place to follow from is a known one.
            known = set()
            begun, now = self._program.clock.monotonic(), iso(self._program.clock.now())
            async with aclosing(self._browse(follow=False)) as recent:
                async for position, message in recent:
                    # Where events keep coming there is no end: what was published since need not be known.
                    if (message.time or "") >= now or self._program.clock.monotonic() - begun > PATIENCE:
                        break
                    known.add(position)
                    self.last = position
            self._ready.set()
            async for position, message in self._browse(follow=True):
                if position in known:
                    known.discard(position)
                    continue
                self.last = position
                told = Told(self.topic, position, message, _just_now(self._program))
                for client in tuple(self.clients):
                    client.offer(told)
        except StentorError as error:
            self._failure = error
        finally:
            self._ready.set()
            for client in tuple(self.clients):
                client.drop(f"{self.topic} cannot be read now")

    async def _browse(self, *, follow: bool) -> AsyncGenerator[tuple[int, Message]]:
        async for found in self._program.broker.browse(self.topic, self.since, follow=follow):
            yield found


class Client:
    """One client's way through some topics."""

    def __init__(self, program: Program, wants: Callable[[Told], bool], topics: list[str], places: Places) -> None:
        self.places: Places = {topic: place for topic, place in places.items() if topic in topics}
        self._program = program
        self._wants = wants
        self.topics = topics
        self._queue: deque[Told] = deque()
        self._first: dict[str, int] = {}
        """The first position that was queued, by topic: what lies before it is read by itself."""
        self._news = asyncio.Event()
        self._dropped: str | None = None

    def offer(self, told: Told) -> None:
        """Queue an event, unless the client is behind it already."""
        place = self.places[told.topic]
        if isinstance(place, int) and self._ordered and told.position <= place:
            return
        if len(self._queue) >= QUEUE:
            self.drop(f"{QUEUE} events wait for you; come back and go on from where you were")
        elif self._dropped is None:
            self._first.setdefault(told.topic, told.position)
            self._queue.append(told)
            self._news.set()

    def drop(self, why: str) -> None:
        """Let it go once it has been told what waits."""
        self._dropped = self._dropped or why
        self._news.set()

    @property
    def _ordered(self) -> bool:
        return self._program.broker.features.one_order

    def _pass(self, told: Told) -> bool:
        """Move its place behind an event; whether it wants the event."""
        self.places[told.topic] = told.position if self._ordered else told.read
        return self._wants(told)

    async def events(self, readers: list[Reader], quiet: float) -> AsyncGenerator[Told | None]:
        """What it lacks and then what comes; None where that begins, and after ``quiet`` seconds without.

        Raises Dropped.
        """
        for reader in readers:
            await reader.ready()
        behind = [reader for reader in readers if reader.topic in self.places]
        async for told in self._catch_up(readers, behind) if self._ordered else self._overlap(readers, behind):
            yield told
        yield None
        while True:
            while self._queue:
                told = self._queue.popleft()
                if self._pass(told):
                    yield told
            if self._dropped is not None:
                raise Dropped(self._dropped)
            self._news.clear()
            try:
                async with self._program.clock.timeout(quiet):
                    await self._news.wait()
            except TimeoutError:
                yield None

    def _join(self, readers: list[Reader]) -> None:
        for reader in readers:
            if reader.topic not in self.places:
                known = self._ordered and reader.last is not None
                self.places[reader.topic] = reader.last if known and reader.last is not None else reader.since
            reader.clients.add(self)

    async def _catch_up(self, readers: list[Reader], behind: list[Reader]) -> AsyncGenerator[Told]:
        """Read to where the readers are, join them, and read what lies before the first that they queue."""
        for joined in (False, True):
            if joined:
                self._join(readers)
            for reader in behind:
                place, goal = self.places[reader.topic], reader.last
                start = place + 1 if isinstance(place, int) else place
                if goal is not None and isinstance(start, int) and start > goal:
                    continue
                async with aclosing(self._read(reader.topic, start)) as lacking:
                    async for told in lacking:
                        if told.position >= self._first.get(reader.topic, END):
                            break
                        if self._pass(told):
                            yield told
                        reached = reader.last if goal is None else goal
                        if reached is not None and told.position >= reached:
                            break
                place = self.places[reader.topic]
                if joined and goal is not None and (not isinstance(place, int) or place < goal):
                    self.places[reader.topic] = goal  # up to there all that is still held was read

    async def _overlap(self, readers: list[Reader], behind: list[Reader]) -> AsyncGenerator[Told]:
        """Where positions are not comparable: read to the end twice, the second time while what comes is queued."""
        known: dict[tuple[str, int], None] = {}
        for joined in (False, True):
            if joined:
                self._join(readers)
            for reader in behind:
                begun = _just_now(self._program)
                # Where events keep coming there is no end; what is published after it is queued, or read next time.
                enough = iso(self._program.clock.now() + (MARGIN if joined else 0.0))
                async for told in self._read(reader.topic, self.places[reader.topic]):
                    if (told.message.time or "") >= enough:
                        break
                    if (told.topic, told.position) in known:
                        continue
                    known[told.topic, told.position] = None
                    if len(known) > REMEMBERED:
                        del known[next(iter(known))]
                    if self._wants(told):
                        yield told
                self.places[reader.topic] = begun
        self._queue = deque(told for told in self._queue if (told.topic, told.position) not in known)

    async def _read(self, topic: str, start: Start) -> AsyncGenerator[Told]:
        async for position, message in self._program.broker.browse(topic, start, follow=False):
            yield Told(topic, position, message, _just_now(self._program))


def _just_now(program: Program) -> datetime:
    return datetime.fromtimestamp(program.clock.now() - MARGIN, UTC)


def write_places(places: Places) -> str:
    """Places as the text that a client keeps: ``orders:17,payments:~1795780000000``."""
    return ",".join(
        f"{topic}:{place}" if isinstance(place, int) else f"{topic}:~{int(place.timestamp() * 1000)}"
        for topic, place in sorted(places.items())
    )


def read_places(text: str) -> Places:
    """The places in a client's text. Raises ValueError."""
    found: Places = {}
    for part in filter(None, text.split(",")):
        topic, colon, place = part.rpartition(":")
        digits = place.removeprefix("~")
        if not colon or not digits.isascii() or not digits.isdigit() or len(digits) > 18 - 4 * (digits != place):
            raise ValueError(f"{text[:100]!r} is no position")
        found[topic] = int(place) if digits == place else datetime.fromtimestamp(int(digits) / 1000, UTC)
    return found
