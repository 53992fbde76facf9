"""Sources: functions and objects that make events, with a position that survives a restart."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct

from stentor.context import Runtime
from stentor.errors import DefinitionError, InvalidEvent, StentorError
from stentor.event import EventLike, EventSpec, Outgoing, Topic, check_name
from stentor.handler import Handler
from stentor.message import Message
from stentor.plan import Duties
from stentor.retry import Retry

Instances = Literal["one", "each"]
log = logging.getLogger("stentor.source")


class Source(Protocol):
    """A source as an object: ``app.add(it)`` runs it. Its ``name`` names its group and its position.

    With an attribute ``instances = "each"`` every process runs it, and it keeps no position.
    """

    @property
    def name(self) -> str: ...
    async def run(self, publish: Publish) -> None: ...


class Row(Struct, frozen=True):
    """What a source read, on its way to events.

    ``id`` is the same whenever this is read again, ``where`` names its place for people, ``value`` is plain JSON data.
    """

    id: str
    where: str
    value: Any


class SourceCounts:
    """What a source did since its process started, for /metrics.

    ``events`` published durably; ``errors`` that it went on after, or that made it start again; ``lag``: how much
    waits where it reads, in its own unit (rows, bytes, files), or None if it cannot know.
    """

    __slots__ = ("errors", "events", "lag")

    def __init__(self) -> None:
        self.events = 0
        self.errors = 0
        self.lag: float | None = None


class SourceFunction:
    """A registered source: its name, what runs, whether one process runs it or each, and how it reads a row."""

    __slots__ = ("again", "counts", "function", "instances", "name", "read")

    def __init__(
        self,
        name: str,
        function: Callable[[Publish], Awaitable[None]],
        instances: Instances,
        read: Callable[[Row], Sequence[EventLike]] | None,
    ) -> None:
        self.name = name
        self.function = function
        self.instances = instances
        self.read = read
        self.again = None if read is None else Handler(_reader(read), types=(Row,), retry=Retry(attempts=1))
        """Reads a refused row, so that it becomes a dead letter, and events when it is redriven."""
        self.counts = SourceCounts()

    async def run(self, publish: Publish) -> None:
        """Run it once; an error is counted, and raised."""
        try:
            await self.function(publish)
        except Exception:
            self.counts.errors += 1
            raise


def _reader(read: Callable[[Row], Sequence[EventLike]]) -> Callable[[Row], Awaitable[Any]]:
    async def refused(row: Row) -> Any:
        try:
            return list(read(row))
        except Exception as error:
            raise InvalidEvent(f"{row.where}: {error}") from error

    return refused


def refused_spec(source: SourceFunction, group: str) -> EventSpec:
    """How a source's refused rows travel: an event type of its own on the group's source topic."""
    return EventSpec(
        Row, topic=Topic(source_topic(group)), key=None, type=f"stentor.refused.{source.name}", version=1, newer="read",
        also=(), wire="cloudevents",
    )  # fmt: skip


def check_source(source: Any, instances: Instances) -> SourceFunction:
    """A source made of an async function or a ``Source``; raises DefinitionError for anything else."""
    if inspect.isroutine(source) or not hasattr(source, "run"):
        function, name = source, getattr(source, "__name__", type(source).__name__)
        shape = f"async def {name}(publish: Publish) -> None"
    else:
        function, name = source.run, check_name(getattr(source, "name", type(source).__name__), "source")
        shape = "async def run(self, publish: Publish) -> None"
    if instances not in ("one", "each"):
        raise DefinitionError(f'source {name}: instances must be "one" or "each", not {instances!r}')
    if not inspect.iscoroutinefunction(function) or len(inspect.signature(function).parameters) != 1:
        raise DefinitionError(f"source {name}: write it as: {shape}")
    return SourceFunction(name, function, instances, None if function is source else getattr(source, "read", None))


def source_topic(group: str) -> str:
    """The topic whose partition 0 decides which process runs a group's sources."""
    return f"stentor.source.{group}"


class Publish:
    """What a source gets: called with an event or a list of them, it publishes; back when that is durable.

    ``position`` is what the source gave with its last durable publish (any JSON value), or None at the first start.
    ``counts`` are the source's figures in /metrics.
    """

    def __init__(
        self,
        source: SourceFunction,
        group: str,
        runtime: Runtime,
        write: Callable[[list[Message], bytes | None], Awaitable[None]],
        position: Any,
        *,
        keeps: bool,
        atomic: bool,
    ) -> None:
        self._source = source
        self._name = source.name
        self._group = group
        self.counts = source.counts
        self._runtime = runtime
        self._write = write
        self._keeps = keeps
        self._atomic = atomic
        self.position = position

    @property
    def stopping(self) -> asyncio.Event:
        """Set when the program is asked to stop."""
        return self._runtime.stopping

    async def __call__(
        self, event: EventLike | Sequence[EventLike], /, *, position: Any = None, **options: Any
    ) -> None:
        """Publish events and remember ``position`` with them; a repetition after a crash carries the same ids.

        Options are those of ``app.publish``. Raises InvalidEvent, LeaseLost (another process runs the source now), or
        the broker's error.
        """
        messages = self._runtime.encode(Outgoing(event, **options) if options else event)
        if position is None:
            await self._write(messages, None)
            self.counts.events += len(messages)
            return
        if not self._keeps:
            raise StentorError(f'source {self._name}: a source with instances="each" keeps no position')
        value = msgspec.json.encode(position)
        if not self._atomic:
            seed = f"{self._name}\0{value.decode()}\0"
            for index, message in enumerate(messages):
                if message.fresh:
                    message.id = hashlib.blake2b(f"{seed}{index}".encode(), digest_size=16).hexdigest()
                    message.fresh = False
        await self._write(messages, value)
        self.counts.events += len(messages)
        self.position = position

    async def rows(self, rows: Iterable[Row], *, position: Any = None) -> None:
        """Publish what the source's ``read`` makes of rows; one that it cannot read becomes a dead letter of the group.

        Ids come from the source's name and the row's id, so that a row that is read again gives the same events.
        """
        good: list[tuple[Row, list[Outgoing]]] = []
        for row in rows:
            try:
                good.append((row, self._outgoing(row)))
            except Exception as error:  # it may be the user's function: whatever it raises, this row is refused
                await self._refuse(row, error)
        try:
            await self([out for _, outs in good for out in outs], position=position)
        except InvalidEvent:
            for row, outs in good:
                try:
                    await self(outs)
                except InvalidEvent as error:
                    await self._refuse(row, error)
            await self([], position=position)

    def _outgoing(self, row: Row) -> list[Outgoing]:
        assert self._source.read is not None
        found = []
        for index, event in enumerate(self._source.read(row)):
            out = event if isinstance(event, Outgoing) else Outgoing(event)
            found.append(out if out.id else msgspec.structs.replace(out, id=self._id(row, index)))
        return found

    def _id(self, row: Row, index: int | str) -> str:
        return hashlib.blake2b(f"{self._group}\0{self._name}\0{row.id}\0{index}".encode(), digest_size=16).hexdigest()

    async def _refuse(self, row: Row, error: Exception) -> None:
        self.counts.errors += 1
        log.warning("source %s cannot read %s: %s; see: stentor dead list", self._name, row.where, error)
        spec, catalog = refused_spec(self._source, self._group), self._runtime.app.catalog
        message = Message(
            id=self._id(row, "refused"), source=catalog.source, type=spec.type, topic=spec.topic.name,
            data=spec.encode(row), time=catalog.stamp(), datacontenttype="application/json",
        )  # fmt: skip
        await self._write([message], None)


class SourceDuty:
    """Runs a group's sources while this process owns partition 0 of their topic."""

    def __init__(self, group: str, sources: list[SourceFunction], runtime: Runtime, *, atomic: bool) -> None:
        self._group = group
        self._sources = sources
        self._runtime = runtime
        self._atomic = atomic

    async def __call__(self, duties: Duties) -> None:
        async with asyncio.TaskGroup() as tasks:
            for source in self._sources:
                tasks.create_task(duties.keep(partial(self._run, source)))

    async def _run(self, source: SourceFunction, duties: Duties) -> None:
        name = f"source/{source.name}"
        value = await duties.read(name)

        async def write(messages: list[Message], position: bytes | None) -> None:
            await duties.publish(messages, name, position)

        position = None if value is None else msgspec.json.decode(value)
        await source.run(Publish(source, self._group, self._runtime, write, position, keeps=True, atomic=self._atomic))
