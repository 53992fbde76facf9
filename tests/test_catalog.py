"""Events to messages and back: checks at publish, versions, former types, foreign JSON, schemas."""

import dataclasses
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import msgspec
import pydantic
import pytest
from jsonschema import Draft202012Validator
from jsonschema import ValidationError as SchemaError

from stentor import App, Event, Named, Outgoing, Retry, event, upcast
from stentor.catalog import Catalog
from stentor.errors import DefinitionError, DuplicateType, InvalidEvent, NewerVersion, Undecodable
from stentor.event import spec_of
from stentor.message import Message
from stentor.testing import VirtualClock, harness

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Line(msgspec.Struct, frozen=True):
    sku: str
    price: float | None = None


class OrderPlaced(Event, topic="orders", key="order_id", type="com.shop.order.placed"):
    order_id: str
    amount: float = 1.0
    lines: tuple[Line, ...] = ()
    note: str | None = None
    extra: dict[str, Any] = {}  # noqa: RUF012


@pytest.fixture
def catalog() -> Catalog:
    return Catalog("/shop", VirtualClock(NOW))


def encode(catalog: Catalog, item: Any) -> Message:
    return catalog.encode(item, catalog.stamp())


def test_an_event_becomes_a_cloudevent_and_comes_back(catalog: Catalog) -> None:
    order = OrderPlaced(order_id="a", lines=(Line(sku="x", price=2.0),), note="ä漢🎉")
    message = encode(catalog, order)
    assert (message.type, message.topic, message.key) == ("com.shop.order.placed", "orders", "a")
    assert (message.source, message.time, message.version) == ("/shop", "2026-05-01T12:00:00.000000Z", 1)
    assert message.datacontenttype == "application/json"
    assert catalog.read(catalog.add(OrderPlaced), message) == order


def test_every_event_has_an_id_of_its_own(catalog: Catalog) -> None:
    order = OrderPlaced(order_id="a")
    assert len({encode(catalog, order).id for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"order_id": 7}, r"OrderPlaced: Expected `str`, got `int` - at `\$.order_id`"),
        ({"amount": "12"}, r"Expected `float`, got `str` - at `\$.amount`"),
        ({"amount": math.nan}, "amount"),
        ({"amount": -math.inf}, "amount"),
        ({"lines": (Line(sku="x", price=math.nan),)}, r"OrderPlaced.lines\[0\].price: nan cannot be carried by JSON"),
        ({"extra": {"deep": [1.0, math.inf]}}, r"OrderPlaced.extra.deep\[1\]: inf cannot be carried by JSON"),
        ({"extra": {"x": object()}}, "OrderPlaced: "),
        ({"note": "\ud800"}, "OrderPlaced: "),
    ],
)
def test_an_event_that_would_not_decode_is_refused_at_its_publisher(
    catalog: Catalog, fields: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidEvent, match=complaint):
        encode(catalog, OrderPlaced(**{"order_id": "a", **fields}))


@event(topic="t")
@dataclasses.dataclass
class D:
    value: float | None
    inner: Any = None


@event(topic="t")
@attrs.define
class A:
    value: float | None
    inner: Any = None


@event(topic="t")
class P(pydantic.BaseModel):
    value: float | None
    inner: Any = None


@event(topic="t")
class S(msgspec.Struct):
    value: float | None
    inner: Any = None


@pytest.mark.parametrize("cls", [D, A, P, S])
def test_not_a_number_is_refused_in_every_kind_of_class(catalog: Catalog, cls: Any) -> None:
    assert encode(catalog, cls(value=None)).data
    with pytest.raises(InvalidEvent, match="value"):
        encode(catalog, cls(value=math.nan))
    with pytest.raises(InvalidEvent, match=r"inner"):
        encode(catalog, cls(value=1.0, inner={"x": [math.inf]}))


def test_not_a_number_is_told_from_none(catalog: Catalog) -> None:
    """Both are null on the wire, and a None may stand in for one that is left out."""

    @event(topic="sparse")
    class Sparse(msgspec.Struct, omit_defaults=True):
        value: float | None = 1.0
        note: str | None = None

    @event(topic="full")
    class Full(msgspec.Struct):
        value: float | None = 1.0
        note: str | None = None

    cls: Any
    for cls in (Sparse, Full):
        assert encode(catalog, cls(value=None)).data.count(b"null") == (1 if cls is Sparse else 2)
        with pytest.raises(InvalidEvent, match=r"value: nan cannot be carried by JSON"):
            encode(catalog, cls(value=math.nan))


def test_a_pydantic_model_that_was_not_validated_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidEvent, match="value"):
        encode(catalog, P.model_construct(value="no number"))


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ("text", "str is no event: publish an instance of an Event subclass or of an @event class"),
        ({"a": 1}, "dict is no event"),
        (None, "NoneType is no event"),
        (OrderPlaced, "OrderPlaced is a class; publish an instance of it"),
        (Line(sku="x"), "Line is no event"),
        (Outgoing([1]), "Outgoing holds one event, not list"),
        (Outgoing("text"), "str is no event"),
    ],
)
def test_what_is_no_event_is_refused(catalog: Catalog, item: Any, complaint: str) -> None:
    with pytest.raises(InvalidEvent, match=complaint):
        encode(catalog, item)


def test_an_abstract_event_is_refused(catalog: Catalog) -> None:
    class Abstract(Event):
        x: int

    with pytest.raises(InvalidEvent, match="Abstract is no event"):
        encode(catalog, Abstract(x=1))
    with pytest.raises(DefinitionError, match="Abstract is no event: it has no topic, so it is abstract"):
        catalog.add(Abstract)


def test_publish_options_go_to_their_attributes(catalog: Catalog) -> None:
    order = OrderPlaced(order_id="a")
    message = encode(
        catalog,
        Outgoing(
            order, key="k", delay="5m", id="order-1", time=NOW - timedelta(hours=1), source="/legacy", subject="s",
            headers={"tenant": "t1", "priority": 5, "urgent": True},
        ),
    )  # fmt: skip
    assert (message.key, message.id, message.source, message.subject) == ("k", "order-1", "/legacy", "s")
    assert message.due == NOW.timestamp() + 300
    assert message.time == "2026-05-01T11:00:00.000000Z"
    assert message.extensions["recordedtime"] == "2026-05-01T12:00:00.000000Z"
    assert (message.extensions["tenant"], message.extensions["priority"], message.extensions["urgent"]) == (
        "t1",
        5,
        True,
    )
    assert encode(catalog, Outgoing(order, at=NOW + timedelta(seconds=5))).due == NOW.timestamp() + 5


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"at": datetime(2026, 5, 2)}, r"at=.*\(2026, 5, 2, 0, 0\) has no time zone; use datetime.now\(UTC\)"),  # noqa: DTZ001
        ({"at": "tomorrow"}, "at must be a datetime, not 'tomorrow'"),
        ({"time": datetime(2026, 5, 2)}, "time=.* has no time zone"),  # noqa: DTZ001
        ({"delay": "1s", "at": NOW}, "delay and at exclude each other"),
        ({"delay": "soon"}, "delay: 'soon' is no duration"),
        ({"delay": timedelta(seconds=-1)}, "delay: .* is negative"),
        ({"delay": "400d"}, "falls due within a year at the latest"),
        ({"at": NOW + timedelta(days=400)}, "falls due within a year at the latest"),
        ({"id": ""}, "id must be a text of 1 to 256 characters"),
        ({"id": 5}, "id must be a text"),
        ({"id": "x" * 257}, "id must be a text"),
        ({"id": "a\nb"}, "id"),
        ({"key": ""}, r"key \(key=\) has 0 characters"),
        ({"key": 1.5}, r"key \(key=\) is 1.5"),
        ({"source": "not a uri"}, "'source'"),
        ({"source": ""}, "'source'"),
        ({"subject": ""}, "subject must be a non-empty string"),
        ({"subject": "a\x00b"}, "subject"),
        ({"headers": {"Tenant": "x"}}, "header 'Tenant': a CloudEvents extension name has only a-z and 0-9"),
        ({"headers": {"x" * 65: "x"}}, "at most 64"),
        ({"headers": {"id": "x"}}, "header 'id' is set by Stentor or has a parameter of its own"),
        ({"headers": {"partitionkey": "x"}}, "header 'partitionkey' is set by Stentor"),
        ({"headers": {"n": 2**31}}, "outside the 32 bits of a CloudEvents Integer"),
        ({"headers": {"n": 1.5}}, "must be a str, int, bool or bytes"),
        ({"headers": {"n": "a\x00"}}, "holds a character that CloudEvents forbids"),
    ],
)  # fmt: skip
def test_wrong_publish_options_are_refused(catalog: Catalog, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidEvent, match=complaint):
        encode(catalog, Outgoing(OrderPlaced(order_id="a"), **options))


# ---- versions -------------------------------------------------------------------------------------------------------


class Address(
    Event, topic="addresses", key="id", type="com.shop.address", version=3, also=("Adresse", "com.old.address")
):
    id: str
    street: str
    country: str


@upcast(Address, from_version=1)
def _split_name(old: dict[str, Any]) -> dict[str, Any]:
    return {"id": old["id"], "street": old["line"]}


@upcast(Address, from_version=2)
def _add_country(old: dict[str, Any]) -> dict[str, Any]:
    return old | {"country": "DE"}


def message(cls: Any, data: bytes, version: Any = None, **changes: Any) -> Message:
    spec = spec_of(cls)
    assert spec is not None
    made = Message(
        id=f"{spec.type}/{version}", source="/x", type=spec.type, topic=spec.topic.name, data=data,
        extensions={} if version is None else {"schemaversion": version},
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("data", "version"),
    [
        (b'{"id": "a", "line": "Main St"}', None),
        (b'{"id": "a", "line": "Main St"}', 1),
        (b'{"id": "a", "street": "Main St"}', 2),
        (b'{"id": "a", "street": "Main St", "country": "DE"}', 3),
        (b'{"id": "a", "street": "Main St", "country": "DE", "planet": "Earth"}', 4),
    ],
)
def test_each_version_is_read_as_the_present_one(catalog: Catalog, data: bytes, version: int | None) -> None:
    read = catalog.read(catalog.add(Address), message(Address, data, version))
    assert read == Address(id="a", street="Main St", country="DE")


def test_an_event_is_published_with_its_version(catalog: Catalog) -> None:
    made = encode(catalog, Address(id="a", street="s", country="DE"))
    assert made.version == 3
    assert made.extensions == {"schemaversion": 3}


@pytest.mark.parametrize(
    ("data", "version", "complaint"),
    [
        (b"\xff\xfe", 3, "com.shop.address version 3: "),
        (b"", 3, "version 3: "),
        (b'{"id": "a"}', 3, "missing required field `street`"),
        (b'{"id": "a"}', 1, "version 1: 'line'"),
        (b'["id"]', 1, "version 1: "),
        (b'{"id": 5, "street": "s"}', 2, "version 2: "),
    ],
)
def test_what_cannot_be_read_says_why(catalog: Catalog, data: bytes, version: int, complaint: str) -> None:
    with pytest.raises(Undecodable, match=complaint):
        catalog.read(catalog.add(Address), message(Address, data, version))


def test_another_content_type_is_not_read_as_json(catalog: Catalog) -> None:
    with pytest.raises(Undecodable, match="cannot read text/xml; expected application/json"):
        catalog.read(catalog.add(OrderPlaced), message(OrderPlaced, b"<a/>", datacontenttype="text/xml"))
    for content in ("application/json; charset=utf-8", "application/vnd.shop+json", "Application/JSON", None):
        read = catalog.read(
            catalog.add(OrderPlaced), message(OrderPlaced, b'{"order_id": "a"}', datacontenttype=content)
        )
        assert read == OrderPlaced(order_id="a")


class NewerRead(Event, topic="newer", type="newer.read", newer="read"):
    x: int


class NewerWait(Event, topic="newer", type="newer.wait", newer="wait"):
    x: int


class NewerDead(Event, topic="newer", type="newer.dead", newer="dead"):
    x: int


def test_a_newer_version_is_read_if_it_can_be(catalog: Catalog) -> None:
    assert catalog.read(catalog.add(NewerRead), message(NewerRead, b'{"x": 1, "y": 2}', 2)) == NewerRead(x=1)
    with pytest.raises(NewerVersion, match=r"newer.read has version 2; this program knows version 1"):
        catalog.read(catalog.add(NewerRead), message(NewerRead, b'{"y": 2}', 2))


@pytest.mark.parametrize("cls", [NewerWait, NewerDead])
def test_a_newer_version_is_not_even_tried_otherwise(catalog: Catalog, cls: Any) -> None:
    with pytest.raises(NewerVersion) as found:
        catalog.read(catalog.add(cls), message(cls, b'{"x": 1}', 2))
    assert (found.value.version, found.value.known) == (2, 1)


async def test_newer_versions_are_read_held_or_dead_in_a_group() -> None:
    app = App("app")
    seen: list[str] = []

    @app.on(NewerRead, group="reads", retry=Retry(attempts=2))
    async def reads(e: NewerRead) -> None:
        seen.append("read")

    @app.on(NewerWait, group="waits", retry=Retry(attempts=2))
    async def waits(e: NewerWait) -> None:
        seen.append("wait")

    @app.on(NewerDead, group="dies", retry=Retry(attempts=2))
    async def dies(e: NewerDead) -> None:
        seen.append("dead")

    async with harness(app) as t:
        made = [message(cls, b'{"x": 1}', 2) for cls in (NewerRead, NewerWait, NewerDead)]
        unreadable = message(NewerRead, b'{"y": 1}', 2, id="2")
        await t.broker.publish([*made, unreadable])
        await t.advance("30d")
        assert seen == ["read"]
        assert t.dead("reads") == t.dead("waits") == []
        assert [letter.reason for letter in t.dead("dies")] == ["undecodable"]
        lag = {lag.group: lag.parked for lag in await t.broker.admin.lag()}
        assert lag == {"reads": 1, "waits": 1, "dies": 0}


async def test_a_rolling_deploy_waits_for_versions_and_then_reads_them() -> None:
    class Old(Event, topic="deploys", key="k", type="deploy"):
        k: str
        a: int

    class New(Event, topic="deploys", key="k", type="deploy", version=2):
        k: str
        b: int

    @upcast(New, from_version=1)
    def step(old: dict[str, Any]) -> dict[str, Any]:
        return {"k": old["k"], "b": old["a"] * 10}

    seen: list[Any] = []
    old, new = App("shop"), App("shop")

    @old.on(Old, group="g")
    async def before(e: Old) -> None:
        seen.append(e)

    @new.on(New, group="g")
    async def after(e: New) -> None:
        seen.append(e)

    async with harness(old) as t:
        await t.publish([Old(k="x", a=1), New(k="x", b=2)])
        await t.settled()
        await t.publish([Old(k="x", a=3), Old(k="y", a=4)])  # x waits behind what the old program cannot read
        await t.settled()
        assert seen == [Old(k="x", a=1), Old(k="y", a=4)]
        assert t.dead("g") == []
        await t.stop()
        t.apps = (new,)
        await t.start()
        await t.settled()
        assert seen[2:] == [New(k="x", b=2), New(k="x", b=30)]


def test_former_types_are_read_by_the_class(catalog: Catalog) -> None:
    spec = catalog.add(Address)
    for name in ("com.shop.address", "Adresse", "com.old.address"):
        assert catalog.find(name) is spec


def test_two_classes_of_one_type_name_both() -> None:
    class Other(Event, topic="orders", type="com.shop.order.placed"):
        pass

    class Former(Event, topic="x", also=("com.shop.order.placed",)):
        pass

    app = App("shop")

    @app.on(OrderPlaced)
    async def one(e: OrderPlaced) -> None: ...

    @app.on(Other)
    async def two(e: Other) -> None: ...

    for cls in (Other, Former):
        catalog = Catalog("/shop", VirtualClock(NOW))
        catalog.add(OrderPlaced)
        with pytest.raises(DuplicateType, match=r"'com.shop.order.placed': .*OrderPlaced and .*(Other|Former)"):
            catalog.add(cls)


async def test_two_classes_of_one_type_are_refused_at_start() -> None:
    class Other(Event, topic="orders", type="com.shop.order.placed"):
        pass

    app = App("shop")

    @app.on(OrderPlaced)
    async def one(e: OrderPlaced) -> None: ...

    @app.on(Other)
    async def two(e: Other) -> None: ...

    with pytest.raises(DuplicateType, match=r"two classes claim the event type 'com\.shop\.order\.placed'"):
        async with harness(app):
            pass


async def test_two_settings_of_one_topic_are_refused_at_start() -> None:
    from stentor import Topic

    class One(Event, topic=Topic("same", partitions=3)):
        pass

    class Two(Event, topic="same"):
        pass

    app = App("shop")

    @app.on(One, Two)
    async def both(e: One | Two) -> None: ...

    with pytest.raises(DuplicateType, match="topic 'same' is declared with different settings"):
        async with harness(app):
            pass


# ---- foreign JSON and events by name --------------------------------------------------------------------------------


class Reading(Event, topic="sensors", key="sensor", wire="json"):
    sensor: str
    value: float


def test_foreign_json_has_no_attributes(catalog: Catalog) -> None:
    made = encode(catalog, Reading(sensor="s", value=1.0))
    assert (made.type, made.time, made.extensions) == ("", None, {})
    assert (made.data, made.key, made.topic) == (b'{"sensor":"s","value":1.0}', "s", "sensors")
    assert catalog.foreign("sensors") is spec_of(Reading)


def test_a_topic_of_foreign_json_has_one_class(catalog: Catalog) -> None:
    class Second(Event, topic="sensors", wire="json"):
        pass

    catalog.add(Reading)
    with pytest.raises(
        DuplicateType, match=r"topic 'sensors' of plain JSON can have one class; it has .*Reading and .*Second"
    ):
        catalog.add(Second)


async def test_foreign_json_is_handled_in_both_directions() -> None:
    app = App("app")
    seen: list[Reading] = []

    @app.on(Reading)
    async def handle(reading: Reading) -> Reading | None:
        seen.append(reading)
        return Reading(sensor="echo", value=reading.value) if reading.sensor != "echo" else None

    async with harness(app) as t:
        foreign = Message(
            id="x", source="", type="", topic="sensors", data=b'{"sensor": "s", "value": 2.5, "unit": "C"}'
        )
        await t.broker.publish([foreign, msgspec.structs.replace(foreign, id="y", data=b"no json")])
        await t.settled()
        assert seen == [Reading(sensor="s", value=2.5), Reading(sensor="echo", value=2.5)]
        [dead] = t.dead(handle)
        assert (dead.reason, dead.message.data) == ("undecodable", b"no json")


def test_an_event_by_name_is_of_its_class_where_there_is_one(catalog: Catalog) -> None:
    catalog.add(OrderPlaced)
    assert catalog.named("com.shop.order.placed", {"order_id": "a"}, None, None, None) == OrderPlaced(order_id="a")
    with pytest.raises(InvalidEvent, match=r"com\.shop\.order\.placed: "):
        catalog.named("com.shop.order.placed", {"order": "a"}, None, None, None)


def test_an_event_known_only_by_name(catalog: Catalog) -> None:
    named = catalog.named("com.other.thing", {"x": 1}, 2, "things", "k")
    assert named == Named(type="com.other.thing", topic="things", data={"x": 1}, version=2, key="k")
    made = encode(catalog, named)
    assert (made.type, made.topic, made.key, made.version, made.data) == (
        "com.other.thing",
        "things",
        "k",
        2,
        b'{"x":1}',
    )
    for data in ({"x": math.nan}, {"x": object()}):
        with pytest.raises(InvalidEvent, match=r"com\.other\.thing"):
            encode(catalog, catalog.named("com.other.thing", data, None, None, None))


# ---- schemas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (OrderPlaced(order_id="a", lines=(Line(sku="x"),), note="n"), {"order_id": 5}),
        (D(value=1.0), {"value": "x"}),
        (A(value=None), {"value": "x"}),
        (P(value=1.0), {"value": "x"}),
        (S(value=1.0), {"value": "x"}),
        (Address(id="a", street="s", country="c"), {"id": "a"}),
    ],
)
def test_every_schema_accepts_its_events_and_refuses_others(catalog: Catalog, made: Any, wrong: dict[str, Any]) -> None:
    catalog.add(type(made))
    [schema] = catalog.schemas().values()
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    validator.validate(msgspec.json.decode(encode(catalog, made).data))
    with pytest.raises(SchemaError):
        validator.validate(wrong)
