"""Parts of an app that live in folders above it, by the method of App that adds each: loaded when it is first called.

So `app.py` imports no folder, and who never calls the method never loads them; see docs/decisions/0009.
"""

from __future__ import annotations

from typing import Any, Protocol

from stentor.connect import load

PARTS: dict[str, tuple[str, str]] = {
    "users": ("stentor.sources.users:users", "http"),
    "webhook": ("stentor.sources.webhook:webhook", "http"),
    "deliver": ("stentor.sinks.http:deliver", "deliver"),
    "subscriptions": ("stentor.sinks.subscriptions:subscriptions", "deliver"),
}
"""By method: a function whose first argument is the app, and the extra that brings its libraries."""


class Remote(Protocol):
    """A service as a handler: ``stentor.sinks.http.Target``."""

    url: str

    @property
    def name(self) -> str: ...


def part(name: str) -> Any:
    """The function behind a method. Raises ConfigError when its libraries are missing."""
    path, extra = PARTS[name]
    return load(path, extra, f"app.{name}")
