"""Events of every kind of class: their keywords, keys, and what is refused when."""

import dataclasses
import enum
import uuid
from collections.abc import Callable
from typing import Any, Literal

import attrs
import msgspec
import pydantic
import pytest

from stentor import Event, Topic, event, replace, upcast
from stentor.errors import DefinitionError, InvalidEvent
from stentor.event import KEY_LIMIT, EventSpec, spec_of


class OrderPlaced(Event, topic="orders", key="order_id", type="com.shop.order.placed"):
    order_id: str
    amount: float = 1.0


@event(topic="orders", key="order_id", type="com.shop.order.shipped", version=2)
@dataclasses.dataclass(frozen=True)
class Shipped:
    order_id: str
    parcels: int = 1


@event(topic="orders", key="order_id")
@attrs.frozen
class Returned:
    order_id: str
    parcels: int = 1


@event(topic="orders", key="order_id")
class Cancelled(pydantic.BaseModel):
    order_id: str
    parcels: int = 1


@event(topic="orders", key="order_id")
class Paid(msgspec.Struct):
    order_id: str
    parcels: int = 1


KINDS = [Shipped, Returned, Cancelled, Paid]


def spec(cls: Any) -> EventSpec:
    found = spec_of(cls)
    assert found is not None
    return found


@pytest.mark.parametrize("cls", KINDS)
def test_a_class_of_any_kind_becomes_an_event(cls: Any) -> None:
    made = cls(order_id="a", parcels=2)
    found = spec(cls)
    assert found.decode(found.encode(made)) == made
    assert found.convert({"order_id": "a", "parcels": 2}) == made
    assert found.key_of(made) == "a"
    assert found.topic == Topic("orders")
    assert replace(made, parcels=3) == cls(order_id="a", parcels=3)
    assert set(found.schema().get("properties") or found.schema()["$defs"][cls.__name__]["properties"]) == {
        "order_id",
        "parcels",
    }


@pytest.mark.parametrize("cls", KINDS)
def test_a_wrong_field_shows_when_a_class_of_any_kind_is_decoded(cls: Any) -> None:
    with pytest.raises((ValueError, msgspec.ValidationError), match="order_id"):
        spec(cls).decode(b'{"order_id": 7}')


@pytest.mark.parametrize("cls", KINDS)
def test_a_key_that_names_no_field_is_refused_for_a_class_of_any_kind(cls: Any) -> None:
    with pytest.raises(DefinitionError, match=r"key names the field 'oder_id'.*its fields are order_id, parcels"):
        event(topic="orders", key="oder_id")(cls)


def test_an_event_is_frozen_and_keyword_only() -> None:
    order = OrderPlaced(order_id="a")
    with pytest.raises(AttributeError):
        order.amount = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        OrderPlaced("a")  # type: ignore[call-arg]
    assert replace(order, amount=2.0) == OrderPlaced(order_id="a", amount=2.0)
    assert hash(order) == hash(OrderPlaced(order_id="a"))


def test_topic_and_key_are_inherited_but_type_and_version_are_not() -> None:
    class Base(Event, topic=Topic("orders", partitions=3, retention="30d"), key="order_id", type="base", version=4):
        order_id: str

    class Child(Base):
        extra: int = 0

    class Elsewhere(Base, topic="other", key=None):
        pass

    assert (spec(Child).topic, spec(Child).key) == (Topic("orders", partitions=3, retention="30d"), "order_id")
    assert (spec(Child).type, spec(Child).version) == ("Child", 1)
    assert (spec(Elsewhere).topic.name, spec(Elsewhere).key_of(Elsewhere(order_id="a"))) == ("other", None)
    assert spec(Child).key_of(Child(order_id="a")) == "a"


def test_an_event_without_a_topic_is_abstract() -> None:
    class Anything(Event, key="id"):
        id: str

    class Something(Anything, topic="things"):
        pass

    class Plain(Event):
        pass

    assert spec_of(Anything) is None
    assert spec_of(Plain) is None
    assert spec(Something).key_of(Something(id="x")) == "x"


def test_a_struct_derived_from_an_event_class_is_not_the_event() -> None:
    @event(topic="t")
    @dataclasses.dataclass
    class A:
        x: int

    class B(A):
        pass

    assert spec_of(A) is not None
    assert spec_of(B) is None


def test_fields_may_have_other_names_on_the_wire() -> None:
    class Renamed(Event, topic="t", rename="camel"):
        order_id: str

    assert spec(Renamed).encode(Renamed(order_id="a")) == b'{"orderId":"a"}'


class Colour(enum.Enum):
    RED = "red"
    ONE = 1
    HALF = 0.5


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("a", "a"),
        ("ä 漢\u2028", "ä 漢\u2028"),
        ("x" * KEY_LIMIT, "x" * KEY_LIMIT),
        (7, "7"),
        (-1, "-1"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (Colour.RED, "red"),
        (Colour.ONE, "1"),
    ],
)
def test_what_a_key_may_be(value: object, key: str) -> None:
    class Keyed(Event, topic="t", key="k"):
        k: Any

    assert spec(Keyed).key_of(Keyed(k=value)) == key


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, r"Keyed: the key \(k\) is None; .*declare key=None for events without an order"),
        (1.5, r"Keyed: the key \(k\) is 1.5; a key must be a str, int, UUID or an Enum of these"),
        (True, r"the key \(k\) is True"),
        (Colour.HALF, r"the key \(k\) is 0.5"),
        (b"a", r"the key \(k\) is b'a'"),
        ("a\0", "attribute 'partitionkey': .* holds a character that CloudEvents forbids"),
        ("\ud800", "attribute 'partitionkey'"),
        ("", r"the key \(k\) has 0 characters; a key has 1 to 1024"),
        ("x" * (KEY_LIMIT + 1), r"the key \(k\) has 1025 characters"),
    ],
)
def test_what_a_key_may_not_be(value: object, complaint: str) -> None:
    class Keyed(Event, topic="t", key="k"):
        k: Any

    with pytest.raises(InvalidEvent, match=complaint):
        spec(Keyed).key_of(Keyed(k=value))


def test_a_key_of_several_fields_or_of_a_function() -> None:
    class Pair(Event, topic="t", key=("a", "b")):
        a: str
        b: str

    class Computed(Event, topic="t", key=lambda e: e.a.lower()):
        a: str

    class Nothing(Event, topic="t", key=lambda e: None):
        pass

    keys = {spec(Pair).key_of(Pair(a=a, b=b)) for a, b in [("a", "b|c"), ("a|1:b", "c"), ("a", "b"), ("ab", "")][:3]}
    assert len(keys) == 3
    assert spec(Computed).key_of(Computed(a="X")) == "x"
    with pytest.raises(InvalidEvent, match="key function"):
        spec(Nothing).key_of(Nothing())


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"topic": ""}, "topic '': use 1 to 200 letters"),
        ({"topic": "with space"}, "use 1 to 200 letters"),
        ({"topic": "-dash"}, "not starting with"),
        ({"topic": "x" * 201}, "use 1 to 200"),
        ({"topic": 5}, "topic must be a name or a Topic, not 5"),
        ({"key": 5}, "key must be a field name"),
        ({"key": ()}, "key must be a field name"),
        ({"key": "nope"}, "key names the field 'nope', which it does not have; its fields are a"),
        ({"key": ("a", "nope")}, "key names the field 'nope'"),
        ({"type": " "}, "type must be a non-empty string"),
        ({"version": 0}, "version must be a whole number from 1"),
        ({"version": "2"}, "version must be a whole number from 1"),
        ({"newer": "guess"}, 'newer must be "read", "wait" or "dead"'),
        ({"wire": "avro"}, 'wire must be "cloudevents" or "json"'),
    ],
)
def test_wrong_keywords_are_refused_at_the_class(keywords: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DefinitionError, match=complaint):

        class Wrong(Event, **{"topic": "t", **keywords}):
            a: str


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Topic("t", partitions=0), "partitions must be 1 to 1024"),
        (lambda: Topic("t", retention="soon"), "topic t: retention: 'soon' is no duration"),
    ],
)
def test_wrong_topic_settings_are_refused(make: Callable[[], Topic], complaint: str) -> None:
    with pytest.raises(DefinitionError, match=complaint):
        make()


def test_event_on_a_plain_class_is_refused() -> None:
    class Plain:
        pass

    with pytest.raises(
        DefinitionError, match="expected a dataclass, an attrs class, a pydantic model or a msgspec Str"
    ):
        event(topic="t")(Plain)


def test_wrong_upcasts_are_refused() -> None:
    class Three(Event, topic="t", version=3):
        pass

    upcast(Three, from_version=1)(dict)
    with pytest.raises(DefinitionError, match=r"from_version=1\) is defined twice"):
        upcast(Three, from_version=1)
    with pytest.raises(DefinitionError, match="the class has version 3; from_version must be below it"):
        upcast(Three, from_version=3)
    with pytest.raises(DefinitionError, match="is no event"):
        upcast(int, from_version=1)


def test_former_types_may_be_one_name_or_several() -> None:
    class One(Event, topic="t", type="one", also="uno"):  # type: ignore[arg-type]
        pass

    class Two(Event, topic="t", also=("Deux", "Due")):
        pass

    assert spec(One).names == ("one", "uno")
    assert spec(Two).names == ("Two", "Deux", "Due")


def test_types_that_stand_below_the_class_are_resolved_at_first_use() -> None:
    assert spec(Early).decode(b'{"later": {"x": 1}}') == Early(later=Later(x=1))


class Early(Event, topic="t"):
    later: "Later"


class Later(msgspec.Struct):
    x: int


def test_newer_is_typed() -> None:
    values: list[Literal["read", "wait", "dead"]] = ["read", "wait", "dead"]
    for value in values:

        class Any1(Event, topic="t", newer=value):
            pass

        assert spec(Any1).newer == value
