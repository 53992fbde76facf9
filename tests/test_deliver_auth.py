"""Who the sender is: Ed25519 signatures, OAuth2, a file, client certificates."""

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import trustme
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from standardwebhooks.webhooks import Webhook

from stentor import App, Event, Retry
from stentor.errors import ConfigError
from stentor.security.signing import Signer
from stentor.sinks.http import OAuth2, Target
from tests.receiver import Answer, Receiver, Request, receiving


class Placed(Event, topic="orders", key="order_id", type="com.shop.order.placed"):
    order_id: str


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as found:
        yield found


async def deliver(target: Target, count: int, receiver: Receiver, requests: int | None = None) -> None:
    app = App("shop", broker="memory://")
    app.deliver(Placed, to=target, retry=Retry(attempts=3, first="10ms"))
    async with app:
        for number in range(count):
            await app.publish(Placed(order_id=f"o-{number}"))
        await receiver.got(count if requests is None else requests)


# ---- signatures -----------------------------------------------------------------------------------------------------


def test_the_vector_of_standard_webhooks() -> None:
    headers = Signer("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', 1614265330.9
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-timestamp"] == "1614265330"


async def test_ed25519_beside_hmac_while_keys_change(receiver: Receiver) -> None:
    private = Ed25519PrivateKey.generate()
    key = "whsk_" + base64.b64encode(private.private_bytes_raw()).decode()
    old, new = ("whsec_" + base64.b64encode(letter * 32).decode() for letter in (b"o", b"n"))
    await deliver(Target(receiver.url, secret=[old, new, key]), 1, receiver)
    [request] = receiver.requests
    for secret in (old, new):
        Webhook(secret).verify(request.body, request.headers)
    [signature] = [s[4:] for s in request.headers["webhook-signature"].split() if s.startswith("v1a,")]
    signed = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
    private.public_key().verify(base64.b64decode(signature), signed)
    with pytest.raises(InvalidSignature):
        private.public_key().verify(base64.b64decode(signature), signed + b" ")


# ---- authorization --------------------------------------------------------------------------------------------------


class Authority:
    """A token endpoint that counts, and a service that takes only the newest token."""

    def __init__(self, lifetime: float = 3600) -> None:
        self.asked: list[Request] = []
        self.lifetime = lifetime
        self.good = True

    def __call__(self, request: Request) -> Answer:
        if request.path == "/token":
            self.asked.append(request)
            token = {"access_token": f"t-{len(self.asked)}", "token_type": "Bearer", "expires_in": self.lifetime}
            return (200, {"content-type": "application/json"}, json.dumps(token).encode()) if self.good else 503
        return 202 if request.headers.get("authorization") == f"Bearer t-{len(self.asked)}" else 401


def hooks(receiver: Receiver) -> list[Request]:
    return [request for request in receiver.requests if request.path == "/hook"]


async def test_one_token_for_many_requests(receiver: Receiver, tmp_path: Path) -> None:
    receiver.answer = authority = Authority()
    (tmp_path / "secret").write_text("s:e/cret\n")
    token_url = receiver.url.replace("/hook", "/token")
    oauth = OAuth2(token_url, "shop", tmp_path / "secret", scope="events", audience="https://billing")
    await deliver(Target(receiver.url, authorization=oauth), 30, receiver, 31)
    [asked] = authority.asked
    assert asked.headers["authorization"] == "Basic " + base64.b64encode(b"shop:s%3Ae%2Fcret").decode()
    form = {"grant_type": ["client_credentials"], "scope": ["events"], "audience": ["https://billing"]}
    assert parse_qs(asked.body.decode()) == form
    assert {request.headers["authorization"] for request in hooks(receiver)} == {"Bearer t-1"}


async def test_a_token_is_renewed_before_it_expires_and_once_when_refused(receiver: Receiver) -> None:
    receiver.answer = authority = Authority(lifetime=0.4)
    oauth = OAuth2(receiver.url.replace("/hook", "/token"), "shop", "secret")
    app = App("shop", broker="memory://")
    app.deliver(Placed, to=Target(receiver.url, authorization=oauth), group="away")
    async with app:
        await app.publish(Placed(order_id="o-1"))
        await receiver.got(2)
        await asyncio.sleep(0.3)  # the token of 0.4 s is renewed a quarter before that
        authority.lifetime = 3600
        await app.publish(Placed(order_id="o-2"))
        await receiver.got(4)
        assert len(authority.asked) == 2
        authority.asked.append(authority.asked[0])  # somebody else got a newer one: ours is refused
        await app.publish(Placed(order_id="o-3"))
        async with asyncio.timeout(60):
            while [r.headers["authorization"] for r in hooks(receiver)][-1] != "Bearer t-4":
                await asyncio.sleep(0.01)
    assert [r.headers["authorization"][7:] for r in hooks(receiver)] == ["t-1", "t-2", "t-2", "t-4"]


async def test_a_token_endpoint_that_is_away_is_waited_for(receiver: Receiver) -> None:
    receiver.answer = authority = Authority()
    authority.good = False
    oauth = OAuth2(receiver.url.replace("/hook", "/token"), "shop", "secret")
    app = App("shop", broker="memory://")
    app.deliver(Placed, to=Target(receiver.url, authorization=oauth), retry=Retry(attempts=5, first="10ms"))
    async with app:
        await app.publish(Placed(order_id="o-1"))
        await receiver.got(2)
        authority.good = True
        async with asyncio.timeout(60):
            while not hooks(receiver):
                await asyncio.sleep(0.01)


async def test_a_file_is_read_again_when_it_changes(receiver: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "authorization"
    file.write_text("Bearer old\n")
    app = App("shop", broker="memory://")
    app.deliver(Placed, to=Target(receiver.url, authorization=file), retry=Retry(attempts=9, first="20ms"))
    async with app:
        await app.publish(Placed(order_id="o-1"))
        await receiver.got(1)
        file.write_text("Bearer new, and longer\n")
        await app.publish(Placed(order_id="o-2"))
        await receiver.got(2)
        file.unlink()  # while it is being exchanged
        await app.publish(Placed(order_id="o-3"))
        await asyncio.sleep(0.05)
        file.write_text("Bearer last\n")
        await receiver.got(3)
    seen = [request.headers["authorization"] for request in receiver.requests]
    assert seen == ["Bearer old", "Bearer new, and longer", "Bearer last"]


# ---- TLS ------------------------------------------------------------------------------------------------------------


async def test_mutual_tls(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    client = authority.issue_cert("shop.example")
    client.cert_chain_pems[0].write_to_path(tmp_path / "client.pem")
    client.private_key_pem.write_to_path(tmp_path / "client.key")
    tls: dict[str, Any] = {
        "ssl_certfile": str(tmp_path / "server.pem"), "ssl_ca_certs": str(tmp_path / "ca.pem"),
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }  # fmt: skip
    shown: dict[str, Any] = {"certificate": tmp_path / "client.pem", "key": tmp_path / "client.key"}
    async with receiving(**tls) as receiver:
        await deliver(Target(receiver.url, ca=tmp_path / "ca.pem", **shown), 3, receiver)
        for target in (
            Target(receiver.url, ca=tmp_path / "ca.pem"),  # no certificate shown
            Target(receiver.url, ca=tmp_path / "stranger.pem", **shown),  # not the server that was meant
            Target(receiver.url, **shown),
        ):
            app = App("shop", broker="memory://")
            app.deliver(Placed, to=target, group="away", retry=Retry(attempts=1))
            async with app:
                await app.publish(Placed(order_id="o-1"))
                async with asyncio.timeout(60):
                    while app.program is None or not app.program.workers[0].counts.dead:
                        await asyncio.sleep(0.01)
        assert len(receiver.requests) == 3
    with pytest.raises(ConfigError, match="certificate, key or ca"):
        Target("https://host/", certificate=tmp_path / "client.key")
