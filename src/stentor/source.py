"""Sources: functions that make events, with a position that survives a restart."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import msgspec

from stentor.context import Runtime
from stentor.errors import DefinitionError, StentorError
from stentor.event import EventLike, Outgoing
from stentor.message import Message
from stentor.plan import Duties

Instances = Literal["one", "each"]


class SourceFunction:
    """A registered source: its name, its function, and whether one process runs it or each."""

    __slots__ = ("function", "instances", "name")

    def __init__(self, name: str, function: Callable[[Publish], Awaitable[None]], instances: Instances) -> None:
        self.name = name
        self.function = function
        self.instances = instances


def check_source(function: Any, instances: Instances) -> SourceFunction:
    """A source made of an async function; raises DefinitionError for anything else."""
    name = getattr(function, "__name__", type(function).__name__)
    if instances not in ("one", "each"):
        raise DefinitionError(f'source {name}: instances must be "one" or "each", not {instances!r}')
    if not inspect.iscoroutinefunction(function) or len(inspect.signature(function).parameters) != 1:
        raise DefinitionError(f"source {name}: write it as: async def {name}(publish: Publish) -> None")
    return SourceFunction(name, function, instances)


def source_topic(group: str) -> str:
    """The topic whose partition 0 decides which process runs a group's sources."""
    return f"stentor.source.{group}"


class Publish:
    """What a source gets: called with an event or a list of them, it publishes; back when that is durable.

    ``position`` is what the source gave with its last durable publish (any JSON value), or None at the first start.
    """

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        write: Callable[[list[Message], bytes | None], Awaitable[None]],
        position: Any,
        *,
        keeps: bool,
        atomic: bool,
    ) -> None:
        self._name = name
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
        self.position = position


class SourceDuty:
    """Runs a group's sources while this process owns partition 0 of their topic."""

    def __init__(self, sources: list[SourceFunction], runtime: Runtime, *, atomic: bool) -> None:
        self._sources = sources
        self._runtime = runtime
        self._atomic = atomic

    async def __call__(self, duties: Duties) -> None:
        async with asyncio.TaskGroup() as tasks:
            for source in self._sources:
                tasks.create_task(self._run(source, duties))

    async def _run(self, source: SourceFunction, duties: Duties) -> None:
        name = f"source/{source.name}"
        value = await duties.read(name)

        async def write(messages: list[Message], position: bytes | None) -> None:
            await duties.publish(messages, name, position)

        publish = Publish(
            source.name, self._runtime, write, None if value is None else msgspec.json.decode(value), keeps=True,
            atomic=self._atomic,
        )  # fmt: skip
        await source.function(publish)
