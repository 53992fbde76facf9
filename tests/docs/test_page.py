"""The page and its picture: everything is on it and nothing of others, boxes and labels stand apart, links lead on."""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from typing import Annotated, Any

import msgspec
import pytest

from examples.flights.app import app as flights
from examples.shop.orders import app as orders
from examples.shop.payments import app as payments
from examples.shop.shipping import app as shipping
from stentor import App, Event, Retry
from stentor.connect import BrokerUrl
from stentor.docs.fields import fields
from stentor.docs.graph import Layout, anchor, common_prefix, fit, layout, text_width
from stentor.docs.overview import Link, Overview, Part, overview
from stentor.docs.page import limits, page, retry
from stentor.docs.reach import Reach
from stentor.docs.svg import part_anchor
from stentor.event import spec_of
from stentor.gateway.routes import make, read_settings
from tests.docs.large import large

SERVICES = """
dead_letter = "orders"
[services]
orders = ["127.0.0.1:8001"]
payments = ["127.0.0.1:8002"]
shipping = ["127.0.0.1:8003"]
"""


class Greeted(Event, topic="greetings", key="name", type="com.example.greeted"):
    """Somebody said hello."""

    name: str


def one() -> Overview:
    app = App("hello")

    @app.on(Greeted)
    async def answer(event: Greeted) -> None:
        """Say it back."""

    return overview([app], BrokerUrl("sqlite:///stentor.db"))


def shop() -> Overview:
    return overview([orders, payments, shipping], BrokerUrl("kafka://kafka-1:9092"))


def with_gateway() -> Overview:
    from examples.shop import bus  # it has the apps of the others deliver

    apps: list[App] = [getattr(bus, name) for name in ("orders", "payments", "shipping")]
    return overview(apps, None, make(apps, read_settings(SERVICES, "gateway.toml")))


def made(parts: list[Part], links: list[Link], **more: Any) -> Overview:
    """An overview of the picture's parts only."""
    services = tuple(dict.fromkeys(part.service for part in parts if part.service))
    return Overview(services=services, broker=None, owners={}, parts={part.id: part for part in parts},
                    links=tuple(links), operations=(), **{"events": {}, **more})  # fmt: skip


def nothing() -> Overview:
    return made([], [])


def cycle() -> Overview:
    """Topics and handlers in a ring, one that answers itself, and one alone."""
    parts = [
        Part(id=f"{kind}{number}", kind=kind, name=f"{kind} {number}", service="s" if kind == "handler" else "")
        for number in range(4)
        for kind in ("topic", "handler")
    ]
    links = [Link(f"topic{number}", f"handler{number}", ("a.b",)) for number in range(4)]
    links += [Link(f"handler{number}", f"topic{(number + 1) % 3}", ("a.c", "a.d")) for number in range(3)]
    return made(parts, [*links, Link("handler0", "topic0", ("a.b",)), Link("topic0", "topic0", ("a.b",))])


def long_names() -> Overview:
    name = "averyveryverylongnamewithoutanyplacetobreakit" * 3
    return made(
        [
            Part(id="a", kind="source", name=name, service=name, note=name),
            Part(id="b", kind="topic", name="well." + name),
            Part(id="c", kind="target", name="https://example.com/" + name, note="HTTP"),
            Part(id="d", kind="gateway", name="注文" * 30, note=name),
        ],
        [Link("a", "b", (name,)), Link("b", "c", tuple("abcdef")), Link("b", "d", ("x",)), Link("d", "b", ("y",))],
    )


ALL: list[Callable[[], Overview]] = [one, shop, with_gateway, large, nothing, cycle, long_names]
ALL.insert(3, lambda: overview([flights], BrokerUrl("sqlite:///flights.db")))
NAMES = ["one", "shop", "with_gateway", "flights", "large", "nothing", "cycle", "long_names"]


@cache
def drawn(number: int) -> tuple[Overview, Layout]:
    view = ALL[number]()
    return view, layout(view)


@pytest.fixture(params=range(len(ALL)), ids=NAMES)
def picture(request: pytest.FixtureRequest) -> tuple[Overview, Layout]:
    return drawn(request.param)


def document(view: Overview) -> dict[str, Any]:
    example = [{"payload": {"name": "ada"}}]
    return {
        "info": {"title": "A shop"},
        "components": {"messages": {type: {"examples": example} for type in view.events}},
    }


class Reader(HTMLParser):
    """What stands in a page, and whether its elements close."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- the picture ----------------------------------------------------------------------------------------------------


def rectangles(found: Layout) -> Iterator[tuple[str, float, float, float, float]]:
    for box in found.boxes:
        yield box.part, box.x, box.y, box.x + box.width, box.y + box.height
    for path in found.paths:
        if path.label is not None:
            one = path.label
            yield f"label {path.number}", one.x, one.y, one.x + one.width, one.y + one.height


def test_every_part_and_every_link_is_drawn(picture: tuple[Overview, Layout]) -> None:
    view, found = picture
    assert [box.part for box in found.boxes] == list(view.parts)
    assert [path.number for path in found.paths] == [n for n, link in enumerate(view.links) if link.start != link.end]


def test_boxes_and_labels_stand_apart(picture: tuple[Overview, Layout]) -> None:
    all = list(rectangles(picture[1]))
    for number, (name, left, top, right, bottom) in enumerate(all):
        for other, x, y, x_end, y_end in all[number + 1 :]:
            apart = right + 4 <= x or x_end + 4 <= left or bottom + 4 <= y or y_end + 4 <= top
            assert apart, f"{name} overlaps {other}"


def test_everything_is_inside(picture: tuple[Overview, Layout]) -> None:
    found = picture[1]
    points = [point for path in found.paths for point in path.points]
    points += [point for _, x, y, x_end, y_end in rectangles(found) for point in ((x, y), (x_end, y_end))]
    points += [(x, 0) for band in found.bands for x in band] + [(found.bar, 0)]
    assert all(0 <= x <= found.width and 0 <= y <= found.height for x, y in points)


def test_links_pass_by_the_boxes_of_others(picture: tuple[Overview, Layout]) -> None:
    view, found = picture
    boxes = {box.part: box for box in found.boxes}
    for path in found.paths:
        link = view.links[path.number]
        others = [box for name, box in boxes.items() if name not in (link.start, link.end)]
        for x, y in curve(path.points):
            for box in others:
                inside = box.x < x < box.x + box.width and box.y < y < box.y + box.height
                assert not inside, f"{link} goes through {box.part}"


def curve(points: tuple[tuple[float, float], ...]) -> Iterator[tuple[float, float]]:
    for start in range(0, len(points) - 1, 3):
        p, q, r, s = points[start : start + 4]
        for t in (0, 0.2, 0.4, 0.6, 0.8):
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
            yield tuple(a * p[i] + b * q[i] + c * r[i] + d * s[i] for i in (0, 1))  # type: ignore[misc]


def test_a_link_begins_and_ends_at_its_boxes(picture: tuple[Overview, Layout]) -> None:
    view, found = picture
    boxes = {box.part: box for box in found.boxes}
    for path in found.paths:
        link = view.links[path.number]
        for name, (x, y) in ((link.start, path.points[0]), (link.end, path.heads[-1][:2])):
            box = boxes[name]
            assert box.x - 0.1 <= x <= box.x + box.width + 0.1
            assert box.y <= y <= box.y + box.height


def test_names_fit_into_their_boxes(picture: tuple[Overview, Layout]) -> None:
    for box in picture[1].boxes:
        size = 13.5 if "://" in box.name.lines[0] else 17
        assert all(text_width(line, size, bold=True) <= box.width - 12 for line in box.name.lines)
        assert text_width(box.below.upper(), 11) <= box.width - 12


def test_links_lead_to_the_right_unless_they_close_a_cycle() -> None:
    assert not any(path.back for path in drawn(NAMES.index("shop"))[1].paths)
    view, found = drawn(NAMES.index("cycle"))
    back = [view.links[path.number] for path in found.paths if path.back]
    assert [(link.start, link.end) for link in back] == [("handler2", "topic0"), ("handler0", "topic0")]


def test_links_that_need_not_cross_are_straight() -> None:
    parts = [Part(id=f"source{number}", kind="source", name=f"s{number}") for number in range(6)]
    parts += [Part(id=f"topic{number}", kind="topic", name=f"t{number}") for number in range(6)]
    links = [Link(f"source{number}", f"topic{(number * 5 + 2) % 6}", ("a",)) for number in (5, 1, 3, 0, 2, 4)]
    for path in layout(made(parts, links)).paths:
        assert len({y for _, y in path.points}) == 1


def test_a_long_type_list_is_counted_and_a_common_prefix_left_out() -> None:
    view, found = drawn(NAMES.index("large"))
    texts = {path.number: path.label.text.lines for path in found.paths if path.label is not None}
    counted = [number for number, lines in texts.items() if lines == ("4 types",)]
    assert [len(view.links[number].types) for number in counted] == [4]
    assert ("cart.submitted",) in texts.values()
    assert found.prefix == "com.example."
    assert common_prefix(["a.b.c"]) == "a.b."
    assert common_prefix(["a.b", "a"]) == ""
    assert common_prefix([]) == ""


def test_a_text_is_broken_at_its_dots_and_shortened_in_the_end() -> None:
    assert fit("orders", 15, 170).lines == ("orders",)
    assert fit("orders.of-last-year.paid", 15, 130).lines == ("orders.of-last-", "year.paid")
    short = fit("x" * 90, 15, 170)
    assert short.lines[-1].endswith("…")
    assert short.whole == "x" * 90


def test_what_is_connected_follows_the_types_through_a_topic() -> None:
    view = drawn(NAMES.index("shop"))[0]
    parts, links = Reach(view).of("handler/orders.outcomes/refused")
    assert parts == {
        "handler/orders.outcomes/refused", "topic//shop.payments", "handler/payments.charge/charge",
        "topic//shop.orders", "source/orders/place",
    }  # fmt: skip
    assert all("com.example.shop.order.shipped" not in view.links[number].types for number in links)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_every_part_and_event_is_on_the_page(picture: tuple[Overview, Layout]) -> None:
    view, _ = picture
    read = Reader(page(view, document(view)))
    assert read.open == []
    assert len(read.ids) == len(set(read.ids))
    ids = set(read.ids)
    assert {part_anchor(part) for part in view.parts.values()} <= ids
    assert {anchor("event", type) for type in view.events} <= ids
    assert {anchor("service", name) for name in view.services} <= ids
    for word in [*view.events, *view.services, *(part.name for part in view.parts.values())]:
        assert word in read.text
    assert len([1 for tag, name, value in read.attributes if name == "class" and "part " in value]) == len(view.parts)


def test_links_lead_inside_and_nothing_is_loaded(picture: tuple[Overview, Layout]) -> None:
    view, _ = picture
    text = page(view, document(view))
    read = Reader(text)
    for tag, name, value in read.attributes:
        if name == "href":
            assert tag == "a"
            assert value.startswith("#")
            assert value[1:] in read.ids
        assert name not in ("src", "srcset", "data", "action", "xlink:href", "poster", "background")
        assert not name.startswith("on"), "no script in an attribute"
        if name == "style":
            assert "url(" not in value
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "image", "use"} & set(read.tags)
    style, script = (re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("style", "script"))
    assert (len(style), len(script)) == (1, 1)
    assert not re.search(r"url\(|@import|https?:|//", style[0])
    assert not re.search(r"https?:|//|fetch|XMLHttp|WebSocket|import|eval|innerHTML", script[0])


HOSTILE = "<script>alert('x')</script>\"&amp;"


def test_a_hostile_name_is_text() -> None:
    class Bad(Event, topic="bad", type=HOSTILE):
        field: Annotated[str, msgspec.Meta(description=HOSTILE)] = HOSTILE

    Bad.__doc__ = HOSTILE
    parts = [
        Part(
            id=f"{kind}/{HOSTILE}", kind=kind, name=HOSTILE, service=service, note=HOSTILE, facts=((HOSTILE, HOSTILE),)
        )
        for kind in ("source", "topic", "handler", "target", "gateway")
        for service in (["", HOSTILE][kind != "topic"],)
    ]
    links = [Link(parts[0].id, parts[1].id, (HOSTILE,), sure=False), Link(parts[1].id, parts[2].id, (HOSTILE,))]
    view = made(parts, links, events={HOSTILE: spec_of(Bad)})
    text = page(view, {"info": {"title": HOSTILE}, "components": {"messages": {HOSTILE: {
        "description": HOSTILE, "examples": [{"payload": {HOSTILE: HOSTILE}}]}}}})  # fmt: skip
    assert text.count("<script>") == 1
    assert "alert('x')" not in text
    read = Reader(text)
    assert read.tags.count("script") == 1
    assert read.text.count("<script>alert") > 20
    assert anchor("event", HOSTILE) in read.ids


def test_it_is_the_same_every_time() -> None:
    view = with_gateway()
    assert page(view, document(view)) == page(with_gateway(), document(with_gateway()))


def test_a_document_may_lack_everything() -> None:
    view = drawn(0)[0]
    assert "<h1>hello</h1>" in page(view, {})
    odd: dict[str, Any]
    for odd in ({"components": None}, {"components": {"messages": []}}, {"info": "x"}):
        assert "com.example.greeted" in page(view, odd)
    component = {"name": "com.example.greeted", "examples": [{"payload": {"data": {"name": "grace"}}}]}
    assert "grace" in page(view, {"components": {"messages": {"com_example_greeted": component}}})


def test_it_says_what_a_handler_does_when_it_fails() -> None:
    view = drawn(NAMES.index("shop"))[0]
    text = Reader(page(view, document(view))).text
    assert "3 services, 4 events, 3 topics, 4 handlers, 1 source, on kafka://kafka-1:9092" in text
    assert "10 attempts, 50 ms apart at first, then 2 times as long up to 1 s" in text
    assert "stentor.dead.payments.charge" in text
    assert "a broker each, with a gateway between them" in page(*gateway())
    assert "delivers them to" in page(*gateway())


def gateway() -> tuple[Overview, dict[str, Any]]:
    view = drawn(NAMES.index("with_gateway"))[0]
    return view, document(view)


def test_times_and_limits_are_told_as_people_do() -> None:
    policy = Retry(attempts=None, first="90s", factor=1, never=(ValueError,))
    told = {"attempts": None, "first": policy._first, "factor": 1, "longest": policy._longest, "never": ["ValueError"]}
    assert retry(told) == "without end, 90 s apart, never after ValueError"
    assert retry({"attempts": 1}) == "none"
    facts = {"concurrency": "auto", "rate": 100.0, "keyRate": 5 / 60, "timeout": 120, "batch": 500, "filtered": True}
    assert limits(facts) == [
        "as many at once as pay", "100/s", "5/min for each key", "at most 2 min each", "batches of up to 500",
        "only events that pass its filter",
    ]  # fmt: skip


class Line(msgspec.Struct):
    item: str
    count: Annotated[int, msgspec.Meta(ge=1, description="How many.")] = 1


class Basket(Event, topic="baskets", key="customer"):
    """What somebody would buy."""

    customer: str
    lines: list[Line]
    note: str | None = None


def test_fields_are_told_with_those_inside() -> None:
    spec = spec_of(Basket)
    assert spec is not None
    found = [(one.name, one.type, one.need, one.about) for one in fields(spec.schema())]
    assert found == [
        ("customer", "string", "required", ""),
        ("lines", "array of Line", "required", ""),
        ("lines[].item", "string", "required", ""),
        ("lines[].count", "integer", "default 1", "How many. ≥ 1"),
        ("note", "string or null", "default null", ""),
    ]
    assert fields({}) == []
    assert [one.type for one in fields({"properties": {"a": {"$ref": "#/$defs/B"}}})] == ["B"]
    loop = {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"next": {"$ref": "#/$defs/A"}}}}}
    assert [one.name for one in fields(json.loads(json.dumps(loop)))] == ["next", "next.next", "next.next.next"]
