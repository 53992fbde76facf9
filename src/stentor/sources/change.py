"""Change events: what happened to a row of a database table, typed by the user's own row class."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import field, inspect

from stentor.errors import DefinitionError, StentorError
from stentor.event import KEY_LIMIT, Event, EventSpec, Outgoing, spec_of

Row = TypeVar("Row")
Operation = Literal["read", "insert", "update", "delete", "truncate"]


class Change(Event, Generic[Row]):
    """One change of one row. Each table has an event class: ``class Changed(Change[MyRow], topic=..., type=...)``.

    Its key is the row's primary key unless the class names one of its own, so the changes of a row stay in order;
    ``key="table"`` keeps those of the whole table in order.
    """

    operation: Operation
    """``read`` is a row that was there when the source first met the table; ``truncate`` emptied the table."""
    table: str
    """With its schema or database, as in ``public.customers``."""
    identity: dict[str, Any] = field(default_factory=dict)
    """The primary key: column and value. Empty for ``truncate`` and for a table without one."""
    before: Row | None = None
    """The whole row as it was, where the database tells it; see the guide for each database."""
    after: Row | None = None
    """The row as it is now; None after ``delete`` and ``truncate``."""
    unchanged: list[str] = field(default_factory=list)
    """Columns of ``after`` that this change left alone and whose value the database did not repeat."""
    transaction: str | None = None
    """What the database calls the transaction."""
    committed: datetime | None = None
    position: str
    """Where the change stands in the database's log."""


class Mapped:
    """A table and its event class, made ready: which columns the rows take, and how a change becomes an event."""

    __slots__ = ("_lax", "fields", "name", "spec", "table", "texts")

    def __init__(self, table: str, cls: type[Change[Any]], *, lax: bool) -> None:
        spec = spec_of(cls)
        if spec is None or not issubclass(cls, Change):
            name = getattr(cls, "__qualname__", repr(cls))
            raise DefinitionError(
                f"table {table}: {name} is no change event; write it as: class {name}(Change[Row], topic=..., type=...)"
            )
        self._lax = lax
        self.table = table
        self.name = cls.__qualname__
        self.spec: EventSpec = spec
        row = _row_of(cls)
        self.fields: dict[str, inspect.Field] | None = (
            {item.encode_name: item for item in row.fields} if row is not None else None
        )
        """By column; None when the rows take whatever columns there are."""
        self.texts = {name for name, item in (self.fields or {}).items() if _is_text(item.type)}
        """Columns that the row class wants as text, whatever their type in the database."""

    def wants(self, column: str) -> bool:
        return self.fields is None or column in self.fields

    def check(self, columns: Sequence[str]) -> None:
        """Raises DefinitionError when the rows need a column that the table does not have."""
        needed = {name for name, item in (self.fields or {}).items() if item.required}
        if missing := sorted(needed - set(columns)):
            raise DefinitionError(
                f"table {self.table} has no column {', '.join(missing)}, which the rows of {self.name} need; "
                f"it has {', '.join(columns)}. Give the field a default if the column is gone"
            )

    def event(self, operation: Operation, position: str, *, id: str, **details: Any) -> Outgoing:
        """The event of a change, keyed and with its id; ``details`` are the other fields of ``Change``.

        Raises:
            StentorError: the row class does not take the values.
        """
        try:
            details |= {"operation": operation, "table": self.table, "position": position}
            event: Any = msgspec.convert(details, self.spec.cls, strict=not self._lax)
        except (msgspec.ValidationError, ValueError, TypeError) as error:
            raise StentorError(
                f"{self.table}: a row at {position} does not fit {self.name}: {error}. Nothing is skipped: the source "
                "goes on from there when the class takes the row"
            ) from None
        key = None if self.spec.key is not None else row_key(details.get("identity") or {}) or self.table
        return Outgoing(event, key=key, id=id)

    def moved(
        self, position: str, *, id: str, before: Any, after: Any, was: Any, now: Any, **same: Any
    ) -> list[Outgoing]:
        """An update that changed the primary key ends one row and begins another, each in the order of its own key."""
        return [
            self.event("delete", position, id=f"{id}-", before=before, identity=was, **same),
            self.event("insert", position, id=f"{id}+", after=after, identity=now, **same),
        ]


def mapped(tables: Mapping[str, type[Change[Any]]], *, lax: bool = False) -> dict[str, Mapped]:
    """The tables made ready; ``lax`` for a database that has no type for some values, as 1 for true.

    Raises DefinitionError when there is no table, or a class is no change event.
    """
    if not tables:
        raise DefinitionError('a database source needs tables: {"customers": CustomerChanged}')
    return {table: Mapped(table, cls, lax=lax) for table, cls in tables.items()}


def row_key(identity: Mapping[str, Any]) -> str:
    """The key text of a primary key: the value, or lengths and values of several; shortened where it is too long."""
    if len(identity) == 1:
        [value] = identity.values()
        if type(value) is int:
            return str(value)
    values = [str(value) for value in identity.values()]
    text = values[0] if len(values) == 1 else "|".join(f"{len(value)}:{value}" for value in values)
    if len(text) > KEY_LIMIT or not text.isprintable():
        text = digest(text)
    return text


def digest(*parts: object) -> str:
    """A short text that stands for values."""
    import hashlib

    seed = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(seed, digest_size=16).hexdigest()


async def until_one_ends(*work: Coroutine[Any, Any, None]) -> None:
    """Run what belongs together until the first of it ends, and end the rest; raises what that one raised."""
    tasks = [asyncio.create_task(part) for part in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _row_of(cls: type) -> Any:
    """What ``inspect`` says of the class of rows; None where rows are plain dicts."""
    after = next(item for item in inspect.type_info(cls).fields if item.name == "after")  # type: ignore[attr-defined]
    for kind in after.type.types if isinstance(after.type, inspect.UnionType) else (after.type,):
        if isinstance(kind, inspect.StructType | inspect.DataclassType):
            return kind
        if isinstance(kind, inspect.DictType | inspect.AnyType):
            return None
    raise DefinitionError(
        f"{cls.__qualname__}: the rows of a change are a msgspec Struct, a dataclass or dict[str, Any]: Change[MyRow]"
    )


def _is_text(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.UnionType):
        return all(isinstance(part, inspect.StrType | inspect.NoneType) for part in kind.types)
    return isinstance(kind, inspect.StrType)
