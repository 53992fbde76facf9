"""Each change of an event is told, and whether it breaks those who read or wrote it before."""

from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest

from stentor import App, Event, event, upcast
from stentor.connect import BrokerUrl
from stentor.docs.asyncapi import document
from stentor.docs.diff import changes
from stentor.docs.overview import overview


def of(cls: Any) -> dict[str, Any]:
    app = App("app")
    app.publishes(cls)
    return document(overview([app], BrokerUrl("memory://")))


class Line(msgspec.Struct):
    item: str
    count: int = 1


class Line2(msgspec.Struct):
    item: int
    count: int = 1


class Node(msgspec.Struct):
    name: str
    inner: "Node | None" = None


def fields(**types: Any) -> Any:
    """An event with such fields: types, or a type and its default."""
    made = {name: one if isinstance(one, tuple) else (one,) for name, one in types.items()}
    space = {"__annotations__": {name: one[0] for name, one in made.items()}} | {
        name: one[1] for name, one in made.items() if len(one) > 1
    }
    meta: Any = type(Event)
    return meta("Made", (Event,), {**space, "__module__": __name__}, topic="t", type="made")


BREAKING = {
    "field a is gone": (fields(a=int, b=int), fields(b=int)),
    "field a was integer, is string": (fields(a=int), fields(a=str)),
    "field a was integer, is integer or null": (fields(a=int), fields(a=int | None)),
    "field a was integer, is number": (fields(a=int), fields(a=float)),
    "field a was array of integer, is array of string": (fields(a=list[int]), fields(a=list[str])),
    "field a.item was string, is integer": (fields(a=Line), fields(a=Line2)),
    "field a[].item was string, is integer": (fields(a=list[Line]), fields(a=list[Line2])),
    "field a{}.item was string, is integer": (fields(a=dict[str, Line]), fields(a=dict[str, Line2])),
    "field b is new and required: what is stored lacks it": (fields(a=int), fields(a=int, b=int)),
    "field a is required: what is stored may lack it": (fields(a=(int, 1)), fields(a=int)),
    "field a may be missing: those who read it rely on it": (fields(a=int), fields(a=(int, 1))),
    "field a has other values than before: y, z": (fields(a=Literal["x", "y"]), fields(a=Literal["x", "z"])),
    "field a: minimum was none, is 3": (fields(a=int), fields(a=Annotated[int, msgspec.Meta(ge=3)])),
}


@pytest.mark.parametrize("text", BREAKING)
def test_changes_that_break(text: str) -> None:
    old, new = BREAKING[text]
    found = changes(of(old), of(new))
    assert [(str(change), change.breaking) for change in found] == [(f"made: {text}", True)]


def test_changes_that_do_not() -> None:
    old, new = fields(a=int, node=Node), fields(a=int, node=Node, b=(int, 1), c=(str | None, None))
    found = changes(of(old), of(new))
    assert [(str(change), change.breaking) for change in found] == [
        ("made: field b is new", False), ("made: field c is new", False),
    ]  # fmt: skip
    assert changes(of(new), of(new)) == []


def test_key_topic_version_and_type() -> None:
    class Old(Event, topic="t", key="a", type="made", version=2):
        a: str
        b: str

    class Key(Event, topic="t", key="b", type="made", version=2):
        a: str
        b: str

    class Moved(Event, topic="u", key="a", type="made", version=1):
        a: str
        b: str

    class Renamed(Event, topic="t", key="a", type="made2", also=("made",), version=2):
        a: str
        b: str

    def told(new: type) -> list[tuple[str, bool]]:
        return [(change.text.partition(":")[0], change.breaking) for change in changes(of(Old), of(new))]

    assert told(Key) == [("its key was a, is b", True)]
    assert told(Moved) == [("its topic was t, is u", True), ("its version was 2, is 1", True)]
    assert told(Renamed) == [("is called made2 now, which reads it", False)]
    assert told(fields()) == [
        ("its key was a, is none", True), ("its version was 2, is 1", True), ("field a is gone", True),
        ("field b is gone", True),
    ]  # fmt: skip
    old, new = of(Old), of(Unlike)
    assert [(change.type, change.text.partition(":")[0], change.breaking) for change in changes(old, new)] == [
        ("made", "is gone", True), ("line", "is new", False),
    ]  # fmt: skip


class Unlike(Event, topic="t", type="line"):
    pass


def test_a_version_with_its_upcasts_says_itself_how_it_is_read() -> None:
    class Old(Event, topic="t", type="made"):
        a: str

    class New(Event, topic="t", type="made", version=3):
        b: str

    found = changes(of(Old), of(New))
    for step in (1, 2):

        @upcast(New, from_version=step)
        def change(data: dict[str, Any]) -> dict[str, Any]:
            return data

        found = changes(of(Old), of(New))
        assert {one.breaking for one in found} == ({False} if step == 2 else {True, False})
    assert [one.text for one in found] == [
        "its version was 1, is 3", "field a is gone", "field b is new and required: what is stored lacks it",
    ]  # fmt: skip


def test_pydantic_and_plain_json() -> None:
    def made(field: type, wire: Literal["cloudevents", "json"] = "cloudevents") -> Any:
        inner = pydantic.create_model("Inner", name=(field, ...))
        return event(topic="t", type="made", wire=wire)(pydantic.create_model("Outer", inner=(inner, ...)))

    assert [str(one) for one in changes(of(made(str)), of(made(int)))] == [
        "made: field inner.name was string, is integer"
    ]
    assert [str(one) for one in changes(of(made(str)), of(made(str, "json")))] == [
        "made: it was a CloudEvent, is plain JSON"
    ]
