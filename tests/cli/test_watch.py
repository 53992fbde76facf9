"""What changes while a command is at work on it is seen."""

import asyncio
import os
from pathlib import Path

import pytest

from stentor.cli import watch


async def test_a_change_between_the_call_and_the_first_look_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command takes some time between its start and the loop over changes."""
    monkeypatch.setattr(watch, "INTERVAL", 0.01)
    config = tmp_path / "gateway.toml"
    config.write_text("a = 1\n")
    os.utime(config, (0, 0))  # a file system tells times apart by some milliseconds
    changes = watch.changed_files(str(tmp_path), [config])
    config.write_text("a = 1\nb = 2\n")
    (tmp_path / "new.py").touch()
    async with asyncio.timeout(60):
        assert await anext(changes) == {str(config), str(tmp_path / "new.py")}
