"""MQTT as a sink: commands out to devices, each confirmed by the server."""

from __future__ import annotations

import asyncio
from typing import Any, Self

from stentor.clock import Duration, seconds
from stentor.errors import BrokerError, Unavailable
from stentor.message import new_id
from stentor.sinks.foreign import payload_bytes
from stentor.sources.mqtt import Connection


class MqttSink:
    """Publishes with QoS 1: ``async with MqttSink("mqtt://host") as sink: await sink.publish("doors/7", "open")``.

    URL as for the source ``Mqtt``; ``timeout``: how long a confirmation may take, over broken connections too.

    Raises:
        ConfigError: the URL is wrong, or paho-mqtt is not installed.
    """

    def __init__(self, url: str, *, timeout: Duration = "30s") -> None:
        self._connection = Connection(url, f"stentor-{new_id()}")
        self._timeout = seconds(timeout, "MqttSink: timeout")
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._connection.client.on_publish = self._confirmed
        self._connection.on_change = self._changed
        self._connection.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connection.stop()

    async def publish(self, topic: str, payload: Any, *, retain: bool = False) -> None:
        """Send bytes or text as they are, anything else (an event, say) as JSON; back when the server has it.

        Raises:
            Unavailable: no confirmation in time; it may have been sent, or may be still.
            BrokerError: the server refuses it. ValueError: ``topic`` is none that can be published to.
        """
        data = payload_bytes(payload)
        done: asyncio.Future[None] = self._loop.create_future()
        info = self._connection.client.publish(topic, data, 1, retain)
        self._waiting[info.mid] = done  # what its thread tells runs in this loop later, so that it finds this
        try:
            async with asyncio.timeout(self._timeout):
                await done
        except TimeoutError:
            place = self._connection.place
            raise Unavailable(f"{place}: no confirmation for {topic} within {self._timeout:g} s") from None
        finally:
            self._waiting.pop(info.mid, None)

    def _changed(self) -> None:
        self._loop.call_soon_threadsafe(self._refused)

    def _refused(self) -> None:
        if self._connection.failure is not None:
            for done in self._waiting.values():
                _end(done, self._connection.failure)

    def _confirmed(self, client: Any, data: Any, mid: int, reason: Any, properties: Any) -> None:
        error = BrokerError(f"{self._connection.place} refuses it: {reason}") if reason.is_failure else None
        self._loop.call_soon_threadsafe(lambda: _end(self._waiting.get(mid), error))


def _end(done: asyncio.Future[None] | None, error: BrokerError | None) -> None:
    if done is not None and not done.done():
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
