"""HTTP ingress over real HTTP: the `cloudevents` SDK and curl send events, uvicorn serves, the broker keeps them."""

import asyncio
import base64
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cloudevents.core.bindings import http as sdk
from cloudevents.core.v1.event import CloudEvent

from stentor.cloudevents import to_structured
from tests.http_site import BATCH, BODY, HEADERS, OBJECT, STRUCTURED, Placed, make, served, stuck


def event(data: Any = None, **attributes: Any) -> CloudEvent:
    given = {"type": "com.shop.order.placed", "source": "/till/7", "id": "e-1", **attributes}
    return CloudEvent(given, {"order_id": "o-1", "amount": 2.5} if data is None else data)


# ---- what is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["binary", "structured", "batched"])
@pytest.mark.parametrize("broker", ["memory", "sqlite"])
async def test_an_event_of_the_sdk_arrives_as_it_was_sent(mode: str, broker: str, tmp_path: Path) -> None:
    sent = event(
        time=datetime(2026, 1, 2, 3, 4, 5, 678000, UTC), subject='Zoë "1" 100% 日本', dataschema="https://x.example/s",
        datacontenttype="application/json", partitionkey="p-9", tenant="a b", schemaversion="1",
    )  # fmt: skip
    async with served(make(broker, tmp_path)) as site:
        message = sdk.to_binary_event(sent) if mode == "binary" else sdk.to_structured_event(sent)
        body, headers = message.body, message.headers
        if mode == "batched":
            body, headers = b"[" + body + b"]", BATCH
        answer = await site.post(body, headers)
        assert (answer.status_code, answer.json()) == (202, {"ids": ["e-1"], "duplicates": []})
        assert await site.handled(1) == [Placed(order_id="o-1", amount=2.5)]
        (got,) = await site.stored()
    assert (got.topic, got.key) == ("orders", "p-9")
    # Back through the SDK: the same event, as far as it looks.
    again = sdk.from_structured_event(sdk.HTTPMessage(STRUCTURED, to_structured(got)))
    for name, value in sent.get_attributes().items():
        assert again.get_attributes()[name] == (1 if name == "schemaversion" else value), name
    assert again.get_data() == sent.get_data()


async def test_without_a_partitionkey_the_class_gives_the_key() -> None:
    async with served(make()) as site:
        await site.post(BODY, STRUCTURED)
        assert [message.key for message in await site.stored()] == ["o-1"]


async def test_old_versions_are_brought_up_and_keep_their_bytes() -> None:
    async with served(make()) as site:
        old = {**OBJECT, "type": "com.shop.payment.taken", "data": {"order": "o-1"}}
        assert (await site.post(json.dumps(old).encode(), STRUCTURED)).status_code == 202
        (got,) = await site.stored("payments")
        assert (got.key, json.loads(got.data)) == ("o-1", {"order": "o-1"})


async def test_a_type_that_the_app_does_not_know_needs_a_topic() -> None:
    async with served(make()) as site:
        binary = {**HEADERS, "ce-type": "com.other", "content-type": "application/octet-stream"}
        blob = bytes(range(256)) * 4
        refused = await site.post(blob, binary)
        assert refused.status_code == 400
        assert refused.json()["attribute"] == "type"
        assert "?topic=" in refused.json()["detail"]
        assert (await site.post(blob, binary, topic="anything")).status_code == 202
        # In structured mode the same bytes travel as Base64; what calls itself nothing is taken as bytes.
        sent = event(blob, type="com.other", id="e-2", datacontenttype="application/octet-stream")
        message = sdk.to_structured_event(sent)
        assert (await site.post(message.body, message.headers, topic="anything")).status_code == 202
        untyped = {**HEADERS, "ce-type": "com.other", "ce-id": "e-3"}
        assert (await site.post(blob, untyped, topic="anything")).status_code == 202
        got = await site.stored("anything")
        assert [message.data for message in got] == [blob] * 3
        assert {message.datacontenttype for message in got} == {"application/octet-stream"}
        assert base64.b64decode(json.loads(to_structured(got[2]))["data_base64"]) == blob
        for topic in ("unheard.of", "stentor.dead.shop.charge", "", "anything&topic=orders"):
            answer = await site.post(blob, binary, topic=topic)
            assert (answer.status_code, answer.json()["parameter"]) == (400, "topic"), topic
        # A known type goes to its own topic only.
        answer = await site.post(BODY, STRUCTURED, topic="anything")
        assert (answer.status_code, answer.json()["parameter"]) == (400, "topic")
        assert (await site.post(BODY, STRUCTURED, topic="orders")).status_code == 202


@pytest.mark.parametrize("broker", ["memory", "sqlite"])
async def test_a_repetition_is_accepted_once(broker: str, tmp_path: Path) -> None:
    async with served(make(broker, tmp_path)) as site:
        body = BODY
        assert (await site.post(body, STRUCTURED)).json()["duplicates"] == []
        for _ in range(3):
            answer = await site.post(body, STRUCTURED)
            assert (answer.status_code, answer.json()) == (202, {"ids": ["e-1"], "duplicates": ["e-1"]})
        elsewhere = json.dumps({**OBJECT, "source": "/till/8"}).encode()
        batch = b"[" + b",".join([body, elsewhere, elsewhere]) + b"]"
        assert (await site.post(batch, BATCH)).json() == {"ids": ["e-1"] * 3, "duplicates": ["e-1"] * 2}
        assert len(await site.stored()) == 2
        assert len(await site.handled(2)) == 2


async def test_202_is_answered_only_when_the_broker_has_it() -> None:
    async with served(make()) as site:
        async with stuck(site) as held:
            request = asyncio.create_task(site.post(BODY, STRUCTURED))
            await held.reached(1)
            assert not request.done()
            assert await site.stored() == []
            held.release()
            assert (await request).status_code == 202
        assert len(await site.stored()) == 1


async def test_ten_publishers_at_once(tmp_path: Path) -> None:
    async with served(make("sqlite", tmp_path)) as site:

        async def publisher(name: int) -> None:
            async with httpx.AsyncClient(base_url=site.url) as client:
                for number in range(20):
                    sent = event({"order_id": f"o-{name}", "amount": number}, id=f"{name}-{number}")
                    message = sdk.to_binary_event(sent)
                    answer = await client.post("/events", content=message.body, headers=message.headers)
                    assert answer.status_code == 202

        await asyncio.gather(*(publisher(name) for name in range(10)))
        handled = await site.handled(200)
    for name in range(10):
        assert [got.amount for got in handled if got.order_id == f"o-{name}"] == [float(n) for n in range(20)]


async def test_an_empty_batch_is_a_batch() -> None:
    async with served(make()) as site:
        answer = await site.post(b"[]", BATCH)
        assert (answer.status_code, answer.json()) == (202, {"ids": [], "duplicates": []})


# ---- what is refused ------------------------------------------------------------------------------------------------


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in OBJECT.items() if key != name}


BAD_OBJECTS: list[tuple[dict[str, Any], str]] = [
    (without("specversion"), "specversion"),
    ({**OBJECT, "specversion": "0.3"}, "specversion"),
    ({**OBJECT, "specversion": 1.0}, "specversion"),
    (without("id"), "id"),
    ({**OBJECT, "id": ""}, "id"),
    ({**OBJECT, "id": 7}, "id"),
    ({**OBJECT, "id": "i" * 257}, "id"),
    (without("source"), "source"),
    ({**OBJECT, "source": "no uri"}, "source"),
    (without("type"), "type"),
    ({**OBJECT, "type": "com.other"}, "type"),
    ({**OBJECT, "time": "yesterday"}, "time"),
    ({**OBJECT, "time": "2026-01-02T03:04:05"}, "time"),
    ({**OBJECT, "subject": "a\x00b"}, "subject"),
    ({**OBJECT, "datacontenttype": "json"}, "datacontenttype"),
    ({**OBJECT, "datacontenttype": "text/plain", "data": "x"}, "datacontenttype"),
    ({**OBJECT, "Tenant": "x"}, "Tenant"),
    ({**OBJECT, "tenant": ["x"]}, "tenant"),
    ({**OBJECT, "tenant": 2**31}, "tenant"),
    ({**OBJECT, "partitionkey": ""}, "partitionkey"),
    ({**OBJECT, "partitionkey": "k" * 1025}, "partitionkey"),
    ({**OBJECT, "schemaversion": "two"}, "schemaversion"),
    ({**OBJECT, "schemaversion": "-99999999999999"}, "schemaversion"),
    ({**OBJECT, "schemaversion": 9, "data": {"other": 1}}, "schemaversion"),
    ({**OBJECT, "data": {"order_id": 1}}, "data"),
    ({**OBJECT, "data": {"order_id": ""}}, "data"),
    (without("data"), "data"),
    ({**OBJECT, "data_base64": "e30="}, "data"),
    ({**without("data"), "data_base64": "%"}, "data_base64"),
]


async def test_400_names_what_is_wrong(subtests: pytest.Subtests) -> None:
    async with served(make()) as site:
        for bad, attribute in BAD_OBJECTS:
            with subtests.test(attribute=attribute, bad=str(bad)):
                answer = await site.post(json.dumps(bad).encode(), STRUCTURED)
                problem = answer.json()
                assert answer.status_code == 400, problem
                assert answer.headers["content-type"] == "application/problem+json"
                assert problem["attribute"] == attribute
                assert (problem["status"], problem["title"]) == (400, "Bad Request")
                assert f"attribute {attribute!r}" in problem["detail"] or "'data'" in problem["detail"]
        assert await site.stored() == []


async def test_400_names_the_header_that_is_wrong(subtests: pytest.Subtests) -> None:
    body = b'{"order_id": "o-1"}'
    cases: list[tuple[list[tuple[str, str]], str]] = [
        ([(name, value) for name, value in HEADERS.items() if name != "ce-id"], "id"),
        ([*HEADERS.items(), ("ce-id", "e-2")], "id"),
        ([*HEADERS.items(), ("ce-subject", "100%")], "subject"),
        ([*HEADERS.items(), ("ce-subject", "%zz")], "subject"),
        ([*HEADERS.items(), ("ce-subject", "%ff")], "subject"),
        ([*HEADERS.items(), ("ce-subject", "%00")], "subject"),
        ([*HEADERS.items(), ("ce-my-name", "x")], "my-name"),
        ([*HEADERS.items(), ("ce-datacontenttype", "text/plain")], "datacontenttype"),
        ([(name, "0.3" if name == "ce-specversion" else value) for name, value in HEADERS.items()], "specversion"),
        ([("content-type", "application/json")], "specversion"),
    ]
    async with served(make()) as site:
        for headers, attribute in cases:
            with subtests.test(attribute=attribute, headers=str(headers)):
                answer = await site.post(body, headers)
                assert (answer.status_code, answer.json()["attribute"]) == (400, attribute)
        for malformed in (b"", b"{", b"[1]", b"\xff", b'"text"', b"[" * 100_000, b'{"a":' * 50_000, b'{"id":"\xff"}'):
            for mode in (STRUCTURED, BATCH):
                answer = await site.post(malformed, mode)
                assert answer.status_code == 400, (malformed[:20], answer.text)
                assert len(answer.text) < 1000
        assert await site.stored() == []


async def test_one_bad_member_refuses_the_batch() -> None:
    good = [{**OBJECT, "id": f"e-{number}"} for number in range(5)]
    for bad, attribute in (({**OBJECT, "time": "never"}, "time"), ({**OBJECT, "data": {}}, "data")):
        async with served(make()) as site:
            answer = await site.post(json.dumps([*good[:3], bad, *good[3:]]).encode(), BATCH)
            assert answer.status_code == 400
            assert (answer.json()["index"], answer.json()["attribute"]) == (3, attribute)
            assert await site.stored() == []


async def test_methods_and_media_types(subtests: pytest.Subtests) -> None:
    body = BODY
    cases: list[tuple[str, str, dict[str, str], int]] = [
        ("GET", "/events", {}, 405),
        ("PUT", "/events", STRUCTURED, 405),
        ("POST", "/healthz", {}, 405),
        ("GET", "/", {}, 404),
        ("POST", "/event", STRUCTURED, 404),
        ("POST", "/events", {**STRUCTURED, "accept": "text/html, image/*"}, 406),
        ("POST", "/events", {**STRUCTURED, "accept": "*/*;q=0"}, 406),
        ("POST", "/events", {"content-type": "application/cloudevents+xml"}, 415),
        ("POST", "/events", {"content-type": "application/cloudevents+json; charset=utf-16"}, 415),
        ("POST", "/events", {"content-type": "text/plain"}, 415),
        ("POST", "/events", {**HEADERS, "content-type": "text/plain"}, 415),
        ("POST", "/events", {**STRUCTURED, "content-encoding": "gzip"}, 415),
        ("POST", "/events", {**STRUCTURED, "accept": "text/html, application/*;q=0.5"}, 202),
        ("POST", "/events", {"content-type": 'Application/CloudEvents+JSON; charset="UTF-8"'}, 202),
        ("POST", "/events?code=1", STRUCTURED, 202),
    ]
    async with served(make()) as site:
        for method, path, headers, status in cases:
            with subtests.test(method=method, path=path, headers=str(headers)):
                answer = await site.client.request(method, path, content=body, headers=headers)
                assert answer.status_code == status, answer.text
                if status == 405:
                    assert answer.headers["allow"]
                if status >= 400:
                    assert answer.json()["status"] == status


# ---- curl -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def curl() -> str:
    found = shutil.which("curl")
    if found is None and os.environ.get("CI"):
        pytest.fail("curl is missing; CI has to have it")
    if found is None:
        pytest.skip("curl is not installed")
    return found


async def test_curl(curl: str, tmp_path: Path) -> None:
    async with served(make()) as site:

        async def run(*arguments: str) -> tuple[int, Any]:
            process = await asyncio.create_subprocess_exec(
                curl, "-sS", "-w", "\n%{http_code}", *arguments, f"{site.url}/events", stdout=asyncio.subprocess.PIPE
            )
            out, _ = await process.communicate()
            text, _, status = out.decode().rpartition("\n")
            return int(status), json.loads(text)

        binary = [part for name, value in HEADERS.items() for part in ("-H", f"{name}: {value}")]
        as_json = ["-H", "content-type: application/json", "-d", '{"order_id": "o-1"}']
        assert await run(*binary, *as_json) == (202, {"ids": ["e-1"], "duplicates": []})
        assert await run(*binary, *as_json) == (202, {"ids": ["e-1"], "duplicates": ["e-1"]})
        event_json = json.dumps({**OBJECT, "id": "e-2"})
        assert (await run("-H", "content-type: application/cloudevents+json", "-d", event_json))[0] == 202
        batch = ["-H", "content-type: application/cloudevents-batch+json"]
        assert (await run(*batch, "-d", f"[{event_json}]"))[1] == {"ids": ["e-2"], "duplicates": ["e-2"]}
        assert (await run(*batch, "-H", "transfer-encoding: chunked", "-d", f"[{event_json}]"))[0] == 202
        status, problem = await run(*binary, "-H", "ce-subject: 50%", *as_json)
        assert (status, problem["attribute"]) == (400, "subject")
        assert (await run())[0] == 405
        # Over a mebibyte curl asks first (Expect: 100-continue), and sends nothing when it is told no.
        large = tmp_path / "large"
        large.write_bytes(bytes(20 * 1024 * 1024))
        assert (await run(*binary, "--data-binary", f"@{large}"))[0] == 413
        assert len(await site.stored()) == 2
