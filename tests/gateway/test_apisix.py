"""What is written for APISIX: held to the schemas of a running 3.16, and to its own references; live where one runs."""

import asyncio
import hashlib
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner

from stentor.cli import cli
from stentor.errors import ConfigError, StentorError, Unavailable, Unsupported
from stentor.gateway import apisix
from tests.gateway.bus import PAID, PLACED, SENT, Service, apps, event
from tests.gateway.test_identity import Issuer
from tests.gateway.test_routes import model

SCHEMAS = Path(__file__).parents[3] / "shared" / "data" / "apisix-3.16-schema.json"


@pytest.fixture(scope="module")
def schemas() -> Any:
    if not SCHEMAS.exists():
        pytest.skip(f"there are no schemas of APISIX at {SCHEMAS}")
    return apisix.read_schemas(str(SCHEMAS))


OWN = """
broadcast = "acked"
[[routes]]
type = "com.shop.*"
source = "/till/*"
to = ["store"]
[[routes]]
type = "com.shop.order.placed"
data = { country = "DE", count = 3 }
to = ["store"]
[types."com.shop.*"]
limit = "100/s"
"""
KEYS = f"""
[keys]
till = "TILL_KEY"
shop = "SHOP_KEY"
billing = "BILLING_KEY"
[publishers]
till = ["{PLACED}", "com.shop.*"]
"""


@pytest.mark.parametrize("toml", ["", "broadcast = 'acked'", "broadcast = 'mirror'", OWN, KEYS])
def test_what_is_written_meets_the_schemas_of_apisix(toml: str, schemas: Any) -> None:
    made = apisix.configuration(model(toml))
    apisix.check(made, schemas)
    text = apisix.to_yaml(made)
    assert text.endswith("\n#END\n")
    assert yaml.safe_load(text) == made


def test_tokens_meet_the_schemas_too(tmp_path: Path, schemas: Any) -> None:
    issuer = Issuer(tmp_path)
    (tmp_path / "public.pem").write_bytes(issuer._openssl("rsa", "-in", str(issuer.key), "-pubout"))
    toml = f"{issuer.settings}public_key = '{tmp_path}/public.pem'\n[publishers]\n'till 7' = ['com.shop.*']"
    made = apisix.configuration(model(toml))
    apisix.check(made, schemas)
    names = {one["username"]: one["plugins"]["jwt-auth"]["key"] for one in made["consumers"]}
    assert names == {"shop": "shop", "billing": "billing", "till_7": "till 7"}


def test_routes_are_those_of_the_model() -> None:
    made = apisix.configuration(model(OWN))
    found = {one["id"]: one for one in made["routes"]}
    assert found["route-0"]["vars"] == [["http_ce_type", "~~", r"^com\.shop\."], ["http_ce_source", "~~", "^/till/"]]
    assert ["post_arg.country", "==", "DE"] in found["route-1"]["vars"]
    assert found["route-0"]["priority"] > found["route-1"]["priority"] > found["route-2"]["priority"]
    by_type = {tuple(one["vars"][0]): one for one in made["routes"] if one["priority"] == apisix.TYPES}
    assert by_type["http_ce_type", "==", PLACED]["upstream_id"] == "billing"
    assert "serverless-post-function" in by_type["http_ce_type", "==", PAID]["plugins"]
    limits = {one["id"]: one["plugins"].get("limit-count", {}).get("count") for one in made["routes"]}
    assert limits["route-0"] == limits["route-2"] == 100


def test_what_no_route_takes_is_as_protected_as_the_routes() -> None:
    made = apisix.configuration(model(KEYS))
    for one in made["routes"]:
        plugins = one["plugins"]
        assert plugins.keys() & {"key-auth", "fault-injection"} or one["id"].startswith("inside-"), one["id"]
    assert made["routes"][-1]["plugins"]["fault-injection"]["abort"]["http_status"] == 403
    [unknown] = [one for one in made["routes"] if one["id"] == "unknown-0"]
    assert unknown["plugins"]["consumer-restriction"]["whitelist"] == ["till"]


def broken(**changes: Any) -> dict[str, Any]:
    made = apisix.configuration(model())
    return made | {"routes": [*made["routes"], {"id": "more", "uri": "/events", "priority": 7, **changes}]}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"upstream_id": "nobody"}, "route more names the upstream nobody, which is not there"),
        ({}, "route more leads nowhere"),
        ({"upstream_id": "shop", "id": "route-0"}, "two routes are called route-0"),
        ({"upstream_id": "shop", "priority": 0}, "routes unknown and more take the same events at priority 0"),
        ({"upstream_id": "shop", "plugins": {"consumer-restriction": {"whitelist": ["eve"]}}}, "lets eve publish"),
    ],
)
def test_references_that_lead_nowhere_are_found(changes: Any, complaint: str) -> None:
    apisix.check(apisix.configuration(model()), None)
    with pytest.raises(ConfigError, match=complaint):
        apisix.check(broken(**changes), None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"methods": ["SHOUT"]}, "route more: methods.0: 'SHOUT' is not one of"),
        ({"plugins": {"limit-count": {"count": -1, "time_window": 1}}}, "route more, limit-count: count"),
        ({"plugins": {"shouting": {}}}, "the plugin shouting is not enabled there"),
    ],
)
def test_what_apisix_would_drop_is_found_before(changes: Any, complaint: str, schemas: Any) -> None:
    with pytest.raises(ConfigError, match=complaint):
        apisix.check(broken(upstream_id="shop", **changes), schemas)


@pytest.mark.parametrize(
    ("toml", "kind", "complaint"),
    [
        ("[tls]\ncert = 'c'\nkey = 'k'", Unsupported, "APISIX does not support .tls. of a gateway"),
        ("[jwt]\nissuer='i'\naudience='a'\njwks='j'", ConfigError, "APISIX reads no JWKS: add public_key"),
        (KEYS + "'till.1' = ['com.shop.*']\ntill_1 = ['com.shop.*']", ConfigError, "have one name in APISIX: till_1"),
        (KEYS + f"x = ['{SENT}']\n[[routes]]\ntype = 'com.shop.*'\nto = ['store']", Unsupported, "publishing '.*sent'"),
    ],
)
def test_what_apisix_cannot_do_is_refused(toml: str, kind: type[StentorError], complaint: str) -> None:
    with pytest.raises(kind, match=complaint):
        apisix.configuration(model(toml))


def test_nothing_is_written_unchecked(tmp_path: Path, schemas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("orders", "payments", "shipping", "gateway")
    places = "\n".join(f"{name} = ['127.0.0.1:{port}']" for port, name in enumerate(names, 8001))
    Path("gateway.toml").write_text(f"[services]\n{places}\n")
    command = ["gateway", "apisix"]
    for name in names[:3]:
        command += ["--app", f"examples.shop.{name}:app"]
    run = CliRunner().invoke
    assert run(cli, [*command, "--out", "o"]).exit_code == 2
    assert not Path("o").exists()
    bad = json.loads(SCHEMAS.read_text())
    bad["main"]["route"]["required"] = ["never"]
    Path("bad.json").write_text(json.dumps(bad))
    refused = run(cli, [*command, "--out", "o", "--check", "bad.json"])
    assert (refused.exit_code, Path("o").exists()) == (3, False)
    assert "'never' is a required property" in refused.stderr
    done = run(cli, [*command, "--out", "o", "--check", str(SCHEMAS)])
    assert done.exit_code == 0, done.stderr
    written = yaml.safe_load(Path("o/apisix.yaml").read_text())
    assert {one["id"] for one in written["upstreams"]} == set(names)


def test_a_push_is_one_request_with_key_and_digest() -> None:
    """Against a server that notes it: a live APISIX has its test below."""
    got: list[Any] = []

    class Admin(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, self.headers["x-api-key"], self.headers["x-digest"], body))
            self.send_response(202 if len(got) == 1 else 400)
            self.end_headers()
            self.wfile.write(b"" if len(got) == 1 else b"route-0: no such upstream")

        def log_message(self, *args: Any) -> None: ...

    made = apisix.configuration(model())
    with HTTPServer(("127.0.0.1", 0), Admin) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        apisix.push(made, url, "secret")
        with pytest.raises(ConfigError, match=r"refuses the configuration \(400\): route-0: no such upstream"):
            apisix.push(made, url, "secret")
        server.shutdown()
    assert got[0][:2] == ("/apisix/admin/configs", "secret")
    assert json.loads(got[0][3]) == made
    assert got[0][2] == hashlib.sha256(got[0][3]).hexdigest()
    with pytest.raises(Unavailable, match="no answer from"):
        apisix.push(made, url, "secret")


# ---- on a live one --------------------------------------------------------------------------------------------------

PLACES = ("APISIX_URL", "APISIX_INSIDE", "APISIX_CONTROL_URL", "APISIX_ADMIN_URL", "APISIX_ADMIN_KEY")
"""Where it takes events, and (HOST:PORT) those of the relay; its schemas; its configuration, and the key for that."""
MISSING = [name for name in PLACES if name not in os.environ]
live = pytest.mark.skipif(bool(MISSING), reason=f"no live APISIX: set {', '.join(MISSING)}")
SHOP, BILLING, STORE = apps()


class Live:
    """A live APISIX in API-driven mode, services behind it, and one connection to it: so one worker answers."""

    def __init__(self, folder: Path, client: httpx.AsyncClient, services: dict[str, list[Service]]) -> None:
        self._folder = folder
        self._client = client
        self.services = services

    def one(self, name: str) -> Service:
        return self.services[name][0]

    async def push(self, toml: str = "") -> None:
        """Give it a configuration, by the command; back when it is what counts."""
        if "[publishers]" in toml:
            await self.push()  # whose routes do not answer 401
        mark = f"mark.{uuid.uuid4().hex}"
        places = "\n".join(f"{name} = {[one.at for one in them]}" for name, them in self.services.items())
        head, bracket, tables = toml.partition("[")
        (self._folder / "gateway.toml").write_text(
            f"inside = '{os.environ['APISIX_INSIDE']}'\n{head}\n[[routes]]\ntype = '{mark}'\nto = ['shop']\n"
            f"{bracket}{tables}\n[services]\n{places}\n"
        )
        command = ["gateway", "apisix", "--config", str(self._folder / "gateway.toml")]
        command += [part for name in ("SHOP", "BILLING", "STORE") for part in ("--app", f"{__name__}:{name}")]
        command += ["--check", os.environ["APISIX_CONTROL_URL"], "--push", os.environ["APISIX_ADMIN_URL"]]
        done = await asyncio.to_thread(CliRunner().invoke, cli, command)
        assert done.exit_code == 0, done.output
        shop = self.one("shop")
        async with asyncio.timeout(60):
            while await self.post(mark) != 401 and not any(got["ce-type"] == mark for got in shop.got):
                await asyncio.sleep(0.02)
        for one in chain(*self.services.values()):
            one.got.clear()
            one.bodies.clear()
            one.queries.clear()
            one.accepted.clear()

    async def post(self, type: str = PLACED, number: int = 1, **more: Any) -> int:
        return (await self.send(type, number, **more)).status_code

    async def send(
        self, type: str = PLACED, number: int = 1, body: bytes = b"{}", token: dict[str, str] | None = None, **more: str
    ) -> httpx.Response:
        return await self._client.post("/events", headers=event(type, number, **more) | (token or {}), content=body)

    def counts(self) -> dict[str, int]:
        return {name: sum(len(one.accepted) for one in them) for name, them in self.services.items()}


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Live]:
    services = {name: [Service()] for name in ("shop", "billing", "store", "gateway")}
    services["billing"].append(Service())
    async with AsyncExitStack() as stack:
        for one in chain(*services.values()):
            await stack.enter_async_context(one)
        client = httpx.AsyncClient(base_url=os.environ["APISIX_URL"], timeout=30, trust_env=False)
        yield Live(tmp_path, await stack.enter_async_context(client), services)


@live
@pytest.mark.slow
async def test_live_an_event_goes_by_each_kind_of_route(bus: Live) -> None:
    await bus.push(
        """
        [[routes]]
        type = "com.shop.*"
        source = "/kiosk/*"
        to = ["store"]
        [[routes]]
        type = "com.shop.order.placed"
        data = { country = "DE", count = 3, gift = true }
        to = ["shop"]
        """
    )
    assert await bus.post(key="k") == 202
    [got] = [got for one in bus.services["billing"] for got in one.got]
    assert {name: got[name] for name in event(key="k")} == event(key="k")
    assert await bus.post("com.shop.parcel.lost", ce_source="/kiosk/1") == 202
    assert await bus.post(body=b'{"country": "DE", "count": 3, "gift": true}') == 202
    assert await bus.post(body=b'{"country": "DE", "count": 4, "gift": true}', number=2) == 202
    assert await bus.post("com.shop.nothing") == 202
    assert bus.counts() == {"shop": 1, "billing": 2, "store": 1, "gateway": 1}
    [dead] = bus.one("gateway").got
    assert (dead["x-dead-letter-reason"], bus.one("gateway").queries) == ("unknown type", ["topic=gateway.unknown"])
    for content_type in ("application/cloudevents+json", "application/cloudevents-batch+json; charset=utf-8"):
        assert await bus.post(content_type=content_type) == 415
    assert sum(bus.counts().values()) == 5


@live
@pytest.mark.slow
async def test_live_the_relay_hands_an_event_to_a_service_by_the_inside(bus: Live) -> None:
    await bus.push()
    assert await bus.post(PAID, x_stentor_target="store") == 202, "from outside it does not name its target"
    assert bus.counts() == {"shop": 0, "billing": 0, "store": 0, "gateway": 1}
    async with httpx.AsyncClient(base_url=f"http://{os.environ['APISIX_INSIDE']}", trust_env=False) as inside:
        for name in ("shop", "store"):
            headers = event(PAID, x_stentor_target=name)
            async with asyncio.timeout(60):  # another connection, perhaps another worker
                while (await inside.post("/events", headers=headers)).status_code != 202:
                    await asyncio.sleep(0.02)
    assert bus.counts() == {"shop": 1, "billing": 0, "store": 1, "gateway": 1}
    assert "x-stentor-target" not in bus.one("store").got[0]


@live
@pytest.mark.slow
async def test_live_acked_answers_2xx_when_all_took_it_and_mirror_when_the_first_did(bus: Live) -> None:
    shop, store = bus.one("shop"), bus.one("store")
    await bus.push("broadcast = 'acked'\n")
    assert await bus.post(PAID, body=b'{"order": "k"}') == 202
    assert store.bodies == shop.bodies == [b'{"order": "k"}']
    for status, answer in ((503, 503), (422, 422)):
        store.answer = lambda count, status=status: status  # type: ignore[misc]
        refused = await bus.send(PAID)
        assert (refused.status_code, refused.headers["x-not-acked"]) == (answer, f"store={status}")
    await bus.push("broadcast = 'mirror'\n")
    assert await bus.post(PAID) == 202, "the mirror's answer is nobody's business"
    async with asyncio.timeout(60):
        while not store.got:
            await asyncio.sleep(0.01)
    assert len(shop.accepted) == 1


@live
@pytest.mark.slow
async def test_live_a_key_has_one_host_and_a_refused_connection_the_other(bus: Live) -> None:
    await bus.push()
    one, two = bus.services["billing"]
    for number in range(60):
        assert await bus.post(number=number, key=f"key-{number % 20}") == 202
    keys = [{got["ce-partitionkey"] for got in host.got} for host in (one, two)]
    assert all(keys)
    assert not keys[0] & keys[1]
    await two.stop()
    for number in range(20):
        assert await bus.post(number=number, key=f"key-{number}") == 202
    assert {got["ce-partitionkey"] for got in one.got} == keys[0] | keys[1]


@live
@pytest.mark.slow
async def test_live_a_host_that_is_not_ready_is_left_out_and_comes_back(bus: Live) -> None:
    await bus.push()
    one, _ = bus.services["billing"]

    async def got_by_one() -> int:
        before = len(one.got)
        for number in range(40):
            assert await bus.post(number=number, key=f"key-{number}") == 202
        return len(one.got) - before

    assert await got_by_one()
    for ready in (503, 200):
        one.ready = ready
        async with asyncio.timeout(60):
            while bool(await got_by_one()) != (ready == 200):
                await asyncio.sleep(0.1)


@live
@pytest.mark.slow
async def test_live_a_type_has_its_rate(bus: Live) -> None:
    await bus.push(f'[types."{PLACED}"]\nlimit = "5/m"\n')
    taken = 0
    async with asyncio.timeout(60):
        while (status := await bus.post(number=taken)) == 202:
            taken += 1
    assert status == 429
    assert taken <= 10, "five a minute, and a minute may have ended meanwhile"
    assert await bus.post("com.shop.nothing") == 202


@live
@pytest.mark.slow
async def test_live_a_token_says_who_publishes_what(bus: Live, tmp_path: Path) -> None:
    issuer = Issuer(tmp_path)
    (tmp_path / "public.pem").write_bytes(issuer._openssl("rsa", "-in", str(issuer.key), "-pubout"))
    people = f"[publishers]\n'till 7' = ['com.shop.*']\nkiosk = ['{PLACED}']\n"
    await bus.push(f"{issuer.settings}public_key = '{tmp_path}/public.pem'\n{people}")
    till, kiosk, billing = (issuer.token(name) for name in ("till 7", "kiosk", "billing"))
    assert await bus.post() == 401
    assert await bus.post(token=kiosk) == 202
    [got] = [got for one in bus.services["billing"] for got in one.got]
    assert "authorization" not in got
    assert await bus.post(PAID, token=kiosk) == 403
    assert await bus.post(PAID, token=billing) == 202
    assert await bus.post(token=issuer.token("nobody")) == 401
    assert await bus.post(token=issuer.token("kiosk", exp=1)) == 401
    assert await bus.post("com.shop.nothing", number=2, token=till) == 202, (
        "nobody takes it, but it is under their prefix"
    )
    assert await bus.post("com.shop.nothing", token=kiosk) == 403
    assert await bus.post("org.other", token=till) == 403
    assert bus.counts() == {"shop": 0, "billing": 1, "store": 0, "gateway": 2}


@live
@pytest.mark.slow
@pytest.mark.skipif("APISIX_TILL_KEY" not in os.environ, reason="APISIX must be started with $APISIX_TILL_KEY too")
async def test_live_an_api_key_says_who_publishes_what(bus: Live) -> None:
    unset = "shop = 'APISIX_NO_SUCH_KEY'\nbilling = 'APISIX_NO_SUCH_KEY_EITHER'"
    await bus.push(f"[keys]\ntill = 'APISIX_TILL_KEY'\n{unset}\n[publishers]\ntill = ['{PLACED}']\n")
    assert await bus.post() == 401
    for wrong in ("wrong", "$env://APISIX_TILL_KEY", "$env://APISIX_NO_SUCH_KEY", "APISIX_NO_SUCH_KEY", ""):
        assert await bus.post(apikey=wrong) == 401, wrong
    assert await bus.post(apikey=os.environ["APISIX_TILL_KEY"]) == 202
    assert await bus.post(PAID, apikey=os.environ["APISIX_TILL_KEY"]) == 403
    [got] = [got for one in bus.services["billing"] for got in one.got]
    assert "apikey" not in got


@live
@pytest.mark.slow
async def test_live_a_configuration_is_taken_as_a_whole_or_not_at_all(bus: Live) -> None:
    await bus.push()
    url, key = os.environ["APISIX_ADMIN_URL"], os.environ["APISIX_ADMIN_KEY"]
    made = broken(upstream_id="shop", methods=["SHOUT"])
    with pytest.raises(ConfigError, match=r"refuses the configuration \(400\)"):
        await asyncio.to_thread(apisix.push, made, url, key)
    with pytest.raises(ConfigError, match=r"refuses the configuration \(401\)"):
        await asyncio.to_thread(apisix.push, apisix.configuration(model()), url, "not the key")
    assert await bus.post() == 202
