"""Endpoints that features mount beside those of every app, over real HTTP."""

import pytest
from httpx import ASGITransport, AsyncClient

from stentor import App
from stentor.errors import ConfigError, DefinitionError
from stentor.exchange import SOCKET, Endpoint, Exchange, Refused
from stentor.parts import PARTS, part
from tests.http_site import make, served


async def echo(exchange: Exchange) -> None:
    body = await exchange.body()
    await exchange.answer(200, {"below": exchange.below, "size": len(body), "app": exchange.program.name})


async def picky(exchange: Exchange) -> None:
    raise Refused(409, "not now", reason="asleep")


async def test_an_endpoint_answers_beside_those_of_every_app() -> None:
    site = make()
    site.app.mount(Endpoint("/echo", echo))
    site.app.mount(Endpoint("/tree/", echo, ("GET", "DELETE")))
    site.app.mount(Endpoint("/picky", picky))
    async with served(site) as site:
        assert (await site.client.post("/echo", content=b"12345")).json() == {"below": "", "size": 5, "app": "shop"}
        assert (await site.client.get("/tree/a/b")).json()["below"] == "a/b"
        assert (await site.client.head("/tree/")).status_code == 200
        assert (await site.client.delete("/tree/a")).json()["below"] == "a"
        problem = (await site.client.post("/picky")).json()
        assert (problem["status"], problem["detail"], problem["reason"]) == (409, "not now", "asleep")
        wrong = await site.client.post("/tree/a")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, DELETE, HEAD")
        missing = await site.client.get("/nowhere")
        assert missing.status_code == 404
        assert (
            missing.json()["detail"]
            == "there are /events, /healthz, /readyz, /metrics, /flow, /echo, /tree/ and /picky"
        )
        assert (await site.client.post("/echo", content=bytes(9_000_000))).status_code == 413
        assert 'stentor_http_refused_total{status="409"} 1.0' in (await site.client.get("/metrics")).text


async def test_a_path_has_one_answer_for_each_method() -> None:
    app = App("shop", broker="memory://")
    app.mount(Endpoint("/thing", picky))
    app.mount(Endpoint("/thing", echo, ("GET",)))
    app.mount(Endpoint("/events", echo, ("PATCH",)))
    for path, methods in (("/thing", ("GET",)), ("/events", ("POST",)), ("thing", ("PUT",))):
        with pytest.raises(DefinitionError, match=path):
            app.mount(Endpoint(path, echo, methods))
    async with AsyncClient(transport=ASGITransport(app.asgi), base_url="http://test") as client:
        assert (await client.post("/thing")).status_code == 409
        assert (await client.get("/thing")).status_code == 503  # the app does not run: nothing can be read
        assert (await client.put("/thing")).headers["allow"] == "POST, GET, HEAD"


async def test_a_connection_goes_to_its_socket() -> None:
    app = App("shop", broker="memory://")
    seen: list[str] = []

    async def talk(scope: object, receive: object, send: object) -> None:
        seen.append("talked")

    app.mount(Endpoint("/talk", talk, (SOCKET,)))

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(event: object) -> None:
        seen.append(str(event))

    for path in ("/talk", "/mounted/talk", "/elsewhere"):
        root = "/mounted" if path.startswith("/mounted") else ""
        await app.asgi({"type": "websocket", "path": path, "root_path": root}, receive, send)
    assert seen == ["talked", "talked", "{'type': 'websocket.close', 'code': 1008}"]


def test_every_part_is_there() -> None:
    for name in PARTS:
        assert callable(part(name))
        assert hasattr(App, name)


def test_a_part_without_its_libraries_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "colour", ("stentor.nowhere:colour", "paint"))
    with pytest.raises(ConfigError, match=r"app.colour: a library is missing \(.*\); pip install 'stentor\[paint\]'"):
        part("colour")
