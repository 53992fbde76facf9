"""Signatures of Standard Webhooks 1.0.0 (https://github.com/standard-webhooks/standard-webhooks): the sending side.

What is signed is ``<webhook-id>.<webhook-timestamp>.<body>``. ``v1`` is HMAC-SHA256 with a secret ``whsec_<Base64>``,
``v1a`` is Ed25519 with a private key ``whsk_<Base64 of its 32 bytes>``, whose public side is ``whpk_<Base64>``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Sequence

from stentor.errors import ConfigError

SECRET = "whsec_"  # noqa: S105 - prefixes of keys, not keys
PRIVATE = "whsk_"
LEAST = 24
"""Bytes that a secret has at least, by the specification."""


def key_bytes(key: str, prefix: str, what: str) -> bytes:
    """The bytes of a key such as ``whsec_...``. Raises ConfigError, which does not show the key."""
    try:
        return base64.b64decode(key.removeprefix(prefix), validate=True)
    except (ValueError, binascii.Error):
        raise ConfigError(f"{what} must be {prefix} and then Base64") from None


def _signer(key: str, what: str) -> Callable[[bytes], str]:
    if key.startswith(PRIVATE):
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        except ImportError:
            raise ConfigError(f"{what}: signing with {PRIVATE} keys needs pip install 'stentor[webhooks]'") from None
        seed = key_bytes(key, PRIVATE, what)
        if len(seed) not in (32, 64):  # some libraries put the public key behind it
            raise ConfigError(f"{what}: a private key has 32 bytes, this one {len(seed)}")
        private = Ed25519PrivateKey.from_private_bytes(seed[:32])
        return lambda content: "v1a," + base64.b64encode(private.sign(content)).decode()
    secret = key_bytes(key, SECRET, what)
    if len(secret) < LEAST:
        raise ConfigError(f"{what} has {len(secret)} bytes; {LEAST} is the least")
    return lambda content: "v1," + base64.b64encode(hmac.digest(secret, content, hashlib.sha256)).decode()


class Signer:
    """Signs bodies with one key, or with several while receivers change from one to the next.

    Raises:
        ConfigError: a key is malformed or too short, or its library is missing.
    """

    def __init__(self, keys: str | Sequence[str], what: str = "secret") -> None:
        self._signers = [_signer(key, what) for key in ([keys] if isinstance(keys, str) else keys)]

    def headers(self, id: str, body: bytes, now: float) -> dict[str, str]:
        """The headers that go with a body; ``now`` in seconds since the epoch."""
        time = str(int(now))
        content = f"{id}.{time}.".encode() + body
        signatures = " ".join(sign(content) for sign in self._signers)
        return {"webhook-id": id, "webhook-timestamp": time, "webhook-signature": signatures}
