"""What a running handler can see and do: its Context, and the injected values beside it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Literal, NoReturn, Protocol

import msgspec
from msgspec import Struct

from stentor.clock import Duration, seconds
from stentor.cloudevents import child_trace, traceparent
from stentor.errors import NotConnected
from stentor.event import EventLike, Outgoing, Topic
from stentor.message import Delivery, Message

FIRING = "stentor.firing"


class Firing(Struct, frozen=True, kw_only=True):
    """One firing of an ``every`` or ``cron`` handler: when it ran, when it was due, how many before it were missed."""

    at: datetime
    scheduled: datetime
    missed: int = 0


class Depends:
    """``Annotated[T, Depends(f)]``: the parameter gets what ``f`` gives.

    ``f`` is a function, generator or context manager, sync or async, with parameters of its own injected alike.
    ``scope="delivery"`` makes it for each delivery (a batch counts once) and closes it before the ack; ``"app"`` makes
    it once and closes it when the app stops.
    """

    __slots__ = ("function", "scope")

    def __init__(self, function: Callable[..., Any], *, scope: Literal["app", "delivery"] = "delivery") -> None:
        self.function = function
        self.scope = scope


class RetryLater(BaseException):
    """Raised by ``ctx.retry``; a BaseException so that ``except Exception`` lets it pass."""

    def __init__(self, after: float | None, count: bool) -> None:
        self.after = after
        self.count = count


class Dead(BaseException):
    """Raised by ``ctx.dead``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Progress(Struct, frozen=True):
    """How far a long handler has come, kept in the journal: 0 to 1, a text, and state of the handler's own."""

    done: float
    text: str
    state: bytes | None


class Runtime:
    """What workers and contexts need of the program around them; the app makes one each time it runs."""

    def __init__(
        self,
        app: Any,
        encode: Callable[[Any], list[Message]],
        fatal: Callable[[BaseException], None],
        declare: Callable[[], Awaitable[None]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.app = app
        self.encode = encode
        """The checked messages of an event, a list or a tuple of events."""
        self.fatal = fatal
        """Ends the program: a worker failed."""
        self.declare = declare
        """Declares what is in ``undeclared``; before anything that was encoded since is stored."""
        self.undeclared: dict[str, Topic] = {}
        """Topics of event classes that were first met at a publish."""
        self.loop = loop
        self.stopping = asyncio.Event()


class Host(Protocol):
    """The worker, as its contexts see it."""

    group: str
    runtime: Runtime

    @property
    def hold(self) -> Any: ...

    async def progress(self, delivery: Delivery, progress: Progress) -> None: ...


class Context:
    """One handling of one delivery (of one batch, for a batch handler)."""

    __slots__ = (
        "_batch", "_count", "_delivery", "_host", "_log", "_message", "attempt", "cancelled", "outputs", "state",
    )  # fmt: skip

    def __init__(
        self, host: Host, delivery: Delivery, attempt: int, state: bytes | None, batch: Sequence[Delivery] = ()
    ) -> None:
        self._host = host
        self._delivery = delivery
        self._batch = batch
        self.attempt = attempt
        """1 for the first attempt."""
        self.state = state
        """What an earlier attempt left with ``progress(state=...)``, or None."""
        self.outputs: list[Message] | tuple[()] = ()
        self.cancelled = False
        """True once the handler's time is up; a sync handler should look at it and return."""
        self._count = 0
        self._message: Message | None = None
        self._log: logging.LoggerAdapter[logging.Logger] | None = None

    @property
    def message(self) -> Message:
        """The message being handled, in a copy of the handler's own; of a batch, the first."""
        if self._message is None:
            self._message = private(self._delivery.message)
        return self._message

    @property
    def messages(self) -> list[Message]:
        """The messages of the events of a batch, in their order, in copies; else the one being handled."""
        return [private(delivery.message) for delivery in self._batch] or [self.message]

    @property
    def replayed(self) -> str:
        """The id of the replay that brought this delivery, or an empty text."""
        return self._delivery.replay

    @property
    def group(self) -> str:
        return self._host.group

    @property
    def app(self) -> Any:
        return self._host.runtime.app

    @property
    def stopping(self) -> asyncio.Event:
        """Set when the program is asked to stop; a long handler saves its state then and leaves."""
        return self._host.runtime.stopping

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that adds event id, type, key, group and attempt."""
        if self._log is None:
            message = self.message
            extra = {
                "event_id": message.id, "event_type": message.type, "event_key": message.key, "group": self.group,
                "attempt": self.attempt,
            }  # fmt: skip
            self._log = logging.LoggerAdapter(logging.getLogger(f"stentor.handler.{self.group}"), extra)
        return self._log

    def caused(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Give messages the ids, correlation and trace that follow from this delivery."""
        cause = self._delivery.message
        for message in messages:
            if message.fresh:
                self._count += 1
                message.id = derived_id(cause, self.group, message.type, self._count, self.replayed)
                message.fresh = False
            extensions = dict(message.extensions)
            extensions.setdefault("causationid", cause.id)
            extensions.setdefault("correlationid", cause.extensions.get("correlationid", cause.id))
            extensions.setdefault("traceparent", child_trace(traceparent(cause), message.id))
            message.extensions = extensions
        return messages

    def add(self, events: Any) -> None:
        """Put events (one, a list or a tuple) among those that are published with the ack."""
        self.outputs = [*self.outputs, *self.caused(self._host.runtime.encode(events))]

    async def publish(self, event: EventLike | Sequence[EventLike], /, **options: Any) -> None:
        """Publish with the ack of this delivery: accepted now, durable with it, dropped if the handler fails.

        Options are those of ``app.publish``. Raises InvalidEvent now, not at the ack.
        """
        self.add(Outgoing(event, **options) if options else event)

    def publish_sync(self, event: EventLike | Sequence[EventLike], /, **options: Any) -> None:
        """``publish`` for sync handlers in threads."""
        self.add(Outgoing(event, **options) if options else event)

    def retry(self, after: Duration | None = None, *, count: bool = True) -> NoReturn:
        """End this handling and run it again later; ``count=False`` burns no attempt."""
        raise RetryLater(None if after is None else seconds(after, "ctx.retry: after"), count)

    def hold(self, time: Duration, reason: str) -> None:
        """Begin nothing new of this group in this process for a while, as what it needs is away; health shows why."""
        self._host.hold.set(seconds(time, "ctx.hold: time"), reason)

    def dead(self, reason: str) -> NoReturn:
        """End this handling and put the event among the dead letters at once."""
        raise Dead(reason)

    async def progress(self, done: float, text: str = "", *, state: bytes | None = None) -> None:
        """Record how far a long handler has come; ``state`` is there as ``ctx.state`` when it must run again.

        Raises:
            ValueError: ``done`` is not between 0 and 1.
        """
        if not 0 <= done <= 1:
            raise ValueError(f"progress is a number from 0 to 1, not {done!r}")
        if state is not None:
            self.state = state
        await self._host.progress(self._delivery, Progress(done, text, self.state))

    def progress_sync(self, done: float, text: str = "", *, state: bytes | None = None) -> None:
        """``progress`` for sync handlers in threads."""
        loop = self._host.runtime.loop
        if not loop.is_running():
            raise NotConnected("the app has stopped")
        asyncio.run_coroutine_threadsafe(self.progress(done, text, state=state), loop).result()


def private(message: Message) -> Message:
    """A copy that a handler may change: nobody else, and no later attempt, sees it."""
    return msgspec.structs.replace(message, extensions=dict(message.extensions))


def derived_id(cause: Message, group: str, type: str, position: int, replay: str = "") -> str:
    """The id of the event that a group makes of ``cause``: the same however often the handling is repeated."""
    text = f"{cause.source}\0{cause.id}\0{group}\0{type}\0{position}\0{replay}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


current: ContextVar[Context | None] = ContextVar("stentor_context", default=None)
"""The Context of the handler that runs now, for ``app.publish`` at any depth below it."""

encode_progress = msgspec.msgpack.Encoder().encode
decode_progress = msgspec.msgpack.Decoder(Progress).decode
