"""What tests take from npm, kept with the other downloads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from servers import CACHE, Missing, locked

PAYLOADS = "@octokit/webhooks-examples@7.6.1"
"""A payload or more of each event of GitHub, as it sends them."""
ASYNCAPI = "@asyncapi/specs@6.11.1"
"""The JSON Schemas of AsyncAPI documents."""
PLAYWRIGHT = "playwright-core@1.64.1"
"""Drives a browser that is there already."""


def package(spec: str) -> Path:
    """The folder of a package, such as ``name@1.2.3``; installed when it is first asked for. Raises Missing."""
    name, _, version = spec.rpartition("@")
    root = CACHE / "npm" / f"{name.replace('/', '+')}-{version}"
    with locked("npm"):
        if not (root / "done").exists():
            program = shutil.which("npm")
            if program is None:
                raise Missing("npm is not installed; it comes with Node.js")
            root.mkdir(parents=True, exist_ok=True)
            command = [program, "install", "--prefix", str(root), "--no-audit", "--no-fund", "--ignore-scripts", spec]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Missing(f"npm install {spec} failed: {done.stderr[-500:]}")
            (root / "done").touch()
    return root / "node_modules" / name
