"""How those who send webhooks sign them: Standard Webhooks, GitHub, Stripe, Slack, and a plain bearer token.

Each is a function of the secrets that are good now, one or several, so that one can be exchanged for another without a
gap. Texts may be given; ``env`` names a variable and ``file`` a file that hold them, one a line. A file is read again
when it changes. What was read is never shown.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stentor.clock import Duration, seconds
from stentor.errors import ConfigError
from stentor.exchange import Refused

Headers = Mapping[str, str]
log = logging.getLogger("stentor.webhook")
MOST = 16
"""Signatures of a request that are looked at."""


class Signed(NamedTuple):
    """What a request says of its signature: the signatures by version, what they cover, and when they were made."""

    signatures: list[tuple[str, bytes]]
    content: bytes
    time: str | None


class Key(Protocol):
    """A secret, ready to use."""

    version: str

    def verifies(self, content: bytes, signature: bytes) -> bool: ...


class _Hmac:
    def __init__(self, version: str, secret: bytes) -> None:
        self.version = version
        self._secret = secret

    def verifies(self, content: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(hmac.digest(self._secret, content, hashlib.sha256), signature)


class _Ed25519:
    version = "v1a"

    def __init__(self, public: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        except ImportError:
            raise ConfigError("a whpk_ key needs cryptography: pip install 'stentor[webhooks]'") from None
        self._key = Ed25519PublicKey.from_public_bytes(public)

    def verifies(self, content: bytes, signature: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, content)
        except InvalidSignature:
            return False
        return True


class _Token:
    version = ""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def verifies(self, content: bytes, signature: bytes) -> bool:  # noqa: ARG002  a token covers no content
        return hmac.compare_digest(self._token, signature)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


class _Keys:
    """The keys that are good now."""

    def __init__(
        self, scheme: str, secrets: tuple[str, ...], env: str | None, file: str | None, make: Callable[[str], Key]
    ) -> None:
        self._scheme = scheme
        self._make = make
        self._file = file
        self._read: tuple[int, int] | None = None
        if env is not None:
            if not os.environ.get(env, "").strip():
                raise ConfigError(f"{scheme}: the variable {env} holds no secret")
            secrets += _lines(os.environ[env])
        self._given = self._made(secrets)
        self._of_file: list[Key] = []
        if not self() and not self._given:
            raise ConfigError(f"{scheme}: no secret; write {scheme}('…'), {scheme}(env='…') or {scheme}(file='…')")

    def _made(self, secrets: tuple[str, ...]) -> list[Key]:
        try:
            if not all(secrets):
                raise ValueError("it is empty")
            return [self._make(secret) for secret in secrets]
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self._scheme}: a secret is malformed: {error}") from None

    def __call__(self) -> list[Key]:
        if self._file is not None:
            try:
                stat = Path(self._file).stat()
                if self._read != (stat.st_mtime_ns, stat.st_ino):
                    self._of_file = self._made(_lines(Path(self._file).read_text("utf-8")))
                    self._read = (stat.st_mtime_ns, stat.st_ino)
            except (OSError, UnicodeDecodeError) as error:
                if self._read is None:
                    raise ConfigError(f"{self._scheme}: secrets: {error}") from None
        return self._given + self._of_file


class Scheme:
    """How a sender signs, and how its requests name themselves. ``check`` is for the request, ``name`` for its JSON."""

    def __init__(
        self,
        name: str,
        keys: _Keys,
        read: Callable[[Headers, bytes], Signed],
        named: Callable[[Headers, Any], tuple[Any, Any]],
        tolerance: Duration,
    ) -> None:
        self.name = name
        self._keys = keys
        self._read = read
        self._named = named
        self._tolerance = seconds(tolerance, "tolerance")

    def __repr__(self) -> str:
        return f"{self.name}(…)"

    def check(self, headers: Headers, body: bytes, now: float) -> None:
        """Raises Refused with 401 unless one of the secrets signed the request, within the tolerance of ``now``."""
        if wrong := self._wrong(headers, body, now):
            # Who cannot sign learns nothing, and floods no log: who looks for the reason asks for DEBUG.
            log.debug("%s: a request is refused: %s", self.name, wrong)
            raise Refused(401, "the request is not signed as it must be")

    def _wrong(self, headers: Headers, body: bytes, now: float) -> str:
        """What is wrong with a signature, or ""."""
        try:
            signed = self._read(headers, body)
            made = None if signed.time is None else int(signed.time[:12])
        except (KeyError, ValueError):
            return "the signature is missing or malformed"
        good = False
        for key in self._keys():
            for version, signature in signed.signatures[:MOST]:
                good |= version == key.version and key.verifies(signed.content, signature)
        if not good:
            return "the signature is wrong"
        if made is not None and abs(now - made) > self._tolerance:
            return f"the signature is {abs(now - made):.0f} s {'old' if made < now else 'in the future'}"
        return ""

    def names(self, headers: Headers, payload: Any) -> tuple[str | None, str | None]:
        """The id of the delivery, which a repetition has again, and the name of what happened."""
        id, name = self._named(headers, payload)
        return (id if isinstance(id, str) and id else None), (name if isinstance(name, str) else None)


def _member(payload: Any, *path: str) -> Any:
    for name in path:
        payload = payload.get(name) if isinstance(payload, dict) else None
    return payload


def _pairs(text: str, between: str, within: str) -> list[tuple[str, str]]:
    """``v1=a,v1=b`` as pairs; what is no pair is left out."""
    parts = [part.strip().partition(within) for part in text.split(between)]
    return [(name, value) for name, sign, value in parts if sign]


def standard(*secrets: str, env: str | None = None, file: str | None = None, tolerance: Duration = "5m") -> Scheme:
    """Standard Webhooks (https://github.com/standard-webhooks/standard-webhooks, spec 1.0.0).

    A secret ``whsec_…`` is symmetric (v1), a public key ``whpk_…`` asymmetric (v1a: Ed25519, of the extra
    ``webhooks``). The id is ``webhook-id``, the name the payload's ``type``.
    """

    def make(secret: str) -> Key:
        kind, line, encoded = secret.rpartition("_")
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        if not raw or kind + line not in ("whsec_", "whpk_", ""):
            raise ValueError("it begins with neither whsec_ nor whpk_, or holds nothing")
        return _Ed25519(raw) if kind == "whpk" else _Hmac("v1", raw)

    def read(headers: Headers, body: bytes) -> Signed:
        id, time = headers["webhook-id"], headers["webhook-timestamp"]
        found = []
        for version, encoded in _pairs(headers["webhook-signature"], " ", ","):
            try:
                found.append((version, base64.b64decode(encoded, validate=True)))
            except binascii.Error:
                continue  # of a version that is not known here, perhaps
        return Signed(found, f"{id}.{time}.".encode("latin-1") + body, time)

    keys = _Keys("standard", secrets, env, file, make)
    return Scheme("standard", keys, read, lambda h, p: (h.get("webhook-id"), _member(p, "type")), tolerance)


def github(*secrets: str, env: str | None = None, file: str | None = None) -> Scheme:
    """GitHub (https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries).

    It signs no time, so nothing but the id (``X-GitHub-Delivery``) tells a repetition. The name is ``X-GitHub-Event``.
    """

    def read(headers: Headers, body: bytes) -> Signed:
        pairs = _pairs(headers["x-hub-signature-256"], ",", "=")
        return Signed([(version, bytes.fromhex(digits)) for version, digits in pairs], body, None)

    keys = _Keys("github", secrets, env, file, lambda secret: _Hmac("sha256", secret.encode()))
    return Scheme("github", keys, read, lambda h, _: (h.get("x-github-delivery"), h.get("x-github-event")), "5m")


def stripe(*secrets: str, env: str | None = None, file: str | None = None, tolerance: Duration = "5m") -> Scheme:
    """Stripe (https://docs.stripe.com/webhooks#verify-manually); id and name are the event's ``id`` and ``type``."""

    def read(headers: Headers, body: bytes) -> Signed:
        pairs = _pairs(headers["stripe-signature"], ",", "=")
        time = dict(pairs)["t"]
        found = [(version, bytes.fromhex(digits)) for version, digits in pairs if version == "v1"]
        return Signed(found, f"{time}.".encode("latin-1") + body, time)

    keys = _Keys("stripe", secrets, env, file, lambda secret: _Hmac("v1", secret.encode()))
    return Scheme("stripe", keys, read, lambda _, p: (_member(p, "id"), _member(p, "type")), tolerance)


def slack(*secrets: str, env: str | None = None, file: str | None = None, tolerance: Duration = "5m") -> Scheme:
    """Slack (https://docs.slack.dev/authentication/verifying-requests-from-slack); the secret is the signing secret.

    The id is ``event_id``, the name the type of the inner event.
    """

    def read(headers: Headers, body: bytes) -> Signed:
        time = headers["x-slack-request-timestamp"]
        pairs = _pairs(headers["x-slack-signature"], ",", "=")
        found = [(version, bytes.fromhex(digits)) for version, digits in pairs]
        return Signed(found, f"v0:{time}:".encode("latin-1") + body, time)

    keys = _Keys("slack", secrets, env, file, lambda secret: _Hmac("v0", secret.encode()))
    named = lambda _, p: (_member(p, "event_id"), _member(p, "event", "type") or _member(p, "type"))  # noqa: E731
    return Scheme("slack", keys, read, named, tolerance)


def bearer(*tokens: str, env: str | None = None, file: str | None = None) -> Scheme:
    """A token in ``Authorization: Bearer …``, for callers of one's own; the id is ``Idempotency-Key``."""

    def read(headers: Headers, body: bytes) -> Signed:  # noqa: ARG001  a token covers no content
        kind, _, token = headers["authorization"].partition(" ")
        return Signed([("" if kind.lower() == "bearer" else "?", token.strip().encode("latin-1"))], b"", None)

    keys = _Keys("bearer", tokens, env, file, _Token)
    return Scheme("bearer", keys, read, lambda h, p: (h.get("idempotency-key"), _member(p, "type")), "5m")
