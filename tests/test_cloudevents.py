"""The wire form, both ways, against the CloudEvents SDK; what is wrong is refused by the name of its attribute."""

import base64
import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_binary, from_structured, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from stentor import App, Event, cloudevents
from stentor.errors import InvalidEvent, TooLarge
from stentor.message import Delivery, Message, Partition

FORMAT = JSONFormat()
CORE = {"id", "source", "type", "specversion", "time", "subject", "datacontenttype", "dataschema", "data"}
MADE = {"recordedtime", "correlationid", "traceparent"}  # what Stentor adds to what it was given
JSON_TYPES = ["application/json", "application/json; charset=utf-8", "application/vnd.shop+json", "text/json"]

# Unicode as CloudEvents allows it: no control characters, no surrogates, no noncharacters.
TEXT = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Cn"]).filter(lambda c: not cloudevents._CONTROL.search(c)),
    min_size=1,
)
URI = st.text(st.characters(categories=["L", "N"]) | st.sampled_from("/:?#[]@!$&'()*+,;=-._~%"), min_size=1)
EXTENSION_NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=20).filter(
    lambda name: name not in CORE | MADE | {"schemaversion", "partitionkey", "sequence", "data", "database64"}
)
EXTENSIONS = st.dictionaries(EXTENSION_NAMES, TEXT | st.integers(-(2**31), 2**31 - 1), max_size=5)
TIMES = st.datetimes(
    datetime(1970, 1, 2), datetime(2100, 1, 1),  # noqa: DTZ001 - Hypothesis wants naive bounds
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=2)), timezone(timedelta(hours=-9, minutes=-30))]),
)  # fmt: skip
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=10,
)
OBJECTS = st.dictionaries(ANY_TEXT, JSON, min_size=1, max_size=4)


@st.composite
def sdk_events(draw: st.DrawFn, data: st.SearchStrategy[Any], content: list[str]) -> CloudEvent:
    attributes: dict[str, Any] = {
        "id": draw(TEXT), "source": draw(URI), "type": draw(TEXT), "specversion": "1.0",
        "datacontenttype": draw(st.sampled_from(content)), **draw(EXTENSIONS),
    }  # fmt: skip
    for name, strategy in {"time": TIMES, "subject": TEXT, "dataschema": URI, "partitionkey": TEXT}.items():
        value = draw(st.none() | strategy)
        if value is not None:
            attributes[name] = value
    return CloudEvent(attributes, draw(data))


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def check(message: Message, event: CloudEvent, *, text: bool) -> None:
    """Every attribute of the event is in the message; in headers all values are text."""
    found = message.attributes()
    for name, value in event.get_attributes().items():
        if name == "time":
            assert datetime.fromisoformat(str(found["time"])) == value
        else:
            assert str(found[name]) == str(value) if text else found[name] == value
    assert set(found) == set(event.get_attributes())


@given(sdk_events(OBJECTS, JSON_TYPES))
def test_structured_json_of_the_sdk_is_read_and_written_back(event: CloudEvent) -> None:
    message = cloudevents.from_structured(to_structured(event, FORMAT).body)
    check(message, event, text=False)
    assert json.loads(message.data) == event.get_data()
    back = from_structured(
        HTTPMessage({"content-type": cloudevents.STRUCTURED}, cloudevents.to_structured(message)), FORMAT
    )
    assert back.get_data() == event.get_data()
    attributes = back.get_attributes()
    assert {
        name: value for name, value in attributes.items() if name in event.get_attributes()
    } == event.get_attributes()
    assert set(attributes) - set(event.get_attributes()) <= MADE


@given(sdk_events(st.binary(min_size=1), ["application/octet-stream", "application/x-protobuf", "application/json"]))
def test_binary_data_passes_through_structured_json(event: CloudEvent) -> None:
    message = cloudevents.from_structured(to_structured(event, FORMAT).body)
    assert message.data == event.get_data()
    again = cloudevents.from_structured(cloudevents.to_structured(message))
    if event.get_datacontenttype() == "application/json" and is_json(message.data):
        assert json.loads(again.data) == json.loads(message.data)
    else:
        assert again.data == message.data


def is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


@given(sdk_events(OBJECTS, JSON_TYPES))
def test_binary_mode_of_the_sdk_is_read_and_written_back(event: CloudEvent) -> None:
    sent = to_binary(event, FORMAT)
    message = cloudevents.from_headers(lower(sent.headers), sent.body)
    check(message, event, text=True)
    assert message.data == sent.body
    headers = cloudevents.to_headers(message)
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    back = from_binary(HTTPMessage(headers, message.data), FORMAT)
    assert back.get_data() == event.get_data()
    for name, value in event.get_attributes().items():
        assert str(back.get_attributes()[name]) == str(value)


@given(sdk_events(st.binary(min_size=1), ["application/octet-stream"]))
def test_binary_data_passes_through_binary_mode(event: CloudEvent) -> None:
    sent = to_binary(event, FORMAT)
    message = cloudevents.from_headers(lower(sent.headers), sent.body)
    assert message.data == event.get_data()
    back = from_binary(HTTPMessage(cloudevents.to_headers(message), message.data), FORMAT)
    data = back.get_data()
    assert (data.encode() if isinstance(data, str) else data) == event.get_data()


@given(st.lists(sdk_events(OBJECTS, JSON_TYPES), max_size=4))
def test_a_batch_is_read_and_written_back(events: list[CloudEvent]) -> None:
    body = b"[" + b",".join(to_structured(event, FORMAT).body for event in events) + b"]"
    messages = cloudevents.from_batch(body)
    assert [message.id for message in messages] == [event.get_id() for event in events]
    assert [json.loads(message.data) for message in cloudevents.from_batch(cloudevents.to_batch(messages))] == [
        event.get_data() for event in events
    ]


@given(st.binary(), st.sampled_from([None, "application/json", "text/plain", "application/octet-stream"]))
def test_any_message_is_written_as_json_that_can_be_read(data: bytes, content: str | None) -> None:
    message = Message(id="1", source="/x", type="t", topic="t", data=data, datacontenttype=content)
    body = cloudevents.to_structured(message)
    json.loads(body)
    again = cloudevents.from_structured(body)
    if again.data != data:  # JSON may be written another way
        assert json.loads(again.data) == json.loads(data)


@given(st.binary(max_size=200))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    for read in (cloudevents.from_structured, cloudevents.from_batch):
        with suppress(InvalidEvent):
            read(body)


@given(st.dictionaries(st.sampled_from([*sorted(CORE), "data_base64", "x", "X-y", "schemaversion", ""]), JSON | TEXT))
def test_any_json_object_is_read_or_refused(found: dict[str, Any]) -> None:
    found = {"specversion": "1.0", "id": "1", "source": "/x", "type": "t"} | found
    try:
        message = cloudevents.from_structured(json.dumps(found).encode())
    except InvalidEvent:
        return
    json.loads(cloudevents.to_structured(message))


@given(
    st.dictionaries(
        st.sampled_from(["ce-id", "ce-source", "ce-type", "ce-time", "ce-x", "ce-", "ce-A", "content-type", "accept"]),
        st.text(st.characters(max_codepoint=255)),
    )
)
def test_any_headers_are_read_or_refused(headers: dict[str, str]) -> None:
    headers = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/x", "ce-type": "t"} | headers
    try:
        message = cloudevents.from_headers(headers, b"{}")
    except InvalidEvent:
        return
    assert all(value.isascii() for name, value in cloudevents.to_headers(message).items() if name.startswith("ce-"))


REQUIRED = {"specversion": "1.0", "id": "1", "source": "/x", "type": "t"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"specversion": None}, "attribute 'specversion' is missing"),
        ({"specversion": "0.3"}, "attribute 'specversion': '0.3' is not supported; expected '1.0'"),
        ({"id": None}, "attribute 'id' is missing"),
        ({"id": ""}, "attribute 'id' must be a non-empty string, not ''"),
        ({"id": 5}, "attribute 'id' must be a non-empty string, not 5"),
        ({"source": ""}, "attribute 'source' must be"),
        ({"source": "no uri"}, "attribute 'source': 'no uri' is no URI-reference"),
        ({"type": None}, "attribute 'type' is missing"),
        ({"type": "a\nb"}, "attribute 'type': .* holds a character that CloudEvents forbids"),
        ({"time": "yesterday"}, "attribute 'time': 'yesterday' is no RFC 3339 time"),
        ({"time": "2026-01-01T00:00:00"}, "attribute 'time': .* is no RFC 3339 time"),
        ({"time": 5}, "attribute 'time' must be a non-empty string"),
        ({"subject": ""}, "attribute 'subject' must be a non-empty string"),
        ({"datacontenttype": "json"}, "attribute 'datacontenttype': 'json' is no media type"),
        ({"partitionkey": ""}, "attribute 'partitionkey' must be a non-empty string"),
        ({"tenantId": "x"}, "attribute 'tenantId': a name has only the letters a-z and digits"),
        ({"number": 2**31}, "attribute 'number': 2147483648 is outside the 32 bits"),
        ({"float": 1.5}, "attribute 'float': 1.5 must be a str, int, bool or bytes"),
        ({"object": {"a": 1}}, "attribute 'object'"),
        ({"schemaversion": "two"}, "attribute 'schemaversion': 'two' is no whole number"),
        ({"schemaversion": 0}, "attribute 'schemaversion': 0 is no version"),
        ({"data": 1, "data_base64": "AA=="}, "attributes 'data' and 'data_base64' exclude each other"),
        ({"data_base64": "?"}, "attribute 'data_base64' is no Base64 text"),
        ({"data_base64": 5}, "attribute 'data_base64' is no Base64 text"),
    ],
)
def test_a_wrong_attribute_is_named(changes: dict[str, Any], complaint: str) -> None:
    body = json.dumps({name: value for name, value in (REQUIRED | changes).items() if value is not None}).encode()
    with pytest.raises(InvalidEvent, match=complaint):
        cloudevents.from_structured(body)
    with pytest.raises(InvalidEvent, match=rf"event 1 of the batch: {complaint}"):
        cloudevents.from_batch(b"[" + json.dumps(REQUIRED).encode() + b"," + body + b"]")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'"text"', b'{"id": 1} x'])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidEvent, match=r"the body is no JSON object of a CloudEvent|attribute"):
        cloudevents.from_structured(body)


@pytest.mark.parametrize(
    ("headers", "complaint"),
    [
        ({"ce-subject": "100%"}, "attribute 'subject': '100%' is not percent-encoded UTF-8"),
        ({"ce-subject": "%ff"}, "attribute 'subject': '%ff' is not percent-encoded UTF-8"),
        ({"ce-datacontenttype": "text/plain"}, "the Content-Type header carries it"),
        ({"ce-id": ""}, "attribute 'id' must be a non-empty string"),
    ],
)
def test_a_wrong_header_is_named(headers: dict[str, str], complaint: str) -> None:
    required = {f"ce-{name}": value for name, value in REQUIRED.items()}
    with pytest.raises(InvalidEvent, match=complaint):
        cloudevents.from_headers(required | headers, b"")


def test_data_of_other_content_types_keeps_its_text() -> None:
    message = cloudevents.from_structured(
        json.dumps(REQUIRED | {"datacontenttype": "text/xml", "data": "<ä/>"}).encode()
    )
    assert message.data == "<ä/>".encode()
    body = json.loads(cloudevents.to_structured(message))
    assert base64.b64decode(body["data_base64"]) == "<ä/>".encode()


def test_what_follows_from_the_rest_is_made_on_the_way_out() -> None:
    message = Message(
        id="1", source="/x", type="t", topic="t", data=b"{}", time="2026-01-01T00:00:00Z", key="k",
        extensions={"unknown": "kept"},
    )  # fmt: skip
    found = cloudevents.attributes(message, Delivery(message, Partition("t", 0, 1), 42))
    assert found["sequence"] == "00000000000000000042"
    assert (found["partitionkey"], found["correlationid"], found["unknown"]) == ("k", "1", "kept")
    assert found["recordedtime"] == "2026-01-01T00:00:00Z"
    version, trace, span, flags = str(found["traceparent"]).split("-")
    assert (version, len(trace), len(span), flags) == ("00", 32, 16, "00")
    assert cloudevents.traceparent(message) == found["traceparent"]
    assert cloudevents.child_trace(str(found["traceparent"]), "2").split("-")[1] == trace


class Blob(Event, topic="blobs"):
    body: str


async def test_the_size_limit_is_stated_and_checked() -> None:
    app = App("big", broker="memory://")
    async with app.connected():
        limit = app.broker.features.max_bytes
        assert limit >= 64 * 1024
        receipt = await app.publish(Blob(body="x" * (limit - 10_000)))
        assert receipt.topic == "blobs"
        with pytest.raises(TooLarge, match=r"Blob: [\d,]+ bytes of attributes and data; memory takes 8,388,608"):
            await app.publish(Blob(body="x" * limit))
        with pytest.raises(TooLarge, match="memory takes"):
            await app.publish(Blob(body="x" * (limit - 2000)), headers={"big": "y" * 3000})
        stored = [message async for _, message in app.broker.browse("blobs", "earliest", follow=False)]
        assert len(stored) == 1
