"""Which .py files under the current directory change; by looking at them, twice a second."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

INTERVAL = 0.5
SKIPPED = {"__pycache__", "node_modules", "site-packages", "build", "dist"}


async def changed_files(folder: str = ".") -> AsyncIterator[set[str]]:
    """Sets of files that changed, appeared or went; a burst of changes comes as one."""
    known = await asyncio.to_thread(_snapshot, folder)
    before: set[str] = set()
    while True:
        await asyncio.sleep(INTERVAL)
        now = await asyncio.to_thread(_snapshot, folder)
        different = {path for path in known.keys() | now.keys() if known.get(path) != now.get(path)}
        known = now
        if different:
            before |= different
        elif before:  # quiet again
            yield before
            before = set()


def _snapshot(folder: str) -> dict[str, int]:
    return dict(_files(folder))


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
