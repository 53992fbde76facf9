"""MQTT 5 and 3.1.1 as a source: what devices publish becomes events; and the connection that the sink has too.

A message of QoS 1 is acknowledged when its events are durable, in the order of arrival (MQTT 5, 4.6). Until then it
stays in the session that the server keeps for the client id, through the end of this process and of the server. The
server sends at most ``window`` messages ahead: that is the backpressure.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from stentor.brokers.trust import trust
from stentor.clock import Duration, seconds
from stentor.cloudevents import STRUCTURED, from_attributes, from_structured
from stentor.connect import BrokerUrl
from stentor.errors import AuthenticationFailed, BrokerError, ConfigError, DefinitionError, InvalidEvent
from stentor.event import EventLike, Outgoing, check_name
from stentor.message import new_id
from stentor.source import Publish, Row
from stentor.sources.foreign import outgoing
from stentor.sources.rows import Reader, To, text_of

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessage

    from stentor.app import App

BATCH = 256
"""Messages whose events are published at once."""
BAD_LOGIN = {134, 135}
"""Reason codes: bad user name or password, not authorized."""
log = logging.getLogger("stentor.source")


class Received(Struct, frozen=True):
    """A message of an MQTT topic, as a function in ``to=`` gets it; ``names`` are the named levels of the topic."""

    topic: str
    data: bytes
    names: dict[str, str]
    content_type: str | None = None
    properties: dict[str, str] = {}
    """The user properties (MQTT 5)."""

    def json(self) -> Any:
        """The payload as JSON. Raises msgspec.DecodeError."""
        return msgspec.json.decode(self.data)


class Connection:
    """A connection that a thread of the client library keeps, and makes again; callbacks run in the event loop.

    ``url``: ``mqtt://`` or ``mqtts://`` with user and password, and the options ``version`` (5, or 3.1.1), ``ca``,
    ``cert`` and ``key`` (PEM files), ``password_file``, ``keepalive`` (seconds).

    Raises:
        ConfigError: the URL is wrong, or paho-mqtt is not installed.
    """

    def __init__(self, url: str, client_id: str, *, session: float = 0.0, window: int = BATCH) -> None:
        try:
            from paho.mqtt import client as paho
            from paho.mqtt.enums import CallbackAPIVersion
            from paho.mqtt.packettypes import PacketTypes
            from paho.mqtt.properties import Properties
        except ImportError:
            raise ConfigError("MQTT needs paho-mqtt: pip install 'stentor[mqtt]'") from None
        parsed = BrokerUrl(url)
        if parsed.scheme not in ("mqtt", "mqtts"):
            raise ConfigError(f"{parsed} is no MQTT URL; write mqtt://host or mqtts://host")
        version = parsed.option("version", "5")
        if version not in ("5", "3.1.1"):
            raise ConfigError(f"{parsed}: option version must be 5 or 3.1.1, not {version!r}")
        keepalive = parsed.option("keepalive", 30, int)
        tls = trust(parsed, 8883, secure=parsed.scheme == "mqtts")
        parsed.finish()
        host, port = parsed.address(8883 if tls else 1883)
        self.place = str(parsed)
        self.five = version == "5"
        self.client: Client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, clean_session=None if self.five else not session,
            protocol=paho.MQTTv5 if self.five else paho.MQTTv311, manual_ack=True,
        )  # fmt: skip
        if parsed.user:
            self.client.username_pw_set(parsed.user, parsed.password)
        if tls is not None:
            self.client.tls_set_context(tls.context)
        self.client.reconnect_delay_set(1, 30)
        self._connect: dict[str, Any] = {"host": host, "port": port, "keepalive": keepalive}
        if self.five:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = min(round(session), 2**32 - 1)
            properties.ReceiveMaximum = window
            self._connect |= {"clean_start": not session, "properties": properties}
        self.epoch = 0
        """Counts connections: a message of an earlier one must not be acknowledged on this one."""
        self.failure: BrokerError | None = None
        """Why the server refused, if it did."""
        self.on_change: Callable[[], None] = lambda: None
        """Called, in the client's thread, when it connected, failed, or lost the connection."""
        self.connected = False
        self.errors = 0
        self.client.on_connect = self._connected
        self.client.on_disconnect = self._disconnected
        self.client.on_connect_fail = self._failed

    def start(self) -> None:
        """Begin to connect."""
        self.client.connect_async(**self._connect)
        self.client.loop_start()

    async def stop(self) -> None:
        """Say goodbye; what was not acknowledged stays with the server."""
        self.client.disconnect()
        await asyncio.to_thread(self.client.loop_stop)

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            kind = AuthenticationFailed if reason.value in BAD_LOGIN else BrokerError
            self.failure = kind(f"{self.place} refuses the connection: {reason}")
        else:
            self.epoch += 1
            self.connected = True
        self.on_change()

    def _disconnected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.connected = False
        if reason.is_failure:
            self.errors += 1
            log.warning("%s: the connection is lost (%s); connecting again", self.place, reason)
        self.on_change()

    def _failed(self, client: Any, data: Any) -> None:
        self.errors += 1
        log.warning("%s: no connection: %s; trying again", self.place, sys.exc_info()[1])
        self.on_change()


class _Pattern:
    """A topic filter whose levels may have names: ``plant/{line}/temperature``, ``plant/+/rate``, ``alarms/#``."""

    def __init__(self, text: str, to: To, what: str) -> None:
        levels = text.split("/")
        for index, level in enumerate(levels):
            whole = level in ("+", "#") or re.fullmatch(r"\{[a-z_]\w*\}", level)
            if (not whole and re.search(r"[+#{}\0]", level)) or (level == "#" and index < len(levels) - 1) or not text:
                raise DefinitionError(
                    f"{what}: {text!r} is no topic pattern: write plant/{{line}}/+/temperature or alarms/#"
                )
        self.filter = "/".join("+" if level[:1] == "{" else level for level in levels)
        parts = [f"(?P<{v[1:-1]}>[^/]*)" if v[:1] == "{" else "[^/]*" if v == "+" else re.escape(v) for v in levels]
        expression = "/".join(parts[:-1] if levels[-1] == "#" else parts)
        tail = (r"(/.*)?" if len(levels) > 1 else ".*") if levels[-1] == "#" else ""
        self.match = re.compile(expression + tail, re.DOTALL).fullmatch
        self._typed = isinstance(to, type)
        self._reader = Reader(to, what)

    def read(self, row: Row, names: dict[str, str]) -> list[EventLike]:
        found = row.value
        payload = found["payload"]
        data = payload.encode() if isinstance(payload, str) else msgspec.convert(payload["base64"], bytes)
        if not self._typed:
            value: Any = Received(found["topic"], data, names, found.get("content_type"), found.get("properties") or {})
        else:
            try:
                value = msgspec.json.decode(data)
            except msgspec.DecodeError as error:
                raise InvalidEvent(str(error)) from None
            if names and isinstance(value, dict):
                value |= names
        return self._reader(Row(row.id, row.where, value))


def _covers(wide: str, narrow: str) -> bool:
    """Whether one topic filter fits all that another one fits."""
    wides, narrows = wide.split("/"), narrow.split("/")
    for index, level in enumerate(wides):
        if level == "#":
            return True
        if index >= len(narrows) or narrows[index] == "#" or level not in ("+", narrows[index]):
            return False
    return len(wides) == len(narrows)


class Mqtt:
    """Subscribes to topics: ``Mqtt("mqtt://host", to={"plant/{line}/temperature": Temperature})``.

    ``to``: by topic pattern an event class, into which a JSON payload and the named levels are decoded, or a function
    that takes a ``Received``, as ``cloudevents(app)`` makes one. The first pattern that fits counts. A payload that
    cannot be read becomes a dead letter.

    ``client_id``: default is the name; the server keeps the session of this id for ``session`` after the connection
    ends. With ``share`` every process runs the source, and they share the messages; each needs an id that it has again
    after a restart: without one, the first number that is free on this host is taken.

    Raises:
        ConfigError: the URL is wrong, or paho-mqtt is not installed. DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        to: Mapping[str, To],
        name: str = "mqtt",
        client_id: str | None = None,
        share: str | None = None,
        session: Duration = "7d",
        window: int = BATCH,
    ) -> None:
        what = f"source {name}"
        if not isinstance(to, Mapping) or not to:
            raise DefinitionError(f"{what}: to must be a dict: a topic pattern, and what its messages become")
        if not 1 <= window <= 65535:
            raise DefinitionError(f"{what}: window must be 1 to 65535, not {window!r}")
        self.name = name
        self.instances = "one" if share is None else "each"
        self._share = "" if share is None else f"$share/{check_name(share, f'{what}: share')}/"
        self._patterns = [_Pattern(text, target, what) for text, target in to.items()]
        self._url = url
        self._client_id = client_id
        self._session = seconds(session, f"{what}: session")
        self._window = window
        Connection(url, name)  # what is wrong with the URL shows here

    def read(self, row: Row) -> Sequence[EventLike]:
        """The events of a message."""
        for pattern in self._patterns:
            found = pattern.match(row.value["topic"])
            if found is not None:
                return pattern.read(row, found.groupdict())
        return []

    def _filters(self) -> list[str]:
        """What is subscribed to: no filter that another one covers, as the server would send twice what fits both."""
        every = list(dict.fromkeys(pattern.filter for pattern in self._patterns))
        return [self._share + one for one in every if not any(other != one and _covers(other, one) for other in every)]

    async def run(self, publish: Publish) -> None:
        """Subscribe, and publish what comes, until it is stopped. Raises BrokerError where the server refuses."""
        with contextlib.ExitStack() as held:
            client_id = self._client_id or (held.enter_context(_free_id(self.name)) if self._share else self.name)
            connection = Connection(self._url, client_id, session=self._session, window=self._window)
            inbox = _Inbox(connection, self._filters(), 2 * self._window)
            connection.start()
            try:
                while True:
                    batch = await inbox.take()
                    publish.counts.errors += connection.errors
                    connection.errors = 0
                    publish.counts.lag = len(inbox.messages)
                    await publish.rows([_row(message) for _, message in batch])
                    for epoch, message in batch:
                        if message.qos and epoch == connection.epoch:
                            connection.client.ack(message.mid, message.qos)
            finally:
                await connection.stop()


class _Inbox:
    """What came and is not published yet: filled by the client's thread, taken by the event loop."""

    def __init__(self, connection: Connection, filters: list[str], limit: int) -> None:
        self.messages: deque[tuple[int, MQTTMessage]] = deque()
        self._connection = connection
        self._filters = filters
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        connection.on_change = self._changed
        connection.client.on_message = self._came
        connection.client.on_subscribe = self._subscribed

    def _changed(self) -> None:
        if self._connection.connected:
            self._connection.client.subscribe([(text, 1) for text in self._filters])
        self._loop.call_soon_threadsafe(self._wake.set)

    def _subscribed(self, client: Any, data: Any, mid: int, reasons: Any, properties: Any) -> None:
        refused = [
            f"{text} ({reason})" for text, reason in zip(self._filters, reasons, strict=False) if reason.is_failure
        ]
        if refused:
            self._connection.failure = BrokerError(f"{self._connection.place} refuses {', '.join(refused)}")
            self._loop.call_soon_threadsafe(self._wake.set)

    def _came(self, client: Any, data: Any, message: MQTTMessage) -> None:
        if message.qos == 0 and len(self.messages) >= self._limit:
            self._connection.errors += 1  # nothing holds back a sender of QoS 0, and nothing was promised to it
            return
        self.messages.append((self._connection.epoch, message))
        self._loop.call_soon_threadsafe(self._wake.set)

    async def take(self) -> list[tuple[int, MQTTMessage]]:
        """The next messages, at least one. Raises the server's refusal."""
        while not self.messages:
            if self._connection.failure is not None:
                raise self._connection.failure
            self._wake.clear()
            if not self.messages:
                await self._wake.wait()
        return [self.messages.popleft() for _ in range(min(BATCH, len(self.messages)))]


def _row(message: MQTTMessage) -> Row:
    properties = getattr(message, "properties", None)
    value = {
        "topic": message.topic,
        "payload": text_of(bytes(message.payload)),
        "content_type": getattr(properties, "ContentType", None),
        "properties": dict(getattr(properties, "UserProperty", ())),
    }
    return Row(new_id(), message.topic, value)


@contextlib.contextmanager
def _free_id(name: str) -> Any:
    """A client id with the lowest number that no process of this host has; a restarted process takes it again."""
    folder = Path(tempfile.gettempdir()) / f"stentor-mqtt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    number, file = 0, None
    while file is None:
        number += 1
        file = _lock(folder / f"{name}-{number}")
    with file:
        yield f"{name}-{socket.gethostname()}-{number}"


def _lock(path: Path) -> IO[str] | None:
    file = open(path, "w")  # noqa: SIM115 - held as long as the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def cloudevents(app: App) -> Callable[[Received], Outgoing]:
    """For ``to=``: reads CloudEvents of types that the app knows, in binary and structured mode of the MQTT binding.

    In MQTT 5 attributes are user properties, or the content type says that the payload has all; in 3.1.1 the payload
    always has.
    """

    def read(received: Received) -> Outgoing:
        if "specversion" in received.properties:
            attributes: dict[str, Any] = dict(received.properties)
            if received.content_type:
                attributes["datacontenttype"] = received.content_type
            return outgoing(app, from_attributes(attributes, received.data))
        media = (received.content_type or STRUCTURED).partition(";")[0].strip().lower()
        if media != STRUCTURED:
            raise InvalidEvent(f"a payload of {media} without a user property 'specversion' is no CloudEvent")
        return outgoing(app, from_structured(received.data))

    return read
