"""The lines of a log that grows, over rotation: by renaming, or by copying and truncating.

A file is known by its inode and by a hash of its first bytes, as inodes are used again and a copy has another one. The
position is that, the offset behind the last line that was published, the file's time of change then, and its number
in the row of files that were read.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from msgspec import Struct, convert, to_builtins

from stentor.clock import Duration, seconds
from stentor.errors import DefinitionError, StentorError
from stentor.event import EventLike
from stentor.source import Publish, Row
from stentor.sources.rows import Reader, To, text_of

HEAD = 1024
"""Bytes at the beginning of a file that tell it from others."""
CHUNK = 256 * 1024
"""Bytes that are read, and whose lines are published, at once."""
LONGEST_LINE = 1024 * 1024
"""Bytes; a longer line comes in pieces of this size."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
log = logging.getLogger("stentor.source")


class Place(Struct):
    """How far a file was read; see the module."""

    number: int
    inode: int
    offset: int = 0
    head: int = 0
    """Length of the beginning that ``digest`` is of."""
    digest: str = ""
    changed: int = 0
    """When the file was changed last, as of its last reading, in ns since the epoch."""
    done: list[tuple[int, int]] = []
    """Inode and time of change of the last files that were read to their end."""

    def is_in(self, file: BinaryIO) -> bool:
        """Whether ``file`` begins like the file that was read, and is long enough still."""
        return os.fstat(file.fileno()).st_size >= self.offset and _digest(file, self.head) == self.digest


def _digest(file: BinaryIO, length: int) -> str:
    return hashlib.blake2b(os.pread(file.fileno(), length, 0), digest_size=8).hexdigest() if length else ""


class Tail:
    """Follows a log: ``Tail("/var/log/shop.log", to=Entry, format="jsonl")``; each whole line is a row.

    It begins at the start of the file (``start="end"``: behind what is there). A line counts when its newline is there.
    Rotated files are looked for beside the log, as ``<name>.*`` or ``<name>-*``; compressed ones are left alone. A log
    that was renamed is read until nothing came for ``linger``, as its writer may have it open still. With
    ``format="lines"`` an event class gets the field ``text``.

    Raises:
        DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        to: To,
        format: Literal["lines", "jsonl"] = "lines",
        name: str = "tail",
        start: Literal["beginning", "end"] = "beginning",
        every: Duration = "200ms",
        linger: Duration = "1s",
    ) -> None:
        if format not in ("lines", "jsonl"):
            raise DefinitionError(f'source {name}: format must be "lines" or "jsonl", not {format!r}')
        if start not in ("beginning", "end"):
            raise DefinitionError(f'source {name}: start must be "beginning" or "end", not {start!r}')
        self.name = name
        self._reader = Reader(to, f"source {name}", format)
        self._path = Path(path)
        self._start = start
        self._every = seconds(every, f"source {name}: every")
        self._linger = seconds(linger, f"source {name}: linger")

    def read(self, row: Row) -> Sequence[EventLike]:
        """The events of a line."""
        return self._reader(row)

    async def run(self, publish: Publish) -> None:
        """Read what is there, then what comes, until it is stopped. Raises StentorError when a file cannot be read."""
        try:
            follow = _Follow(self, publish)
            try:
                while True:
                    if not await follow.step():
                        await asyncio.sleep(self._every)
            finally:
                follow.close()
        except OSError as error:
            raise StentorError(f"source {self.name}: {error}") from error


class _Follow:
    """One run of a Tail: the file that is open, and the place in it."""

    def __init__(self, tail: Tail, publish: Publish) -> None:
        self._tail = tail
        self._path = tail._path
        self._publish = publish
        self._file: BinaryIO | None = None
        self._place = Place(0, 0)
        self._quiet_since: float | None = None
        if publish.position is not None:
            self._place = convert(publish.position, Place)
            self._file = self._find()
            if self._file is None:
                self._lost("is gone or compressed")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lost(self, why: str) -> None:
        self._publish.counts.errors += 1
        text = "source %s: the file that was read up to byte %d %s: if it had more lines, they are not read"
        log.error(text, self._tail.name, self._place.offset, why)

    def _files(self) -> list[tuple[int, bool, Path, int]]:
        """The log and its rotated files, oldest first: time of change, whether it is the log itself, path, inode.

        A list that is made while files are renamed may lack one, or have it twice: two in a row have to agree.
        """
        found, names = self._list(), None
        while names != (now := {(path, inode) for _, _, path, inode in found}):
            found, names = self._list(), now
        return sorted(found)

    def _list(self) -> list[tuple[int, bool, Path, int]]:
        found = []
        for path in self._path.parent.iterdir():
            name = path.name
            rotated = name.startswith((f"{self._path.name}.", f"{self._path.name}-")) and not name.endswith(COMPRESSED)
            if rotated or name == self._path.name:
                try:
                    about = path.stat()
                except FileNotFoundError:
                    continue
                found.append((about.st_mtime_ns, not rotated, path, about.st_ino))
        return found

    def _find(self) -> BinaryIO | None:
        """The file of the place, opened: that of its inode, else a rotated one that begins alike."""
        place = self._place
        for _, live, path, inode in sorted(self._files(), key=lambda found: found[3] != place.inode):
            if inode != place.inode and live:
                continue
            file = _open(path, inode)
            if file is None:
                return self._find()  # renamed since it was listed, and so may be the one that is looked for
            if place.is_in(file):
                place.inode = inode
                return file
            file.close()
        return None

    async def step(self) -> bool:
        """Read and publish once; False when there was nothing to do."""
        if self._file is None:
            return await self._open_next()
        file, place = self._file, self._place
        data = os.pread(file.fileno(), CHUNK, place.offset)
        about = os.fstat(file.fileno())
        if not place.is_in(file):  # truncated, maybe written again since: what was read belongs to the new beginning
            await self._truncated()
            return True
        end = data.rfind(b"\n") + 1
        if not end and len(data) == CHUNK:
            data = os.pread(file.fileno(), LONGEST_LINE, place.offset)
            end = data.find(b"\n") + 1 or len(data) // LONGEST_LINE * LONGEST_LINE
        self._publish.counts.lag = about.st_size - place.offset
        if end:
            self._quiet_since = None
            await self._lines(data[:end], about.st_mtime_ns)
            return True
        now = time.monotonic()
        if not self._rotated():
            self._quiet_since = now
        if self._quiet_since is None or now - self._quiet_since < self._tail._linger:
            self._quiet_since = self._quiet_since or now
            return False
        if data:  # the last line of a finished file, without its newline
            await self._lines(data, about.st_mtime_ns)
        self._finish(file)
        return await self._open_next()

    def _rotated(self) -> bool:
        """Whether the open file is not the log any more, and there is another one."""
        try:
            return self._path.stat().st_ino != self._place.inode
        except FileNotFoundError:
            return False  # it is moved away, and the next one is not there yet

    def _finish(self, file: BinaryIO) -> None:
        about = os.fstat(file.fileno())
        place = self._place
        place.changed = about.st_mtime_ns
        place.done = [*place.done[-15:], (about.st_ino, about.st_mtime_ns)]
        self.close()

    async def _open_next(self) -> bool:
        """Open the file that follows the place; False when there is none yet."""
        place = self._place
        self._quiet_since = None
        for changed, live, path, inode in self._files():
            if live or (place.number and changed >= place.changed and (inode, changed) not in place.done):
                file = _open(path, inode)
                if file is None:
                    return False  # the next look has its new name
                self._file = file
                self._begin(inode)
                if place.number == 0 and self._tail._start == "end":
                    size = os.fstat(file.fileno()).st_size
                    last = os.pread(file.fileno(), CHUNK, max(0, size - CHUNK))
                    self._at(size - len(last) + last.rfind(b"\n") + 1, 0)
                    await self._publish([], position=to_builtins(self._place))
                return True
        return False

    def _begin(self, inode: int) -> None:
        self._place = Place(self._place.number + 1, inode, changed=self._place.changed, done=self._place.done)

    async def _truncated(self) -> None:
        """The log was cut: what was not read of it stands in its copy, if there is one; then it begins anew."""
        log_file, log_inode = self._file, self._place.inode
        self._file = self._find()
        if self._file is None:
            self._lost("was truncated, and no copy of it is there")
        else:
            copy = self._file
            while data := os.pread(copy.fileno(), CHUNK, self._place.offset):
                await self._lines(data[: data.rfind(b"\n") + 1 or len(data)], os.fstat(copy.fileno()).st_mtime_ns)
            self._finish(copy)
        self._file = log_file
        self._begin(log_inode)

    def _at(self, offset: int, changed: int) -> None:
        """Move the place."""
        assert self._file is not None
        place = self._place
        place.offset, place.changed = offset, max(changed, place.changed)
        if place.head < HEAD:
            place.head = min(offset, HEAD)
            place.digest = _digest(self._file, place.head)

    async def _lines(self, data: bytes, changed: int) -> None:
        """Publish the lines of ``data``, which begins at the place, and move it behind them."""
        place, rows, at = self._place, [], self._place.offset
        for line in data.split(b"\n"):
            if line.strip():
                rows.append(Row(f"{place.number}\0{at}", f"{self._path}@{at}", text_of(line.removesuffix(b"\r"))))
            at += len(line) + 1
        self._at(place.offset + len(data), changed)
        await self._publish.rows(rows, position=to_builtins(place))


def _open(path: Path, inode: int) -> BinaryIO | None:
    """The file that was listed there; None when it has been renamed or removed since."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_ino == inode:
        return file
    file.close()
    return None
