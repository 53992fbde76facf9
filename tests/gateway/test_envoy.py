"""The real Envoy, on what `stentor gateway envoy` writes: each feature by sending events."""

import asyncio
import json
from collections import defaultdict
from pathlib import Path

import pytest

from stentor.gateway import files
from tests.gateway.bus import PLACED, SENT, event, running, structured

pytestmark = [pytest.mark.server, pytest.mark.slow]
STRUCTURED = {"content-type": "application/cloudevents+json; charset=utf-8"}


async def test_a_type_goes_to_the_service_that_handles_it_and_an_unknown_one_to_the_dead_letters(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as (bus, client):
        assert (await client.post("/events", headers=event(key="k"), content=b'{"order": "k"}')).status_code == 202
        [got] = bus.one("billing").got
        assert bus.one("billing").bodies == [b'{"order": "k"}']
        assert {name: got[name] for name in event(key="k")} == event(key="k")
        assert not [name for name in got if name.startswith("x-stentor") and name != "x-stentor-key"]
        assert (await client.post("/events", headers=event("com.shop.nothing"))).status_code == 202
        [dead] = bus.one("gateway").got
        assert (dead["ce-type"], dead["x-dead-letter-reason"]) == ("com.shop.nothing", "unknown type")
        assert bus.one("gateway").queries == ["topic=gateway.unknown"], "the relay takes types that it does not know"
        assert (await client.post("/events", headers=event(""))).status_code == 400
        assert (await client.get("/events")).status_code == 405
        assert (await client.post("/other", headers=event())).status_code == 404
        assert len(bus.one("billing").got) == len(bus.one("gateway").got) == 1
        files.check(bus.model())


async def test_a_structured_event_goes_by_what_is_in_its_body(tmp_path: Path) -> None:
    async with running(tmp_path) as (bus, client):

        async def post(body: bytes, **headers: str) -> int:
            return (await client.post("/events", headers=STRUCTURED | headers, content=body)).status_code

        assert await post(structured(PLACED)) == 202
        assert await post(structured("com.shop.nothing"), **{"ce-type": PLACED, "x-stentor-type": PLACED}) == 202
        assert len(bus.one("billing").got) == len(bus.one("gateway").got) == 1
        assert json.loads(bus.one("billing").bodies[0])["type"] == PLACED
        for body in (b"{broken", b"[]", b"{}", b'{"type": 7}', b'{"type": ""}', b'{"type": null}'):
            assert await post(body) in (202, 400), body
        assert await post(b"{broken") == await post(b"{}") == 400
        batch = {"content-type": "application/cloudevents-batch+json"}
        assert (await client.post("/events", headers=batch, content=b"[]")).status_code == 415
        assert len(bus.one("billing").got) == 1


async def test_no_spelling_of_a_type_passes_by_its_route(tmp_path: Path) -> None:
    async with running(tmp_path) as (bus, client):
        spelled = event(PLACED.replace("order", "%6Frder"), x_stentor_type=SENT, x_stentor_source="/evil")
        assert (await client.post("/events?topic=evil", headers=spelled)).status_code == 202
        assert bus.one("billing").queries == [""]
        assert len(bus.one("billing").got) == 1
        twice = [*event().items(), ("ce-type", SENT)]
        assert (await client.post("/events", headers=twice)).status_code == 400
        forged = event("com.shop.nothing", x_dead_letter_reason="all is well")
        assert (await client.post("/events", headers=forged)).status_code == 202
        assert bus.one("gateway").got[0]["x-dead-letter-reason"] == "unknown type"


ROUTES = """
[[routes]]
type = "com.shop.*"
source = "/till/*"
to = ["till"]
[[routes]]
type = "com.shop.order.placed"
data = { country = "DE", "amount.high" = true, count = 3 }
to = ["abroad"]
[[routes]]
type = "org.other.*"
to = ["store"]
"""


async def test_routes_go_by_prefix_source_and_content(tmp_path: Path) -> None:
    async with running(tmp_path, ROUTES, till=1, abroad=1) as (bus, client):
        good = {"country": "DE", "amount": {"high": True}, "count": 3}

        async def post(source: str, data: object, type: str = PLACED) -> None:
            headers = event(type) | {"ce-source": source}
            assert (await client.post("/events", headers=headers, content=json.dumps(data))).status_code == 202
            body = json.loads(structured(type)) | {"source": source, "data": data}
            answer = await client.post("/events", headers=STRUCTURED, content=json.dumps(body))
            assert answer.status_code == 202

        await post("/till/9", good)
        await post("/web", good)
        await post("/web", good | {"country": "AT"})
        await post("/web", good | {"amount": {"high": False}})
        await post("/web", good | {"count": 4})
        await post("/web", {}, "org.other.thing")
        counts = {name: len(bus.one(name).got) for name in bus.services}
        assert counts == {"shop": 0, "billing": 6, "store": 2, "gateway": 0, "till": 2, "abroad": 2}


async def test_the_events_of_a_key_go_to_one_host(tmp_path: Path) -> None:
    async with running(tmp_path, billing=2) as (bus, client):
        for number in range(120):
            key = f"key-{number % 30}"
            if number % 2:
                answer = await client.post("/events", headers=event(number=number, key=key))
            else:
                body = structured(number=number, partitionkey=key)
                answer = await client.post("/events", headers=STRUCTURED, content=body)
            assert answer.status_code == 202
        hosts = defaultdict(set)
        for host in bus.services["billing"]:
            for got, body in zip(host.got, host.bodies, strict=True):
                hosts[got.get("ce-partitionkey") or json.loads(body)["partitionkey"]].add(host.port)
        assert len(hosts) == 30
        assert all(len(ports) == 1 for ports in hosts.values())
        assert all(len(host.got) > 20 for host in bus.services["billing"])


async def test_a_publish_is_tried_again_on_another_host(tmp_path: Path) -> None:
    async with running(tmp_path, billing=2) as (bus, client):
        one, two = bus.services["billing"]
        one.answer = two.answer = lambda count: 503 if count == 1 else 202
        assert (await client.post("/events", headers=event(key="k"))).status_code == 202
        assert len(one.got) >= 1 <= len(two.got)
        assert sum((one.accepted + two.accepted).values()) == 1
        one.answer = two.answer = lambda count: 400
        before = len(one.got) + len(two.got)
        assert (await client.post("/events", headers=event(key="k"))).status_code == 400
        assert len(one.got) + len(two.got) == before + 1, "what the service refuses for good is not tried again"


async def test_a_host_that_is_not_ready_is_left_out_and_comes_back(tmp_path: Path) -> None:
    async with running(tmp_path, billing=2) as (bus, client):
        one, two = bus.services["billing"]

        async def spread(count: int = 40) -> tuple[int, int]:
            before = len(one.got), len(two.got)
            for number in range(count):
                answer = await client.post("/events", headers=event(number=number, key=f"k{number}"))
                assert answer.status_code == 202, answer.text
            return len(one.got) - before[0], len(two.got) - before[1]

        assert min(await spread()) > 0
        one.ready = 503
        async with asyncio.timeout(60):
            while (await spread())[0]:
                await asyncio.sleep(0.1)
        one.ready = 200
        async with asyncio.timeout(60):
            while not (await spread())[0]:
                await asyncio.sleep(0.1)
        await two.stop()
        one.accepted.clear()
        await spread(20)  # its port refuses: each event is taken by the other, at once
        assert len(one.accepted) == 20


async def test_a_host_that_keeps_failing_is_ejected(tmp_path: Path) -> None:
    async with running(tmp_path, billing=2) as (bus, client):
        one, two = bus.services["billing"]
        one.answer = lambda count: 500
        for number in range(60):
            assert (await client.post("/events", headers=event(number=number, key=f"k{number}"))).status_code == 202
        assert 5 <= len(one.got) < 25, "without ejection it would get about half of them"
        assert len(two.accepted) == 60


async def test_a_type_has_its_rate(tmp_path: Path) -> None:
    async with running(tmp_path, f'[types."{PLACED}"]\nlimit = "5/h"') as (bus, client):
        answers = [await client.post("/events", headers=event(number=number)) for number in range(8)]
        assert [answer.status_code for answer in answers] == [202] * 5 + [429] * 3
        assert answers[-1].headers["retry-after"] == "3600"
        assert (await client.post("/events", headers=event("com.shop.nothing"))).status_code == 202
        assert len(bus.one("billing").got) == 5


async def test_a_body_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, "max_bytes = 100_000") as (bus, client):
        assert (await client.post("/events", headers=event(), content=b"x" * 100_000)).status_code == 202
        assert (await client.post("/events", headers=event(), content=b"x" * 100_001)).status_code == 413
        assert len(bus.one("billing").got) == 1


async def test_a_stuck_service_stops_nobody_else(tmp_path: Path) -> None:
    """The circuit breaker of one cluster bounds what waits for it; other services are served meanwhile."""
    async with running(tmp_path) as (bus, client):
        bus.one("billing").delay = 3
        stuck = [asyncio.create_task(client.post("/events", headers=event(number=number))) for number in range(50)]
        async with asyncio.timeout(60):
            while len(bus.one("billing").got) < 50:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(2):
            assert (await client.post("/events", headers=event("com.shop.nothing"))).status_code == 202
        assert {(await answer).status_code for answer in stuck} == {202}


CONNECTIONS, PENDING = 1024, 1024
"""What the circuit breaker of a service lets it have under way, and waiting."""


async def test_what_waits_for_a_stuck_service_is_bounded(tmp_path: Path) -> None:
    """Its circuit breaker trips: what is too much is refused at once, reaches nobody, and other services are served."""
    most, more = CONNECTIONS + PENDING, 300
    async with running(tmp_path) as (bus, client):
        billing, done = bus.one("billing"), asyncio.Event()
        billing.held = done
        answers: dict[int, int] = {}
        turned_away: set[str] = set()
        refused = asyncio.Event()

        async def send(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = "".join(f"{name}: {value}\r\n" for name, value in event(number=number, content_length="2").items())
            writer.write(f"POST /events HTTP/1.1\r\nhost: bus\r\n{head}\r\n{{}}".encode())
            said = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            answers[number] = int(said.split()[1])
            if "x-envoy-overloaded: true" in said:
                turned_away.add(str(number))
            if len(turned_away) >= 50:
                refused.set()
            writer.close()

        # All connections first: then the events come at once, long before anything times out.
        ends = [await asyncio.open_connection("127.0.0.1", bus.ports["listen"]) for _ in range(most + more)]
        sending = [asyncio.create_task(send(number, *end)) for number, end in enumerate(ends)]
        async with asyncio.timeout(60):
            await refused.wait()
            assert set(answers.values()) == {503}, "nobody was served yet"
            assert (await client.post("/events", headers=event("com.shop.nothing"))).status_code == 202
            done.set()
            await asyncio.gather(*sending)
        assert not turned_away & billing.accepted.keys()
        taken = {str(number) for number, status in answers.items() if status == 202}
        assert taken <= billing.accepted.keys()
        assert taken
        assert (await client.post("/events", headers=event(number=most + more))).status_code == 202
