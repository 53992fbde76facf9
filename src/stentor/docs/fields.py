"""JSON Schemas: what references stand for, and the fields of an event, as a table has them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

_BOUNDS = (
    ("minimum", "≥ "), ("exclusiveMinimum", "> "), ("maximum", "≤ "), ("exclusiveMaximum", "< "),
    ("multipleOf", "multiple of "), ("minLength", "length ≥ "), ("maxLength", "length ≤ "),
    ("minItems", "items ≥ "), ("maxItems", "items ≤ "), ("pattern", "pattern "),
)  # fmt: skip
DEEP = 3
"""How many objects inside each other are unfolded."""


class Field(Struct, frozen=True):
    """A field by its dotted name; ``need`` is "required" or its default."""

    name: str
    type: str
    need: str
    about: str


def fields(schema: Mapping[str, Any]) -> list[Field]:
    """The fields of an object, and those of the objects in it."""
    defs = schema.get("$defs")
    return list(_fields(schema, defs if isinstance(defs, Mapping) else {}, "", DEEP))


def description(schema: Mapping[str, Any]) -> str:
    """What the schema says of the whole event."""
    defs = schema.get("$defs")
    return str(follow(schema, defs if isinstance(defs, Mapping) else {}).get("description") or "")


def _fields(schema: Mapping[str, Any], defs: Mapping[str, Any], before: str, deep: int) -> Iterator[Field]:
    schema = follow(schema, defs)
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return
    required = schema.get("required") or ()
    for name, value in properties.items():
        one = value if isinstance(value, Mapping) else {}
        solved = follow(one, defs)
        need = "required" if name in required else ""
        if "default" in one:
            need = f"default {json.dumps(one['default'], ensure_ascii=False, default=str)}"
        about = str(one.get("description") or solved.get("description") or "")
        bounds = ", ".join(f"{word}{solved[key]}" for key, word in _BOUNDS if key in solved)
        yield Field(before + str(name), _type(one, defs), need or "optional",
                    ". ".join(text for text in (about.rstrip("."), bounds) if text))  # fmt: skip
        if deep > 1:
            many = solved.get("items")
            inner = follow(many, defs) if isinstance(many, Mapping) else solved
            yield from _fields(inner, defs, f"{before}{name}{'[]' if inner is not solved else ''}.", deep - 1)


def follow(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference, or references of references, stand for."""
    for _ in range(8):
        if "$ref" not in schema:
            break
        found = defs.get(str(schema["$ref"]).rpartition("/")[2])
        if not isinstance(found, Mapping):
            break
        schema = found
    return schema


def _type(schema: Mapping[str, Any], defs: Mapping[str, Any], deep: int = 4) -> str:
    """In a few words: ``string``, ``array of integer``, ``"red" or "green"``."""
    name = str(schema["$ref"]).rpartition("/")[2] if "$ref" in schema else ""
    schema = follow(schema, defs)
    if "enum" in schema and isinstance(schema["enum"], list):
        return " or ".join(json.dumps(value, ensure_ascii=False, default=str) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False, default=str)
    for word in ("anyOf", "oneOf", "allOf"):
        several = schema.get(word)
        if isinstance(several, list) and deep:
            return (" and " if word == "allOf" else " or ").join(
                dict.fromkeys(_type(one, defs, deep - 1) for one in several if isinstance(one, Mapping))
            )
    kind = schema.get("type")
    if isinstance(kind, list):
        return " or ".join(map(str, kind))
    if kind == "array":
        items = schema.get("items")
        return f"array of {_type(items, defs, deep - 1)}" if isinstance(items, Mapping) and deep else "array"
    if kind == "object":
        values = schema.get("additionalProperties")
        if "properties" not in schema and isinstance(values, Mapping) and deep:
            return f"object of {_type(values, defs, deep - 1)}"
        return name or "object"
    about = schema.get("format") or schema.get("contentEncoding")
    return f"{kind or name or 'any'}{f' ({about})' if about else ''}"
