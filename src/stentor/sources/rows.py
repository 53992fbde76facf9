"""From rows of any source to events: what ``to=`` takes, and the formats of files."""

from __future__ import annotations

import base64
import codecs
import csv
import io
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, Literal

import msgspec

from stentor.errors import DefinitionError, InvalidEvent
from stentor.event import EventLike, spec_of
from stentor.source import Row

To = type[Any] | Callable[[Any], Any]
"""An event class, into which a row is decoded, or a function that makes an event, several, or None of a row."""
Format = Literal["file", "lines", "jsonl", "csv"]


class Reader:
    """Makes events of rows by ``to``; ``lax`` reads numbers and truths from text, as CSV has nothing else.

    Raises:
        DefinitionError: ``to`` is neither an event class nor a function.
    """

    def __init__(self, to: To, what: str, format: Format | None = None) -> None:
        if format not in (None, "file", "lines", "jsonl", "csv"):
            raise DefinitionError(f'{what}: format must be "file", "lines", "jsonl" or "csv", not {format!r}')
        self._make = _maker(to, what, strict=format != "csv")
        self._format = format

    def __call__(self, row: Row) -> list[EventLike]:
        """The events of a row. Raises InvalidEvent, or what the function raises."""
        try:
            made = self._make(self._value(row.value))
        except (msgspec.ValidationError, msgspec.DecodeError, ValueError) as error:
            raise InvalidEvent(str(error)) from error
        if made is None:
            return []
        return list(made) if isinstance(made, (list, tuple)) else [made]

    def _value(self, value: Any) -> Any:
        if self._format in ("lines", "jsonl") and not isinstance(value, str):
            raise ValueError("is not UTF-8")
        if self._format == "csv" and not isinstance(value, dict):
            raise ValueError(value)
        return msgspec.json.decode(value) if self._format == "jsonl" else value


def _maker(to: To, what: str, *, strict: bool) -> Callable[[Any], Any]:
    spec = spec_of(to)
    if spec is not None:
        if hasattr(spec.cls, "model_validate"):
            return spec.convert  # pydantic decides itself
        cls = spec.cls
        return lambda value: msgspec.convert({"text": value} if isinstance(value, str) else value, cls, strict=strict)
    if isinstance(to, type) or not callable(to):
        raise DefinitionError(f"{what}: to must be an event class or a function that takes a row, not {to!r}")
    return to


def text_of(data: bytes) -> str | dict[str, str]:
    """Bytes as JSON holds them: the text, or as Base64 what is no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def rows_of(stream: IO[bytes], format: Format, id: str, where: str) -> Iterator[Row]:
    """The rows of a whole file in order; ``id`` is the file's."""
    if format == "csv":
        values: Iterator[tuple[int, Any]] = _records(stream)
    else:
        lines = (line.rstrip(b"\r\n") for line in stream)
        values = ((number, text_of(line.removeprefix(codecs.BOM_UTF8))) for number, line in enumerate(lines, 1) if line)
    for number, value in values:
        yield Row(f"{id}\0{number}", f"{where}:{number}", value)


def _records(stream: IO[bytes]) -> Iterator[tuple[int, Mapping[str, str] | str]]:
    """Line number and fields by name; a text is what is wrong with the record."""
    with io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            names = next(reader, [])
            for fields in reader:
                if len(fields) == len(names):
                    yield reader.line_num, dict(zip(names, fields, strict=True))
                elif fields:
                    yield reader.line_num, f"{len(fields)} fields under {len(names)} names: {','.join(fields)[:1000]}"
        except (csv.Error, UnicodeDecodeError) as error:
            yield reader.line_num + 1, f"the file cannot be read from here on: {error}"
