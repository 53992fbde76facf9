"""A script that publishes without a loop of its own leaves quietly, also on a file."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

SCRIPT = """
from stentor import App, Event

class Ping(Event, topic="pings", key="n"):
    n: int

app = App("pinger", broker="sqlite:///ping.db")
print(app.publish_sync(Ping(n=1)).position)
"""


def test_publish_sync_on_a_file_ends_without_a_word(tmp_path: Path) -> None:
    """The connection that publish_sync opened closes at exit; the event is there."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    with closing(sqlite3.connect(tmp_path / "ping.db")) as db, db:
        assert db.execute("SELECT count(*) FROM stentor_event").fetchone() == (1,)
    db.close()
