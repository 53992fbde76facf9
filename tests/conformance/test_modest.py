"""The suite on a broker that can do little: what it lacks is tested to be refused."""

from collections.abc import Sequence

import msgspec
import pytest

from stentor.broker import Broker, Start
from stentor.brokers.memory import MemoryBroker
from stentor.clock import Clock
from stentor.connect import BrokerUrl
from stentor.errors import Unsupported
from stentor.message import Message, Receipt
from stentor.testing.conformance import Rules


class ModestBroker(MemoryBroker):
    features = msgspec.structs.replace(MemoryBroker.features, name="modest", replay=False, cancel=False, dedupe=False)

    async def publish(self, messages: Sequence[Message]) -> Sequence[Receipt]:
        for message in messages:
            message.fresh = True  # nobody looks for an earlier one
        return await super().publish(messages)

    async def replay(self, group: str, start: Start, topics: Sequence[str] = ()) -> int:
        raise Unsupported("replay", "modest", "declare a new group")

    async def cancel(self, id: str) -> bool:
        raise Unsupported("cancel", "modest", "let the handler decide")


class TestModest(Rules):
    @pytest.fixture
    def broker_url(self) -> str:
        return "memory://"

    def make_broker(self, url: str, clock: Clock) -> Broker:
        return ModestBroker(BrokerUrl(url), clock)
