"""Real servers for tests: one of each kind for all processes of a run, a fresh namespace for each test.

In CI a server that cannot be had fails the test; elsewhere the test is skipped and says why.
"""

import itertools
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

import servers
from stentor.connect import _BUILT_IN, connect

_count = itertools.count()
_run = secrets.token_hex(3)


def unavailable(error: Exception) -> NoReturn:
    """Skip on a laptop, fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"in CI every server is required: {error}")
    pytest.skip(str(error))


def server_url(name: str, factory: pytest.TempPathFactory, *, secure: bool = False) -> str:
    """The URL of a running server that all tests of this run share."""
    base = factory.getbasetemp()
    controller = int(os.environ.get("STENTOR_TEST_CONTROLLER", "0")) or os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = Path(base) / f"server-{name}{'-secure' if secure else ''}"
    try:
        return servers.shared(name, folder, controller, secure=secure)
    except servers.Missing as missing:
        unavailable(missing)


def fresh(url: str, **options: object) -> str:
    """A URL with a namespace that nobody used before, and further options."""
    given = {"namespace": f"t{_run}{os.getpid():x}{next(_count)}", **options}
    return url + ("&" if "?" in url else "?") + "&".join(f"{name}={value}" for name, value in given.items())


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Any]:
    """An open broker."""
    broker = connect(url)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


def brokers() -> list[str]:
    """The kinds of real servers that a broker exists for, by the name of the server."""
    return [name for name, scheme in _SCHEMES.items() if scheme in _BUILT_IN]


_SCHEMES = {
    "redis": "redis", "postgresql": "postgresql", "rocketmq": "rocketmq", "kafka": "kafka", "nats": "nats",
    "rabbitmq": "amqp",
}  # fmt: skip


def url_of(kind: str, path: Path, factory: pytest.TempPathFactory) -> str:
    """The URL of an empty broker: memory, sqlite (in a file at ``path``), or a namespace of a real server."""
    if kind == "memory":
        return "memory://"
    if kind == "sqlite":
        return f"sqlite:///{path}"
    return fresh(server_url(kind, factory), lease=2, beat=0.5, partitions=4)
