"""The replication connection of a PostgreSQL source, and what makes events of the rows that it sends."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer

from stentor.errors import StentorError
from stentor.event import Outgoing
from stentor.sources.change import Mapped
from stentor.sources.pgoutput import UNCHANGED, Begin, Relation, RowChange, Values

BEAT = 10.0
"""Seconds between two words to the server, which takes a silent reader for dead after ``wal_sender_timeout`` (60 s)."""
_TEXT = 25
_SEND = struct.Struct("!cQQQqB").pack
_EPOCH = 946_684_800
"""Seconds from 1970 to 2000, from which PostgreSQL counts."""


class Stream:
    """Reads and answers on a connection in replication."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], lsn: int) -> None:
        self.connection = connection
        self._pgconn = connection.pgconn
        self._told = self.flushed = lsn
        """All before this is durable here; the server may forget it."""
        self.end = lsn
        """All transactions that ended before this have come."""

    def get(self) -> bytes | None:
        """The next message of the plugin, or None when there is none now. Raises psycopg.Error."""
        asked = False
        while True:
            size, data = self._pgconn.get_copy_data(1)
            if size > 0:
                if data[0] == 119:  # w
                    return bytes(data[25:])
                self.end = int.from_bytes(data[1:9], "big")
                if data[17]:
                    self.tell(again=True)
                continue
            if size < 0:
                text = self._pgconn.get_result()
                said = text.error_message.decode(errors="replace").strip() if text is not None else ""
                raise psycopg.OperationalError(said or "the server ended the stream")
            if asked:
                return None
            self._pgconn.consume_input()
            asked = True

    async def wait(self, stopping: asyncio.Event) -> None:
        """Until something came, the program stops, or a second is over."""
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._pgconn.socket, came.set)
        waiting = [asyncio.create_task(event.wait()) for event in (came, stopping)]
        try:
            await asyncio.wait(waiting, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(self._pgconn.socket)
            for task in waiting:
                task.cancel()

    def tell(self, *, again: bool = False) -> None:
        """Tell the server how far the events are durable, unless it knows."""
        if self._told == self.flushed and not again:
            return
        self._told = self.flushed
        now = int((time.time() - _EPOCH) * 1_000_000)
        self._pgconn.put_copy_data(_SEND(b"r", self.flushed, self.flushed, self.flushed, now, 0))
        self._pgconn.flush()

    async def beat(self) -> None:
        """Tell it again and again, also while a publish takes long."""
        while True:
            await asyncio.sleep(BEAT)
            self.tell(again=True)


class Reader:
    """Makes events of the rows of one table, as its columns are now."""

    def __init__(self, table: Mapped, relation: Relation, primary: Sequence[str], context: Any) -> None:
        names = [column.name for column in relation.columns]
        table.check(names)
        keys = {column.name for column in relation.columns if column.key}
        if not (set(primary) <= keys and primary):  # the replica identity is another index, or the whole row
            primary = [] if relation.full else sorted(keys)
        self.table = table
        self._primary = [name for name in primary if name in names]
        self._at = [
            at for at, name in enumerate(names) if table.wants(name) or name in self._primary
        ]  # fmt: skip
        self._all = len(self._at) == len(names)
        self._names = [names[at] for at in self._at]
        self._kinds = [_TEXT if names[at] in table.texts else relation.columns[at].type for at in self._at]
        self._context = context
        self._whole = Transformer(context)
        self._whole.set_loader_types(self._kinds, pq.Format.TEXT)

    def _row(self, values: Values) -> dict[str, Any]:
        """Columns and values, without those that were not sent."""
        chosen = values if self._all else [values[at] for at in self._at]
        names, adapters = self._names, self._whole
        if UNCHANGED in chosen:
            sent = [at for at, value in enumerate(chosen) if value is not UNCHANGED]
            names, adapters = [names[at] for at in sent], Transformer(self._context)
            adapters.set_loader_types([self._kinds[at] for at in sent], pq.Format.TEXT)
            chosen = [chosen[at] for at in sent]
        try:
            return dict(zip(names, adapters.load_sequence(chosen), strict=True))
        except (psycopg.Error, ValueError) as error:
            raise StentorError(
                f"{self.table.table}: a value cannot be read: {error}. A field of type str takes any value as text"
            ) from None

    def truncated(self, id: str, transaction: Begin) -> Outgoing:
        """The table was emptied."""
        return self.table.event(
            "truncate", transaction.position, id=id, transaction=transaction.transaction,
            committed=transaction.committed,
        )  # fmt: skip

    def events(self, change: RowChange, id: str, transaction: Begin) -> list[Outgoing]:
        """One event; two when an update changed the primary key."""
        new, old = change.new, change.old
        if new is not None and old is not None and UNCHANGED in new:
            new = [
                was if value is UNCHANGED and was is not None else value for was, value in zip(old, new, strict=True)
            ]
        before = self._row(old) if old is not None else None
        after = self._row(new) if new is not None else None
        was = {name: before[name] for name in self._primary} if before is not None else None
        now = {name: after[name] for name in self._primary} if after is not None else None
        whole = before if change.whole else None
        position = transaction.position
        same = {"transaction": transaction.transaction, "committed": transaction.committed}
        if change.kind == "I":
            return [self.table.event("insert", position, id=id, identity=now, after=after, **same)]
        if change.kind == "D":
            return [self.table.event("delete", position, id=id, identity=was, before=whole, **same)]
        if was is not None and was != now:
            return self.table.moved(position, id=id, before=whole, after=after, was=was, now=now, **same)
        gaps = [name for name in self._names if after is not None and name not in after]
        return [
            self.table.event(
                "update", position, id=id, identity=now, before=whole, after=after, unchanged=gaps, **same
            )
        ]  # fmt: skip
