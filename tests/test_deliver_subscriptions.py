"""Other services subscribe by themselves: the API, filters, the handshake, and where events may be sent."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trustme
from standardwebhooks.webhooks import Webhook

from stentor import App, Event
from stentor.clock import iso
from stentor.errors import ConfigError, DefinitionError, NotDelivered
from stentor.security.addresses import networks, public
from stentor.serve import serve
from stentor.sinks.filters import compile_filters
from stentor.sinks.guard import Guard
from stentor.sinks.http import Sender, Target
from stentor.sinks.subscriptions import Record, subscriptions
from tests.real import brokers, url_of
from tests.receiver import Answer, Receiver, Request, receiving

TOKEN = "a-token-of-the-test"
MASTER = "the secret of all secrets of the test"
LOOPBACK = ("127.0.0.0/8",)
HERE = "http://127.0.0.1:1"
"""Where sinks are told to call back; the tests ask the real address."""


class Placed(Event, topic="orders", key="order_id", type="com.shop.order.placed"):
    order_id: str
    amount: float = 1.0


class Paid(Event, topic="payments", key="order_id", type="com.shop.payment.taken"):
    order_id: str


def consenting(request: Request) -> Answer:
    if request.method == "OPTIONS":
        origin = request.headers["webhook-request-origin"]
        return 200, {"webhook-allowed-origin": origin, "webhook-allowed-rate": "*"}, b""
    return 202


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as found:
        found.answer = consenting
        yield found


def posts(receiver: Receiver) -> list[str]:
    return [json.loads(r.body)["order_id"] for r in receiver.requests if r.method == "POST"]


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not (await condition() if inspect.iscoroutinefunction(condition) else condition()):
            await asyncio.sleep(0.01)


class Shop:
    app: App
    client: httpx.AsyncClient

    async def make(self, sink: str, **more: Any) -> dict[str, Any]:
        answer = await self.client.post("/subscriptions", json={"sink": sink, "protocol": "HTTP", **more})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        assert answer.headers["location"] == f"/subscriptions/{made['id']}"
        return made

    async def refused(self, status: int, **body: Any) -> str:
        answer = await self.client.post("/subscriptions", json={"protocol": "HTTP", **body})
        assert answer.status_code == status, answer.text
        return str(answer.json()["detail"])

    async def groups(self) -> set[str]:
        return {info.name for info in await self.app.broker.admin.groups()}

    async def records(self) -> dict[str, Any]:
        """What is stored, as the topic has it."""
        topic = self.app.broker.browse("stentor.subscriptions.shop", "earliest", follow=False)
        return {r.wanted.id: r async for _, m in topic for r in [msgspec.json.decode(m.data, type=Record)]}

    async def runs(self, id: str) -> None:
        await until(lambda: self.app.program and any(w.group.endswith(id) for w in self.app.program.workers))


@asynccontextmanager
async def shop(broker: str = "memory://", **options: Any) -> AsyncIterator[Shop]:
    found = Shop()
    found.app = app = App("shop", broker=broker)
    given = {"allow": TOKEN, "secret": MASTER, "inside": LOOPBACK, **options}
    app.subscriptions(Placed, Paid, **given)
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with (
        app, serve(app, "127.0.0.1:0") as url,
        httpx.AsyncClient(base_url=url, headers=headers, timeout=30, trust_env=False) as found.client,
    ):  # fmt: skip
        yield found


# ---- the API --------------------------------------------------------------------------------------------------------


async def test_a_service_subscribes_gets_events_and_leaves(receiver: Receiver) -> None:
    async with shop() as s:
        await s.app.publish(Placed(order_id="o-before"))
        made = await s.make(receiver.url, types=["com.shop.order.placed"], filters=[{"prefix": {"partitionkey": "o-"}}])
        await s.app.publish(
            [Placed(order_id="o-1"), Placed(order_id="x-2"), Paid(order_id="o-3"), Placed(order_id="o-4")]
        )
        _, *requests = await receiver.got(3)
        assert posts(receiver) == ["o-1", "o-4"]
        for request in requests:
            Webhook(made["secret"]).verify(request.body, request.headers)
            assert request.headers["webhook-request-origin"] == "shop"
        listed = (await s.client.get("/subscriptions")).json()
        assert [entry["id"] for entry in listed] == [made["id"]]
        one = (await s.client.get(f"/subscriptions/{made['id']}")).json()
        assert one == {key: value for key, value in made.items() if key != "secret"} == listed[0]
        changed = await s.client.put(
            f"/subscriptions/{made['id']}",
            json={"sink": receiver.url, "protocol": "HTTP", "types": ["com.shop.payment.taken"]},
        )
        assert changed.status_code == 200
        await until(lambda: any(set(w.plan.routes) == {"com.shop.payment.taken"} for w in s.app.program.workers))  # type: ignore[union-attr]
        await s.app.publish([Placed(order_id="o-5"), Paid(order_id="o-6")])
        await until(lambda: posts(receiver)[-1] == "o-6")
        assert (await s.client.delete(f"/subscriptions/{made['id']}")).status_code == 200
        assert (await s.client.get(f"/subscriptions/{made['id']}")).status_code == 404
        assert (await s.client.get("/subscriptions")).json() == []
        name = f"shop.subscription.{made['id']}"

        async def dropped() -> bool:
            return name not in await s.groups()

        await until(dropped)
        assert "o-5" not in posts(receiver)


async def test_it_outlives_restarts_and_other_processes_see_it(receiver: Receiver, tmp_path: Path) -> None:
    broker = f"sqlite:///{tmp_path}/shop.db"
    async with shop(broker) as s, shop(broker) as other:
        kept = await s.make(receiver.url)
        left = await other.make(receiver.url, types=["com.shop.payment.taken"])
        assert {entry["id"] for entry in (await s.client.get("/subscriptions")).json()} == {kept["id"], left["id"]}
        for process in (s, other):
            await process.runs(kept["id"])
            await process.runs(left["id"])
        assert (await s.client.delete(f"/subscriptions/{left['id']}")).status_code == 200

        async def dropped() -> bool:
            return f"shop.subscription.{left['id']}" not in await s.groups()

        await until(dropped)
    async with App("shop", broker=broker).connected() as outside:  # nobody runs it, and it misses nothing
        await outside.publish([Placed(order_id=f"o-{number}") for number in range(20)])
    async with shop(broker):
        await until(lambda: len(posts(receiver)) >= 20)
    assert sorted(posts(receiver)) == sorted(f"o-{number}" for number in range(20))


async def test_a_sink_that_is_gone_ends_its_subscription(receiver: Receiver) -> None:
    receiver.answer = lambda request: consenting(request) if request.method == "OPTIONS" else 410
    async with shop() as s:
        made = await s.make(receiver.url)
        await s.app.publish(Placed(order_id="o-1"))

        async def dropped() -> bool:
            return not any(made["id"] in name for name in await s.groups())

        await until(dropped)
        assert (await s.client.get("/subscriptions")).json() == []


async def test_nobody_may_without_authorization_and_each_sees_only_its_own(receiver: Receiver) -> None:
    for allow in (None, "", "short"):
        with pytest.raises(DefinitionError, match="allow must be"):
            App("shop").subscriptions(Placed, allow=allow)
    with pytest.raises(DefinitionError, match="name the event types"):
        App("shop").subscriptions(allow=TOKEN)
    people = {"Bearer for-ada": "ada", "Bearer for-ben": "ben"}
    async with shop(allow=lambda headers: people.get(headers.get("authorization", ""))) as s:
        body = {"sink": receiver.url, "protocol": "HTTP"}
        for method, path in (("GET", ""), ("POST", ""), ("GET", "/x"), ("PUT", "/x"), ("DELETE", "/x")):
            answer = await s.client.request(method, f"/subscriptions{path}", json=body)
            assert (answer.status_code, answer.json()["detail"]) == (401, "not authorized")
        ada, ben = ({"authorization": f"Bearer for-{name}"} for name in ("ada", "ben"))
        made = (await s.client.post("/subscriptions", json=body, headers=ada)).json()
        assert (await s.client.get("/subscriptions", headers=ben)).json() == []
        for method in ("GET", "PUT", "DELETE"):
            path = f"/subscriptions/{made['id']}"
            assert (await s.client.request(method, path, json=body, headers=ben)).status_code == 404
        assert len((await s.client.get("/subscriptions", headers=ada)).json()) == 1
    async with shop() as s:
        answer = await s.client.get("/subscriptions", headers={"authorization": "Bearer of-nobody"})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_what_is_wrong_is_said(receiver: Receiver) -> None:
    async with shop() as s:
        url = receiver.url
        assert "sink" in await s.refused(400)
        assert "is no URL" in await s.refused(400, sink="nonsense")
        assert "protocol" in await s.refused(400, sink=url, protocol="AMQP")
        assert "com.shop.order.placed" in await s.refused(400, sink=url, types=["com.other"])
        assert "types" in await s.refused(400, sink=url, types=[])
        assert "no dialect" in await s.refused(400, sink=url, filters=[{"regex": {"type": "x"}}])
        assert "unknown field" in await s.refused(400, sink=url, colour="red")
        assert "headers" in await s.refused(400, sink=url, protocolsettings={"headers": {"authorization": "x"}})
        assert (await s.client.post("/subscriptions", content=b"[" * 5000)).status_code == 400
        assert (await s.client.post("/subscriptions", content=b" " * 70_000)).status_code == 413
        made = await s.make(url)
        answer = await s.client.put(f"/subscriptions/{made['id']}", json={"id": "x", "sink": url, "protocol": "HTTP"})
        assert answer.status_code == 400
        assert (await s.client.patch("/subscriptions")).status_code == 405


# ---- filters --------------------------------------------------------------------------------------------------------

EVENT: dict[str, str | int | bool] = {
    "specversion": "1.0",
    "id": "1",
    "source": "/till/7",
    "type": "com.shop.order.placed",
    "subject": "Ünïcode",
    "n": 7,
    "b": True,
}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], True),
        ([{"exact": {"type": "com.shop.order.placed", "source": "/till/7"}}], True),
        ([{"exact": {"type": "com.shop.order.placed", "source": "/till/8"}}], False),
        ([{"exact": {"n": "7", "b": "true"}}], True),
        ([{"exact": {"absent": "x"}}], False),
        ([{"prefix": {"type": "com.shop."}}, {"suffix": {"type": ".placed"}}], True),
        ([{"prefix": {"type": "com.shop."}}, {"suffix": {"type": ".gone"}}], False),
        ([{"not": {"exact": {"absent": "x"}}}], True),
        ([{"any": [{"exact": {"n": "8"}}, {"sql": "n > 6"}]}], True),
        ([{"all": [{"exact": {"n": "8"}}, {"sql": "n > 6"}]}], False),
        ([{"sql": "subject LIKE '%code'"}], True),
        ([{"sql": "'true'"}], True),  # coerced
        ([{"sql": "absent = 1"}], False),  # an error is false
        ([{"not": {"any": [{"all": [{"sql": "FALSE"}]}]}}], True),
    ],
)  # fmt: skip
def test_filters(filters: Any, expected: bool) -> None:
    assert compile_filters(filters)(EVENT) is expected


@pytest.mark.parametrize(
    "filters",
    [
        {}, [1], [{}], [{"exact": {}}], [{"exact": {"type": ""}}], [{"exact": {"type": 1}}], [{"exact": {"": "x"}}],
        [{"all": []}], [{"any": []}], [{"any": {}}], [{"not": []}], [{"sql": 1}], [{"sql": "a = "}], [{"sql": "NO(1)"}],
        [{"sql": "TRUE) OR (TRUE"}], [{"exact": {"a": "b"}, "prefix": {"a": "b"}}],
    ],
)  # fmt: skip
def test_wrong_filters(filters: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        compile_filters(filters)


def test_filters_nested_without_end_are_refused() -> None:
    nested: Any = {"exact": {"a": "b"}}
    for _ in range(500):
        nested = {"not": nested}
    with pytest.raises(ValueError, match="deeper"):
        compile_filters([nested])


# ---- the handshake --------------------------------------------------------------------------------------------------


async def test_a_sink_that_does_not_consent_gets_nothing(receiver: Receiver) -> None:
    answers: list[Answer] = [
        200, 405, 500, (302, {"location": receiver.url, "webhook-allowed-origin": "nobody"}, b""),
        (200, {"webhook-allowed-origin": "other.example", "webhook-allowed-rate": "*"}, b""),
    ]  # fmt: skip
    async with shop(origin="events.shop.example") as s:
        for answer in answers:
            receiver.answer = lambda request, answer=answer: answer  # type: ignore[misc]
            assert "did not allow events.shop.example" in await s.refused(400, sink=receiver.url)
        assert "did not answer" in await s.refused(400, sink="http://127.0.0.1:1/")
        await s.app.publish(Placed(order_id="o-1"))
        assert (await s.client.get("/subscriptions")).json() == []
        assert {r.method for r in receiver.requests} == {"OPTIONS"}
        receiver.answer = lambda request: (200, {"webhook-allowed-origin": "*"}, b"")
        await s.make(receiver.url)


async def test_an_allowed_rate_is_kept(receiver: Receiver) -> None:
    times: list[float] = []

    def slowly(request: Request) -> Answer:
        if request.method == "OPTIONS":
            return 200, {"webhook-allowed-origin": "*", "webhook-allowed-rate": "600"}, b""
        times.append(asyncio.get_running_loop().time())
        return 202

    receiver.answer = slowly
    async with shop() as s:
        await s.make(receiver.url)
        await s.app.publish([Placed(order_id=f"o-{number}") for number in range(6)])
        await until(lambda: len(times) == 6)
    assert times[-1] - times[0] >= 0.45  # six within a tenth of a second each


async def test_a_rate_is_asked_for_and_counts_where_none_is_told(receiver: Receiver) -> None:
    said: dict[str, str] = {}
    receiver.answer = lambda request: (200, {"webhook-allowed-origin": "*", **said}, b"")
    async with shop(rate=600) as s:
        for told, kept in ((None, 600), ("*", 0), ("60", 60), ("nonsense", 600), ("0", 600)):
            said = {} if told is None else {"webhook-allowed-rate": told}
            made = await s.make(receiver.url)
            assert receiver.requests[-1].headers["webhook-request-rate"] == "600"
            assert (await s.records())[made["id"]].rate == kept
    with pytest.raises(DefinitionError, match="rate is how many requests a minute"):
        App("shop").subscriptions(Placed, allow=TOKEN, rate=0)


class Later(Receiver):
    """A sink that does not consent at once, but remembers where it may."""

    callback = ""

    def __init__(self) -> None:
        super().__init__()
        self.answer = self._later

    def _later(self, request: Request) -> Answer:
        if request.method == "OPTIONS":
            self.callback = request.headers["webhook-request-callback"]
            return 405
        return 202


@pytest.fixture
async def later() -> AsyncIterator[Later]:
    async with receiving(found := Later()):
        yield found


@pytest.mark.parametrize(
    ("method", "headers", "rate"), [("GET", {}, 1200), ("POST", {"webhook-allowed-rate": "6000"}, 6000)]
)
async def test_a_sink_consents_later_by_the_callback(
    later: Later, method: str, headers: dict[str, str], rate: int
) -> None:
    async with shop(callback=HERE, rate=1200) as s:
        answer = await s.client.post("/subscriptions", json={"sink": later.url, "protocol": "HTTP"})
        made = answer.json()
        assert answer.status_code == 202
        assert made["pending"] > iso(s.app.program.clock.now())  # type: ignore[union-attr]
        place = later.callback.removeprefix(HERE)
        key = place.partition("key=")[2]
        assert len(key) == 64
        shown = await s.client.get(f"/subscriptions/{made['id']}")
        assert shown.json()["pending"] == made["pending"]
        assert key not in answer.text + shown.text, "who subscribes a sink cannot consent for it"
        await s.app.publish(Placed(order_id="o-before"))
        assert f"shop.subscription.{made['id']}" not in await s.groups(), "it holds nothing back yet"
        anyone = httpx.AsyncClient(base_url=s.client.base_url, trust_env=False)
        async with anyone:
            assert (await anyone.head(place)).status_code == 405, "that a link is looked at is no consent"
            for wrong in (place[:-1] + ("0" if place[-1] != "0" else "1"), place.replace("until=2", "until=3"),
                          place.partition("?")[0]):  # fmt: skip
                assert (await anyone.request(method, wrong)).status_code == 404
            assert (await s.records())[made["id"]].wanted.pending
            assert (await anyone.request(method, place, headers=headers)).status_code == 200
            await s.app.publish(Placed(order_id="o-1"))
            await until(lambda: posts(later) == ["o-1"])
            assert (await s.records())[made["id"]].rate == rate
            again = await anyone.request(method, place, headers={"webhook-allowed-rate": "1"})
            assert again.status_code == 200
            assert (await s.records())[made["id"]].rate == rate, "it consented before"
            assert "pending" not in (await s.client.get(f"/subscriptions/{made['id']}")).json()
            assert (await s.client.delete(f"/subscriptions/{made['id']}")).status_code == 200
            assert (await anyone.request(method, place)).status_code == 404


class Eager(Later):
    """A sink that calls back before it answers."""

    base = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "OPTIONS":
            place = dict(scope["headers"])[b"webhook-request-callback"].decode().removeprefix(HERE)
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.post(f"{self.base}{place}")).status_code == 200
        await super().__call__(scope, receive, send)


async def test_a_callback_may_come_before_the_answer() -> None:
    async with shop(callback=HERE) as s, receiving(eager := Eager()):
        eager.base = str(s.client.base_url).rstrip("/")
        answer = await s.client.post("/subscriptions", json={"sink": eager.url, "protocol": "HTTP"})
        assert answer.status_code == 202
        await s.app.publish(Placed(order_id="o-1"))
        await until(lambda: posts(eager) == ["o-1"])


async def test_a_change_waits_for_consent_too_and_loses_nothing(later: Later, receiver: Receiver) -> None:
    async with shop(callback=HERE) as s:
        made = await s.make(receiver.url)
        await s.runs(made["id"])
        wanted = {"sink": later.url, "protocol": "HTTP"}
        answer = await s.client.put(f"/subscriptions/{made['id']}", json=wanted)
        assert answer.status_code == 202
        await until(lambda: not any(w.group.endswith(made["id"]) for w in s.app.program.workers))  # type: ignore[union-attr]
        await s.app.publish(Placed(order_id="o-1"))
        assert (await s.client.get(later.callback.removeprefix(HERE))).status_code == 200
        await until(lambda: posts(later) == ["o-1"])
        assert posts(receiver) == []
        later.answer = lambda request: (200, {"webhook-allowed-origin": "nobody"}, b"")
        assert (await s.client.put(f"/subscriptions/{made['id']}", json=wanted)).status_code == 400
        await s.app.publish(Placed(order_id="o-2"))
        later.answer = lambda request: 202
        await until(lambda: posts(later) == ["o-1", "o-2"])


async def test_consent_that_does_not_come_ends_it(later: Later, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stentor.sinks.subscriptions.WAIT", -1.0)
    async with shop(callback=HERE) as s:
        answer = await s.client.post("/subscriptions", json={"sink": later.url, "protocol": "HTTP"})
        assert answer.status_code == 202
        assert (await s.client.get(later.callback.removeprefix(HERE))).status_code == 404

        async def gone() -> bool:
            return bool((await s.client.get("/subscriptions")).json() == [])

        await until(gone)


def test_a_callback_that_nobody_can_trust_is_refused() -> None:
    with pytest.raises(DefinitionError, match="callback needs secret"):
        App("shop").subscriptions(Placed, allow=TOKEN, callback="https://shop.example")
    with pytest.raises(DefinitionError, match="must be called by https"):
        App("shop").subscriptions(Placed, allow=TOKEN, secret=MASTER, callback="http://shop.example")
    with pytest.raises(ConfigError, match="callback"):
        App("shop").subscriptions(Placed, allow=TOKEN, secret=MASTER, callback="shop")


async def test_the_ingress_of_another_app_consents(receiver: Receiver) -> None:
    seen: asyncio.Queue[str] = asyncio.Queue()
    billing = App("billing", broker="memory://")

    @billing.on(Placed)
    async def invoice(order: Placed) -> None:
        seen.put_nowait(order.order_id)

    async with billing, serve(billing, "127.0.0.1:0") as url, shop() as s:
        async with httpx.AsyncClient() as client:
            answer = await client.options(f"{url}/events", headers={"webhook-request-origin": "a.example"})
            assert answer.status_code == 200
            assert answer.headers["webhook-allowed-origin"] == "a.example"
            assert answer.headers["webhook-allowed-rate"] == "*"
            assert "POST" in answer.headers["allow"]
            headers = {
                "webhook-request-origin": "a.example", "webhook-request-rate": "120",
                "webhook-request-callback": f"{receiver.url}?key=x",
            }  # fmt: skip
            answer = await client.options(f"{url}/events", headers=headers)
            assert answer.headers["webhook-allowed-rate"] == "*"
            assert not receiver.requests, "it consents at once, and calls no URL that it is given"
            plain = await client.options(f"{url}/events")
            assert "webhook-allowed-origin" not in plain.headers
        await s.make(f"{url}/events", types=["com.shop.order.placed"], config={"mode": "structured"})
        await s.app.publish(Placed(order_id="o-1"))
        async with asyncio.timeout(60):
            assert await seen.get() == "o-1"


# ---- where events may be sent ---------------------------------------------------------------------------------------

NOT_PUBLIC = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1",
    "::", "::1", "::7f00:1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1",
    "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1",
    "2001::1", "2002:7f00:1::", "2002:808:808::1", "2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "151.101.1.69", "2606:4700::1111", "2a00:1450:4001::1"])
def test_addresses_that_are(address: str) -> None:
    assert public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "2130706433", "0x7f000001", "0177.0.0.1", "127.1",
     "127.0.0.1.", "10.0.0.1", "localhost", "[64:ff9b::7f00:1]", "0"],
)  # fmt: skip
async def test_a_subscription_to_a_private_address_is_refused(host: str) -> None:
    async with shop(inside=()) as s:
        for scheme in ("http", "https"):
            detail = await s.refused(400, sink=f"{scheme}://{host}:8080/hook")
            assert "not a public address" in detail or "no address in its usual form" in detail or "no URL" in detail
        assert (await s.client.get("/subscriptions")).json() == []


async def test_plain_http_goes_only_inside() -> None:
    async def everywhere(host: str, port: int) -> list[str]:
        return ["8.8.8.8"]

    guard = Guard("http://hook.example/", networks(LOOPBACK, "inside"), everywhere)
    with pytest.raises(NotDelivered, match="by https"):
        await guard.resolve("hook.example", 80)
    await Guard("https://hook.example/", (), everywhere).resolve("hook.example", 443)
    with pytest.raises(ConfigError, match="inside"):
        networks(["10.0.0.1/8"], "inside")


async def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["8.8.8.8", "10.0.0.1"]

    with pytest.raises(NotDelivered, match="not a public address"):
        await Guard("https://hook.example/", (), mixed).resolve("hook.example", 443)


async def test_a_name_that_changes_its_mind_reaches_nothing_private(receiver: Receiver) -> None:
    """DNS rebinding: the handshake sees an allowed address, every later answer is one that is not."""
    asked: list[str] = []
    port = int(receiver.url.split(":")[2].split("/")[0])

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.2"] if len(asked) == 1 else ["127.0.0.1"]

    app = App("shop", broker="memory://")
    subscriptions(app, Placed, allow=TOKEN, origin=None, secret=None, inside=("127.0.0.2/32",), lookup=rebinding)
    second = Receiver()
    second.answer = consenting
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with (
        receiving(second, host="127.0.0.2") as allowed, app, serve(app, "127.0.0.1:0") as url,
        httpx.AsyncClient(base_url=url, headers=headers) as client,
    ):  # fmt: skip
        port = int(allowed.url.split(":")[2].split("/")[0])
        answer = await client.post(
            "/subscriptions", json={"sink": f"http://rebind.example:{port}/", "protocol": "HTTP"}
        )
        assert answer.status_code == 201, answer.text
        async with receiving(Receiver(), port=port) as private:
            await app.publish(Placed(order_id="o-1"))
            await until(lambda: len(asked) >= 3)
            assert private.requests == []
    assert [request.method for request in second.requests] == ["OPTIONS"]


async def test_the_connection_is_pinned_and_the_name_stays_in_host_and_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("hook.example")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    lookups = 0

    async def once(host: str, port: int) -> list[str]:
        nonlocal lookups
        lookups += 1
        return ["127.0.0.1"]

    async with receiving(ssl_certfile=str(tmp_path / "server.pem")) as receiver:
        port = receiver.url.split(":")[2].split("/")[0]
        url = f"https://hook.example:{port}/hook"
        guard = Guard(url, networks(LOOPBACK, "inside"), once)
        sender = Sender(Target(url, ca=tmp_path / "ca.pem"), resolver=guard)
        for _ in range(3):
            async with sender.session().post(url) as answer:
                assert answer.status == 202
        await sender.close()
        assert [request.headers["host"] for request in receiver.requests] == [f"hook.example:{port}"] * 3
        assert lookups == 1
        wrong = Sender(Target(url.replace("hook.", "other."), ca=tmp_path / "ca.pem"), resolver=guard)
        with pytest.raises(Exception, match=r"(?i)hostname mismatch"):
            await wrong.session().post(url.replace("hook.", "other."))
        await wrong.close()


async def test_proxies_of_the_environment_are_not_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with shop() as s:
        await s.make(receiver.url)


# ---- on every broker ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("kind", brokers())
async def test_it_works_on_every_broker(
    kind: str, receiver: Receiver, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    broker = url_of(kind, tmp_path / "unused", tmp_path_factory)
    async with shop(broker) as s:
        kept = await s.make(receiver.url, types=["com.shop.order.placed"])
        left = await s.make(receiver.url, types=["com.shop.payment.taken"])
        await s.app.publish([Placed(order_id="o-0"), Paid(order_id="p-0")])
        await until(lambda: sorted(posts(receiver)) == ["o-0", "p-0"])
        assert (await s.client.delete(f"/subscriptions/{left['id']}")).status_code == 200
        gone = f"shop.subscription.{left['id']}"

        async def dropped() -> bool:
            return gone not in await s.groups()

        await until(dropped)
    async with App("shop", broker=broker).connected() as outside:
        await outside.publish([Placed(order_id=f"o-{number}") for number in range(1, 10)])
    async with shop(broker) as s:
        assert [entry["id"] for entry in (await s.client.get("/subscriptions")).json()] == [kept["id"]]
        await until(lambda: len(posts(receiver)) >= 11)
    assert sorted(posts(receiver)) == [*(f"o-{number}" for number in range(10)), "p-0"]
