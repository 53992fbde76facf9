"""A Kafka topic of somebody else as a sink: each message confirmed by all replicas in step."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Self

from stentor.brokers.trust import trust
from stentor.clock import Duration, seconds
from stentor.connect import BrokerUrl
from stentor.errors import BrokerError, ConfigError, Unavailable
from stentor.message import Message
from stentor.sinks.foreign import Mode, form, payload_bytes

LARGEST = 1024 * 1024
"""Bytes of a message, unless the topic takes less (Kafka's ``max.message.bytes``)."""


class KafkaSink:
    """``async with KafkaSink("kafka://host") as sink: await sink.publish("orders", order, key="7")``.

    URL as for the source ``KafkaTopic``; ``timeout``: how long a confirmation may take. Keys go to the partition where
    Kafka's own clients put them.

    Raises:
        ConfigError: the URL is wrong, or confluent-kafka is not installed.
    """

    def __init__(self, url: str, *, timeout: Duration = "30s") -> None:
        try:
            from stentor.brokers.kafka_client import Sender, client_settings
        except ImportError:
            raise ConfigError("KafkaSink needs confluent-kafka: pip install 'stentor[kafka]'") from None
        parsed = BrokerUrl(url)
        if parsed.scheme != "kafka":
            raise ConfigError(f"{parsed} is no Kafka URL; write kafka://host:9092")
        self._settings = client_settings(parsed, trust(parsed, 9092)) | {
            "partitioner": "murmur2_random", "allow.auto.create.topics": True,  # as the server is set
        }  # fmt: skip
        parsed.finish()
        self._server = str(parsed)
        self._timeout = seconds(timeout, "KafkaSink: timeout")
        self._make = Sender

    async def __aenter__(self) -> Self:
        self._sender = self._make(self._settings, LARGEST)
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self._sender.close)

    async def publish(
        self, topic: str, payload: Any, *, key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send bytes or text as they are, anything else (an event, say) as JSON; back when it is stored.

        Raises:
            Unavailable: no confirmation in time; it may have been stored. BrokerError: the server refuses it.
        """
        raw = None if key is None else key.encode()
        told = [(name, value.encode()) for name, value in (headers or {}).items()]
        try:
            async with asyncio.timeout(self._timeout):
                [found] = await self._sender.send([(topic, -1, payload_bytes(payload), raw)], told)
        except TimeoutError:
            raise Unavailable(f"{self._server}: no confirmation for {topic} within {self._timeout:g} s") from None
        if not isinstance(found, int):
            kind = Unavailable if found.retriable() or found.code() < 0 else BrokerError
            raise kind(f"{self._server}: {topic}: {found.str()}")

    async def forward(self, topic: str, message: Message, *, mode: Mode = "binary") -> None:
        """Send a message (``ctx.message``) as a CloudEvent of the Kafka binding, under its key."""
        headers, body = form(message, mode, "ce_")
        await self.publish(topic, body, key=message.key, headers=headers)
