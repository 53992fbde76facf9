"""One HTML page that needs nothing else: the picture of the services, and what each of them and each event is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from stentor.docs.fields import description, fields
from stentor.docs.graph import Layout, anchor, colour, common_prefix, layout
from stentor.docs.overview import Operation, Overview, Part
from stentor.docs.style import SCRIPT, STYLE
from stentor.docs.svg import part_anchor, service_parts, svg
from stentor.event import EventSpec
from stentor.observe.text import per_second, short_time


def page(overview: Overview, document: dict[str, Any]) -> str:
    """The page of an overview; ``document`` is its AsyncAPI document, which has the title and the examples."""
    title = str(_get(document, "info", "title") or ", ".join(overview.services) or "no services")
    drawn = layout(overview)
    parts = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="told">{_counts(overview)}</p></header>',
        f"<figure>{svg(overview, drawn)}</figure>",
        _legend(overview, drawn),
        "<main>",
    ]
    parts += [_service(overview, service) for service in overview.services]
    parts += _others(overview)
    if overview.events:
        parts.append("<h2>Events</h2>")
    parts += [_event(overview, type, spec, document) for type, spec in overview.events.items()]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>\n<body>\n"
        + "\n".join(parts)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _get(value: Any, *names: str) -> Any:
    """What stands there in nested dicts; None where one of them lacks it."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


# ---- above and below the picture ------------------------------------------------------------------------------------


def _counts(overview: Overview) -> str:
    kinds = [part.kind for part in overview.parts.values()]
    topics = {part.name for part in overview.parts.values() if part.kind == "topic"}
    told = [
        (len(overview.services), "service"), (len(overview.events), "event"), (len(topics), "topic"),
        (kinds.count("handler"), "handler"), (kinds.count("source"), "source"),
    ]  # fmt: skip
    words = [f"{number} {word}{'s' if number != 1 else ''}" for number, word in told if number]
    if overview.gateway is not None:
        words.append("a broker each, with a gateway between them")
    elif overview.broker is not None:
        words.append(f"on <code>{escape(str(overview.broker))}</code>")
    return ", ".join(words)


_PIPE = "M6 2H28a4 8 0 0 1 0 16H6a4 8 0 0 1 0-16Z"
_CARD = "M6 2H28q4 0 4 4v8q0 4-4 4H6q-4 0-4-4V6q0-4 4-4Z"
_KEYS = {
    "source": ("Source: where events begin", '<path class="shape" d="M32 2q0 0 0 0v16H11a8 8 0 0 1 0-16Z"/>'),
    "topic": ("Topic", f'<path class="shape" d="{_PIPE}"/><path class="lid" d="M28 2a4 8 0 0 0 0 16"/>'),
    "handler": ("Handler", f'<path class="shape" d="{_CARD}"/><path class="stripe" d="M6 2q-4 0-4 4v8q0 4 4 4Z"/>'),
    "target": ("Target: outside of these services", '<path class="shape" d="M2 2H26l6 6V18H8l-6-6Z"/>'),
    "gateway": ("Gateway", '<path class="shape" d="M7 5L17 1L27 5V15L17 19L7 15Z"/>'),
}  # fmt: skip
_FORWARD = '<path class="line" d="M1 10H26"/><path class="head" d="M33 10L24 5.5V14.5Z"/>'
_BACK = '<path class="line" d="M9 10H33"/><path class="head" d="M1 10L10 5.5V14.5Z"/>'


def _key(kind: str, text: str, shape: str) -> str:
    return f'<li><svg viewBox="0 0 34 20" aria-hidden="true"><g class="{kind} all">{shape}</g></svg>{text}</li>'


def _legend(overview: Overview, drawn: Layout) -> str:
    items = [
        f'<li data-with="{service_parts(overview, service)}">{_chip(overview, service)}'
        f"{_link(anchor('service', service), service)}</li>"
        for service in overview.services
    ]
    kinds = {part.kind for part in overview.parts.values()}
    items += [_key(kind, *told) for kind, told in _KEYS.items() if kind in kinds]
    items.append(_key("link", "Events go there", _FORWARD))
    if any(not link.sure for link in overview.links):
        items.append(_key("link code", "Read from the code, not declared", _FORWARD))
    if any(path.back for path in drawn.paths):
        items.append(_key("link back", "Events go back, against the other links", _BACK))
    if drawn.prefix:
        items.append(f"<li>Types stand without their <code>{escape(drawn.prefix)}</code></li>")
    if overview.gateway is not None:
        items.append("<li>Topics have the colour of the service on whose own broker they are</li>")
    return f'<ul class="legend" aria-label="Legend">{"".join(items)}</ul>'


def _chip(overview: Overview, service: str) -> str:
    number = colour(overview, service)
    return f'<span class="chip {f"s{number}" if number is not None else "all"}"></span>'


# ---- services -------------------------------------------------------------------------------------------------------


def _link(place: str, text: str) -> str:
    return f'<a href="#{place}">{escape(text)}</a>'


def _types(overview: Overview, types: Iterable[str]) -> str:
    """Links to events, one a line."""
    prefix = common_prefix(overview.events)
    return "<br>".join(
        f'<a href="#{anchor("event", type)}" title="{escape(type)}">{escape(type.removeprefix(prefix))}</a>'
        if type in overview.events
        else escape(type)
        for type in types
    )


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><tr>{names}</tr>{"".join(rows)}</table></div>'


def _row(cells: Iterable[str], place: str = "") -> str:
    at = f' id="{place}"' if place else ""
    return f"<tr{at}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _service(overview: Overview, service: str) -> str:
    own = [part for part in overview.parts.values() if part.service == service]
    out = [
        f'<section id="{anchor("service", service)}"><h2>{_chip(overview, service)}{escape(service)}</h2>',
        _sources(overview, [part for part in own if part.kind == "source"]),
        _handlers(overview, service, [part for part in own if part.kind == "handler"]),
        _topics(overview, [part for part in own if part.kind == "topic"], "Topics of its own broker"),
        _targets(overview, [part for part in own if part.kind in ("target", "gateway")]),
    ]
    return "\n".join(out) + "</section>"


def _sent(overview: Overview, part: Part) -> str:
    """The types that leave a part, with what is not sure."""
    types: dict[str, bool] = {}
    for link in overview.links:
        if link.start == part.id:
            types |= {type: link.sure or types.get(type, False) for type in link.types}
    return "<br>".join(
        _types(overview, [type]) + ("" if sure else " <small>(read from the code)</small>")
        for type, sure in types.items()
    )


def _came(overview: Overview, part: Part) -> str:
    return _types(
        overview, dict.fromkeys(type for link in overview.links if link.end == part.id for type in link.types)
    )


def _sources(overview: Overview, parts: list[Part]) -> str:
    if not parts:
        return ""
    rows = []
    for part in parts:
        facts = dict(part.facts)
        does = facts.pop("does", "")
        more = [f"{escape(name)}: {escape(value)}" for name, value in facts.items()]
        sent = _sent(overview, part) or _starts(overview, part)
        rows.append(_row([escape(part.name), escape(part.note), "<br>".join([escape(does)] * bool(does) + more), sent],
                         part_anchor(part)))  # fmt: skip
    return "<h3>Sources</h3>" + _table(("name", "kind", "what it does", "sends"), rows)


def _starts(overview: Overview, part: Part) -> str:
    """The handlers that a timer runs."""
    ends = [overview.parts[link.end] for link in overview.links if link.start == part.id and not link.types]
    return "<br>".join("runs " + _link(part_anchor(end), end.name) for end in ends)


def _handlers(overview: Overview, service: str, parts: list[Part]) -> str:
    runs: dict[str, list[Operation]] = {part.id: [] for part in parts}
    others: dict[str, list[Operation]] = {}
    for operation in overview.operations:
        if operation.service == service and operation.action == "receive":
            id = next((part.id for part in parts if _is(part, operation)), None)
            if id is not None:
                runs[id].append(operation)
            else:
                others.setdefault(operation.id.removesuffix(f".{operation.topic}"), []).append(operation)
    rows = [_handler(overview, part, runs[part.id]) for part in parts]
    rows += [_handler(overview, None, some) for some in others.values()]
    if not rows:
        return ""
    return "<h3>Handlers</h3>" + _table(("name", "handles", "sends", "group", "when it fails", "dead letters"), rows)


def _is(part: Part, operation: Operation) -> bool:
    name = f"{part.note}.{part.name}"
    return operation.id in (name, f"{name}.{operation.topic}") and operation.facts.get("group") == part.note


def _handler(overview: Overview, part: Part | None, operations: list[Operation]) -> str:
    """A row; without a part it is one that delivers."""
    facts = operations[0].facts if operations else {}
    told = dict(part.facts) if part is not None else {}
    does = operations[0].summary if operations else told.get("does", "")
    group = str(facts.get("group") or told.get("group", ""))
    takes = _types(overview, (type for one in operations for type in one.types))
    every = [f"all of {escape(one.topic)}" for one in operations if not one.types]
    if part is not None:
        name, sent = part.name, _sent(overview, part)
    else:
        name = operations[0].id.removeprefix(f"{group}.").removesuffix(f".{operations[0].topic}")
        sent = "delivers them " + _delivers(overview, operations[0])
    runs = [order(facts), *limits(facts)] if facts else _told(told)
    cells = [
        _two(name, does),
        "<br>".join([takes] * bool(takes) + every) if operations else "when it is due",
        sent,
        _two(group, "; ".join(runs), strong=False),
        escape(retry(facts.get("retry")) if facts else told.get("retry", "")),
        escape(dead(facts.get("deadLetter")) if facts else told.get("dead letters", "")),
    ]
    return _row(cells, part_anchor(part) if part is not None else "")


def _two(name: str, more: str, *, strong: bool = True) -> str:
    """A name, and in small what there is to say of it."""
    first = f"<strong>{escape(name)}</strong>" if strong else escape(name)
    return first + (f"<br><small>{escape(more)}</small>" if more else "")


def _delivers(overview: Overview, operation: Operation) -> str:
    """Where to, if no other one delivers from that topic too."""
    ends: dict[str, Part] = {}
    for link in overview.links:
        start, end = overview.parts[link.start], overview.parts[link.end]
        near = start.kind == "topic" and start.name == operation.topic and start.service in ("", operation.service)
        if near and end.kind in ("target", "gateway") and set(operation.types) <= set(link.types):
            ends[end.id] = end
    return "".join(f"to {_link(part_anchor(end), end.name)}" for end in ends.values()) if len(ends) == 1 else ""


def order(facts: Mapping[str, Any]) -> str:
    """How a group's events follow each other."""
    words = ["in order by key" if facts.get("order") == "key" else "in no order"]
    if facts.get("start") == "latest":
        words.append("begins at the newest")
    if facts.get("broadcast"):
        words.append("every process gets each event")
    if facts.get("single"):
        words.append("one process at a time")
    return ", ".join(words)


def retry(facts: Any) -> str:
    """When a failed handler runs again."""
    attempts = _get(facts, "attempts")
    if attempts == 1:
        return "none"
    words = "without end" if attempts is None else f"{attempts} attempts"
    first, factor, longest = (_get(facts, name) for name in ("first", "factor", "longest"))
    if first is not None and longest is not None:
        words += f", {_time(first)} apart"
        if factor is not None and factor != 1 and first < longest:
            words += f" at first, then {factor:g} times as long up to {_time(longest)}"
    for name, text in (("never", "never after"), ("only", "only after")):
        if errors := _get(facts, name):
            words += f", {text} {', '.join(map(str, errors))}"
    return words


def _time(value: Any) -> str:
    """As ``short_time``, with whole seconds and minutes as such."""
    value = float(value)
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if value >= unit and value % unit == 0:
            return f"{value / unit:g} {name}"
    return short_time(value)


def dead(facts: Any) -> str:
    """Where events go that are given up, and what becomes of their key."""
    topic = str(_get(facts, "topic") or "")
    return f"{topic}, and the key waits" if _get(facts, "then") == "park" else topic


def limits(facts: Mapping[str, Any]) -> list[str]:
    """What bounds a handler."""
    words = []
    if "concurrency" in facts:
        many = facts["concurrency"]
        words.append("as many at once as pay" if many == "auto" else f"{many} at once")
    for name, text in (("rate", ""), ("keyRate", " for each key")):
        if name in facts:
            words.append(f"{_rate(facts[name])}{text}")
    if "timeout" in facts:
        words.append(f"at most {_time(facts['timeout'])} each")
    if "batch" in facts:
        words.append(f"batches of up to {facts['batch']}")
    if facts.get("filtered"):
        words.append("only events that pass its filter")
    return words


def _rate(value: Any) -> str:
    value = float(value)
    for seconds, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if value * seconds >= 1 and abs(value * seconds - round(value * seconds)) < 1e-6:
            return f"{round(value * seconds):,}/{unit}"
    return per_second(value)


def _told(facts: Mapping[str, str]) -> list[str]:
    """The same of a part, where no operation says more."""
    kept = ("does", "group", "order", "retry", "dead letters")
    first = ["in order by key" if facts.get("order") == "key" else "in no order"]
    return first + [f"{name} {value}" for name, value in facts.items() if name not in kept]


# ---- what is nobody's -----------------------------------------------------------------------------------------------


def _others(overview: Overview) -> Iterator[str]:
    parts = [part for part in overview.parts.values() if part.service not in overview.services]
    yield _topics(overview, [part for part in parts if part.kind == "topic"], "Topics", 2)
    yield _targets(overview, [part for part in parts if part.kind in ("target", "gateway")], 2)
    rest = [part for part in parts if part.kind in ("source", "handler")]
    if rest:
        yield "<h2>Others</h2>" + _table(
            ("name", "kind"), [_row([escape(part.name), part.kind], part_anchor(part)) for part in rest]
        )


def _topics(overview: Overview, parts: list[Part], title: str, level: int = 3) -> str:
    if not parts:
        return ""
    names = list(dict.fromkeys(name for part in parts for name, _ in part.facts))
    rows = []
    for part in parts:
        facts = dict(part.facts)
        types = [type for link in overview.links if part.id in (link.start, link.end) for type in link.types]
        rows.append(_row([escape(part.name), *(escape(facts.get(name, "")) for name in names),
                          _types(overview, sorted(set(types)))], part_anchor(part)))  # fmt: skip
    return f"<h{level}>{title}</h{level}>" + _table(("name", *names, "events"), rows)


def _targets(overview: Overview, parts: list[Part], level: int = 3) -> str:
    if not parts:
        return ""
    rows = []
    for part in parts:
        told = [part.note] * bool(part.note) + [f"{name}: {value}" for name, value in part.facts]
        rows.append(_row([escape(part.name), "<br>".join(map(escape, told)), _came(overview, part),
                          _sent(overview, part)], part_anchor(part)))  # fmt: skip
    return f"<h{level}>Where events go</h{level}>" + _table(("name", "what", "gets", "hands on"), rows)


# ---- events ---------------------------------------------------------------------------------------------------------


def _event(overview: Overview, type: str, spec: EventSpec, document: dict[str, Any]) -> str:
    message = _message(document, type)
    schema = _schema(spec, message, document)
    texts = (_get(message, "description"), description(schema), _get(message, "summary"))
    told = next((text for text in texts if isinstance(text, str) and text), "")
    ends = {end for link in overview.links if type in link.types for end in (link.start, link.end)}
    topics = [part for part in overview.parts.values() if part.kind == "topic" and part.id in ends]
    whose = ", ".join(
        _link(part_anchor(part), part.name) + (f" <small>of {escape(part.service)}</small>" if part.service else "")
        for part in topics
    )
    senders = ", ".join(_link(anchor("service", name), name) for name in overview.owners.get(type, ()))
    key = spec.key
    rows = [
        ("version", str(spec.version)),
        ("topic", whose or escape(spec.topic.name)),
        ("key", escape(key if isinstance(key, str) else getattr(key, "__name__", "computed") if key else "none")),
        ("sent by", senders or "none of these services"),
        ("handled by", _takers(overview, type) or "none of these services"),
    ]
    facts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    left = [f"<p>{escape(told)}</p>"] * bool(told) + [f"<dl>{facts}</dl>"]
    lines = [
        _row([f"<code>{escape(one.name)}</code>", escape(one.type), escape(one.need), escape(one.about)])
        for one in fields(schema)
    ]
    if lines:
        left.append(_table(("field", "type", "", "description"), lines))
    examples = _get(message, "examples")
    right = ""
    for example in examples[:1] if isinstance(examples, list) else ():
        text = json.dumps(_get(example, "payload"), indent=2, ensure_ascii=False, default=str)
        right = f"<pre><code>{escape(text)}</code></pre>"
    head = f'<section id="{anchor("event", type)}"><h3>{escape(type)}</h3>'
    return f'{head}<div class="pair"><div>{"".join(left)}</div>{right}</div></section>'


def _takers(overview: Overview, type: str) -> str:
    """The parts to which the type goes from a topic."""
    found: dict[str, Part] = {}
    for link in overview.links:
        end = overview.parts[link.end]
        if type in link.types and end.kind != "topic":
            found[end.id] = end
    return ", ".join(
        _link(part_anchor(part), part.name) + (f" <small>of {escape(part.service)}</small>" if part.service else "")
        for part in found.values()
    )


def _message(document: dict[str, Any], type: str) -> Any:
    """The document's message of an event: a component's name has fewer signs than a type."""
    messages = _get(document, "components", "messages")
    if not isinstance(messages, Mapping):
        return None
    named = (message for message in messages.values() if _get(message, "name") == type)
    return messages[type] if type in messages else next(named, None)


def _schema(spec: EventSpec, message: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Of the event class; of the document where the class gives none."""
    try:
        return spec.schema()
    except Exception:  # a type that has no JSON Schema may raise anything
        payload = _get(message, "payload")
        for one in _get(payload, "allOf") or ():  # the data in an envelope
            payload = _get(one, "properties", "data") or payload
        return {**payload, "$defs": _get(document, "components", "schemas") or {}} if isinstance(payload, dict) else {}
