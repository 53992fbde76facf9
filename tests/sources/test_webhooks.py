"""Webhooks over real HTTP: signatures as the senders make them, what their payloads become, and every refusal."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from standardwebhooks.webhooks import Webhook as Oracle
from standardwebhooks.webhooks import WebhookVerificationError

import servers.npm
from stentor import App, Event, Message, Outgoing
from stentor.errors import ConfigError, DefinitionError, Unavailable
from stentor.exchange import Refused
from stentor.serve import serve
from stentor.sources.webhook import bearer, github, slack, standard, stripe
from tests.http_site import Placed, Site, make, served, stuck
from tests.real import unavailable

WHSEC = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SECRET = "It's a Secret to Everybody"
BODY = b'{"test": 2432232314}'


class Thing(Event, topic="things", key="test", type="com.example.thing"):
    test: int


class Push(Event, topic="pushes", key="ref", type="com.example.push"):
    ref: str


def sha256(secret: str, content: bytes) -> str:
    return hmac.new(secret.encode(), content, hashlib.sha256).hexdigest()


def by_github(body: bytes, secret: str = SECRET, *, id: str = "d-1", name: str = "push") -> dict[str, str]:
    signature = f"sha256={sha256(secret, body)}"
    return {
        "x-hub-signature-256": signature, "x-github-delivery": id, "x-github-event": name,
        "content-type": "application/json",
    }  # fmt: skip


def by_standard(body: bytes, secret: str = WHSEC, *, id: str = "msg_1", at: float | None = None) -> dict[str, str]:
    moment = datetime.fromtimestamp(int(time.time() if at is None else at), UTC)
    signature = Oracle(secret).sign(id, moment, body.decode())
    return {"webhook-id": id, "webhook-timestamp": str(int(moment.timestamp())), "webhook-signature": signature}


def by_stripe(body: bytes, secret: str = "whsec_x", *, at: float | None = None) -> dict[str, str]:
    moment = int(time.time() if at is None else at)
    signature = sha256(secret, f"{moment}.".encode() + body)
    return {"stripe-signature": f"t={moment},v1={'0' * 64},v1={signature},v0=6ffbb59b"}


def by_slack(body: bytes, secret: str = SECRET, *, at: float | None = None) -> dict[str, str]:
    moment = int(time.time() if at is None else at)
    signature = sha256(secret, f"v0:{moment}:".encode() + body)
    return {"x-slack-request-timestamp": str(moment), "x-slack-signature": f"v0={signature}"}


@contextlib.asynccontextmanager
async def hooked(broker: str = "memory", folder: Path | None = None, **hook: Any) -> AsyncIterator[Site]:
    site = make(broker, folder)
    site.app.webhook("/hook", **hook)
    async with served(site):
        yield site


# ---- signatures -----------------------------------------------------------------------------------------------------


def accepts(scheme: Any, headers: Mapping[str, str], body: bytes, now: float) -> bool:
    try:
        scheme.check(headers, body, now)
    except Refused as refused:
        return refused.status != 401
    return True


def test_the_vectors_of_the_senders() -> None:
    # Standard Webhooks: the example of its specification and of all its libraries.
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek", "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }  # fmt: skip
    assert accepts(standard(WHSEC), headers, BODY, 1614265330)
    assert not accepts(standard(WHSEC), headers, BODY + b" ", 1614265330)
    # GitHub: https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries
    signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert accepts(github(SECRET), {"x-hub-signature-256": signature}, b"Hello, World!", 0)
    # Slack: https://docs.slack.dev/authentication/verifying-requests-from-slack
    body = (
        b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V"
        b"&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text="
        b"&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN"
        b"&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
    )
    headers = {
        "x-slack-request-timestamp": "1531420618",
        "x-slack-signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
    }
    assert accepts(slack("8f742231b10e8888abcd99yyyzzz85a5"), headers, body, 1531420618)


def test_it_agrees_with_the_library_of_standard_webhooks() -> None:
    now = int(time.time())
    moment = datetime.fromtimestamp(now, UTC)
    other = "whsec_" + base64.b64encode(os.urandom(32)).decode()
    verdicts = set()
    for id, body, secret, shift, change in (
        ("msg_1", BODY, WHSEC, 0, ""),
        ("msg_1", b"", WHSEC, 0, ""),
        ("msg_1", '{"zoë": "日本"}'.encode(), other, 0, ""),
        ("msg_1", BODY, other, 0, ""),
        ("msg_1", BODY, WHSEC, -290, ""),
        ("msg_1", BODY, WHSEC, -310, ""),
        ("msg_1", BODY, WHSEC, 310, ""),
        ("msg_1", BODY, WHSEC, 0, "id"),
        ("msg_1", BODY, WHSEC, 0, "version"),
        ("msg_1", BODY, WHSEC, 0, "more"),
        ("msg_1", BODY, WHSEC, 0, "none"),
    ):
        headers = by_standard(body, secret, id=id, at=now + shift)
        if change == "id":
            headers["webhook-id"] = "msg_2"
        elif change == "version":
            headers["webhook-signature"] = headers["webhook-signature"].replace("v1,", "v2,")
        elif change == "more":
            headers["webhook-signature"] = "v1,bm9wZQ== v1a,bm9wZQ== " + headers["webhook-signature"]
        elif change == "none":
            del headers["webhook-signature"]
        try:
            Oracle(WHSEC).verify(body, headers, json_parse=False)
            theirs = True
        except WebhookVerificationError:
            theirs = False
        assert accepts(standard(WHSEC), headers, body, moment.timestamp()) is theirs, (shift, change)
        verdicts.add(theirs)
    assert verdicts == {True, False}


def test_asymmetric_signatures() -> None:
    private = Ed25519PrivateKey.generate()
    public = "whpk_" + base64.b64encode(private.public_key().public_bytes_raw()).decode()
    signed = private.sign(b"msg_1.1614265330." + BODY)
    headers = {
        "webhook-id": "msg_1", "webhook-timestamp": "1614265330",
        "webhook-signature": "v1a," + base64.b64encode(signed).decode(),
    }  # fmt: skip
    assert accepts(standard(public), headers, BODY, 1614265330)
    assert accepts(standard(WHSEC, public), headers, BODY, 1614265330)
    assert not accepts(standard(public), headers, BODY + b"x", 1614265330)
    # A symmetric signature whose secret is the public key, which everyone knows, is none.
    forged = hmac.digest(private.public_key().public_bytes_raw(), b"msg_1.1614265330." + BODY, "sha256")
    headers["webhook-signature"] = "v1," + base64.b64encode(forged).decode()
    assert not accepts(standard(public), headers, BODY, 1614265330)


@pytest.mark.parametrize("headers", [
    {}, {"webhook-id": "1", "webhook-timestamp": "soon", "webhook-signature": "v1,x"},
    {"webhook-id": "1", "webhook-timestamp": "9" * 5000, "webhook-signature": "v1," + "A" * 44},
    {"webhook-id": "é", "webhook-timestamp": "1", "webhook-signature": ",, v1 ,v1"},
    {"x-hub-signature-256": "sha256"}, {"x-hub-signature-256": "sha256=xyz"}, {"x-hub-signature-256": "sha1=00"},
    {"stripe-signature": "v1=00"}, {"stripe-signature": "t=1,v1=zz"}, {"stripe-signature": "t=,v1=00"},
    {"x-slack-signature": "v0=00"}, {"x-slack-signature": "00", "x-slack-request-timestamp": "1"},
    {"authorization": "Basic c2VjcmV0"}, {"authorization": "Bearer"}, {"authorization": "secret"},
])  # fmt: skip
def test_what_is_no_signature_is_refused(headers: dict[str, str]) -> None:
    for scheme in (standard(WHSEC), github(SECRET), stripe("whsec_x"), slack(SECRET), bearer("secret")):
        assert not accepts(scheme, headers, BODY, 1)


def test_secrets_are_exchanged_without_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    assert all(accepts(github("old", "new"), by_github(BODY, key), BODY, now) for key in ("old", "new"))
    monkeypatch.setenv("HOOK_SECRETS", "old\nnew")
    assert all(accepts(github(env="HOOK_SECRETS"), by_github(BODY, key), BODY, now) for key in ("old", "new"))
    file = tmp_path / "secrets"
    file.write_text("old\n")
    scheme = github(file=str(file))
    assert accepts(scheme, by_github(BODY, "old"), BODY, now)
    (tmp_path / "next").write_text("old\nnew\n")
    (tmp_path / "next").replace(file)
    assert all(accepts(scheme, by_github(BODY, key), BODY, now) for key in ("old", "new"))
    file.unlink()  # while it is exchanged, say: what was known stays
    assert accepts(scheme, by_github(BODY, "new"), BODY, now)


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text("sesame")
    assert "sesame" not in repr(github(file=str(file))) + repr(github("sesame"))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: standard("sesame!"), "standard: a secret is malformed"),
        (lambda: standard("whkey_c2VzYW1l"), "neither whsec_ nor whpk_"),
        (lambda: standard("whpk_c2VzYW1l"), "standard: a secret is malformed"),
        (github, "no secret; write github"),
        (lambda: github(""), "it is empty"),
        (lambda: github(env="NOT_SET_ANYWHERE"), "NOT_SET_ANYWHERE holds no secret"),
        (lambda: github(file=str(tmp_path / "gone")), "No such file"),
    ]
    for wrong, text in cases:
        with pytest.raises(ConfigError, match=text) as refused:
            wrong()
        assert "sesame" not in str(refused.value)


# ---- what payloads become -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broker", ["memory", "sqlite"])
async def test_a_delivery_becomes_an_event_once(broker: str, tmp_path: Path) -> None:
    body = json.dumps({"ref": "main", "size": 3, "more": {"unknown": [1]}}).encode()
    async with hooked(broker, tmp_path, verify=github(SECRET), to=Push) as site:
        first = await site.client.post("/hook", content=body, headers=by_github(body))
        assert (first.status_code, first.json()) == (202, {"ids": ["d-1"], "duplicates": []})
        again = await site.client.post("/hook", content=body, headers=by_github(body))
        assert (again.status_code, again.json()) == (202, {"ids": ["d-1"], "duplicates": ["d-1"]})
        (stored,) = await site.stored("pushes")
        assert (stored.id, stored.source, stored.type, stored.key) == ("d-1", "/shop/hook", "com.example.push", "main")
        assert json.loads(stored.data) == {"ref": "main"}


async def test_a_function_maps_what_it_likes() -> None:
    def some(payload: Any, headers: Mapping[str, str]) -> Any:
        match payload["kind"]:
            case "none":
                return None
            case "one":
                return Placed(order_id=headers["webhook-id"])
            case "own":
                return Outgoing(Placed(order_id="o"), id="mine", source="/elsewhere", key="k")
            case _:
                return [Placed(order_id=str(n)) for n in range(payload["kind"])]

    async def later(payload: Any, headers: Mapping[str, str]) -> Any:
        await asyncio.sleep(0)
        return some(payload, headers)

    for to in (some, later):
        async with hooked(verify=standard(WHSEC), to=to) as site:
            for kind, ids in (("none", []), ("one", ["m"]), ("own", ["mine"]), (3, ["m3", "m3.1", "m3.2"])):
                body = json.dumps({"kind": kind}).encode()
                id = "m3" if kind == 3 else "m"
                answer = await site.client.post("/hook", content=body, headers=by_standard(body, id=id))
                assert (answer.status_code, answer.json()["ids"]) == (202, ids), answer.text
            stored = await site.stored()
            assert [message.id for message in stored] == ["m", "mine", "m3", "m3.1", "m3.2"]
            assert [message.source for message in stored][:2] == ["/shop/hook", "/elsewhere"]


async def test_a_dict_maps_by_name_and_drops_the_rest() -> None:
    to = {"push": Push, "order.paid": lambda payload, _: Placed(order_id=payload["id"])}
    async with hooked(verify=github(SECRET), to=to) as site:
        body = b'{"ref": "main", "zen": "x"}'
        for name, count in (("push", 1), ("star", 0), ("ping", 0)):
            answer = await site.client.post("/hook", content=body, headers=by_github(body, id=name, name=name))
            assert (answer.status_code, len(answer.json()["ids"])) == (202, count)
    async with hooked(verify=stripe("whsec_x"), to=to) as site:
        body = b'{"id": "evt_1", "type": "order.paid", "object": "event"}'
        for duplicates in ([], ["evt_1"]):
            answer = await site.client.post("/hook", content=body, headers=by_stripe(body))
            assert answer.json() == {"ids": ["evt_1"], "duplicates": duplicates}


async def test_the_first_words_of_slack_and_github_are_answered() -> None:
    async with hooked(verify=slack(SECRET), to={"message": lambda p, _: Placed(order_id=p["event"]["text"])}) as site:
        body = b'{"type": "url_verification", "challenge": "3eZbrw1aB", "token": "x"}'
        assert (await site.client.post("/hook", content=body)).status_code == 401
        answer = await site.client.post("/hook", content=body, headers=by_slack(body))
        assert (answer.status_code, answer.json()) == (200, {"challenge": "3eZbrw1aB"})
        body = b'{"type": "event_callback", "event_id": "Ev1", "event": {"type": "message", "text": "7"}}'
        for duplicates in ([], ["Ev1"]):
            answer = await site.client.post("/hook", content=body, headers=by_slack(body))
            assert answer.json() == {"ids": ["Ev1"], "duplicates": duplicates}
    async with hooked(verify=github(SECRET), to=Push) as site:
        body = b'{"zen": "Keep it logically awesome."}'
        answer = await site.client.post("/hook", content=body, headers=by_github(body, name="ping"))
        assert (answer.status_code, answer.json()["ids"]) == (202, [])


async def test_json_in_a_form() -> None:
    seen: list[Any] = []
    async with hooked(verify=github(SECRET), to=Push) as site:
        body = urlencode({"payload": '{"ref": "été"}'}).encode()
        form = {"content-type": "application/x-www-form-urlencoded"}
        answer = await site.client.post("/hook", content=body, headers=by_github(body) | form)
        assert answer.json()["ids"] == ["d-1"]
        assert json.loads((await site.stored("pushes"))[0].data) == {"ref": "été"}
    async with hooked(verify=slack(SECRET), to=lambda payload, _: seen.append(payload)) as site:
        body = b"command=%2Fship&text=7"
        assert (await site.client.post("/hook", content=body, headers=by_slack(body) | form)).status_code == 202
        assert seen == [{"command": "/ship", "text": "7"}]


async def test_callers_with_a_token() -> None:
    async with hooked(verify=bearer("t-1", "t-2"), to=Thing) as site:
        for token, status in (("t-2", 202), ("t-3", 401)):
            headers = {"authorization": f"Bearer {token}", "idempotency-key": "k-1"}
            assert (await site.client.post("/hook", content=BODY, headers=headers)).status_code == status
        assert [message.id for message in await site.stored("things")] == ["k-1"]


# ---- refusals -------------------------------------------------------------------------------------------------------


async def test_who_did_not_sign_learns_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with hooked(verify=standard(WHSEC), to=Thing) as site:
        other = "whsec_" + base64.b64encode(b"another secret").decode()
        now = time.time()
        for headers, reason in (
            (by_standard(BODY, other), "the signature is wrong"),
            (by_standard(BODY + b" "), "the signature is wrong"),
            (by_standard(BODY, at=now - 400), "the signature is 40. s old"),
            (by_standard(BODY, at=now + 400), "the signature is (400|399) s in the future"),
            ({}, "the signature is missing or malformed"),
        ):
            answer = await site.client.post("/hook", content=BODY, headers=headers)
            assert (answer.status_code, answer.json()["detail"]) == (401, "the request is not signed as it must be")
            [*_, told] = (record.getMessage() for record in caplog.records if record.name == "stentor.webhook")
            assert re.fullmatch(f"standard: a request is refused: {reason}", told), "who runs it may learn why"
        assert await site.stored("things") == []
        assert 'stentor_http_refused_total{status="401"} 5.0' in (await site.client.get("/metrics")).text
    assert WHSEC not in caplog.text
    assert WHSEC.removeprefix("whsec_") not in caplog.text


async def test_what_cannot_be_read_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with hooked(verify=github(SECRET), to=Push) as site:
        for body in (b"", b"{", b"[]", b'{"ref": 7}', b"\xff", b"[" * 100_000, b'{"ref": ""}'):
            answer = await site.client.post("/hook", content=body, headers=by_github(body))
            assert answer.status_code == 400, body[:20]
        body = b'{"ref": "main"}'
        long = await site.client.post("/hook", content=body, headers=by_github(body, id="x" * 300))
        assert (long.status_code, "256" in long.json()["detail"]) == (400, True)
        assert "/hook: push d-1 is refused: it is no com.example.push" in caplog.text
        body = bytes(9_000_000)
        assert (await site.client.post("/hook", content=body, headers=by_github(body))).status_code == 413
        assert (await site.client.get("/hook")).headers["allow"] == "POST"


async def test_a_mapping_that_fails_asks_for_the_delivery_again(caplog: pytest.LogCaptureFixture) -> None:
    async with hooked(verify=github(SECRET), to=lambda payload, _: payload["missing"]) as site:
        answer = await site.client.post("/hook", content=BODY, headers=by_github(BODY))
        assert (answer.status_code, answer.json()["detail"]) == (500, "the server failed; its log says why")
        assert "KeyError: 'missing'" in caplog.text


async def test_202_only_when_it_is_durable() -> None:
    async with hooked(verify=github(SECRET), to=Push) as site:
        body = b'{"ref": "main"}'
        async with stuck(site) as held:
            request = asyncio.create_task(site.client.post("/hook", content=body, headers=by_github(body)))
            await held.reached(1)
            assert not request.done()
            assert await site.stored("pushes") == []
            held.release()
            assert (await request).status_code == 202
        assert len(await site.stored("pushes")) == 1


async def test_without_a_broker_it_asks_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hooked(verify=github(SECRET), to=Push) as site:

        async def away(messages: list[Message]) -> None:
            raise Unavailable("the broker is away")

        monkeypatch.setattr(site.app.broker, "publish", away)
        body = b'{"ref": "main"}'
        answer = await site.client.post("/hook", content=body, headers=by_github(body))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    site = make()
    site.app.webhook("/hook", verify=github(SECRET), to=Push)
    async with serve(site.app, "127.0.0.1:0") as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post("/hook", content=body, headers=by_github(body))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_what_cannot_work_is_refused_where_it_is_written() -> None:
    app = App("shop", broker="memory://")
    for options, text in (
        ({"verify": "secret", "to": Push}, "verify must say who signs"),
        ({"verify": github(SECRET), "to": "Push"}, "to= is an event class, a function"),
        ({"verify": github(SECRET), "to": {"push": 7}}, "to= is an event class, a function"),
        ({"verify": github(SECRET), "to": int}, "int is no event"),
    ):
        with pytest.raises(DefinitionError, match=text):
            app.webhook("/hook", **options)  # type: ignore[arg-type]
    app.webhook("/hook", verify=github(SECRET), to=Push)
    with pytest.raises(DefinitionError, match="two parts of shop answer to POST /hook"):
        app.webhook("/hook", verify=github(SECRET), to=Push)
    assert "pushes" in app.catalog.topics()


# ---- real payloads --------------------------------------------------------------------------------------------------


class Everything(Event, topic="github", key="who", type="com.github.any"):
    who: str
    action: str | None = None


class Opened(Event, topic="issues", key="repository", type="com.github.issue.opened"):
    number: int
    repository: str


@pytest.mark.slow
async def test_every_payload_of_github_arrives_once(tmp_path: Path) -> None:
    try:
        folder = servers.npm.package(servers.npm.PAYLOADS)
    except servers.Missing as missing:
        unavailable(missing)
    kinds = json.loads((folder / "api.github.com" / "index.json").read_text())
    examples = [(kind["name"], body) for kind in kinds for body in kind["examples"]]
    assert len(examples) > 300

    def map_issue(payload: Any, _: Mapping[str, str]) -> Opened | None:
        if payload["action"] != "opened":
            return None
        return Opened(number=payload["issue"]["number"], repository=payload["repository"]["full_name"])

    def map_any(payload: Any, headers: Mapping[str, str]) -> Everything:
        return Everything(who=payload["sender"]["login"] if "sender" in payload else "-", action=payload.get("action"))

    to = {kind["name"]: map_any for kind in kinds} | {"issues": map_issue}
    opened = sum(name == "issues" and body["action"] == "opened" for name, body in examples)
    issues = sum(name == "issues" for name, _ in examples)
    async with hooked("sqlite", tmp_path, verify=github(SECRET), to=to) as site:

        async def send(number: int, name: str, payload: Any) -> Any:
            body = json.dumps(payload).encode()
            headers = by_github(body, id=f"{number}", name=name)
            while (answer := await site.client.post("/hook", content=body, headers=headers)).status_code == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))
            assert answer.status_code == 202, (name, answer.text)
            return answer.json()

        for list_of in ("ids", "duplicates"):
            ids: list[str] = []
            for first in range(0, len(examples), 32):
                some = range(first, min(first + 32, len(examples)))
                for answer in await asyncio.gather(*(send(number, *examples[number]) for number in some)):
                    ids += answer[list_of]
            assert len(ids) == len(examples) - issues + opened
        assert len(await site.stored("github")) == len(examples) - issues
        stored = [json.loads(message.data) for message in await site.stored("issues")]
        assert len(stored) == opened > 0
        assert {entry["repository"] for entry in stored} == {"Codertocat/Hello-World"}
