"""Where everything stands, for a test that has waited for too long."""

from __future__ import annotations

import asyncio
from typing import Any


def where(waiting: Any) -> list[str]:
    """Where a suspended coroutine stands: from its own line to that of what it waits for in the end."""
    found: list[str] = []
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is not None:
            found.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
    return found


def stands() -> str:
    """A line for each task of the running loop, the innermost call first."""
    lines = [f"{task.get_name()}: " + " < ".join(reversed(where(task.get_coro()))) for task in asyncio.all_tasks()]
    return "\n".join(sorted(lines))
