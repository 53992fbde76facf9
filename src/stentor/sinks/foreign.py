"""Messages to brokers of others: the forms that their payload and CloudEvents take there."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from stentor.cloudevents import STRUCTURED, attributes, to_structured
from stentor.errors import DefinitionError
from stentor.message import Message

Mode = Literal["binary", "structured"]
"""How a CloudEvent travels: its attributes as headers, or all of it in the body."""


def payload_bytes(payload: Any) -> bytes:
    """Bytes or text as they are, anything else as JSON."""
    if isinstance(payload, str):
        return payload.encode()
    return payload if isinstance(payload, bytes) else msgspec.json.encode(payload)


def form(message: Message, mode: Mode, prefix: str) -> tuple[dict[str, str], bytes]:
    """Headers, with the content type among them, and body of a CloudEvent; ``prefix`` is the binding's."""
    if mode == "structured":
        return {"content-type": f"{STRUCTURED}; charset=UTF-8"}, to_structured(message)
    if mode != "binary":
        raise DefinitionError(f'mode must be "binary" or "structured", not {mode!r}')
    found = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in attributes(message).items()
    }
    content = found.pop("datacontenttype", None)
    headers = {prefix + name: value for name, value in found.items()}
    return headers | ({} if content is None else {"content-type": content}), message.data
