"""MQTT against Mosquitto: every QoS 1 message is an event, over kills of the reader and restarts of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

import servers
from servers.mosquitto import Mosquitto
from stentor import App, Depends, Event
from stentor.cloudevents import to_structured
from stentor.errors import AuthenticationFailed, ConfigError, DefinitionError
from stentor.message import Message
from stentor.sinks.mqtt import MqttSink
from stentor.sources.mqtt import Mqtt, Received, _Pattern, cloudevents
from tests.real import unavailable
from tests.sources.reading import Line, Reader

MESSAGES = 3_000


class Temperature(Event, topic="temperatures", key="line", type="com.example.temperature"):
    line: str
    celsius: float


class Open(Event, topic="doors", key="door", type="com.example.open"):
    door: str


def started(folder: Path, *, secure: bool = False) -> Mosquitto:
    try:
        Mosquitto.install()
        server = Mosquitto(folder, secure=secure)
        server.start()
    except servers.Missing as missing:
        unavailable(missing)
    return server


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """One server for the tests of this file, which have topics and client ids of their own."""
    server = started(tmp_path_factory.mktemp("mosquitto"))
    yield server
    server.kill()


@asynccontextmanager
async def subscribed(app: App, url: str, probe: str) -> AsyncIterator[tuple[MqttSink, list[Any]]]:
    """The app, running with its subscription made, a sink, and what it publishes; ``probe`` is a topic of Line."""
    found: list[Any] = []

    async def collect(event: Any) -> None:
        found.append(event)

    app.on(Line, Temperature, Open, group="collect")(collect)
    async with MqttSink(url) as sink, app:
        await sink.publish(probe, {"n": -1}, retain=True)  # comes to every new subscription
        await until(lambda: Line(n=-1) in found)
        found.clear()
        yield sink, found


async def until(ready: Any, patience: float = 20.0) -> None:
    async with asyncio.timeout(patience):
        while not ready():
            await asyncio.sleep(0.02)


@pytest.mark.server
@pytest.mark.slow
class TestMosquitto:
    @pytest.mark.parametrize("version", ["5", "3.1.1"])
    async def test_messages_become_events_by_topic_and_what_cannot_be_read_a_dead_letter(
        self, mosquitto: Mosquitto, version: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        base, url = f"read{version[0]}", f"{mosquitto.url}?version={version}"
        app = App(base, broker="memory://")

        def counted(received: Received) -> list[Line] | None:
            return [Line(n=len(received.data))] * 2 if received.data else None

        to: dict[str, Any] = {base + "/{line}/temperature": Temperature, f"{base}/probe": Line, f"{base}/#": counted}
        app.add(Mqtt(url, to=to, name=base))
        async with subscribed(app, url, f"{base}/probe") as (sink, found):
            for topic, payload in (
                ("a/temperature", {"celsius": 21.5}), ("a/temperature", {"celsius": "warm"}),
                ("b/temperature", "no JSON"), ("c", b"\xff\xff"), ("c", b""), ("b/temperature", {"celsius": 3}),
            ):  # fmt: skip
                await sink.publish(f"{base}/{topic}", payload)
            await until(lambda: len(found) == 4)
            assert {repr(event) for event in found} == {
                "Temperature(line='a', celsius=21.5)", "Line(n=2)", "Temperature(line='b', celsius=3.0)",
            }  # fmt: skip
            assert app.program is not None
            worker = next(w for w in app.program.workers if w.group == f"{base}.{base}")
            await until(lambda: worker.counts.dead == 2)
            assert len(found) == 4, "what fits two patterns came twice"
        refused = [record.getMessage() for record in caplog.records if "cannot read" in record.getMessage()]
        assert "Expected `float`, got `str` - at `$.celsius`" in refused[0]
        assert f"source {base} cannot read {base}/b/temperature: JSON is malformed" in refused[1]

    @pytest.mark.parametrize("version", ["5", "3.1.1"])
    async def test_every_confirmed_message_is_an_event_over_kills_of_the_reader_and_restarts_of_the_server(
        self, tmp_path: Path, version: str
    ) -> None:
        server = await asyncio.to_thread(started, tmp_path / "server")
        url = f"{server.url}?version={version}"
        reader = Reader(tmp_path, "stentor.sources.mqtt", "Mqtt", f"{url!r}, to={{'lines': Line}}")
        reader.start()
        try:
            async with MqttSink(url, timeout="60s") as sink:
                await sink.publish("lines", {"n": 0}, retain=True)
                await reader.published(1)
                numbers = iter(range(1, MESSAGES))

                async def publish() -> None:
                    for n in numbers:
                        await sink.publish("lines", {"n": n})

                async with asyncio.TaskGroup() as tasks:
                    for _ in range(20):
                        tasks.create_task(publish())
                    for fault in ("reader", "server", "reader", "server", "both"):
                        seen = len(set(reader.stored()))
                        await until(lambda seen=seen: len(set(reader.stored())) > min(seen + 300, MESSAGES - 1), 40)
                        if fault != "server":
                            reader.kill()
                        if fault != "reader":
                            await asyncio.to_thread(server.stop)
                            await asyncio.to_thread(server.start)
                        if fault != "server":
                            reader.start()
            assert set(await reader.published(MESSAGES)) == set(range(MESSAGES))
        finally:
            reader.kill()
            server.kill()

    async def test_processes_share_a_subscription_and_one_that_is_killed_goes_on_with_its_session(
        self, mosquitto: Mosquitto, tmp_path: Path
    ) -> None:
        arguments = f"{mosquitto.url!r}, to={{'shared': Line}}, share='pair', name='shared{tmp_path.name[-1]}'"
        pair = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            pair.append(Reader(tmp_path / name, "stentor.sources.mqtt", "Mqtt", arguments))
        try:
            for reader in pair:
                reader.start()
            async with MqttSink(mosquitto.url) as sink:
                sent = 0
                async with asyncio.timeout(60):
                    while not all(reader.stored() for reader in pair):  # what nobody subscribes to yet is gone
                        await sink.publish("shared", {"n": -1})
                        await asyncio.sleep(0.05)
                for sent in range(1000):
                    await sink.publish("shared", {"n": sent})
                    if sent == 300:
                        pair[0].kill()
                    if sent == 600:
                        pair[0].start()
            await until(lambda: {n for reader in pair for n in reader.stored()} >= set(range(1000)))
        finally:
            for reader in pair:
                reader.kill()
        each = [set(reader.stored()) - {-1} for reader in pair]
        assert min(map(len, each)) > 100, "they did not share"

    async def test_cloudevents_come_in_binary_and_structured_mode(self, mosquitto: Mosquitto) -> None:
        app = App("ce", broker="memory://")
        app.catalog.add(Open)
        app.add(Mqtt(mosquitto.url, to={"ce/probe": Line, "ce/#": cloudevents(app)}, name="ce"))
        seen: list[Message] = []

        @app.on(topic="doors")
        async def keep(message: Message) -> None:
            seen.append(message)

        event = Message(
            id="1-2-3", source="/doors", type="com.example.open", topic="", data=b'{"door":"7"}', subject="seven",
            time="2026-01-02T03:04:05Z", datacontenttype="application/json", extensions={"tenant": "a"},
        )  # fmt: skip
        async with subscribed(app, mosquitto.url, "ce/probe") as (sink, _):
            binary = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            binary.ContentType = "application/json"
            attributes = event.attributes() | {"id": "binary"}
            attributes.pop("datacontenttype")
            binary.UserProperty = [(name, str(value)) for name, value in attributes.items()]
            client = sink._connection.client
            client.publish("ce/binary", event.data, 1, properties=binary)
            structured = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            structured.ContentType = "application/cloudevents+json; charset=utf-8"
            client.publish("ce/structured", to_structured(event), 1, properties=structured)
            client.publish("ce/as-in-3.1.1", to_structured(event).replace(b"1-2-3", b"plain"), 1)
            await until(lambda: len(seen) == 3)
        assert {message.id for message in seen} == {"binary", "1-2-3", "plain"}
        for message in seen:
            assert (message.source, message.subject, message.key) == ("/doors", "seven", "7")
            assert message.extensions["tenant"] == "a"
            assert message.time is not None
            assert message.time.startswith("2026-01-02T03:04:05")

    async def test_a_handler_sends_a_command_that_the_server_confirms(self, mosquitto: Mosquitto) -> None:
        app, device, got = App("commands", broker="memory://"), App("device", broker="memory://"), list[Any]()

        async def sink() -> AsyncIterator[MqttSink]:
            async with MqttSink(mosquitto.url) as made:
                yield made

        @app.on(Open)
        async def unlock(event: Open, devices: Annotated[MqttSink, Depends(sink, scope="app")]) -> None:
            await devices.publish(f"command/{event.door}", event)
            got.append("confirmed")

        device.add(Mqtt(mosquitto.url, to={"command/+": Open, "command-probe": Line}, name="device"))
        async with subscribed(device, mosquitto.url, "command-probe") as (_, found), app:
            await app.publish(Open(door="7"))
            await until(lambda: found and got)
        assert (found, got) == ([Open(door="7")], ["confirmed"])

    async def test_tls_and_password(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        server = await asyncio.to_thread(started, tmp_path / "server", secure=True)
        try:
            app = App("safe", broker="memory://")
            app.add(Mqtt(server.url, to={"lines": Line}))
            async with subscribed(app, server.url, "lines") as (sink, found):
                await sink.publish("lines", {"n": 1})
                await until(lambda: found)
            wrong = server.url.replace("stentor:", "nobody:")
            for version in ("5", "3.1.1"):
                async with MqttSink(f"{wrong}&version={version}") as sink:
                    with pytest.raises(AuthenticationFailed, match=r"mqtts://localhost:.* refuses the connection: "):
                        await sink.publish("lines", {"n": 1})
            app = App("wrong", broker="memory://")
            app.add(Mqtt(wrong, to={"lines": Line}))
            with caplog.at_level(logging.WARNING):
                async with app:
                    await until(lambda: "refuses the connection" in caplog.text)
            assert "s3cret" not in caplog.text
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("pattern", "topic", "names"),
    [
        ("plant/{line}/t", "plant/7/t", {"line": "7"}),
        ("plant/+/t", "plant/7/t", {}),
        ("plant/{line}/t", "plant/7/x/t", None),
        ("alarms/#", "alarms/a/b", {}),
        ("alarms/#", "alarms", {}),
        ("#", "anything/at all", {}),
        ("a.b", "axb", None),
    ],
)
def test_a_pattern_fits_as_mqtt_says(pattern: str, topic: str, names: dict[str, str] | None) -> None:
    found = _Pattern(pattern, Line, "").match(topic)
    assert (None if found is None else found.groupdict()) == names


@pytest.mark.parametrize("pattern", ["", "a/#/b", "a+/b", "{a}b", "{1}"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(DefinitionError, match="is no topic pattern"):
        Mqtt("mqtt://localhost", to={pattern: Line})


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://localhost", "is no MQTT URL"),
        ("mqtt://localhost?version=4", "version must be 5 or 3.1.1"),
        ("mqtt://localhost?colour=red", "unknown option colour"),
        ("mqtt://localhost?ca=x", "ca, cert and key are for TLS: write tls=1 too"),
        ("mqtts://localhost?ca=/not/there", "No such file"),
        ("mqtt://localhost:nine", "'localhost:nine' is no host and port"),
    ],
)
def test_a_wrong_url_is_refused_at_once(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Mqtt(url, to={"a": Line})
