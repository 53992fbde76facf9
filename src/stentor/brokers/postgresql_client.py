"""How the PostgreSQL broker uses its client: one step at a time on a connection, in time, and what an error means."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Self, TypeVar

import psycopg

from stentor.brokers.trust import refused, refuses_certificate
from stentor.errors import AuthenticationFailed, BrokerError, StentorError, StorageFull, StorageUnusable, Unavailable

if TYPE_CHECKING:
    from stentor.brokers.postgresql import PostgresBroker

T = TypeVar("T")
Connection = psycopg.AsyncConnection[tuple[Any, ...]]

_ABSENT = {"28P01", "28000"}
_FULL = {"53100", "53200", "54000"}


def failure(error: Exception, broker: object) -> StentorError:
    """What an error of the client is in Stentor's tree."""
    state = getattr(error, "sqlstate", None)
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if state in _ABSENT or "password authentication failed" in text or "no password supplied" in text:
        return AuthenticationFailed(f"{broker} refuses the user or password: {text}")
    if refuses_certificate(text):
        return refused(broker, text)
    if state in _FULL:
        return StorageFull(f"{broker} has no room: {text}")
    if state == "42501":
        return StorageUnusable(f"{broker}: the role lacks a right: {text}")
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | OSError):
        return Unavailable(f"{broker} cannot be reached: {text}")
    return BrokerError(f"{broker}: {text}")


async def whole(call: Awaitable[T]) -> T:
    """Await a step that runs to its end in a task of its own: a cancelled one must not leave half a transaction."""
    return await asyncio.shield(quiet(call))


def quiet(call: Awaitable[T]) -> asyncio.Future[T]:
    """A task whose error nobody has to ask for."""
    task = asyncio.ensure_future(call)
    task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return task


def transacted(step: Callable[[Connection], Awaitable[T]]) -> Callable[[Connection], Awaitable[T]]:
    """The step in a transaction."""

    async def run(connection: Connection) -> T:
        async with connection.transaction():
            return await step(connection)

    return run


async def in_time(connection: Connection, call: Awaitable[T], patience: float) -> T:
    """What the server answers within ``patience`` seconds; else its connection is cut. Raises TimeoutError.

    A rollback, or the client's own way of cancelling, would wait for the same server.
    """
    task = quiet(call)
    try:
        await asyncio.wait({task}, timeout=patience)
        if task.done():
            return task.result()
        raise TimeoutError(f"no answer within {patience:g} s")
    finally:
        if not task.done():
            cut(connection)
            await asyncio.wait({task})


def cut(connection: Connection | psycopg.Connection[tuple[Any, ...]]) -> None:
    """Let the client see the end of the stream; to close it would leave its number to the next socket."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as way:
        way.shutdown(socket.SHUT_RDWR)


class Line:
    """One connection, used by one step at a time, made anew after it broke.

    ``again``: its steps may be repeated, so one that meets a connection which broke while it was idle is.
    """

    def __init__(self, broker: PostgresBroker, *, again: bool = False) -> None:
        self._broker = broker
        self._again = again
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()
        self._closed = True

    def open(self) -> Self:
        self._closed = False
        self._broker.lines.add(self)
        return self

    async def run(self, step: Callable[[Connection], Awaitable[T]], *, sent: Callable[[str], StentorError]) -> T:
        """Run a step, which is one statement, or opens a transaction. When the connection breaks under it, ``sent``
        makes the error.
        """
        return await whole(self._run(step, sent))

    async def _run(self, step: Callable[[Connection], Awaitable[T]], sent: Callable[[str], StentorError]) -> T:
        async with self._lock:
            idle = self._connection
            try:
                return await self._once(step, sent)
            except Unavailable:
                if not self._again or idle is None or self._connection is not None:
                    raise
            return await self._once(step, sent)

    async def _once(self, step: Callable[[Connection], Awaitable[T]], sent: Callable[[str], StentorError]) -> T:
        if self._closed:
            raise Unavailable(f"{self._broker} is not open")
        try:
            if self._connection is None or self._connection.closed:
                self._connection = await self._broker.session()
        except (psycopg.Error, OSError) as error:
            raise failure(error, self._broker) from None
        try:
            return await in_time(self._connection, step(self._connection), self._broker.patience)
        except asyncio.CancelledError:  # only when the loop ends
            await self._drop()
            raise
        except (psycopg.Error, OSError, TimeoutError) as error:
            broken = isinstance(error, TimeoutError) or self._connection.closed
            if broken:
                await self._drop()
            found = failure(error, self._broker)
            raise (sent(str(error)) if broken or isinstance(found, Unavailable) else found) from None

    async def _drop(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def close(self) -> None:
        """Close the connection when the step that uses it has ended, also one that nobody awaits any more."""
        self._closed = True
        await whole(self._close())

    async def _close(self) -> None:
        async with self._lock:
            await self._drop()
        self._broker.lines.discard(self)
