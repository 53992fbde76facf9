"""Which addresses may be asked to take events when the one who names them is not trusted."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from stentor.errors import ConfigError

Network = IPv4Network | IPv6Network

REFUSED = [
    ip_network(text)
    for text in (
        "100.64.0.0/10",  # carrier-grade NAT, and the metadata service of some clouds
        "168.63.129.16/32",  # what every virtual machine of one cloud may ask about itself
        "192.0.0.0/24",  # protocol assignments, another cloud's metadata among them
        "192.88.99.0/24",  # 6to4 relays
        "::/96",  # IPv4 in IPv6, in its many forms: what it reaches is decided elsewhere
        "::ffff:0:0/96",
        "::ffff:0:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2001::/32",
        "2002::/16",
        "fec0::/10",
    )
]
"""Beside what the Python library knows as not global: private, loopback, link-local (metadata), reserved."""


def networks(texts: Sequence[str], what: str) -> tuple[Network, ...]:
    """Networks such as ``10.0.0.0/8``. Raises ConfigError."""
    try:
        return tuple(ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from None


def within(address: str, inside: Sequence[Network]) -> bool:
    """Whether an address is in one of the networks."""
    found = ip_address(address.partition("%")[0])
    return any(found in network for network in inside if network.version == found.version)


def public(address: str) -> bool:
    """Whether an address is one of the Internet, and leads nowhere else."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address) and found.scope_id is not None:
        return False
    return (
        found.is_global
        and not (found.is_multicast or found.is_reserved or found.is_unspecified)
        and not any(found in network for network in REFUSED if network.version == found.version)
    )
