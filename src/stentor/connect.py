"""Broker URLs, and from a URL to its broker."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from stentor.broker import Broker
from stentor.clock import Clock, SystemClock, seconds
from stentor.errors import ConfigError, DefinitionError
from stentor.event import check_name

T = TypeVar("T")


def switch(text: str) -> bool:
    """An option that is on or off."""
    if text not in ("1", "0"):
        raise ValueError("write 1 or 0")
    return text == "1"


def count(text: str) -> int:
    """An option that is a number of things, of which there is one at least."""
    if (number := int(text)) < 1:
        raise ValueError("at least 1")
    return number


def duration(text: str) -> float:
    """An option that is a duration, in seconds."""
    try:
        return seconds(text)
    except DefinitionError as error:
        raise ValueError(str(error)) from None


def one_of(*words: str) -> Callable[[str], Any]:
    """An option that is one of a few words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"write {' or '.join(words)}")
        return text

    return parse


class Address(NamedTuple):
    """Where a server listens; as text ``host:port``, an IPv6 address in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class BrokerUrl:
    """A parsed broker URL; options are taken one by one, and ``finish`` refuses what nobody took.

    Raises:
        ConfigError: the text is no URL, or an option is unknown, doubled or malformed.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or "://" not in text:
            raise ConfigError(
                f"broker {_hide(str(text))!r} is no URL; write for example sqlite:///stentor.db or memory://"
            )
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise ConfigError(f"broker {_hide(text)!r} is no URL: {error}") from None
        self.scheme = parts.scheme
        self.host = parts.netloc.rpartition("@")[2]
        self.path = unquote(parts.path)
        self.user = unquote(parts.username) if parts.username else None
        self.password = unquote(parts.password) if parts.password else None
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        self._options = dict(pairs)
        if len(self._options) != len(pairs):
            raise ConfigError(f"{self}: an option stands twice")
        self._known: list[str] = []
        namespace = self.option("namespace", "")
        self.namespace = check_name(namespace, "namespace") + "." if namespace else ""
        password_file = self.option("password_file", "")
        if password_file:
            try:
                with open(password_file, encoding="utf-8") as file:
                    self.password = file.read().strip()
            except OSError as error:
                raise ConfigError(f"{self}: password_file: {error}") from None

    def option(self, name: str, default: T, parse: Callable[[str], T] | None = None) -> T:
        """The value of a query option; ``parse`` makes it of text and raises ValueError for what it refuses."""
        self._known.append(name)
        if name not in self._options:
            return default
        text = self._options.pop(name)
        try:
            return parse(text) if parse else text  # type: ignore[return-value]
        except ValueError as error:
            raise ConfigError(f"{self}: option {name}={text!r}: {error}") from None

    def addresses(self, port: int) -> list[Address]:
        """The servers; ``port`` where none is given, localhost for no host. Raises ConfigError."""
        found = []
        for part in self.host.split(","):
            match = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]*)(?::([0-9]{1,5}))?", part)
            if match is None or int(match[2] or port) > 65535:
                raise ConfigError(
                    f"{self}: {part!r} is no host and port; write host:{port}, or [::1]:{port} for an IPv6 address"
                )
            found.append(Address(match[1].strip("[]") or "localhost", int(match[2] or port)))
        return found

    def address(self, port: int) -> Address:
        """As ``addresses``, where there can be one only. Raises ConfigError."""
        first, *others = self.addresses(port)
        if others:
            raise ConfigError(f"{self}: name one host")
        return first

    def finish(self) -> None:
        """Refuse the options that are left."""
        if self._options:
            unknown = ", ".join(sorted(self._options))
            raise ConfigError(f"{self}: unknown option {unknown}; {self.scheme} knows {', '.join(sorted(self._known))}")

    def __str__(self) -> str:
        """The URL without credentials and options, fit for a log."""
        return f"{self.scheme}://{self.host}{self.path}"


def _hide(text: str) -> str:
    head, at, tail = text.rpartition("@")
    return f"…@{tail}" if at and head else text


_BUILT_IN = {
    "memory": ("stentor.brokers.memory:MemoryBroker", ""),
    "sqlite": ("stentor.brokers.sqlite:SqliteBroker", ""),
    "amqp": ("stentor.brokers.rabbitmq:RabbitMQBroker", "rabbitmq"),
    "amqps": ("stentor.brokers.rabbitmq:RabbitMQBroker", "rabbitmq"),
    "kafka": ("stentor.brokers.kafka:KafkaBroker", "kafka"),
    "nats": ("stentor.brokers.nats:NatsBroker", "nats"),
    "postgresql": ("stentor.brokers.postgresql:PostgresBroker", "postgresql"),
    "redis": ("stentor.brokers.redis:RedisBroker", "redis"),
    "rediss": ("stentor.brokers.redis:RedisBroker", "redis"),
    "rocketmq": ("stentor.brokers.rocketmq:RocketMQBroker", "rocketmq"),
}
"""By URL scheme: the class, and the extra that brings its client library."""


def load(path: str, extra: str, what: str) -> Any:
    """What ``module:name`` names. Raises ConfigError when a library is missing, naming the extra that brings it."""
    try:
        return EntryPoint(what, path, "stentor").load()
    except ImportError as error:
        raise ConfigError(f"{what}: a library is missing ({error}); pip install 'stentor[{extra}]'") from None


def connect(url: str, clock: Clock | None = None) -> Broker:
    """The broker of a URL, not yet opened.

    Third parties add schemes through the entry point group ``stentor.brokers``.

    Raises:
        ConfigError: the URL or an option is wrong, or nothing provides the scheme.
    """
    parsed = BrokerUrl(url)
    if parsed.scheme in _BUILT_IN:
        path, extra = _BUILT_IN[parsed.scheme]
    else:
        points = {point.name: point.value for point in entry_points(group="stentor.brokers")}
        if parsed.scheme not in points:
            known = ", ".join(sorted(set(_BUILT_IN) | set(points)))
            raise ConfigError(f"{parsed}: no broker for {parsed.scheme}://; installed are {known}")
        path, extra = points[parsed.scheme], parsed.scheme
    broker: Broker = load(path, extra, str(parsed))(parsed, clock or SystemClock())
    parsed.finish()
    return broker


def broker_url(given: str | None = None) -> str:
    """The broker URL in force: the given one, else $STENTOR_BROKER, else the file named by $STENTOR_BROKER_FILE,
    else ``sqlite:///stentor.db``.
    """
    if given:
        return given
    if url := os.environ.get("STENTOR_BROKER"):
        return url
    if path := os.environ.get("STENTOR_BROKER_FILE"):
        try:
            with open(path, encoding="utf-8") as file:
                return file.read().strip()
        except OSError as error:
            raise ConfigError(f"$STENTOR_BROKER_FILE: {error}") from None
    return "sqlite:///stentor.db"
