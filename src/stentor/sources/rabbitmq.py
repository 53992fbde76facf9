"""A RabbitMQ queue of somebody else as a source: a message is acknowledged when its events are durable."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from stentor.brokers.trust import trust
from stentor.connect import BrokerUrl
from stentor.errors import AuthenticationFailed, ConfigError, DefinitionError, Unavailable
from stentor.message import new_id
from stentor.source import Publish
from stentor.sources.foreign import Decode, Foreign, Record, header_text
from stentor.sources.rows import To

PREFETCH = 500
log = logging.getLogger("stentor.source")


class RabbitQueue(Foreign):
    """Consumes a queue that is there: ``RabbitQueue("amqp://host", "orders", to=OrderPlaced)``.

    URL: ``amqp://`` or ``amqps://`` with user, password and the virtual host as path; ``ca``, ``cert`` and ``key``
    name PEM files. ``to`` and ``decode`` as for ``KafkaTopic``. ``prefetch``: messages that the server sends ahead.
    A message that cannot be read is acknowledged too: it is a dead letter of the source's group. Its ``message_id``, if
    it has one, is the event's identity, so that one that comes twice is one event where the broker drops duplicates.

    Raises:
        ConfigError: the URL is wrong, or aio-pika is not installed. DefinitionError: an argument makes no sense.
    """

    def __init__(
        self,
        url: str,
        queue: str,
        *,
        to: To,
        decode: Decode | None = None,
        name: str = "rabbitmq",
        prefetch: int = PREFETCH,
    ) -> None:
        super().__init__(name, queue, to, decode)
        if not 1 <= prefetch <= 65535:
            raise DefinitionError(f"source {name}: prefetch must be 1 to 65535, not {prefetch!r}")
        try:
            import aio_pika  # noqa: F401
        except ImportError:
            raise ConfigError(f"source {name} needs aio-pika: pip install 'stentor[rabbitmq-source]'") from None
        self._server, self._arguments = arguments_of(url)
        self._prefetch = prefetch

    def __str__(self) -> str:
        return f"source {self.name} of {self._server}"

    async def run(self, publish: Publish) -> None:
        """Consume until it is stopped. Raises AuthenticationFailed or Unavailable; then it is run again."""
        import aio_pika
        from aio_pika.exceptions import AMQPException, ProbableAuthenticationError

        messages: asyncio.Queue[aio_pika.abc.AbstractIncomingMessage] = asyncio.Queue()
        try:
            connection = await aio_pika.connect(**self._arguments, timeout=10, client_properties={"app": "stentor"})
            async with connection:
                channel = await connection.channel(publisher_confirms=False)
                await channel.set_qos(self._prefetch)
                queue = await channel.get_queue(self._place)  # it has to be there: nothing of others is made here
                await queue.consume(messages.put)
                ended = asyncio.ensure_future(channel.closed())
                try:
                    await self._follow(messages, ended, publish)
                finally:
                    ended.cancel()
        except ProbableAuthenticationError as error:
            raise AuthenticationFailed(f"{self}: {error}") from None
        except (AMQPException, OSError, TimeoutError) as error:
            raise Unavailable(f"{self}: {str(error) or type(error).__name__}") from None

    async def _follow(self, messages: asyncio.Queue[Any], ended: asyncio.Future[Any], publish: Publish) -> None:
        while True:
            getting = asyncio.ensure_future(messages.get())
            await asyncio.wait((getting, ended), return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                raise Unavailable(f"{self}: the connection is lost")
            batch = [getting.result()]
            while not messages.empty() and len(batch) < PREFETCH:
                batch.append(messages.get_nowait())
            publish.counts.lag = messages.qsize()
            await self.take(publish, [(m.message_id or new_id(), _record(self._place, m)) for m in batch])
            await batch[-1].ack(multiple=True)


def arguments_of(url: str) -> tuple[str, dict[str, Any]]:
    """A URL without its password, for messages, and what aio-pika connects with. Raises ConfigError."""
    parsed = BrokerUrl(url)
    if parsed.scheme not in ("amqp", "amqps"):
        raise ConfigError(f"{parsed} is no RabbitMQ URL; write amqp://host or amqps://host")
    tls = trust(parsed, 5671, secure=parsed.scheme == "amqps")
    parsed.finish()
    host, port = parsed.address(5671 if tls else 5672)
    arguments: dict[str, Any] = {
        "host": host, "port": port, "login": parsed.user or "guest",
        "password": parsed.password or "guest", "virtualhost": parsed.path[1:] or "/",
    }  # fmt: skip
    return str(parsed), arguments | ({} if tls is None else {"ssl": True, "ssl_context": tls.context})


def _record(queue: str, message: Any) -> Record:
    headers = {name: header_text(value) for name, value in (message.headers or {}).items()}
    return Record(
        queue, f"message {message.message_id or message.delivery_tag}", message.body, message.routing_key, headers,
        message.content_type, None if message.timestamp is None else message.timestamp.timestamp(),
    )  # fmt: skip
