"""Who a request comes from, as the user's program says, and what they may do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, NamedTuple

from msgspec import Struct


class Visit(NamedTuple):
    """What a request tells of who makes it: headers by name in lower case, cookies, parameters of the query."""

    headers: Mapping[str, str]
    cookies: Mapping[str, str]
    query: Mapping[str, str]


class Identity(Struct, frozen=True, kw_only=True):
    """Someone with a name, and the event types that they may publish and subscribe to (classes, or types by name).

    ``where`` bounds both further, by CloudEvents SQL on the attributes: ``"partitionkey = 'customer-7'"``.
    """

    name: str
    publish: tuple[Any, ...] = ()
    subscribe: tuple[Any, ...] = ()
    where: str | None = None


Identify = Callable[[Visit], Identity | Awaitable[Identity | None] | None]
"""Gives the identity behind a request, or None when there is none."""


def cookies(header: str) -> dict[str, str]:
    """The cookies of a request; none where they cannot be read."""
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header).items()}
    except CookieError:
        return {}
