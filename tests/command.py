"""The command line as people run it, in a process of its own, beside an app that a test runs."""

import asyncio
import os
import subprocess
import sys


async def stentor(*args: str, broker: str) -> str:
    """What a command says that is to succeed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STENTOR")}
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "stentor", *args, "--broker", broker],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False, env=kept,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


async def dead(group: str, count: int, *, broker: str, status: str = "open") -> None:
    """Back when a group has so many dead letters of a status."""
    command = ["dead", "list", "--group", group, "--status", status, "--json"]
    async with asyncio.timeout(60):
        while len((await stentor(*command, broker=broker)).splitlines()) != count:
            await asyncio.sleep(0.05)


async def redrive(group: str, count: int, *, broker: str) -> None:
    """Run a group's dead letters, which are so many, again; back when that is asked for."""
    said = await stentor("dead", "redrive", "--group", group, "--yes", broker=broker)
    assert said == f"{count} dead letter{'s' * (count > 1)} of {group} run again now\n"
