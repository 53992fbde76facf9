"""Files as they come: of a folder, or objects of any store that fsspec reaches; each is an event, or each of its rows.

A file is known by name, modification time (or the store's own tag) and size: one that changed is read again as a whole.
The position holds those three of every file that is there still, and how far the present one has been read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from msgspec import Struct

from stentor.clock import Duration, seconds
from stentor.errors import ConfigError, DefinitionError, StentorError
from stentor.event import EventLike
from stentor.source import Publish, Row
from stentor.sources.rows import Format, Reader, To, rows_of

CHUNK = 500
"""Rows that are read, and published, at once."""
UNFINISHED = (".tmp", ".part", ".partial", ".crdownload", "~")
log = logging.getLogger("stentor.source")


class Found(Struct):
    """A file in a listing; ``modified`` in seconds since the epoch, 0 if the store does not tell."""

    name: str
    version: str
    size: int
    modified: float


class _Files:
    """What a folder and a store of objects share: compare the listing with the position, read what is new."""

    def __init__(
        self, name: str, to: To, format: Format, every: Duration, settle: Duration, after: Literal["keep", "delete"]
    ) -> None:
        what = f"source {name}"
        if after not in ("keep", "delete"):
            raise DefinitionError(f'{what}: after must be "keep" or "delete", not {after!r}')
        self.name = name
        self._reader = Reader(to, what, format)
        self._format: Format = format
        self._every = seconds(every, f"{what}: every")
        self._settle = seconds(settle, f"{what}: settle")
        self._after = after

    def read(self, row: Row) -> Sequence[EventLike]:
        """The events of a row, or of a file where ``format="file"``."""
        return self._reader(row)

    # What differs: `listing`, `open` and `remove` run in a thread; `wakes` yields when it is time to look.
    def listing(self) -> list[Found]:
        raise NotImplementedError

    def open(self, name: str) -> IO[bytes]:
        raise NotImplementedError

    def remove(self, name: str) -> None:
        raise NotImplementedError

    async def wakes(self) -> AsyncIterator[None]:
        while True:
            yield
            await asyncio.sleep(self._every)

    async def run(self, publish: Publish) -> None:
        """Read what is there, then what comes, until it is stopped. Raises StentorError when nothing can be listed."""
        seen: dict[str, str] = (publish.position or {}).get("seen", {})
        async for _ in self.wakes():
            try:
                listed = await asyncio.to_thread(self.listing)
            except OSError as error:
                raise StentorError(f"source {self.name}: {error}") from error
            there = {file.name for file in listed}
            for gone in seen.keys() - there:
                del seen[gone]
            new = sorted((f for f in listed if seen.get(f.name) != f.version), key=lambda f: (f.modified, f.name))
            publish.counts.lag = len(new)
            # Those that are younger may be written still.
            await self._take(publish, [f for f in new if time.time() - f.modified >= self._settle], seen)

    async def _take(self, publish: Publish, files: Sequence[Found], seen: dict[str, str]) -> None:
        """Publish files, small ones together: each time the position is written, it tells of all that is there."""
        rows: list[Row] = []
        whole: list[Found] = []

        async def store(at: Any = None) -> None:
            seen.update((file.name, file.version) for file in whole)
            await publish.rows(rows, position={"seen": seen} | ({"at": at} if at else {}))
            rows.clear()
            publish.counts.lag = (publish.counts.lag or 0) - len(whole)
            for file in whole if self._after == "delete" else ():
                try:
                    await asyncio.to_thread(self.remove, file.name)
                except OSError as error:
                    failed(file, error)
            whole.clear()

        def failed(file: Found, error: OSError) -> None:
            publish.counts.errors += 1
            log.warning("source %s: %s: %s", self.name, file.name, error)

        for file in files:
            at = (publish.position or {}).get("at")  # [name, version, rows] of the file that was being read
            done = at[2] if at is not None and at[:2] == [file.name, file.version] else 0
            chunks = self._chunks(file, done)
            try:
                while chunk := await asyncio.to_thread(next, chunks, None):
                    rows += chunk
                    done += len(chunk)
                    if len(rows) >= CHUNK:
                        await store([file.name, file.version, done])
                whole.append(file)
            except FileNotFoundError:
                continue
            except OSError as error:
                failed(file, error)  # the next look reads it again, behind what is stored now
                await store([file.name, file.version, done])
            if len(whole) >= CHUNK:  # empty ones
                await store()
        if rows or whole:
            await store()

    def _chunks(self, file: Found, done: int) -> Iterator[list[Row]]:
        """The rows of a file behind the first ``done``; for threads, and closed by itself when it is dropped."""
        id = f"{file.name}\0{file.version}"
        if self._format == "file":
            if not done:
                yield [Row(id, file.name, {"name": file.name, "size": file.size, "modified": file.modified})]
            return
        with self.open(file.name) as stream:
            rows = islice(rows_of(stream, self._format, id, file.name), done, None)
            while chunk := list(islice(rows, CHUNK)):
                yield chunk


class Folder(_Files):
    """The files of one folder whose names fit a pattern: ``Folder("inbox/*.csv", to=Order, format="csv")``.

    ``to``: an event class or a function, for each row (``format="csv"``, ``"jsonl"``, ``"lines"``) or for each file
    (``"file"``: name, size, modified). A file counts as whole when it did not change for ``settle`` ("0s": where all
    are renamed into the folder). Hidden and unfinished names (``.tmp``, ``.part``, ``~``) are left alone.
    ``after="delete"`` removes a file whose events are durable. It looks when the kernel tells of a change, and
    ``every`` so often.

    Raises:
        ConfigError: watchfiles is not installed. DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        pattern: str | Path,
        *,
        to: To,
        format: Format = "file",
        name: str = "folder",
        every: Duration = "10s",
        settle: Duration = "1s",
        after: Literal["keep", "delete"] = "keep",
    ) -> None:
        super().__init__(name, to, format, every, settle, after)
        try:
            import watchfiles  # noqa: F401
        except ImportError:
            raise ConfigError(f"source {name} needs watchfiles: pip install 'stentor[files]'") from None
        self._folder, self._pattern = Path(pattern).parent, Path(pattern).name

    def listing(self) -> list[Found]:
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name.endswith(UNFINISHED) or not fnmatchcase(name, self._pattern):
                    continue
                try:
                    if entry.is_file():
                        about = entry.stat()
                        version = f"{about.st_mtime_ns}-{about.st_size}"
                        found.append(Found(name, version, about.st_size, about.st_mtime))
                except FileNotFoundError:
                    continue
        return found

    def open(self, name: str) -> IO[bytes]:
        return open(self._folder / name, "rb")

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    async def wakes(self) -> AsyncIterator[None]:
        from watchfiles import awatch

        if not self._folder.is_dir():
            raise StentorError(f"source {self.name}: there is no folder {self._folder}")
        wait = round(1000 * min(self._every, self._settle or self._every))
        watch = awatch(
            self._folder,
            recursive=False,
            watch_filter=None,
            debounce=100,
            step=20,
            rust_timeout=wait,
            yield_on_timeout=True,
        )
        yield
        async for _ in watch:
            yield


class Objects(_Files):
    """Objects of a store that fsspec reaches: ``Objects("s3://bucket/inbox/*.jsonl", to=Order, format="jsonl")``.

    ``options`` go to the store's file system (see fsspec; it may need a package of its own, as s3fs). The rest is as
    for ``Folder``; objects are whole when they are listed. ``.gz`` and its like are read as what they hold.

    Raises:
        ConfigError: fsspec, or the package of the store, is not installed. DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        to: To,
        format: Format = "file",
        name: str = "objects",
        every: Duration = "30s",
        after: Literal["keep", "delete"] = "keep",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(name, to, format, every, "0s", after)
        try:
            import fsspec

            self._store, self._path = fsspec.url_to_fs(url, **options or {})
        except (ImportError, ValueError) as error:
            raise ConfigError(f"source {name}: {error}; see: pip install 'stentor[files]'") from None

    def listing(self) -> list[Found]:
        self._store.invalidate_cache()
        return [
            Found(path, f"{_tag(info)}-{info.get('size')}", int(info.get("size") or 0), _modified(info))
            for path, info in self._store.glob(self._path, detail=True).items()
            if info["type"] == "file"
        ]

    def open(self, name: str) -> IO[bytes]:
        return self._store.open(name, "rb", compression="infer")  # type: ignore[no-any-return]

    def remove(self, name: str) -> None:
        self._store.rm_file(name)


TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
"""What stores call the time of a change."""


def _tag(info: dict[str, Any]) -> str:
    found = next((info[name] for name in ("ETag", "etag", "generation", *TIMES) if info.get(name)), "")
    return str(found)


def _modified(info: dict[str, Any]) -> float:
    found = next((info[name] for name in TIMES if info.get(name)), 0.0)
    return float(found.timestamp() if hasattr(found, "timestamp") else found) if not isinstance(found, str) else 0.0
