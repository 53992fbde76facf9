"""Exchanges and queues of somebody else's RabbitMQ as a sink: each message routed and confirmed, or an error."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Self

from stentor.clock import Duration, seconds
from stentor.errors import AuthenticationFailed, BrokerError, ConfigError, Unavailable
from stentor.message import Message, new_id
from stentor.sinks.foreign import Mode, form, payload_bytes
from stentor.sources.rabbitmq import arguments_of


class RabbitSink:
    """``async with RabbitSink("amqp://host") as sink: await sink.publish("orders", order)`` into the queue ``orders``.

    With ``exchange`` the name is a routing key of that exchange. URL as for the source ``RabbitQueue``. Messages are
    persistent, and one that no queue takes is an error. A lost connection is made again.

    Raises:
        ConfigError: the URL is wrong, or aio-pika is not installed.
    """

    def __init__(self, url: str, *, exchange: str = "", timeout: Duration = "30s") -> None:
        try:
            import aio_pika  # noqa: F401
        except ImportError:
            raise ConfigError("RabbitSink needs aio-pika: pip install 'stentor[rabbitmq-source]'") from None
        self._server, self._arguments = arguments_of(url)
        self._exchange = exchange
        self._timeout = seconds(timeout, "RabbitSink: timeout")

    async def __aenter__(self) -> Self:
        import aio_pika
        from aio_pika.exceptions import AMQPException, ProbableAuthenticationError

        try:
            self._connection = await aio_pika.connect_robust(**self._arguments, timeout=10)
            channel = await self._connection.channel(on_return_raises=True)
            self._target = await channel.get_exchange(self._exchange) if self._exchange else channel.default_exchange
        except ProbableAuthenticationError as error:
            raise AuthenticationFailed(f"{self._server}: {error}") from None
        except (AMQPException, OSError, TimeoutError) as error:
            raise Unavailable(f"{self._server}: {str(error) or type(error).__name__}") from None
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connection.close()

    async def publish(
        self, name: str, payload: Any, *, id: str | None = None, headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
    ) -> None:  # fmt: skip
        """Send bytes or text as they are, anything else (an event, say) as JSON; back when the server has it.

        Raises:
            Unavailable: no confirmation in time; it may have been stored. BrokerError: no queue takes it.
        """
        import aio_pika
        from aio_pika.exceptions import AMQPException, DeliveryError

        message = aio_pika.Message(
            payload_bytes(payload), headers=dict(headers or {}), content_type=content_type, message_id=id or new_id(),
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._timeout):
                await self._target.publish(message, name)
        except DeliveryError:
            raise BrokerError(f"{self._server}: no queue takes {name!r}") from None
        except (AMQPException, OSError, TimeoutError, RuntimeError) as error:
            raise Unavailable(f"{self._server}: {name}: {str(error) or 'no confirmation in time'}") from None

    async def forward(self, name: str, message: Message, *, mode: Mode = "binary") -> None:
        """Send a message (``ctx.message``) as a CloudEvent of the AMQP binding, under its id."""
        headers, body = form(message, mode, "cloudEvents:")
        content = headers.pop("content-type", None)
        await self.publish(name, body, id=message.id, headers=headers, content_type=content)
