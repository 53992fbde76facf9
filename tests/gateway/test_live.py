"""Changes while events flow: nothing is lost, and what does not work is told and changes nothing.

$STENTOR_GATEWAY_EVENTS says how many events are sent: 50000 take minutes, by default it is fewer.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import msgspec
import pytest

from stentor.errors import ConfigError
from stentor.gateway import files
from stentor.gateway.routes import Rate
from tests.gateway.bus import PLACED, Bus, Service, event, running

pytestmark = [pytest.mark.server, pytest.mark.slow]
EVENTS = int(os.environ.get("STENTOR_GATEWAY_EVENTS") or 4000)
CLIENTS = 12
LENGTH = re.compile(r"content-length: (\d+)")


class Load:
    """Clients with a connection each, which send events one after the other."""

    def __init__(self, bus: Bus, count: int) -> None:
        self._port = bus.ports["listen"]
        self._numbers = iter(range(count))
        self.statuses: Counter[str] = Counter()
        self.again = 0
        """Requests that were sent again, with their id, as the connection ended before an answer."""

    async def run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(CLIENTS)))

    async def _client(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            for number in self._numbers:
                head = event(PLACED, number, key=f"k{number % 97}") | {"host": "bus", "content-length": "2"}
                lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
                answer = ""
                while not answer:
                    try:
                        writer.write(f"POST /events HTTP/1.1\r\n{lines}\r\n{{}}".encode())
                        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                        await reader.readexactly(int(LENGTH.findall(answer)[0]))
                    except (asyncio.IncompleteReadError, ConnectionError):
                        answer = ""  # as HTTP has it: an idle connection may end while a request is on its way
                        self.again += 1
                    if not answer or "connection: close" in answer:
                        writer.close()
                        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                self.statuses[answer.split()[1]] += 1
        finally:
            writer.close()


OTHER = f"""
max_bytes = 2_000_000
[[routes]]
type = "{PLACED}"
source = "/nowhere"
to = ["extra"]
[types."{PLACED}"]
limit = "1000000/s"
"""


@pytest.mark.timeout(900)
async def test_no_event_is_lost_while_services_routes_and_listeners_change(tmp_path: Path) -> None:
    async with running(tmp_path, billing=2) as (bus, _):
        one, two = bus.services["billing"]
        load = Load(bus, EVENTS)
        sending = asyncio.create_task(load.run())
        changes = 0
        start = time.monotonic()
        async with Service() as extra:
            while not sending.done():
                match changes % 4:
                    case 0:  # a host goes
                        bus.services["billing"] = [one]
                        await asyncio.to_thread(bus.write)
                        await two.stop()
                    case 1:  # and comes back
                        await two.start()
                        bus.services["billing"] = [one, two]
                        await asyncio.to_thread(bus.write)
                    case 2:  # a service and a route come, a limit, and another listener
                        bus.services["extra"], bus.toml = [extra], OTHER
                        await asyncio.to_thread(bus.write)
                    case _:  # and go
                        del bus.services["extra"]
                        bus.toml = ""
                        await asyncio.to_thread(bus.write)
                changes += 1
            await sending
        took = time.monotonic() - start
        print(f"{EVENTS:,} events, {changes} changes in {took:.1f} s: {dict(load.statuses)}, {load.again} sent again")
        assert load.statuses == {"202": EVENTS}
        accepted = one.accepted + two.accepted
        assert len(accepted) == EVENTS, "every event that was acknowledged is there"
        assert changes >= 4


async def test_a_host_that_is_taken_out_gets_nothing_more_though_it_is_well(tmp_path: Path) -> None:
    async with running(tmp_path, billing=2) as (bus, client):
        one, two = bus.services["billing"]

        async def got_by_two() -> int:
            before = len(two.got)
            for number in range(40):
                assert (await client.post("/events", headers=event(number=number, key=f"k{number}"))).status_code == 202
            return len(two.got) - before

        assert await got_by_two() > 0
        bus.services["billing"] = [one]
        await asyncio.to_thread(bus.write)
        async with httpx.AsyncClient(trust_env=False) as admin:
            told = (await admin.get(f"http://127.0.0.1:{bus.ports['admin']}/clusters")).text
            assert one.at in told
            assert two.at not in told, "Envoy has it when the command is back"
        async with asyncio.timeout(60):  # its threads have it a moment later
            while await got_by_two():
                pass
        await two.stop()


async def test_a_file_that_envoy_refuses_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 2.0)
    async with running(tmp_path) as (bus, client):
        bus.toml = f'[types."{PLACED}"]\nlimit = "1/h"'
        model = bus.model()
        before = (bus.folder / "xds" / "rds.events.json").read_text()
        # What no gateway writes, and Envoy's rules forbid: a bucket that is never filled.
        model = msgspec.structs.replace(
            model, routes=tuple(msgspec.structs.replace(route, limit=Rate(0, 1)) for route in model.routes)
        )
        with pytest.raises(ConfigError, match=r"does not take rds\.events\.json \(events\)"):
            await asyncio.to_thread(files.write, model, bus.folder)
        assert (bus.folder / "xds" / "rds.events.json").read_text() == before
        for number in range(3):
            assert (await client.post("/events", headers=event(number=number))).status_code == 202


def test_watch_writes_again_when_something_changes(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from stentor import App, Event\n"
        "class Placed(Event, topic='o', type='placed'): ...\n"
        "app = App('shop')\n"
        "@app.on(Placed)\n"
        "async def see(placed: Placed) -> None: ...\n"
    )
    config = tmp_path / "gateway.toml"
    config.write_text("[services]\nshop = ['127.0.0.1:1']\ngateway = ['127.0.0.1:2']\n")
    command = [sys.executable, "-m", "stentor", "gateway", "envoy", "--app", "shop:app", "--out", "bus", "--watch"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    ends, routes = tmp_path / "bus" / "xds" / "eds.shop.json", tmp_path / "bus" / "xds" / "rds.events.json"

    def wait(path: Path, text: str) -> None:
        deadline = time.monotonic() + 60
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)

    try:
        wait(tmp_path / "log", "1 route to 2 services")
        config.write_text("[services]\nshop = ['127.0.0.1:1', '127.0.0.1:77']\ngateway = ['127.0.0.1:2']\n")
        wait(ends, "77")
        config.write_text("[services]\n")
        wait(tmp_path / "log", "placed goes to shop, which has no address")
        assert "77" in ends.read_text()
        config.write_text("[services]\nshop = ['127.0.0.1:1']\ngateway = ['127.0.0.1:2']\n")
        shop = tmp_path / "shop.py"
        shop.write_text(shop.read_text().replace("'placed'", "'was.placed'"))
        wait(routes, "was.placed")
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
