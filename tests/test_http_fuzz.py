"""Whatever a client sends, the answer is never a 500, and what is refused is not stored."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.http_site import make

NAMES = st.sampled_from([
    *("ce-id", "ce-source", "ce-type", "ce-specversion", "ce-time", "ce-subject", "ce-schemaversion", "ce-tenant"),
    *("ce-partitionkey", "ce-dataschema", "ce-data", "ce-", "content-type", "content-length", "accept"),
    "content-encoding",
])  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ["1.0", "com.shop.order.placed", "com.shop.payment.taken", "com.x", "/a", "1", "-1", "%", "%C3%28"]
    ),
    st.sampled_from(["application/json", "application/cloudevents+json", "application/cloudevents-batch+json", "a/b"]),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass").decode("latin-1")),
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from(
        ["id", "source", "type", "specversion", "time", "data", "data_base64", "datacontenttype", "schemaversion"]
    )
    | st.text(max_size=8),
    st.sampled_from(["1.0", "com.shop.order.placed", "com.shop.payment.taken", "/a", "e30=", "text/plain", "1"])
    | PLAIN,
)
VALID = {"specversion": "1.0", "type": "com.shop.order.placed", "source": "/t", "id": "1", "data": {"order_id": "o"}}


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


FEW = st.dictionaries(st.sampled_from(["id", "time", "subject", "tenant", "partitionkey", "data"]), PLAIN, max_size=1)
EVENTS = ATTRIBUTES | FEW.map(lambda changes: {**VALID, **changes})
BODIES = st.binary(max_size=200) | (EVENTS | st.lists(EVENTS, max_size=3) | PLAIN).map(as_json)
ONE = [("content-type", "application/cloudevents+json")]
BATCH = [("content-type", "application/cloudevents-batch+json")]
FULL = [("ce-specversion", "1.0"), ("ce-type", "com.shop.order.placed"), ("ce-source", "/t"), ("ce-id", "1")]
REQUESTS = st.one_of(
    st.tuples(st.lists(st.tuples(NAMES, VALUES), max_size=12) | st.sampled_from([ONE, BATCH]), BODIES),
    st.tuples(st.lists(st.tuples(NAMES, VALUES), max_size=1).map(lambda more: FULL + more), BODIES | st.just(b"{}")),
    st.tuples(st.just(ONE), EVENTS.map(as_json)),
    st.tuples(st.just(BATCH), st.lists(EVENTS, max_size=3).map(as_json)),
)


@pytest.fixture(scope="module")
def ingress() -> Any:
    """``send(headers, body, query)`` -> status and how many were stored; straight into the ASGI application."""
    with asyncio.Runner() as runner:
        site = make()
        running = site.app.running(connect_only=True)
        runner.run(running.__aenter__())
        asgi = site.app.asgi

        async def stored() -> int:
            return sum([len(await site.stored(topic)) for topic in ("orders", "payments", "anything")])

        async def send(headers: list[tuple[str, str]], body: bytes, query: str) -> tuple[int, int]:
            answers: list[Any] = []

            async def receive() -> Any:
                return {"type": "http.request", "body": body}

            async def answer(message: Any) -> None:
                answers.append(message)

            raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            scope = {"type": "http", "method": "POST", "path": "/events", "headers": raw}
            before = await stored()
            await asgi({**scope, "query_string": query.encode()}, receive, answer)
            return answers[0]["status"], await stored() - before

        yield lambda *request: runner.run(send(*request))
        runner.run(running.__aexit__(None, None, None))


@given(
    sent=REQUESTS,
    query=st.sampled_from(["", "topic=anything", "topic=orders", "topic=%ff&topic", "&&=", "topic=stentor.dead.x"]),
)
def test_whatever_comes_is_never_a_500(ingress: Any, sent: tuple[Any, bytes], query: str) -> None:
    status, stored = ingress(*sent, query)
    event(str(status))
    assert status in {202, 400, 406, 413, 415}
    assert stored == 0 or status == 202
