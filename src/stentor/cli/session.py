"""Broker connections of commands that run no app, and how a broker is described."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from stentor.broker import Broker, Features
from stentor.connect import BrokerUrl, broker_url, connect
from stentor.errors import ConfigError, Unavailable

T = TypeVar("T")

_SURVIVE = {"host": "events survive a crash of the machine", "replica": "events survive the loss of a machine"}


def survival(features: Features) -> str:
    """What a confirmed event survives, in words."""
    if features.durable != "process":
        return _SURVIVE[features.durable]
    return "a crash of the machine can lose events" if features.restart else "events are lost when the process ends"


def database(url: str) -> Path | None:
    """The absolute path of the file behind a sqlite URL; None for other brokers."""
    parsed = BrokerUrl(url)
    return Path(parsed.path.removeprefix("/")).absolute() if parsed.scheme == "sqlite" else None


def describe(url: str, broker: Broker) -> str:
    """A broker in one line: kind, absolute path or address, namespace, and what survives what."""
    parsed = BrokerUrl(url)
    path = database(url)
    where = str(path) if path is not None else f"{parsed.host}{parsed.path}"
    space = f" namespace {parsed.namespace.rstrip('.')}" if parsed.namespace else ""
    features = broker.features
    return f"{features.name}{' ' + where if where else ''}{space} (durable: {features.durable}; {survival(features)})"


@asynccontextmanager
async def opened(url: str | None) -> AsyncIterator[Broker]:
    """The broker in force, open, for a look from outside. Raises ConfigError, BrokerError."""
    full = broker_url(url)
    broker = connect(full)
    if not broker.features.shared:
        raise ConfigError(
            f"{BrokerUrl(full)} lives inside one process, so there is nothing to see from outside; name the broker "
            "that the app uses with --broker or $STENTOR_BROKER"
        )
    path = database(full)
    if path is not None and not path.exists():
        raise Unavailable(
            f"there is no {path} yet: run or declare an app first, or name another broker with --broker or "
            "$STENTOR_BROKER"
        )
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


def with_broker(url: str | None, work: Callable[[Broker], Awaitable[T]]) -> T:
    """Run ``work`` with the broker in force."""

    async def run() -> T:
        async with opened(url) as broker:
            return await work(broker)

    return asyncio.run(run())
