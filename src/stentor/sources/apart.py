"""What a library must be asked outside the event loop for, one call after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Apart:
    """One thread for the calls of one connection; ``end`` closes it.

    A call that was cancelled goes on in its thread, and a connection that is closed under it brings the interpreter
    down; so closing waits its turn there.
    """

    def __init__(self, name: str, end: Callable[[], object]) -> None:
        self._end = end
        self._thread = ThreadPoolExecutor(1, name)

    async def call(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def close(self) -> None:
        self._thread.submit(self._end)
        self._thread.shutdown(wait=False)
