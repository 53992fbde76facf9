"""What changed between two AsyncAPI documents of ours, and what of it breaks somebody.

A change breaks when an app of before cannot read what one of now publishes, or an app of now cannot read what is
stored: Stentor keeps events, so both are read side by side. A type whose version was raised, with an ``upcast`` from
each version between, says itself how its data are read: their changes are told, and break nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from stentor.docs.fields import follow

Object = dict[str, Any]
_LIMITS = (
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern",
    "minItems", "maxItems", "uniqueItems",
)  # fmt: skip


class Change(Struct, frozen=True):
    """One change of one event type."""

    type: str
    text: str
    breaking: bool

    def __str__(self) -> str:
        return f"{self.type}: {self.text}"


def changes(old: Object, new: Object) -> list[Change]:
    """All changes of events from one document to another, those that break first."""
    before, after = _messages(old), _messages(new)
    read_as = {name: type for type, message in after.items() for name in _also(message)}
    found: list[Change] = []
    for type, message in before.items():
        name = type if type in after else read_as.get(type)
        if name is None:
            found.append(Change(type, "is gone: nobody here publishes or handles it any more", breaking=True))
            continue
        if name != type:
            found.append(Change(type, f"is called {name} now, which reads it", breaking=False))
        found += _message(type, _Side(old, message), _Side(new, after[name]))
    new_types = [type for type in after if type not in before and not before.keys() & _also(after[type])]
    found += [Change(type, "is new", breaking=False) for type in new_types]
    return sorted(found, key=lambda change: not change.breaking)


def _messages(document: Object) -> dict[str, Object]:
    return {one["name"]: one for one in document["components"]["messages"].values()}


def _also(message: Object) -> set[str]:
    return set(message["x-stentor"].get("also", ()))


class _Side:
    """A message in its document."""

    def __init__(self, document: Object, message: Object) -> None:
        self.schemas: Object = document["components"].get("schemas", {})
        self.told: Object = message["x-stentor"]
        payload = message["payload"]
        self.enveloped = "allOf" in payload
        self.data: Object = payload["allOf"][1]["properties"]["data"] if self.enveloped else payload
        key = next(key for key, one in document["components"]["messages"].items() if one["name"] == message["name"])
        self.topics = [channel["address"] for channel in document["channels"].values() if key in channel["messages"]]

    def follow(self, schema: Any) -> Mapping[str, Any]:
        return follow(schema, self.schemas) if isinstance(schema, dict) else {}


def _message(type: str, old: _Side, new: _Side) -> Iterator[Change]:
    if old.told.get("key") != new.told.get("key"):
        yield Change(type, f"its key was {_told(old.told.get('key'))}, is {_told(new.told.get('key'))}: events that "
                     "were handled in order may be handled side by side", breaking=True)  # fmt: skip
    if old.topics != new.topics:
        yield Change(type, f"its topic was {', '.join(old.topics)}, is {', '.join(new.topics)}: what is stored stays "
                     "in the old one", breaking=True)  # fmt: skip
    if old.enveloped != new.enveloped:
        words = {True: "a CloudEvent", False: "plain JSON"}
        yield Change(type, f"it was {words[old.enveloped]}, is {words[new.enveloped]}", breaking=True)
    was, now = old.told.get("version", 1), new.told.get("version", 1)
    if now < was:
        yield Change(type, f"its version was {was}, is {now}: a version only rises", breaking=True)
    elif now > was:
        yield Change(type, f"its version was {was}, is {now}", breaking=False)
    upcast = now > was and set(range(was, now)) <= set(new.told.get("upcasts", ()))
    for text, breaking in _schema("", old.data, new.data, old, new, set()):
        yield Change(type, text, breaking and not upcast)


def _schema(
    path: str, old: Any, new: Any, before: _Side, after: _Side, seen: set[tuple[int, int]]
) -> Iterator[tuple[str, bool]]:
    """The changes of a value, each with whether it breaks."""
    where = f"field {path}" if path else "the data"
    was, now = _text(before, old), _text(after, new)
    if was != now:
        yield f"{where} was {was}, is {now}", True
        return
    old, new = _inner(before, old), _inner(after, new)
    if (pair := (id(old), id(new))) in seen:
        return
    seen = seen | {pair}
    if "enum" in old and "enum" in new and old["enum"] != new["enum"]:
        values = ", ".join(map(str, sorted({str(one) for one in old["enum"]} ^ {str(one) for one in new["enum"]})))
        if values:
            yield f"{where} has other values than before: {values}", True
    for word in _LIMITS:
        if old.get(word) != new.get(word):
            yield f"{where}: {word} was {_told(old.get(word))}, is {_told(new.get(word))}", True
    if "properties" in old or "properties" in new:
        yield from _fields(path, old, new, before, after, seen)
    for word, suffix in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(old.get(word), dict) and isinstance(new.get(word), dict):
            yield from _schema(path + suffix, old[word], new[word], before, after, seen)


def _fields(
    path: str, old: Mapping[str, Any], new: Mapping[str, Any], before: _Side, after: _Side, seen: set[tuple[int, int]]
) -> Iterator[tuple[str, bool]]:
    was, now = old.get("properties", {}), new.get("properties", {})
    for name, schema in was.items():
        field = f"{path}.{name}" if path else name
        if name not in now:
            yield f"field {field} is gone", True
            continue
        yield from _schema(field, schema, now[name], before, after, seen)
        needed, needs = name in old.get("required", ()), name in new.get("required", ())
        if needs and not needed:
            yield f"field {field} is required: what is stored may lack it", True
        elif needed and not needs:
            yield f"field {field} may be missing: those who read it rely on it", True
    for name in now:
        if name not in was:
            field = f"{path}.{name}" if path else name
            needs = name in new.get("required", ())
            yield f"field {field} is new{' and required: what is stored lacks it' if needs else ''}", needs


def _inner(side: _Side, schema: Any) -> Mapping[str, Any]:
    """What can be looked into: the one alternative beside null, or the schema itself."""
    schema = side.follow(schema)
    choices = [one for one in schema.get("anyOf", ()) if side.follow(one).get("type") != "null"]
    return _inner(side, choices[0]) if len(choices) == 1 else schema


def _text(side: _Side, schema: Any) -> str:
    """The type of a value in words; of objects only that they are."""
    schema = side.follow(schema)
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(sorted(_text(side, one) for one in (schema.get("anyOf") or schema["oneOf"])))
    if len(schema.get("allOf", ())) == 1:
        return _text(side, schema["allOf"][0])
    kind = schema.get("type")
    if kind is None and (values := schema.get("enum") or ([schema["const"]] if "const" in schema else [])):
        kind = sorted({_json_type(value) for value in values})
    if isinstance(kind, list):
        kind = " or ".join(sorted(kind))
    if kind == "array":
        items = schema.get("items")
        if isinstance(items, list):
            return f"array of ({', '.join(_text(side, one) for one in items)})"
        return f"array of {_text(side, items)}" if items else "array"
    if schema.get("format"):
        return f"{kind} ({schema['format']})"
    return str(kind or "anything")


def _json_type(value: Any) -> str:
    names: dict[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return names.get(type(value), "object")


def _told(value: Any) -> str:
    return "none" if value is None else str(value)
