"""``python3 tasks.py servers up|down|list [NAME]...``: real servers for a laptop."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from servers import ROOT, SERVERS, Missing, hold, shared

DATA = ROOT / ".data" / "servers"
USAGE = f"""python3 tasks.py servers up NAME...     start servers and print their URLs; they run until `down`
python3 tasks.py servers down [NAME...]  stop them, all if none is named; their data stays in {DATA.relative_to(ROOT)}
python3 tasks.py servers list            what runs

NAME is one of {", ".join(SERVERS)}; NAME:secure runs it with TLS and a password"""


def running(folder: Path) -> dict[str, str | int] | None:
    """What a folder's state says, if its process is alive."""
    try:
        state: dict[str, str | int] = json.loads((folder / "state.json").read_text())
        os.kill(int(state["pid"]), 0)
    except (OSError, ValueError):
        return None
    return state


def up(wish: str) -> int:
    name, _, kind = wish.partition(":")
    if name not in SERVERS or kind not in ("", "secure"):
        print(f"no server is called {wish!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    folder = DATA / wish.replace(":", "-")
    if running(folder) is None:
        (folder / "state.json").unlink(missing_ok=True)
    try:
        print(f"{wish:16}{shared(name, folder, 0, secure=kind == 'secure')}", flush=True)
    except (Missing, RuntimeError) as error:
        print(f"{wish:16}{error}", file=sys.stderr)
        (folder / "state.json").unlink(missing_ok=True)
        return 1
    return 0


def down(folder: Path) -> None:
    state = running(folder)
    if state is None:
        return
    os.kill(int(state["pid"]), signal.SIGTERM)
    while running(folder) is not None:
        time.sleep(0.1)
    print(f"{folder.name:16}stopped", flush=True)


def main(args: list[str]) -> int:
    """Run a command; its exit code."""
    match args:
        case ["hold", name, place, parent, secure]:
            hold(name, Path(place), int(parent), secure == "1")
            return 0
        case ["up", _, *_]:
            return max(up(wish) for wish in args[1:])
        case ["down", *names]:
            for folder in [DATA / name.replace(":", "-") for name in names] or sorted(DATA.glob("*")):
                down(folder)
            return 0
        case ["list"]:
            for folder in sorted(DATA.glob("*")):
                if (state := running(folder)) is not None:
                    print(f"{folder.name:16}{state.get('url')}")
            return 0
        case _:
            pass
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
