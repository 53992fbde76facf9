"""``stentor top``, and ``stentor capacity`` of a running program, as people use them."""

import json
import re
from typing import Any

import httpx

from stentor.cli.top import COLUMNS, _row
from stentor.histogram import Histogram
from stentor.observe.flow import Flow
from tests.cli.conftest import Running, Stentor


def order(number: int) -> dict[str, object]:
    return {
        "specversion": "1.0", "type": "shop.ordered", "source": "/till", "id": f"order {number}",
        "data": {"customer": "ada", "number": number},
    }  # fmt: skip


def served(shop: Stentor) -> tuple[Running, str]:
    worker = shop.start("run", "shop", "--http", "127.0.0.1:0")
    found = re.search(r"http://\S+", worker.until("http://"))
    assert found is not None
    worker.until("ready after")
    return worker, found[0]


def test_what_a_program_does_now(shop: Stentor) -> None:
    worker, url = served(shop)
    watching = shop.start("top", url, "--interval", "1s", "--json")
    watching.until("{")  # it has looked once
    with httpx.Client() as client:
        for number in range(3):
            client.post(f"{url}/events", json=order(number), headers={"content-type": "application/cloudevents+json"})
    worker.until("charged ada 2")
    seen = 0
    found: dict[str, Any] = {}
    while seen < 3:
        found = json.loads(watching.until("shop.charge"))
        seen += found["service"]["count"]
    assert found["group"] == "shop.charge"
    assert found["hottest"] == {"key": "ada", "share": 1.0}
    assert found["concurrency"] == 64
    table = shop("top", url, "--interval", "200ms", "--count", "1")
    assert re.search(r"parked\s+retries\s+dead\s+hottest key", table)
    assert re.search(r"group\s+λ in\s+X out\s+ρ", table)
    assert re.search(r"shop\.charge\s+0/s", table)


def test_retries_and_dead_letters_have_their_rates() -> None:
    flow = Flow(
        group="shop.charge", arrivals=3, throughput=2, utilisation=0.5, processes=1, running=1, concurrency=4,
        partitions=12, service=Histogram(), waiting=Histogram(), settling=Histogram(), waits=0, oldest=0, parked=0,
        retries=1.5, dead=0.25, hottest=None,
    )  # fmt: skip
    shown = dict(zip((column.lstrip("~>") for column in COLUMNS), _row(flow), strict=True))
    assert shown["retries"] == ("1.5/s", "yellow")
    assert shown["dead"] == ("0.25/s", "red")


def test_capacity_of_a_running_program(shop: Stentor) -> None:
    _, url = served(shop)
    assert "nothing within" in shop("capacity", "--url", url, "--group", "shop.charge", "--during", "100ms", code=5)
    assert "shop.charge" in shop("capacity", "--url", url, "--during", "100ms", code=5)
    assert "not both" in shop("capacity", "x.csv", "--url", url, code=2)
    watching = shop.start(
        "capacity", "--url", url, "--group", "shop.charge", "--during", "5s", "--workers", "2", "--json"
    )
    with httpx.Client() as client:
        number = 0
        while watching.process.poll() is None:
            number += 1
            client.post(f"{url}/events", json=order(number), headers={"content-type": "application/cloudevents+json"})
    assert watching.end() == 0
    found = json.loads(watching.lines[-1])
    assert found["limit"]["name"] == "hot key"  # one customer: one order at a time
    assert 0 < found["utilisation"] < 1


def test_nobody_there(shop: Stentor) -> None:
    assert "http://127.0.0.1:9/flow" in shop("top", "http://127.0.0.1:9", code=4)
