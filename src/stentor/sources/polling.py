"""Sources that ask again and again: an HTTP API, a feed (RSS or Atom), a table by a column that rises.

What was seen is in the position, so a restart neither repeats nor leaves out; ids come from what was read, so that a
repetition after a crash carries the same ones.
"""

from __future__ import annotations

import asyncio
import calendar
import hashlib
import json
import logging
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct, field

from stentor.clock import Duration, iso, per_second, seconds
from stentor.errors import ConfigError, DefinitionError, StentorError
from stentor.event import EventLike
from stentor.source import Publish, Row
from stentor.sources.apart import Apart
from stentor.sources.rows import Reader, To

if TYPE_CHECKING:
    import aiohttp

LARGEST = 32 * 1024 * 1024
"""Bytes of an answer; a larger one is an error."""
SLOWEST = 20
"""After errors it asks ever later, up to so many times ``every``."""
MANY = 500
"""Rows that are read, and published, at once."""
REMEMBERED = 5_000
"""Rows of a table before which late ones are looked for, at most."""
log = logging.getLogger("stentor.source")


class NotNow(StentorError):
    """An answer that is none; ask again, after ``wait`` seconds if it said so."""

    def __init__(self, text: str, wait: float = 0.0) -> None:
        super().__init__(text)
        self.wait = wait


class Polling(ABC):
    """What all of them share: when to ask, and what follows when that fails."""

    def __init__(self, name: str, to: To, every: Duration) -> None:
        self.name = name
        self._reader = Reader(to, f"source {name}")
        self._every = seconds(every, f"source {name}: every")
        if not self._every:
            raise DefinitionError(f"source {name}: every must be longer than nothing")

    def read(self, row: Row) -> Sequence[EventLike]:
        """The events of a row."""
        return self._reader(row)

    @abstractmethod
    async def ask(self, publish: Publish) -> None:
        """Ask once, and publish what is new. Raises NotNow."""

    async def run(self, publish: Publish) -> None:
        """Ask until it is stopped, every ``every``, a tenth sooner or later, so that many do not ask at once."""
        failures = 0
        while True:
            wait = self._every * random.uniform(0.9, 1.1)  # noqa: S311
            try:
                await self.ask(publish)
                failures = 0
            except NotNow as error:
                failures += 1
                publish.counts.errors += 1
                wait = max(wait * min(SLOWEST, 2 ** min(failures - 1, 10)), error.wait)
                log.warning("source %s: %s; again in %.3g s", self.name, error, wait)
            await asyncio.sleep(wait)


# ---- HTTP -----------------------------------------------------------------------------------------------------------


class Heard(Struct, omit_defaults=True):
    """What an API said: the validators of its last answer, the cursor, and the ids of what the last answer held."""

    etag: str = ""
    modified: str = ""
    cursor: str = ""
    seen: list[str] = field(default_factory=list)


class HttpPoll(Polling):
    """What an HTTP API answers: ``HttpPoll("https://api.example/orders", to=Order, items="data", id="number")``.

    ``items``: where in the answer the list is, its names joined by dots; none: the answer is the list, or the one item.
    ``id``: where in an item its id is; none: an item is known by its content, and comes again when that changes.
    ``cursor``: ``("since", "meta.next")``: the query parameter, and where in the answer its next value is; as long as
    that changes and items come it asks on, at ``rate`` (``"10/s"``) or at once. ``headers``: of each request; a
    function is asked each time.

    An answer is asked for only if it changed (ETag, Last-Modified). 429 and 503 are asked again when ``Retry-After``
    says so, other failures ever later.

    Raises:
        ConfigError: aiohttp is not installed. DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        to: To,
        name: str = "http",
        every: Duration = "1m",
        items: str = "",
        id: str = "",
        cursor: tuple[str, str] | None = None,
        rate: str | None = None,
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        timeout: Duration = "30s",
    ) -> None:
        super().__init__(name, to, every)
        try:
            import aiohttp  # noqa: F401
        except ImportError:
            raise ConfigError(f"source {name} needs aiohttp: pip install 'stentor[polling]'") from None
        if not url.startswith(("http://", "https://")):
            raise DefinitionError(f"source {name}: {url!r} is no HTTP URL")
        self._url = url
        self._items = items
        self._id = id
        self._cursor = cursor
        self._pause = 0.0 if rate is None else 1 / per_second(rate, f"source {name}: rate")
        self._headers = headers
        self._timeout = seconds(timeout, f"source {name}: timeout")

    async def ask(self, publish: Publish) -> None:
        """Ask once, and as long as the cursor moves on."""
        import aiohttp

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(self._timeout)) as session:
            while await self._ask(publish, session):  # noqa: ASYNC110
                await asyncio.sleep(self._pause)

    async def _ask(self, publish: Publish, session: aiohttp.ClientSession) -> bool:
        import aiohttp

        heard = msgspec.convert(publish.position or {}, Heard)
        headers = dict(self._headers() if callable(self._headers) else self._headers or {})
        if heard.etag:
            headers["If-None-Match"] = heard.etag
        if heard.modified:
            headers["If-Modified-Since"] = heard.modified
        query = {self._cursor[0]: heard.cursor} if self._cursor is not None and heard.cursor else {}
        try:
            async with session.get(self._url, params=query, headers=headers) as answer:
                if answer.status == 304:
                    return False
                if answer.status != 200:
                    raise NotNow(f"{self._url} answers {answer.status}", _retry_after(answer))
                body = await answer.content.read(LARGEST + 1)
                while len(body) <= LARGEST and (more := await answer.content.read(LARGEST + 1 - len(body))):
                    body += more
                now = Heard(answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", ""), heard.cursor)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise NotNow(f"{self._url}: {str(error) or type(error).__name__}") from None
        if len(body) > LARGEST:
            raise NotNow(f"{self._url} answers more than {LARGEST} bytes")
        found = self.parse(body)
        seen = set(heard.seen)
        rows = [Row(id, f"{self._url} {id}", item) for id, item in found.items() if id not in seen]
        if self._cursor is None:
            now.seen = list(found)
        else:  # the validators are those of another page
            moved = _at(_json(body, self._url), self._cursor[1])
            now = Heard(cursor=heard.cursor if moved is None else str(moved), seen=list(found))
        if rows or now != heard:
            await publish.rows(rows, position=msgspec.to_builtins(now))
        return bool(rows) and self._cursor is not None and now.cursor != heard.cursor

    def parse(self, body: bytes) -> dict[str, Any]:
        """The items of an answer by their ids, the oldest first. Raises NotNow when it is none."""
        answer = _json(body, self._url)
        found = _at(answer, self._items) if self._items else answer
        if found is None:
            raise NotNow(f"{self._url} answers without {self._items!r}")
        items = found if isinstance(found, list) else [found]
        return {self._known(item): item for item in items}

    def _known(self, item: Any) -> str:
        if not self._id:
            return hashlib.blake2b(json.dumps(item, sort_keys=True).encode(), digest_size=16).hexdigest()
        id = _at(item, self._id)
        if not isinstance(id, str | int):
            raise NotNow(f"{self._url} answers with an item without {self._id!r}")
        return str(id)


class Feed(HttpPoll):
    """The entries of an RSS or Atom feed, each once: ``Feed("https://example.com/feed.xml", to=Post)``.

    An entry has ``id``, ``title``, ``link``, ``summary``, ``author``, ``published`` and ``updated`` (RFC 3339, in UTC);
    what the feed does not tell is left out. The oldest comes first.

    Raises:
        ConfigError: feedparser is not installed. DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        to: To,
        name: str = "feed",
        every: Duration = "10m",
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        timeout: Duration = "30s",
    ) -> None:
        super().__init__(url, to=to, name=name, every=every, headers=headers, timeout=timeout)
        try:
            import feedparser  # noqa: F401
        except ImportError:
            raise ConfigError(f"source {name} needs feedparser: pip install 'stentor[polling]'") from None

    def parse(self, body: bytes) -> dict[str, Any]:
        """The entries of a feed by their ids, the oldest first. Raises NotNow when it is none."""
        import feedparser

        feed = feedparser.parse(body)
        if not feed.version:
            raise NotNow(f"{self._url} is neither RSS nor Atom: {feed.get('bozo_exception', 'no feed')}")
        found: dict[str, Any] = {}
        for entry in reversed(feed.entries):
            item = {name: entry[name] for name in ("title", "link", "summary", "author") if entry.get(name)}
            for name in ("published", "updated"):
                if (moment := dict.get(entry, f"{name}_parsed")) is not None:  # entry.get takes one for the other
                    item[name] = iso(calendar.timegm(moment))
            item["id"] = entry.get("id") or entry.get("link") or self._known(item)
            found[item["id"]] = item
        return found


def _json(body: bytes, url: str) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotNow(f"{url} does not answer with JSON: {error}") from None


def _at(value: Any, path: str) -> Any:
    """What is in JSON data at names joined by dots, or None."""
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _retry_after(answer: aiohttp.ClientResponse) -> float:
    """Seconds of ``Retry-After`` (RFC 9110, section 10.2.3), a day at most; 0 without."""
    text = answer.headers.get("Retry-After", "")
    try:
        wait = float(text) if text.isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(86_400.0, max(0.0, wait))


# ---- tables ---------------------------------------------------------------------------------------------------------


class Reached(Struct, omit_defaults=True):
    """A row (its column, and key) before which none comes any more, and the ids of those read behind it."""

    row: list[Any] | None = None
    seen: list[str] = field(default_factory=list)


class TablePoll(Polling):
    """New rows of a table by a column that rises: ``TablePoll("postgresql+psycopg://...", "orders", "id", to=Order)``.

    The URL is SQLAlchemy's; its driver is installed beside it. ``column``: a number or a time that no row with NULL or
    a lower value comes behind; ``key`` tells rows of one value apart, where the column is not unique. A row is a
    mapping by column names, times and decimals as text.

    A transaction that commits late brings rows with lower values than others that were read already: rows are looked
    for again for so long as ``late`` says, and each comes once. Updates and deletes are not seen, except where the
    column is the time of the last change; for all changes in their order see ``PostgresChanges`` and its like.

    Raises:
        ConfigError: SQLAlchemy or the driver is not installed. DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        url: str,
        table: str,
        column: str,
        *,
        to: To,
        key: str | None = None,
        name: str = "table",
        every: Duration = "5s",
        late: Duration = "2s",
    ) -> None:
        super().__init__(name, to, every)
        self._late = seconds(late, f"source {name}: late")
        try:
            from sqlalchemy import create_engine
            from sqlalchemy.exc import ArgumentError
        except ImportError:
            raise ConfigError(f"source {name} needs SQLAlchemy: pip install 'stentor[polling]'") from None
        try:
            self._engine = create_engine(url)
        except ArgumentError as error:
            raise DefinitionError(f"source {name}: {error}") from None
        except ImportError as error:
            raise ConfigError(f"source {name}: the driver is not installed: {error}") from None
        self._place = table.rpartition(".")
        self._names = [column] if key is None else [column, key]
        self._table: Any = None
        self._met: dict[str, float] = {}
        """When a row was first read, for those that others may still come before."""

    async def run(self, publish: Publish) -> None:
        """Ask until it is stopped. Raises StentorError when there is no such table or column."""
        self._apart = Apart(f"stentor {self.name}", self._engine.dispose)
        try:
            await super().run(publish)
        finally:
            self._apart.close()

    async def ask(self, publish: Publish) -> None:
        """Read what is new, and what came late."""
        import sqlalchemy

        reached = msgspec.convert(publish.position or {}, Reached)
        now = time.monotonic()
        self._met = {id: self._met.get(id, now) for id in reached.seen}
        waiting: deque[tuple[str, list[Any]]] = deque()
        after = reached.row
        try:
            while found := await self._apart.call(self._rows, after):
                new: list[Row] = []
                for values in found:
                    row, after = self._row(values), [values[name] for name in self._names]
                    waiting.append((row.id, after))
                    if row.id not in self._met:
                        self._met[row.id] = time.monotonic()
                        new.append(row)
                settled = time.monotonic() - self._late
                while waiting and (self._met[waiting[0][0]] <= settled or len(waiting) > REMEMBERED):
                    id, reached.row = waiting.popleft()
                    del self._met[id]
                reached.seen = list(self._met)
                position = msgspec.to_builtins(reached)
                if new or position != publish.position:
                    await publish.rows(new, position=position)
        except sqlalchemy.exc.NoSuchTableError:
            raise StentorError(f"source {self.name}: there is no table {''.join(self._place)}") from None
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise NotNow(str(error).partition("\n")[0]) from None

    def _rows(self, after: list[Any] | None) -> list[dict[str, Any]]:
        """The next rows behind a place. Blocks."""
        import sqlalchemy
        from sqlalchemy import and_, or_

        with self._engine.connect() as connection:
            if self._table is None:
                self._table = sqlalchemy.Table(
                    self._place[2], sqlalchemy.MetaData(schema=self._place[0] or None), autoload_with=connection
                )
            try:
                columns = [self._table.c[name] for name in self._names]
            except KeyError as error:
                raise StentorError(f"source {self.name}: {self._table} has no column {error}") from None
            query = sqlalchemy.select(self._table).where(columns[0].is_not(None)).order_by(*columns).limit(MANY)
            if after is not None:
                first, *other = (_typed(value, c) for value, c in zip(after, columns, strict=True))
                behind = columns[0] > first
                query = query.where(or_(behind, and_(columns[0] == first, columns[1] > other[0])) if other else behind)
            return [_plain(row) for row in connection.execute(query).mappings()]

    def _row(self, row: dict[str, Any]) -> Row:
        place = " ".join(str(row[name]) for name in self._names)
        text = f"{''.join(self._place)}\0{place}"
        return Row(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), text.replace("\0", " "), row)


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row as JSON has it."""
    found: dict[str, Any] = msgspec.to_builtins(dict(row), enc_hook=str)
    return found


def _typed(value: Any, column: Any) -> Any:
    """A value from JSON as the column has it."""
    return msgspec.convert(value, column.type.python_type, strict=False)
