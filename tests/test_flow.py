"""λ, X and ρ from what processes tell: the arithmetic, then a real program over HTTP."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from stentor.errors import Unavailable
from stentor.histogram import Histogram
from stentor.observe.flow import Reading, between, read
from tests.http_site import BODY, STRUCTURED, make, numbered, served


def told(handled: int, waits: int, times: list[float], keys: dict[str, int] | None = None) -> dict[str, Any]:
    """What a process says of one group."""
    empty = Histogram().to_dict()
    return {
        "group": "g", "concurrency": 4, "running": 1, "partitions": 8,
        "counts": {"handled": handled, "dead": 0, "skipped": 0, "retried": 0},
        "service": Histogram(times).to_dict(), "waiting": empty, "settling": empty, "settled": handled,
        "keys": keys or {}, "keyed": handled,
        "lag": [{"topic": "t", "events": waits, "seconds": 2.0, "parked": 1}],
    }  # fmt: skip


def test_rates_lie_between_two_readings_of_all_processes() -> None:
    before = Reading(100.0, {"a": {"g": told(10, 5, [1.0] * 10)}, "b": {"g": told(0, 5, [])}})
    after = Reading(110.0, {
        "a": {"g": told(30, 25, [1.0] * 30, {"x": 6})}, "b": {"g": told(10, 25, [2.0] * 10, {"x": 4, "y": 1})},
    })  # fmt: skip
    [flow] = between(before, after)
    assert flow.throughput == pytest.approx(3)
    assert flow.arrivals == pytest.approx(5)  # the backlog grew by 20 in 10 s
    assert flow.utilisation == pytest.approx((20 * 1.0 + 10 * 2.0) / (2 * 4 * 10))
    assert (flow.processes, flow.partitions, flow.waits, flow.parked) == (2, 16, 26, 1)
    assert flow.service.count == 30
    assert flow.service.quantile(0.9) == pytest.approx(2.0, rel=0.02)
    assert flow.hottest == ("x", 10 / 40)


def test_a_process_that_began_anew_counts_from_its_begin() -> None:
    before = Reading(0.0, {"a": {"g": told(1000, 0, [0.1] * 1000)}})
    after = Reading(10.0, {"a": {"g": told(20, 0, [0.1] * 20)}})
    [flow] = between(before, after)
    assert flow.throughput == pytest.approx(2)
    assert flow.service.count == 20


async def test_a_program_tells_its_flow() -> None:
    async with served(make()) as site:
        first = (await site.client.get("/flow")).json()
        for number in range(5):
            assert (await site.post(numbered(number), STRUCTURED)).status_code == 202
        await site.handled(5)
        second = (await site.client.get("/flow")).json()
        flows = between(*(
            Reading(moment, {site.url: {one["group"]: one for one in found["groups"]}})
            for moment, found in ((0.0, first), (1.0, second))
        ))  # fmt: skip
        charge = next(flow for flow in flows if flow.group == "shop.charge")
        assert (charge.throughput, charge.service.count) == (5, 5)
        assert charge.hottest == ("o-1", 1.0)
        families = {one.name: one for one in parse((await site.client.get("/metrics")).text)}
        samples = {
            (one.name, one.labels.get("le")): one.value
            for one in families["stentor_handler_seconds"].samples
            if one.labels["group"] == "shop.charge"
        }
        assert samples["stentor_handler_seconds_count", None] == 5
        assert samples["stentor_handler_seconds_bucket", "+Inf"] == 5
        assert samples["stentor_handler_seconds_bucket", "50.0"] == 5
        for name in ("stentor_waiting_seconds", "stentor_settle_seconds", "stentor_concurrency"):
            assert name in families
        [hot] = [one for one in families["stentor_hottest_key_share"].samples if one.labels["group"] == "shop.charge"]
        assert hot.value == 1.0


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://127.0.0.1", "127.0.0.1:80"])
def test_a_program_that_does_not_answer_is_named(url: str) -> None:
    with pytest.raises(Unavailable, match=url.removeprefix("http://")):
        read([url])


async def test_what_is_no_program_is_told() -> None:
    async with served(make()) as site:
        await site.post(BODY, STRUCTURED)
        with pytest.raises(Unavailable, match="--http"):
            await asyncio.to_thread(read, [f"{site.url}/nothing"])


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (b"<html>", "is no JSON"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"groups": [{"pid": 1, "group": "g"}]}', "missing required field `counts` - at `$.groups[0]`"),
        (b'{"groups": [{"pid": 1, "group": "g", "counts": {"handled": "many"}}]}', "at `$.groups[0].counts.handled`"),
        (b'{"groups": [%s]}' % json.dumps({**told(1, 0, []), "pid": 1, "service": {}}).encode(), "not a histogram"),
        (b'{"groups": [%s]}' % json.dumps({**told(1, 0, []), "pid": 1, "counts": {}}).encode(), "handled"),
    ],
)
def test_what_another_program_tells_is_refused_in_one_line(answer: bytes, wrong: str) -> None:
    class Foreign(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Foreign) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(Unavailable) as refused:
            read([url])
    assert str(refused.value).startswith(f"{url}/flow: ")
    assert wrong in str(refused.value)
    assert str(refused.value).endswith("; is it a program run with --http?")
