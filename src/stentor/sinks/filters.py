"""Filters of CloudEvents subscriptions: exact, prefix, suffix, all, any, not, and sql.

Source: section 3.2.4 of the Subscriptions API, https://github.com/cloudevents/spec (0.1-wip).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stentor.cesql import parse
from stentor.message import Attribute

Filter = Callable[[Mapping[str, Attribute]], bool]
DEPTH = 16
"""How deep filters may be nested."""
DIALECTS = ("exact", "prefix", "suffix", "all", "any", "not", "sql")


def compile_filters(filters: Any, depth: int = 0) -> Filter:
    """One filter that is true when all are. Raises ValueError naming what is wrong."""
    if not isinstance(filters, list):
        raise ValueError("filters must be an array of filters")  # noqa: TRY004  all that a client can send wrong
    if depth > DEPTH:
        raise ValueError(f"filters are nested deeper than {DEPTH}")
    parts = [_one(item, depth) for item in filters]
    return lambda attributes: all(part(attributes) for part in parts)


def _one(item: Any, depth: int) -> Filter:
    if not isinstance(item, dict) or len(item) != 1:
        raise ValueError(f"a filter is an object with one member, its dialect: one of {', '.join(DIALECTS)}")
    [(dialect, value)] = item.items()
    if dialect in ("exact", "prefix", "suffix"):
        return _texts(dialect, value)
    if dialect == "sql":
        return _sql(value)
    if dialect == "not":
        inner = compile_filters([value], depth + 1)
        return lambda attributes: not inner(attributes)
    if dialect not in ("all", "any"):
        raise ValueError(f"{str(dialect)[:50]!r} is no dialect; there are {', '.join(DIALECTS)}")
    if not isinstance(value, list) or not value:
        raise ValueError(f"{dialect!r} takes an array of at least one filter")
    if dialect == "all":
        return compile_filters(value, depth + 1)
    choices = [compile_filters([choice], depth + 1) for choice in value]
    return lambda attributes: any(choice(attributes) for choice in choices)


def _texts(dialect: str, value: Any) -> Filter:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{dialect!r} takes an object of attributes and their values")
    if not all(name and isinstance(text, str) and text for name, text in value.items()):
        raise ValueError(f"{dialect!r}: names and values are texts that are not empty")
    matches: dict[str, Callable[[str, str], bool]] = {
        "exact": str.__eq__, "prefix": str.startswith, "suffix": str.endswith,
    }  # fmt: skip
    match = matches[dialect]
    return lambda attributes: all(
        name in attributes and match(_text(attributes[name]), text) for name, text in value.items()
    )


def _text(value: Attribute) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sql(value: Any) -> Filter:
    if not isinstance(value, str):
        raise ValueError("'sql' takes a text")  # noqa: TRY004
    missing = parse(value).missing_functions
    if missing:
        raise ValueError(f"'sql': there is no function {', '.join(missing)}")
    return parse(f"BOOL({value})").matches
