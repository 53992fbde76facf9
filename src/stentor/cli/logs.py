"""What `stentor run` logs: short coloured lines on a terminal, plain ones elsewhere, or JSON Lines."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import click
import msgspec

from stentor.cli.exits import fold

_EXTRA = ("group", "event_id", "event_type", "event_key", "attempt")
"""What a handler's ``ctx.log`` adds to a record."""
_SHORT = {logging.WARNING: "WARN", logging.CRITICAL: "FATAL"}
_COLOURS = {logging.DEBUG: "bright_black", logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _Lines(logging.Formatter):
    """One line a record: time, level, the worker process where there are several, the text."""

    def __init__(self, worker: int | None, *, colour: bool) -> None:
        super().__init__()
        self._prefix = "" if worker is None else f"[{worker}] "
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        name = record.name.removeprefix("stentor.handler.")
        if not name.startswith("stentor"):  # what Stentor logs names its group already
            text = f"{name}: {text}"
        when = datetime.fromtimestamp(record.created).astimezone()
        if self._colour:
            if "\n" not in text:
                edge = len(f"00:00:00.000 {'':5} {self._prefix}")
                text = fold(text, edge, edge + 2)
            level = click.style(
                f"{_SHORT.get(record.levelno, record.levelname):5}", fg=_COLOURS.get(record.levelno, "green")
            )
            start = click.style(f"{when:%H:%M:%S}.{int(record.msecs):03}", dim=True)
            text = f"{start} {level} {self._prefix}{text}"
        else:
            text = f"{when:%Y-%m-%d %H:%M:%S}.{int(record.msecs):03}{when:%z} {record.levelname:7} {self._prefix}{text}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class _Json(logging.Formatter):
    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: getattr(record, name) for name in _EXTRA if hasattr(record, name)}
        if self._worker is not None:
            entry["worker"] = self._worker
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def set_up(level: str, *, as_json: bool, worker: int | None = None) -> None:
    """Log to standard error; an app that configures logging itself, beyond basicConfig, has the last word."""
    handler = logging.StreamHandler(sys.stderr)
    colour = sys.stderr.isatty() and click.get_current_context().color is not False
    handler.setFormatter(_Json(worker) if as_json else _Lines(worker, colour=colour))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))  # its start is told here
