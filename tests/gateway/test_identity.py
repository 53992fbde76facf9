"""Who may publish what, before the real Envoy: tokens, client certificates, and both."""

import base64
import json
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from servers.tls import certificates
from tests.gateway.bus import PAID, PLACED, event, running, structured

pytestmark = [pytest.mark.server, pytest.mark.slow]
ISSUER, AUDIENCE = "https://id.example.com", "events"
PUBLISHERS = f"""
[publishers]
till = ["{PLACED}"]
auditor = ["com.shop.*"]
client = ["{PLACED}"]
"""


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Issuer:
    """Signs tokens with a key whose public half is in ``jwks``."""

    def __init__(self, folder: Path) -> None:
        self.key = folder / "issuer.key"
        self._openssl("genrsa", "-out", str(self.key), "2048")
        modulus = self._openssl("rsa", "-in", str(self.key), "-modulus", "-noout").decode().strip().partition("=")[2]
        key = {"kty": "RSA", "alg": "RS256", "kid": "one", "n": b64(bytes.fromhex(modulus)), "e": "AQAB"}
        self.jwks = folder / "jwks.json"
        self.jwks.write_text(json.dumps({"keys": [key]}))

    @staticmethod
    def _openssl(*args: str, data: bytes = b"") -> bytes:
        return subprocess.run(["openssl", *args], input=data, check=True, capture_output=True).stdout

    def token(self, subject: str, **claims: Any) -> dict[str, str]:
        """The header of a token, good for a minute unless the claims say otherwise."""
        body = {"sub": subject, "iss": ISSUER, "aud": AUDIENCE, "exp": int(time.time()) + 60} | claims
        head = {"alg": "RS256", "typ": "JWT", "kid": "one"}
        text = ".".join(b64(json.dumps(part).encode()) for part in (head, body))
        signed = self._openssl("dgst", "-sha256", "-sign", str(self.key), data=text.encode())
        return {"authorization": f"Bearer {text}.{b64(signed)}"}

    @property
    def settings(self) -> str:
        return f'[jwt]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\njwks = "{self.jwks}"\n'


async def test_a_token_says_who_publishes_and_each_publishes_what_it_may(tmp_path: Path) -> None:
    issuer = Issuer(tmp_path)
    async with running(tmp_path, issuer.settings + PUBLISHERS) as (bus, client):

        async def post(type: str, token: dict[str, str], body: bytes = b"{}", **more: str) -> int:
            headers = event(type) | token | {name.replace("_", "-"): value for name, value in more.items()}
            return (await client.post("/events", headers=headers, content=body)).status_code

        till, auditor, billing = issuer.token("till"), issuer.token("auditor"), issuer.token("billing")
        assert await post(PLACED, till) == 202
        [got] = bus.one("billing").got
        assert "authorization" not in got
        assert await post(PAID, till) == 403
        assert await post(PAID, billing) == 202, "a service may publish what its app publishes"
        assert await post(PLACED, billing) == 403
        assert await post(PLACED, issuer.token("nobody")) == 403
        # The type that counts is that of the body, which is what the service reads.
        assert await post(PLACED, till, structured(PAID), content_type="application/cloudevents+json") == 403
        assert await post(PAID, till, structured(PLACED), content_type="application/cloudevents+json") == 202
        # Nothing is easier to reach than a route: not the dead letters, not another path or method.
        assert await post("com.shop.nothing", auditor) == 202
        assert await post("com.shop.nothing", till) == 403
        assert await post("org.else", auditor) == 403
        for type in (PLACED, "com.shop.nothing"):
            assert await post(type, {}) == 401
            assert await post(type, {"authorization": "Bearer a.b.c"}) == 401
            assert await post(type, issuer.token("auditor", exp=int(time.time()) - 120)) == 401
            assert await post(type, issuer.token("auditor", aud="others")) == 403
            assert await post(type, issuer.token("auditor", iss="https://evil.example.com")) == 401
        assert (await client.get("/events")).status_code == 401
        assert (await client.get("/", headers=till | {"x-stentor-type": PLACED})).status_code == 403
        assert len(bus.one("billing").got) == 2
        assert len(bus.one("gateway").got) == 2  # Paid goes to two services, so to the relay; and the unknown one


def tls(folder: Path, *, certificate: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if certificate:
        context.load_cert_chain(folder / "client.pem", folder / "client.key")
    return context


async def test_a_client_certificate_says_who_publishes(tmp_path: Path) -> None:
    made = certificates(tmp_path / "tls")
    toml = f'[tls]\ncert = "{made}/server.pem"\nkey = "{made}/server.key"\nclient_ca = "{made}/ca.pem"\n'
    client = {"verify": tls(made, certificate=True)}
    async with running(tmp_path, toml + PUBLISHERS, client=client) as (bus, session):
        assert (await session.post("/events", headers=event())).status_code == 202
        assert (await session.post("/events", headers=event(PAID))).status_code == 403
        assert (await session.post("/events", headers=event("com.shop.nothing"))).status_code == 403
        async with httpx.AsyncClient(base_url=bus.url, verify=tls(made, certificate=False)) as stranger:
            with pytest.raises((httpx.TransportError, ssl.SSLError)):
                await stranger.post("/events", headers=event())
        assert len(bus.one("billing").got) == 1
        assert "x-forwarded-client-cert" not in bus.one("billing").got[0]


async def test_a_token_or_a_certificate_is_enough_where_both_are_taken(tmp_path: Path) -> None:
    made, issuer = certificates(tmp_path / "tls"), Issuer(tmp_path)
    toml = f'[tls]\ncert = "{made}/server.pem"\nkey = "{made}/server.key"\nclient_ca = "{made}/ca.pem"\n'
    client = {"verify": tls(made, certificate=True)}
    async with running(tmp_path, toml + issuer.settings + PUBLISHERS, client=client) as (bus, session):
        assert (await session.post("/events", headers=event())).status_code == 202
        async with httpx.AsyncClient(base_url=bus.url, verify=tls(made, certificate=False)) as stranger:
            assert (await stranger.post("/events", headers=event() | issuer.token("till"))).status_code == 202
            assert (await stranger.post("/events", headers=event())).status_code == 403
            assert (await stranger.post("/events", headers=event("com.shop.nothing"))).status_code == 403
        assert len(bus.one("billing").got) == 2
        assert not bus.one("gateway").got
