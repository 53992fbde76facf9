"""Users over real HTTP: what a browser may see and say, and that a client that comes back lacks nothing."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from stentor import App, Event
from stentor.errors import DefinitionError
from stentor.identity import Identity, Visit, cookies
from stentor.serve import serve
from stentor.sources import follow
from stentor.sources.follow import read_places, write_places
from tests.real import brokers, url_of
from tests.sources.reading import until


class Placed(Event, topic="orders", key="customer", type="com.shop.order.placed"):
    customer: str
    number: int = 0


class Shipped(Event, topic="parcels", key="customer", type="com.shop.order.shipped"):
    customer: str
    number: int = 0


class Secret(Event, topic="secrets", type="com.shop.secret"):
    text: str


def identify(visit: Visit) -> Identity | None:
    name = visit.query.get("token") or visit.cookies.get("session") or visit.headers.get("x-user")
    if name == "staff":
        return Identity(name="staff", publish=(Placed, Shipped), subscribe=(Placed, "com.shop.order.shipped"))
    if name in ("ada", "bob"):
        return Identity(name=name, publish=(Placed,), subscribe=(Placed, Shipped), where=f"partitionkey = '{name}'")
    return Identity(name="mute") if name == "mute" else None


class Site:
    def __init__(self, app: App, url: str, client: httpx.AsyncClient) -> None:
        self.app = app
        self.url = url
        self.client = client

    @asynccontextmanager
    async def socket(self, query: str = "token=ada", **options: Any) -> AsyncIterator[ClientConnection]:
        address = self.url.replace("http", "ws") + f"/ws?{query}"
        # A client that holds frames back does not read the answer to its close, and waits ten seconds for it.
        options = {"subprotocols": ["cloudevents.json"], "max_queue": None, **options}
        async with connect(address, **options) as socket:
            yield socket

    @asynccontextmanager
    async def stream(self, query: str = "token=ada", **headers: str) -> AsyncIterator["Stream"]:
        async with self.client.stream("GET", f"/stream?{query}", headers=headers) as answer:
            assert answer.status_code == 200, (await answer.aread()).decode()
            yield Stream(answer)


class Goodbye(Exception):
    """The server ended the stream; a client comes back."""


class Stream:
    """Server-Sent Events as a browser reads them."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.aiter_lines()
        self.last = ""

    async def __anext__(self) -> tuple[str, str]:
        """The next event's name and data; one without data only moves ``last``."""
        name, data = "message", []
        async with asyncio.timeout(60):
            async for line in self._lines:
                field, _, value = line.partition(": ")
                if field == "id":
                    self.last = value
                elif field == "event":
                    name = value
                elif field == "data":
                    data.append(value)
                elif not line and data:
                    return name, "\n".join(data)
                elif not line and self.last:
                    return "position", self.last
        raise StopAsyncIteration

    async def event(self) -> Any:
        """The next CloudEvent."""
        while (found := await anext(self))[0] == "position":
            pass
        if found[0] == "bye":
            raise Goodbye(found[1])
        assert found[0] == "message", found
        return json.loads(found[1])


@asynccontextmanager
async def site(url: str = "memory://", **options: Any) -> AsyncIterator[Site]:
    app = App("shop", broker=url)
    app.users(Placed, Shipped, identify=identify, **options)
    async with (
        app,
        serve(app, "127.0.0.1:0", grace=2) as address,
        httpx.AsyncClient(base_url=address, timeout=30) as client,
    ):
        yield Site(app, address, client)


async def said(socket: ClientConnection, type: str | None = None) -> Any:
    """The next message, of one type if it is given."""
    while True:
        found = json.loads(await asyncio.wait_for(socket.recv(), 60))
        if type in (None, found["type"]):
            return found


def order(number: int, customer: str = "ada") -> str:
    return json.dumps({
        "specversion": "1.0", "id": f"o-{number}", "source": "/browser", "type": "com.shop.order.placed",
        "data": {"customer": customer, "number": number},
    })  # fmt: skip


# ---- subscribing and publishing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("broker", ["memory", "sqlite"])
async def test_users_see_and_say_what_they_may(broker: str, tmp_path: Path) -> None:
    url = "memory://" if broker == "memory" else f"sqlite:///{tmp_path}/shop.db"
    async with site(url) as here, here.socket() as ada, here.socket("token=staff") as staff, here.stream() as stream:
        assert ada.subprotocol == "cloudevents.json"
        assert (await said(ada))["type"] == (await said(staff))["type"] == "stentor.position"
        assert (await anext(stream))[0] == "position"
        await ada.send(order(1))
        accepted = await said(ada, "stentor.accepted")
        assert accepted["data"] == {"id": "o-1", "duplicate": False}
        for seen in (await said(ada, "com.shop.order.placed"), await said(staff), await stream.event()):
            assert seen["data"] == {"customer": "ada", "number": 1}
            assert (seen["source"], seen["partitionkey"]) == ("/shop/users/ada", "ada")
        await ada.send(order(1))
        assert (await said(ada))["data"] == {"id": "o-1", "duplicate": True}
        # What is another's is not told, and nobody speaks for another.
        await here.app.publish([Placed(customer="bob", number=2), Shipped(customer="ada", number=1)])
        assert (await said(ada))["data"] == (await stream.event())["data"] == {"customer": "ada", "number": 1}
        assert {(await said(staff))["type"] for _ in range(2)} == {"com.shop.order.placed", "com.shop.order.shipped"}
        for text, status, detail in (
            (order(3, "bob"), 403, "ada may not publish this com.shop.order.placed"),
            (order(3).replace("order.placed", "order.shipped"), 403, "ada may not publish 'com.shop.order.shipped'"),
            (order(3).replace('"number": 3', '"number": "x"'), 400, "Expected `int`, got `str`"),
            ("{", 400, "truncated"),
            ("[" * 2000, 400, ""),
        ):
            await ada.send(text)
            refused = await said(ada)
            assert (refused["type"], refused["data"]["status"]) == ("stentor.refused", status)
            assert detail in refused["data"]["detail"]
            assert refused["data"]["id"] == ("o-3" if len(text) > 10 and text[0] == "{" else None)
        stored = [message async for _, message in here.app.broker.browse("orders", "earliest", follow=False)]
        assert [(message.id, message.source) for message in stored][:1] == [("o-1", "/shop/users/ada")]
        assert len(stored) == 2


async def test_a_filter_of_the_client_narrows() -> None:
    async with site() as here:
        where = httpx.QueryParams({"token": "staff", "type": "com.shop.order.placed", "where": "partitionkey = 'bob'"})
        async with here.stream(str(where)) as stream:
            await anext(stream)
            await here.app.publish([Placed(customer="ada"), Shipped(customer="bob"), Placed(customer="bob", number=7)])
            assert (await stream.event())["data"]["number"] == 7


async def test_events_are_posted_too() -> None:
    structured = {"content-type": "application/cloudevents+json"}
    async with site() as here:
        for again in ([], ["o-1"]):
            answer = await here.client.post("/stream?token=ada", content=order(1), headers=structured)
            assert (answer.status_code, answer.json()) == (202, {"ids": ["o-1"], "duplicates": again})
        for query, body, headers, status in (
            ("token=ada", order(2, "bob"), structured, 403),
            ("token=mute", order(2), structured, 403),
            ("", order(2), structured, 401),
            ("token=ada", order(2), {"content-type": "text/plain"}, 415),  # what a form of any page can send
            ("token=ada", order(2), {**structured, "origin": "https://evil.example"}, 403),
        ):
            answer = await here.client.post(f"/stream?{query}", content=body, headers=headers)
            assert answer.status_code == status, answer.text


async def test_who_may_not_is_told_at_the_door() -> None:
    async with site(origins=["https://shop.example"]) as here:
        for query, headers, status, detail in (
            ("token=nobody", {}, 401, "nobody is known"),
            ("token=mute", {}, 403, "mute may not subscribe to anything"),
            ("token=ada&type=com.shop.secret", {}, 403, "ada may not subscribe to 'com.shop.secret'"),
            ("token=ada&where=a%20%3D", {}, 400, "invalid CloudEvents SQL"),
            ("token=ada&last=orders", {}, 400, "is no position"),
            ("token=ada&last=orders:~" + "9" * 18, {}, 400, "is no position"),
            ("token=ada", {"origin": "https://evil.example"}, 403, "pages of https://evil.example may not come here"),
            ("token=ada", {"origin": "null"}, 403, "pages of null may not"),
        ):
            answer = await here.client.get(f"/stream?{query}", headers=headers)
            assert (answer.status_code, detail in answer.json()["detail"]) == (status, True), answer.text
            with pytest.raises(InvalidStatus) as refused:
                async with here.socket(query, additional_headers=headers):
                    pass
            assert refused.value.response.status_code == status
            assert detail in refused.value.response.body.decode()
        for origin in ("https://shop.example", here.url):
            async with (
                here.socket(additional_headers={"origin": origin}),
                here.client.stream("GET", "/stream?token=ada", headers={"origin": origin}) as answer,
            ):
                assert answer.headers.get("access-control-allow-origin") == (None if origin == here.url else origin)
        async with here.stream("", cookie="a=b; session=ada"), here.stream("", **{"x-user": "bob"}):
            pass
        assert (await here.client.get("/ws?token=ada")).status_code == 426
    assert (cookies("a=b; c"), cookies("a=b; c=d")) == ({}, {"a": "b", "c": "d"})


def test_what_cannot_work_is_refused_where_it_is_written() -> None:
    app = App("shop", broker="memory://")
    with pytest.raises(DefinitionError, match="identify is a function"):
        app.users(Placed, identify="ada")  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="int is no event"):
        app.users(int, identify=identify)
    app.users(Placed, identify=identify)
    assert "orders" in app.catalog.topics()
    with pytest.raises(DefinitionError, match="two parts of shop answer to GET /stream"):
        app.users(Placed, identify=identify)


# ---- coming back ----------------------------------------------------------------------------------------------------


def test_places_as_text() -> None:
    for text in ("", "orders:17", "a.b:3,orders:~1795780000000"):
        assert write_places(read_places(text)) == text
    for text in ("orders", "orders:", "orders:x", "orders:-1", ":~", "orders:~99999999999999999", "orders:" + "9" * 19):
        with pytest.raises(ValueError, match="is no position"):
            read_places(text)


async def coming_and_going(url: str, total: int = 300) -> tuple[list[int], int]:
    """The numbers that a client sees that is cut off again and again while events come; and how many came."""
    last = ""
    seen: list[int] = []
    dice = random.Random(7)
    async with asyncio.timeout(90), site(url) as here:

        async def publish() -> None:
            for number in range(1, total + 1):
                kind = Placed if number % 3 else Shipped
                await here.app.publish(kind(customer="ada" if number % 2 else "bob", number=number))
                await asyncio.sleep(0.002)

        async with here.stream("token=staff") as stream:
            last = (await anext(stream))[1]
        publishing = asyncio.create_task(publish())
        while len(set(seen)) < total:
            enough = min(total, len(set(seen)) + dice.randrange(1, 40))  # of those that it had not seen
            if dice.random() < 0.5:
                async with here.stream("token=staff", **{"last-event-id": last}) as stream:
                    with suppress(Goodbye):  # the broker was out of reach for a moment
                        while len(set(seen)) < enough:
                            seen.append((await stream.event())["data"]["number"])
                    last = stream.last or last
            else:
                async with here.socket(f"token=staff&last={last}") as socket:
                    with suppress(ConnectionClosed):
                        while len(set(seen)) < enough:
                            while (found := await said(socket))["type"].startswith("stentor."):
                                last = found["position"]
                            seen.append(found["data"]["number"])
                            last = found["position"]
        await publishing
    return seen, total


@pytest.mark.parametrize("broker", ["memory", "sqlite"])
async def test_a_client_that_comes_back_lacks_nothing_and_sees_nothing_twice(broker: str, tmp_path: Path) -> None:
    seen, total = await coming_and_going("memory://" if broker == "memory" else f"sqlite:///{tmp_path}/shop.db")
    assert sorted(seen) == list(range(1, total + 1))
    assert [number for number in seen if number % 3] == [n for n in range(1, total + 1) if n % 3]  # a topic's order


async def test_what_comes_while_a_client_joins_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MARGIN", 0.0)  # so that the reader knows no position yet
    only = "token=staff&type=com.shop.order.placed"
    async with site() as here:
        first, _ = await here.app.publish([Placed(customer="ada", number=n) for n in (1, 2)])
        await asyncio.sleep(0.01)
        async with here.stream(only) as other:
            await anext(other)
            browse, calls = here.app.broker.browse, []

            async def busy(topic: str, start: Any, *, follow: bool) -> AsyncIterator[Any]:
                calls.append(start)
                if len(calls) == 2:
                    await here.app.publish(Placed(customer="ada", number=3))
                    assert (await other.event())["data"]["number"] == 3  # the reader has queued it
                async for found in browse(topic, start, follow=follow):
                    yield found

            monkeypatch.setattr(here.app.broker, "browse", busy)
            async with here.stream(only, **{"last-event-id": f"orders:{first.position}"}) as stream:
                assert [(await stream.event())["data"]["number"] for _ in range(2)] == [2, 3]
                await here.app.publish(Placed(customer="ada", number=4))
                assert (await stream.event())["data"]["number"] == 4


async def test_a_client_that_comes_as_the_last_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What read for the one that left takes a while to end, and reads for nobody any more."""
    browse, gate = follow.Reader._browse, asyncio.Event()
    reading: list[follow.Reader] = []

    async def slow_to_end(reader: follow.Reader, *, follow: bool) -> AsyncIterator[Any]:
        reading.append(reader)
        try:
            async for found in browse(reader, follow=follow):
                yield found
        finally:
            if follow:
                await gate.wait()

    monkeypatch.setattr(follow.Reader, "_browse", slow_to_end)
    async with site() as here:
        async with here.stream("token=staff") as stream:
            await anext(stream)
        await until(lambda: all(reader.task.cancelling() for reader in reading))
        async with here.stream("token=staff") as stream:
            await anext(stream)
            await here.app.publish(Placed(customer="ada", number=1))
            async with asyncio.timeout(20):
                assert (await stream.event())["data"]["number"] == 1
        gate.set()


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("broker", brokers())
async def test_on_servers_too(broker: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where partitions have no common order a client goes on by time, and may see what is near it again."""
    seen, total = await coming_and_going(url_of(broker, tmp_path / "x", tmp_path_factory))
    again = broker in ("kafka", "rabbitmq", "rocketmq")
    assert (sorted(set(seen)) if again else sorted(seen)) == list(range(1, total + 1))


async def test_a_client_after_a_restart_of_the_program_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    async with site(url) as here, here.stream() as stream:
        await anext(stream)
        await here.app.publish(Placed(customer="ada", number=1))
        assert (await stream.event())["data"]["number"] == 1
        last = stream.last
    async with site(url) as here:
        await here.app.publish([Placed(customer="ada", number=n) for n in (2, 3)])
        async with here.stream(**{"last-event-id": last}) as stream:
            assert [(await stream.event())["data"]["number"] for _ in range(2)] == [2, 3]
            await here.app.publish(Placed(customer="ada", number=4))
            assert (await stream.event())["data"]["number"] == 4


# ---- bounds ---------------------------------------------------------------------------------------------------------


async def test_a_slow_client_is_let_go_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "QUEUE", 10)
    async with site() as here:
        async with here.socket("token=staff", max_queue=1) as socket:
            await said(socket)
            # More than the buffers between take while nobody reads, in one go, so that the queue is full at once.
            await here.app.publish([Placed(customer="x" * 200, number=n) for n in range(1000)])
            numbers, last = [], ""
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    found = await said(socket, "com.shop.order.placed")
                    numbers.append(found["data"]["number"])
                    last = found["position"]
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, "come back" in closed.value.rcvd.reason) == (1013, True)
            assert numbers == list(range(len(numbers)))
            assert len(numbers) <= 12
        async with here.stream("token=staff", **{"last-event-id": last}) as stream:
            numbers += [(await stream.event())["data"]["number"] for _ in range(1000 - len(numbers))]
        assert numbers == list(range(1000))


async def test_who_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stentor.sources.users.SLOW", 0.2)
    monkeypatch.setattr("stentor.sources.users.LAST", 0.1)
    async with site() as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(here.url.rpartition(":")[2]), limit=1024)
        writer.write(b"GET /stream?token=staff HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"id: ")
        for number in range(200):  # 20 MB: more than the system keeps for a connection
            await here.app.publish(Placed(customer="ada", number=number), headers={"text": "x" * 100_000})
        async with asyncio.timeout(60):
            while clients(here) > 0:
                await asyncio.sleep(0.02)
        writer.close()


def clients(here: Site) -> int:
    (endpoint,) = (each for each in here.app.endpoints if each.path == "/ws")
    return int(endpoint.answer.__self__.clients)  # type: ignore[attr-defined]


async def test_clients_share_one_reader_a_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    async with site() as here:
        browse, browsing = here.app.broker.browse, []

        def counted(topic: str, start: Any, *, follow: bool) -> Any:
            browsing.append((topic, follow))
            return browse(topic, start, follow=follow)

        monkeypatch.setattr(here.app.broker, "browse", counted)
        async with asyncio.TaskGroup() as group:
            there = asyncio.Barrier(21)

            async def one() -> None:
                async with here.stream("token=staff&type=com.shop.order.placed") as stream:
                    await anext(stream)
                    await there.wait()
                    assert (await stream.event())["data"]["number"] == 9

            for _ in range(20):
                group.create_task(one())
            await there.wait()
            await here.app.publish(Placed(customer="ada", number=9))
        assert browsing == [("orders", False), ("orders", True)]
        async with asyncio.timeout(60):
            while clients(here) > 0:
                await asyncio.sleep(0.01)


async def test_there_is_room_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stentor.sources.users.CLIENTS", 1)
    async with site() as here, here.stream():
        answer = await here.client.get("/stream?token=ada")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


async def test_signs_of_life_move_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stentor.sources.users.QUIET", 0.05)
    async with site() as here, here.stream() as stream, here.socket() as socket:
        first = (await anext(stream))[1]
        await here.app.publish(Placed(customer="bob", number=1))  # not for ada: but she need not see it again
        while (await anext(stream))[1] == first:
            pass
        while write_places(read_places((await said(socket))["position"])) == first:
            pass


async def test_a_stop_ends_the_streams_at_once() -> None:
    running = site()
    here = await running.__aenter__()
    async with httpx.AsyncClient(base_url=here.url) as client, client.stream("GET", "/stream?token=ada") as answer:
        stream = Stream(answer)
        await anext(stream)
        async with here.socket() as socket:
            await said(socket)
            begin = asyncio.get_running_loop().time()
            await running.__aexit__(None, None, None)
            assert asyncio.get_running_loop().time() - begin < 1.5  # the grace of ``site`` is 2 s
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            with pytest.raises(ConnectionClosed):
                await said(socket, "never")
