"""What each grade of broadcast promises when a target is down, slow, answers 503, or does so every other time."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from stentor import App
from stentor.message import dead_topic, decode_dead_letter
from stentor.testing.conformance.stage import until
from stentor.testing.conformance.stands import stands
from tests import command
from tests.gateway.bus import PAID, PLACED, Bus, Service, event, running

pytestmark = [pytest.mark.server, pytest.mark.slow]
EVENTS = 40
SLOW = 0.4
BODY = b'{"order": "k"}'
Fault = str


async def break_(service: Service, fault: Fault) -> None:
    if fault == "down":
        await service.stop()
    elif fault == "slow":
        service.delay = SLOW
    elif fault == "503":
        service.answer = lambda count: 503
    elif fault == "flapping":
        service.answer = lambda count: 503 if count % 2 else 202


async def publish(client: httpx.AsyncClient, count: int = EVENTS) -> tuple[list[httpx.Response], float]:
    """So many events at once; the answers, and the seconds until the last."""
    start = time.monotonic()
    wishes = [
        client.post("/events", headers=event(PAID, number, key=f"k{number}"), content=BODY) for number in range(count)
    ]
    return list(await asyncio.gather(*wishes)), time.monotonic() - start


def taken(service: Service) -> tuple[int, int]:
    """How many events a service took, and how often in all."""
    return len(service.accepted), sum(service.accepted.values())


async def settled(bus: Bus, service: Service, count: int) -> None:
    """Until a service took so many events, by a proxy that may still be at it."""
    try:
        await until(lambda: len(service.accepted) >= count)
    except AssertionError:
        workers = bus.relay.program.workers if bus.relay.program is not None else []
        told = [f"{each.group}: {each.counts}, {each.running} running, {each.hold.reason}" for each in workers]
        got = f"{len(service.accepted)} of {count} taken, {len(service.got)} asked for"
        pytest.fail("\n".join([got, *told, stands()]))


MIRRORED = {"none": EVENTS, "down": 0, "503": 0, "flapping": EVENTS // 2, "slow": EVENTS}
"""How many events a mirror in this state takes: nothing is tried again, and nobody is told."""


@pytest.mark.parametrize("fault", MIRRORED)
async def test_mirror_is_best_effort(fault: Fault, tmp_path: Path) -> None:
    async with running(tmp_path, "broadcast = 'mirror'") as (bus, client):
        first, mirror = bus.one("shop"), bus.one("store")
        await break_(mirror, fault)
        answers, _ = await publish(client)
        assert fault != "slow" or len(mirror.accepted) < EVENTS, "nobody waits for a mirror"
        assert {answer.status_code for answer in answers} == {202}, "the publisher never learns of the mirror"
        assert taken(first) == (EVENTS, EVENTS)
        await settled(bus, mirror, MIRRORED[fault])
        if fault != "down":
            await until(lambda: len(mirror.got) >= EVENTS)  # nobody waits for a mirror
            assert len(mirror.got) == EVENTS, "one attempt each"
        assert taken(mirror) == (MIRRORED[fault], MIRRORED[fault])


@pytest.mark.parametrize("fault", ["none", "down", "503", "flapping", "slow"])
async def test_acked_answers_2xx_only_when_all_took_it(fault: Fault, tmp_path: Path) -> None:
    async with running(tmp_path, "broadcast = 'acked'") as (bus, client):
        first, last = bus.one("shop"), bus.one("store")
        await break_(last, fault)
        answers, took = await publish(client)
        assert taken(first) == (EVENTS, EVENTS)
        refused = [answer for answer in answers if answer.status_code != 202]
        if fault in ("down", "503"):
            assert len(refused) == EVENTS
            assert {answer.status_code for answer in refused} == {503}
            assert {answer.headers["x-not-acked"] for answer in refused} == {"store=503"}
            if fault == "down":
                await last.start()
            last.answer = lambda count: 202
            async with asyncio.timeout(60):  # its health is seen with the next check
                while (answers := (await publish(client))[0]) and any(one.status_code != 202 for one in answers):
                    await asyncio.sleep(0.1)
            assert taken(first)[0] == EVENTS < taken(first)[1], "who had it gets it again: nothing is remembered"
        else:
            # Each target is tried again, four times at most: an event may meet the 503 of one time in two every time.
            assert len(refused) <= (EVENTS // 2 if fault == "flapping" else 0)
            if fault == "slow":
                assert took >= SLOW
        assert len(last.accepted) >= EVENTS - len(refused)
        assert {answer.status_code for answer in answers} <= {202, 503}


async def test_acked_hands_on_what_a_target_refuses_for_good(tmp_path: Path) -> None:
    async with running(tmp_path, "broadcast = 'acked'") as (bus, client):
        bus.one("store").answer = lambda count: 422
        [answer], _ = await publish(client, 1)
        assert (answer.status_code, answer.headers["x-not-acked"]) == (422, "store=422")
        assert len(bus.one("store").got) == 1


async def dead(app: App, group: str) -> list[str]:
    """The ids of a group's dead letters."""
    found = app.broker.browse(dead_topic(group), "earliest", follow=False)
    return [decode_dead_letter(message.data).message.id async for _, message in found]


@pytest.mark.parametrize("fault", ["none", "down", "503", "flapping", "slow"])
async def test_relay_hands_every_event_to_every_target(fault: Fault, tmp_path: Path) -> None:
    async with running(tmp_path, relay=True) as (bus, client):
        first, last = bus.one("shop"), bus.one("store")
        await break_(last, fault)
        answers, _ = await publish(client)
        assert fault != "slow" or len(last.accepted) < EVENTS, "nobody waits for a slow target"
        assert {answer.status_code for answer in answers} == {202}, "the relay has it: the publisher need not wait"
        await settled(bus, first, EVENTS)
        if fault == "down":
            await last.start()
        if fault in ("down", "503"):
            last.answer = lambda count: 202
        await settled(bus, last, EVENTS)
        assert taken(first) == (EVENTS, EVENTS), "one target's fault is not another's"
        assert taken(last)[0] == EVENTS
        assert await dead(bus.relay, "gateway.store") == []


async def test_relay_has_a_dead_letter_for_what_one_target_refuses(tmp_path: Path) -> None:
    async with running(tmp_path, relay=True) as (bus, client):
        bus.one("store").answer = lambda count: 422
        await publish(client, 5)
        await settled(bus, bus.one("shop"), 5)
        async with asyncio.timeout(60):
            while len(await dead(bus.relay, "gateway.store")) < 5:
                await asyncio.sleep(0.05)
        assert await dead(bus.relay, "gateway.shop") == []


async def test_redriven_dead_letters_of_the_relay_reach_their_target_alone(tmp_path: Path) -> None:
    async with running(tmp_path, relay=True) as (bus, client):
        first, last = bus.one("shop"), bus.one("store")
        last.answer = lambda count: 422
        await publish(client, 5)
        await settled(bus, first, 5)
        await command.dead("gateway.store", 5, broker=bus.broker)
        last.answer = lambda count: 202
        await command.redrive("gateway.store", 5, broker=bus.broker)
        await settled(bus, last, 5)
        await command.dead("gateway.store", 5, broker=bus.broker, status="redriven")
        assert taken(last) == (5, 5)
        assert {got["ce-id"] for got in last.got} == last.accepted.keys(), "they come under their old ids"
        await publish(client, 6)  # the sixth is new: what went before has reached whom it was to reach
        await settled(bus, last, 6)
        await settled(bus, first, 6)
        assert len(first.got) == 6, "the other target has nothing again"


async def test_an_unknown_event_is_a_dead_letter_of_the_relay(tmp_path: Path) -> None:
    async with running(tmp_path, relay=True) as (bus, client):
        for number, type in enumerate(["com.shop.nothing", PLACED]):
            answer = await client.post("/events", headers=event(type, number), content=b'{"order": "k"}')
            assert answer.status_code == 202
        async with asyncio.timeout(60):
            while not await dead(bus.relay, "gateway.unknown"):
                await asyncio.sleep(0.05)
        assert await dead(bus.relay, "gateway.unknown") == ["0"]
        assert list(bus.one("billing").accepted) == ["1"], "what has one target does not go by the relay"
