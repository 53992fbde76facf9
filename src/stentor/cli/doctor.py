"""``stentor doctor``: what weakens durability, or stands in the way."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from stentor import __version__
from stentor.broker import Broker, Finding, Verdict
from stentor.cli.exits import FAILED, fold
from stentor.cli.load import load_app
from stentor.cli.options import broker_option, json_option
from stentor.cli.output import is_terminal, print_json, size
from stentor.cli.session import database, describe, survival
from stentor.connect import BrokerUrl, broker_url, connect
from stentor.errors import StentorError
from stentor.observe.text import span

LITTLE_SPACE = 1 << 30
NO_SPACE = 100 << 20
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "glusterfs", "ceph", "lustre", "afs"}
VOLATILE = {"tmpfs", "ramfs"}
STRONGER = {
    "memory": "fine for tests; else take sqlite:///stentor.db or a server",
    "sqlite": "drop the option synchronous=normal: publish then waits for the disk",
    "redis": "drop the option durable=process, on a server with appendfsync always",
    "rocketmq": "drop the option durable=process, on a server with flushDiskType=SYNC_FLUSH",
    "nats": "set sync_interval: always on the server and add durable=host, or replicas=3 in a cluster",
    "rabbitmq": "name all nodes of a cluster, so that copies are seen: a stream never waits for the disk of one node",
    "kafka": "drop the option flush=0, or add replicas=3 in a cluster",
}
"""How the same broker keeps more."""
MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


@click.command()
@click.argument("target", metavar="[MODULE:APP]", required=False)
@broker_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, target: str | None, url: str | None, as_json: bool) -> None:
    """Find what weakens durability, or stands in the way.

    Looks at versions, the broker and its settings, disk, file system and clock; with MODULE:APP at the app too. The
    exit code is 1 when something is broken, 0 when all is well or could merely be better.
    """
    findings = [_installed()]
    if target is not None:
        findings.append(_app(target))
    findings += asyncio.run(_broker(url))
    worst = 0
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        worst = FAILED if finding.verdict == "fail" else worst
        if as_json:
            print_json(finding)
            continue
        mark, colour = MARKS[finding.verdict]
        edge = width + 4
        found, advice = (
            (fold(text, edge, edge) if is_terminal() else text) for text in (finding.found, finding.advice)
        )
        click.echo(f"{click.style(mark, fg=colour, bold=True)} {finding.check.ljust(width)}  {found}")
        if advice:
            click.echo(click.style(f"{'':{edge}}{advice}", fg=colour))
    ctx.exit(worst)


def _installed() -> Finding:
    return Finding("stentor", "ok", f"{__version__}, Python {sys.version.split()[0]} ({sys.executable})")


def _sqlite_version(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    racy = (3, 7, 0) <= version <= (3, 51, 2) and version[:3] not in ((3, 44, 6), (3, 50, 7))
    if not racy:
        return Finding("sqlite", "ok", text)
    return Finding(
        "sqlite", "warn", f"{text}: its WAL-reset race (3.7.0 to 3.51.2) can lose a commit when two programs write",
        "Stentor's own writers are safe, they take turns by a lock; let no other program write to the same file",
    )  # fmt: skip


def _app(target: str) -> Finding:
    try:
        app = load_app(target)
        groups = app.groups()
    except StentorError as error:
        return Finding("app", "fail", str(error))
    return Finding("app", "ok", f"{app.name}: {', '.join(groups) or 'no groups'}")


async def _broker(url: str | None) -> list[Finding]:
    try:
        full = broker_url(url)
        broker = connect(full)
    except StentorError as error:
        return [Finding("broker", "fail", str(error))]
    findings = [*_name(full, broker), *_files(full)]
    path = database(full)
    if path is not None and not path.exists():
        findings += _durability(broker)
        findings.append(Finding("connection", "ok", f"there is no {path.name} yet; the first run makes it"))
        return findings
    began = time.monotonic()
    try:
        await broker.open()
    except StentorError as error:
        return [
            *findings,
            Finding("connection", "fail", str(error), "until this is mended, nothing is published or handled"),
        ]
    try:
        findings += _durability(broker)  # some learn it from the server
        trouble = await broker.health()
        if trouble is None:
            findings.append(Finding("connection", "ok", f"answers after {span(time.monotonic() - began)}"))
        else:
            findings.append(Finding("connection", "fail", trouble))
        findings += await broker.review()  # each by itself: what comes first stays said
        findings.append(await _clock(broker))
        findings += await _groups(broker)
    except StentorError as error:
        findings.append(Finding("connection", "fail", str(error)))
    finally:
        await broker.close()
    return findings


def _name(url: str, broker: Broker) -> Iterator[Finding]:
    yield Finding("broker", "ok", describe(url, broker).partition(" (")[0])
    namespace = BrokerUrl(url).namespace.rstrip(".")
    yield Finding("namespace", "ok", namespace or "none: topics and groups have their plain names")


def _durability(broker: Broker) -> Iterator[Finding]:
    features = broker.features
    if features.durable == "process":
        yield Finding("durability", "warn", f"process: {survival(features)}", STRONGER.get(features.name, ""))
    else:
        yield Finding("durability", "ok", f"{features.durable}: {survival(features)}")
    lacking = [
        name for name in ("shared", "atomic", "dedupe", "replay", "cancel", "browse") if not getattr(features, name)
    ]
    if lacking:
        yield Finding("features", "warn", f"it lacks {', '.join(lacking)}", "a program that asks for these is refused")


def _files(url: str) -> Iterator[Finding]:
    path = database(url)
    if path is None:
        return
    yield _sqlite_version(sqlite3.sqlite_version_info)
    folder = path.parent
    if not folder.is_dir():
        yield Finding(
            "disk", "fail", f"the folder {folder} does not exist", "make it, or name another file with --broker"
        )
        return
    free = shutil.disk_usage(folder).free
    used = sum(file.stat().st_size for file in (path, Path(f"{path}-wal")) if file.exists())
    verdict: Verdict = "fail" if free < NO_SPACE else "warn" if free < LITTLE_SPACE else "ok"
    advice = "" if verdict == "ok" else "make room: publishers are refused when the disk is full"
    yield Finding("disk", verdict, f"{size(free)} free, {size(used)} used by {path.name}", advice)
    if not os.access(path if path.exists() else folder, os.W_OK):
        yield Finding(
            "access", "fail", f"{path} cannot be written by this user", "give it the right, or run as its owner"
        )
    kind = _file_system(folder)
    if kind in NETWORK:
        advice = "SQLite's locks are not safe there: put the file on a local disk"
        yield Finding("file system", "fail", f"{kind} is a network file system", advice)
    elif kind in VOLATILE:
        yield Finding("file system", "warn", f"{kind} is memory", "a restart of the machine loses all: use a disk")
    else:
        yield Finding("file system", "ok", kind or "unknown")


def _file_system(folder: Path) -> str:
    """The kind of file system a folder is on, from the kernel's list; empty where there is none."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        _, point, type, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if (folder == Path(point) or Path(point) in folder.parents) and len(point) >= len(best):
            best, kind = point, type
    return kind


async def _clock(broker: Broker) -> Finding:
    now = time.time()
    newest = max((topic.newest for topic in await broker.admin.topics() if topic.newest is not None), default=None)
    if newest is not None and newest > now + 5:
        return Finding(
            "clock", "warn", f"the newest event was stored {span(newest - now)} in the future",
            "this clock, or that of a publisher, is wrong; delays and timers follow it: synchronise it (NTP)",
        )  # fmt: skip
    if time.gmtime(now).tm_year < 2025:
        return Finding("clock", "fail", f"it says {time.strftime('%Y-%m-%d', time.gmtime(now))}", "set it")
    return Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %Z"))


async def _groups(broker: Broker) -> list[Finding]:
    lag = await broker.admin.lag()
    stuck = sorted({entry.group for entry in lag if entry.members == 0 and entry.events + entry.parked})
    if stuck:
        shown = ", ".join(stuck[:5]) + (f" and {len(stuck) - 5} more" if len(stuck) > 5 else "")
        advice = "run their app, or drop them: what a declared group has not handled is kept for it"
        return [Finding("groups", "warn", f"events wait, and no member runs: {shown}", advice)]
    return [Finding("groups", "ok", f"{len({entry.group for entry in lag})} declared, none waits without a member")]
