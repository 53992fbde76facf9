"""The document is valid AsyncAPI, says what the apps say, and its examples are events that the apps read."""

import json
from typing import Any

import msgspec
import pytest
from jsonschema import Draft7Validator

import servers.npm
from examples.flights.app import app as flights
from examples.shop.main import SERVICES
from stentor import App, Event
from stentor.brokers.wire import unpack
from stentor.cli.load import load_app
from stentor.connect import BrokerUrl
from stentor.docs.asyncapi import document
from stentor.docs.overview import overview
from stentor.gateway.routes import make, read_settings
from tests.docs.apps import billing, shop
from tests.real import unavailable

GATEWAY = """
dead_letter = "orders"
keys = {ops = "OPS_KEY"}
[services]
orders = ["127.0.0.1:8001"]
payments = ["127.0.0.1:8002"]
shipping = ["127.0.0.1:8003"]
[jwt]
issuer = "https://id.example"
audience = "bus"
jwks = "keys.json"
[tls]
cert = "gateway.pem"
key = "gateway.key"
client_ca = "ca.pem"
"""


def documents() -> dict[str, dict[str, Any]]:
    bus = [load_app(f"examples.shop.bus:{name}") for name in SERVICES]
    urls = (
        "sqlite:///stentor.db", "memory://", "nats://me:secret@one,two:4222", "redis://host/2", "amqps://me:secret@host/v",
        "kafka://me:secret@k1:9092,k2:9092?tls=1&cert=c.pem&key=c.key", "postgresql://me@host/db", "rocketmq://host",
    )  # fmt: skip
    found = {url: document(overview([shop, billing], BrokerUrl(url)), "2.3.4") for url in urls}
    found["flights"] = document(overview([flights], BrokerUrl("sqlite:///x.db")))
    found["gateway"] = document(overview(bus, None, make(bus, read_settings(GATEWAY, "gateway.toml"))))
    return found


@pytest.mark.slow
def test_documents_are_valid_by_the_schema_of_asyncapi() -> None:
    try:
        folder = servers.npm.package(servers.npm.ASYNCAPI)
    except servers.Missing as missing:
        unavailable(missing)
    validator = Draft7Validator(json.loads((folder / "schemas" / "3.1.0-without-$id.json").read_text("utf-8")))
    assert list(validator.iter_errors({"asyncapi": "3.1.0", "info": {}})), "the schema refuses what is wrong"
    for name, made in documents().items():
        text = json.loads(json.dumps(made))
        assert [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(text)] == [], name


def test_references_lead_somewhere() -> None:
    for made in documents().values():

        def follow(value: Any, made: dict[str, Any] = made) -> None:
            if isinstance(value, dict):
                if isinstance(ref := value.get("$ref"), str):
                    found: Any = made
                    for part in ref.removeprefix("#/").split("/"):
                        found = found[part.replace("~1", "/").replace("~0", "~")]
                for item in value.values():
                    follow(item)
            elif isinstance(value, list):
                for item in value:
                    follow(item)

        follow(made)


def test_examples_are_events_that_the_apps_read() -> None:
    made = documents()["memory://"]
    messages = made["components"]["messages"]
    assert {name for name, message in messages.items() if "examples" not in message} == set()
    for name, message in messages.items():
        payload = message["examples"][0]["payload"]
        app = shop if shop.catalog.find(name) else billing
        spec = app.catalog.find(name)
        assert spec is not None
        if spec.wire == "json":
            spec.decode(msgspec.json.encode(payload))
        else:
            read = unpack(msgspec.json.encode(payload), spec.topic.name, "?")
            event = app.catalog.read(spec, read)
            assert read.key == spec.key_of(event)


def test_what_a_handler_promises_is_said() -> None:
    made = documents()["memory://"]
    charge = made["operations"]["billing.charge.charge"]
    assert (charge["action"], charge["summary"]) == ("receive", "Take the money.")
    assert charge["channel"] == {"$ref": "#/channels/shop.orders"}
    assert charge["messages"] == [{"$ref": "#/channels/shop.orders/messages/shop.order.placed"}]
    assert charge["x-stentor"] == {
        "app": "billing", "group": "billing.charge", "order": "key", "concurrency": 64, "start": "earliest",
        "retry": {"attempts": 5, "first": 2.0, "factor": 2, "longest": 600.0, "never": ["ValueError"]},
        "deadLetter": {"topic": "stentor.dead.billing.charge", "then": "continue"}, "timeout": 3.0,
    }  # fmt: skip
    assert made["operations"]["mails.tell"]["x-stentor"] | {"retry": 0} == {
        "app": "billing", "group": "mails", "order": "none", "concurrency": "auto", "start": "earliest", "retry": 0,
        "deadLetter": {"topic": "stentor.dead.mails", "then": "continue"}, "rate": 10.0, "filtered": True,
    }  # fmt: skip
    assert made["channels"]["shop.orders"]["x-stentor"] == {"partitions": 4, "retention": 604800.0}
    placed = made["components"]["messages"]["shop.order.placed"]
    assert placed["x-stentor"] == {"key": "customer", "version": 1, "newer": "read", "publishedBy": ["shop"]}
    assert placed["summary"] == "An order stands."
    assert made["info"] == {"title": "shop, billing", "version": "2.3.4"}


def test_servers_and_what_they_ask_of_clients() -> None:
    found = documents()
    for made in found.values():
        assert "secret" not in json.dumps(made["servers"])
    kafka = found["kafka://me:secret@k1:9092,k2:9092?tls=1&cert=c.pem&key=c.key"]
    assert kafka["servers"]["broker"]["host"] == "k1:9092,k2:9092"
    assert kafka["servers"]["broker"]["protocol"] == "kafka-secure"
    assert kafka["components"]["securitySchemes"] == {
        "login": {"type": "scramSha512"}, "certificate": {"type": "X509"},
    }  # fmt: skip
    gateway = found["gateway"]
    assert list(gateway["servers"]) == ["gateway", "orders", "payments", "shipping"]
    assert gateway["servers"]["gateway"]["protocol"] == "https"
    assert {scheme["type"] for scheme in gateway["components"]["securitySchemes"].values()} == {
        "http", "X509", "httpApiKey",
    }  # fmt: skip


def test_names_that_are_no_component_names() -> None:
    class Odd(Event, topic="odd", type="https://shop.example/order placed#1"):
        pass

    class Other(Event, topic="odd", type="https:__shop.example_order placed#1"):
        pass

    app = App("odd")
    app.publishes(Odd, Other)
    made = document(overview([app], BrokerUrl("memory://")))
    assert len(made["components"]["messages"]) == 2
    assert {one["name"] for one in made["components"]["messages"].values()} == {
        "https://shop.example/order placed#1", "https:__shop.example_order placed#1",
    }  # fmt: skip
