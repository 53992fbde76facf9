"""Safe sending to addresses that others name: only where it may go, over the connection that was looked at.

A name is resolved once for a connection, every address of it is checked, and the connection goes to these addresses;
the name still stands in Host and in the TLS handshake. So a name that changes its mind between check and use
(DNS rebinding) gains nothing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

from stentor.errors import NotDelivered
from stentor.security.addresses import Network, public, within
from stentor.sinks.http import check_url, shown

Lookup = Callable[[str, int], Awaitable[list[str]]]
"""The addresses of a host."""


async def system_lookup(host: str, port: int) -> list[str]:
    """What the system's resolver says."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Guard(AbstractResolver):
    """The resolver of connections to one URL.

    Allowed are public addresses by https, and all of ``inside`` by http too.

    Raises:
        ConfigError: what is no URL. NotDelivered: its host is an address that is not allowed.
    """

    def __init__(self, url: str, inside: Sequence[Network] = (), lookup: Lookup = system_lookup) -> None:
        check_url(url, "sink")
        parts = urlsplit(url)
        self._https = parts.scheme == "https"
        self._inside = inside
        self._lookup = lookup
        host = (parts.hostname or "").rstrip(".")
        last = host.rpartition(".")[2]
        if ":" in host or last.isdigit() or last.startswith("0x"):  # it is, or would be taken for, an address
            try:
                ip_address(host)
            except ValueError:
                raise NotDelivered(f"{shown(url)}: {host} is no address in its usual form") from None
            self._check(host, host)

    def _check(self, host: str, address: str) -> None:
        if within(address, self._inside):
            return
        if not public(address):
            raise NotDelivered(f"{host} is not a public address")
        if not self._https:
            raise NotDelivered(f"{host} must be sent to by https")

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,  # noqa: ARG002  all are checked
    ) -> list[ResolveResult]:
        addresses = await self._lookup(host, port)
        for address in addresses:
            self._check(host, address)
        return [
            ResolveResult(
                hostname=host, host=address, port=port, proto=0, flags=socket.AI_NUMERICHOST,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
            )
            for address in addresses
        ]  # fmt: skip

    async def close(self) -> None:
        pass
