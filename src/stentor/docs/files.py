"""The files that ``stentor docs`` writes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stentor.errors import ConfigError


def write(folder: Path, files: dict[str, str]) -> None:
    """Write texts by name. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None


def read(path: Path) -> dict[str, Any]:
    """A document of ours. Raises ConfigError."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    try:
        messages = found["components"]["messages"].values()
        if not all("x-stentor" in message for message in messages) or "channels" not in found:
            raise KeyError
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is no document that `stentor docs` wrote") from None
    return dict(found)
