"""Which .py files under the current directory, and which others that are named, change; by looking, twice a second."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

INTERVAL = 0.5
SKIPPED = {"__pycache__", "node_modules", "site-packages", "build", "dist"}


def changed_files(folder: str = ".", also: Sequence[Path] = ()) -> AsyncIterator[set[str]]:
    """Sets of files that changed, appeared or went since this call; a burst of changes comes as one."""
    return _changes(_snapshot(folder, also), folder, also)


async def _changes(known: dict[str, int], folder: str, also: Sequence[Path]) -> AsyncIterator[set[str]]:
    before: set[str] = set()
    while True:
        await asyncio.sleep(INTERVAL)
        now = await asyncio.to_thread(_snapshot, folder, also)
        different = {path for path in known.keys() | now.keys() if known.get(path) != now.get(path)}
        known = now
        if different:
            before |= different
        elif before:  # quiet again
            yield before
            before = set()


def _snapshot(folder: str, also: Sequence[Path]) -> dict[str, int]:
    found = dict(_files(folder))
    for path in also:
        with suppress(OSError):
            found[str(path)] = path.stat().st_mtime_ns
    return found


def _files(folder: str) -> Iterator[tuple[str, int]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in SKIPPED:
            continue
        if entry.is_dir(follow_symlinks=False):
            if not Path(entry.path, "pyvenv.cfg").exists():
                yield from _files(entry.path)
        elif entry.name.endswith(".py"):
            try:
                yield entry.path.removeprefix("./"), entry.stat().st_mtime_ns
            except OSError:
                continue
