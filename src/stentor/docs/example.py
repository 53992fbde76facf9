"""An example of an event, made of its schema, and shown only if the event's class reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from stentor.docs.fields import follow
from stentor.event import EventSpec

DEPTH = 6
"""How deep structures may lie in each other; what lies deeper is left out where it may be."""
TRIES = 40
_TEXTS = {
    "date-time": "2026-01-31T12:30:00Z",
    "date": "2026-01-31",
    "time": "12:30:00Z",
    "uuid": "0190f3a4-7c1e-7a2b-9d54-3f6a1b2c4d5e",
    "duration": "PT90S",
    "decimal": "12.50",
    "byte": "c3RlbnRvcg==",
    "email": "ada@shop.example",
    "uri": "https://shop.example/",
    "ipv4": "192.0.2.1",
}
"""Texts that say what is meant, by the format of JSON Schema."""
_PATH = re.compile(r"at `\$([^`]*)`")


def example(spec: EventSpec, schema: dict[str, Any], named: dict[str, Any]) -> Any:
    """Data that the event's class reads, or None where none was found; ``named`` has the schemas behind references."""
    given = follow(schema, named).get("examples")
    if given and _reads(spec, given[0]) is None:
        return given[0]
    instead: dict[str, Iterator[str]] = {}
    found: dict[str, str] = {}
    for _ in range(TRIES):
        data = _sample(schema, named, "", found, DEPTH)
        path = _reads(spec, data)
        if path is None:
            return data
        # What a class wants of a text its schema does not always say.
        text = next(instead.setdefault(path, iter(_TEXTS.values())), None)
        if text is None:
            return None
        found[path] = text
    return None


def _reads(spec: EventSpec, data: Any) -> str | None:
    """None if the class reads it, else the path of what it does not."""
    try:
        spec.decode(msgspec.json.encode(data))
    except Exception as error:  # whatever a class of the user's raises
        match = _PATH.search(str(error))
        return match[1] if match else ""
    return None


def _sample(schema: Any, named: dict[str, Any], path: str, texts: dict[str, str], depth: int) -> Any:
    if not isinstance(schema, dict):
        return None
    schema = follow(schema, named)
    for word in ("const", "default"):
        if schema.get(word) is not None:
            return schema[word]
    for word in ("examples", "enum"):
        if schema.get(word):
            return schema[word][0]
    for word in ("anyOf", "oneOf", "allOf"):
        if schema.get(word):
            choices = [one for one in schema[word] if one.get("type") != "null"] or schema[word]
            return _sample(choices[0], named, path, texts, depth)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    match kind:
        case "object":
            return _object(schema, named, path, texts, depth)
        case "array":
            return _array(schema, named, path, texts, depth)
        case "integer" | "number":
            return _number(schema, whole=kind == "integer")
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return texts.get(path) or _TEXTS.get(schema.get("format", "")) or _word(path, schema)


def _word(path: str, schema: dict[str, Any]) -> str:
    name = path.rpartition(".")[2].removesuffix("[...]") or "text"
    least, most = int(schema.get("minLength", 0)), int(schema.get("maxLength", 1000))
    return (name + "-" * (least - len(name)))[:most]


def _number(schema: dict[str, Any], *, whole: bool) -> int | float:
    step = schema.get("multipleOf", 1)
    least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + step)
    most = schema.get("maximum", schema.get("exclusiveMaximum", least + 1) - (0 if "maximum" in schema else step))
    value = min(max(least, step), max(most, least))
    return int(value) if whole else float(value)


def _object(schema: dict[str, Any], named: dict[str, Any], path: str, texts: dict[str, str], depth: int) -> Any:
    required = schema.get("required", ())
    fields = {
        name: _sample(field, named, f"{path}.{name}", texts, depth - 1)
        for name, field in schema.get("properties", {}).items()
        if depth or name in required
    }
    more = schema.get("additionalProperties")
    if not fields and isinstance(more, dict) and depth:
        return {"name": _sample(more, named, f"{path}[...]", texts, depth - 1)}
    return fields


def _array(schema: dict[str, Any], named: dict[str, Any], path: str, texts: dict[str, str], depth: int) -> Any:
    items = schema.get("prefixItems") or schema.get("items")
    if isinstance(items, list):
        return [_sample(item, named, f"{path}[{place}]", texts, depth - 1) for place, item in enumerate(items)]
    if not isinstance(items, dict) or (not depth and not schema.get("minItems")):
        return []
    count = max(1, schema.get("minItems", 0))
    return [_sample(items, named, f"{path}[...]", texts, depth - 1)] * count
