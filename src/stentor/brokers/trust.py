"""TLS of a broker's connections: the files that a URL names, and what is said of a certificate that is refused."""

from __future__ import annotations

import asyncio
import ssl

from msgspec import Struct

from stentor.connect import Address, BrokerUrl, switch
from stentor.errors import AuthenticationFailed, ConfigError

PLAIN = "speaks no TLS there, and the URL asks for it"

_NO_TLS = ("wrong version number", "wrong_version_number", "no tls")
_ALERTS = ("certificate", "unknown ca", "unknown_ca", *_NO_TLS)


class Trust(Struct, frozen=True):
    """Paths of PEM files, empty where none is named, and a context made of them that verifies the server's name."""

    ca: str
    cert: str
    key: str
    context: ssl.SSLContext
    hosts: tuple[Address, ...]
    greeted: bool

    async def refusal(self) -> str:
        """What TLS says to somebody who connects and asks nothing; empty where nobody minds.

        Since TLS 1.3 a server says so after the handshake, and a client that has sent something by then may find the
        connection cut instead.
        """
        for host, port in self.hosts:
            context, name = (None, None) if self.greeted else (self.context, host)
            try:
                async with asyncio.timeout(2):
                    reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=name)
                    try:
                        if self.greeted:
                            await reader.readline()
                            await writer.start_tls(self.context, server_hostname=host)
                        await reader.read(1)
                    finally:
                        writer.transport.abort()
            except ssl.SSLError as error:  # RocketMQ says no more than "internal error"
                return str(error)
            except (OSError, TimeoutError):
                pass
        return ""


def trust(url: BrokerUrl, port: int, *, secure: bool = False, greeted: bool = False) -> Trust | None:
    """The options ``tls`` (1, or implied by ``secure``), ``ca``, ``cert`` and ``key`` of a URL; None without TLS.

    ``port`` is the default one; ``greeted``: the server says a line in clear before TLS begins.
    Raises ConfigError where a file cannot be used, or is named and there is no TLS.
    """
    ca, cert, key = (url.option(name, "") for name in ("ca", "cert", "key"))
    if not url.option("tls", False, switch) and not secure:
        if ca or cert or key:
            raise ConfigError(f"{url}: ca, cert and key are for TLS: write tls=1 too")
        return None
    if key and not cert:
        raise ConfigError(f"{url}: a key without cert: name the client's certificate too")
    try:
        context = ssl.create_default_context(cafile=ca or None)
        if cert:
            context.load_cert_chain(cert, key or None, password="")  # without one it would ask the terminal
    except OSError as error:  # ssl.SSLError is one
        named = ", ".join(f"{name}={path}" for name, path in (("ca", ca), ("cert", cert), ("key", key)) if path)
        raise ConfigError(f"{url}: the files cannot be read ({named}): {error.strerror or error}") from None
    return Trust(ca, cert, key or cert, context, tuple(url.addresses(port)), greeted)


def refuses_certificate(text: str) -> bool:
    """Whether an error of a connection is about a certificate, ours or the server's, or about there being no TLS."""
    return any(alert in text.lower() for alert in _ALERTS)


def refused(broker: object, text: str) -> AuthenticationFailed:
    """That a certificate is not accepted, or there is no TLS: trying again does not help."""
    text = " ".join(text.split())
    if any(word in text.lower() for word in _NO_TLS):
        return AuthenticationFailed(f"{broker} {PLAIN}")
    if "alert" in text.lower() or "client certificate" in text:
        return AuthenticationFailed(f"{broker} takes no client without a certificate that it accepts: {text}")
    return AuthenticationFailed(f"{broker} has a certificate that is not accepted here: {text}")
