"""Servers that ask for user, password and a client's certificate: where these come from, and what is said without."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

import servers
from servers.postgresql import CERTIFIED
from servers.tls import PASSWORD, USER, certificates
from stentor import App
from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError
from stentor.event import Topic
from stentor.message import Message
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from stentor.testing.conformance.events import Job
from tests.real import brokers, unavailable

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module", params=brokers())
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of this module's own, with user, password, and the client's certificate and key."""
    kind = servers.find(request.param)
    try:
        kind.install()
    except servers.Missing as missing:
        unavailable(missing)
    server = kind(tmp_path_factory.mktemp(request.param), secure=True)
    server.mutual = True
    with server:
        yield server.url


def without(url: str) -> str:
    """The URL without the client's certificate and key."""
    return re.sub("&(cert|key)=[^&]*", "", url)


def other(url: str, folder: Path) -> str:
    """The URL with the certificate and key of a client whom another authority has signed."""
    made = certificates(folder)
    return f"{without(url)}&cert={quote(str(made / 'client.pem'))}&key={quote(str(made / 'client.key'))}"


async def test_with_a_certificate_all_works(url: str) -> None:
    broker = connect(url)
    await broker.open()
    try:
        await broker.declare([Topic("t", partitions=1)], [])
        await broker.publish([Message(id="1", source="s", type="x", topic="t", data=b"{}")])
        assert [message.id async for _, message in broker.browse("t", "earliest", follow=False)] == ["1"]
        assert await broker.health() is None
    finally:
        await broker.close()


@pytest.mark.parametrize("whose", ["nobody's", "another authority's"])
async def test_without_it_fails_fast(
    url: str, whose: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """In seconds, in one line that names the certificate, with no secret in it or in any log."""
    caplog.set_level(logging.DEBUG)
    wrong = without(url) if whose == "nobody's" else other(url, tmp_path)
    assert wrong != url
    async with asyncio.timeout(60):
        with pytest.raises(AuthenticationFailed, match="certificate") as caught:
            await connect(wrong).open()
    text = str(caught.value)
    assert "\n" not in text
    told = text + caplog.text + "".join(capfd.readouterr())
    secrets = [PASSWORD, quote(PASSWORD, safe="")]
    if whose != "nobody's":
        secrets += (tmp_path / "client.key").read_text().splitlines()[1:-1]
    assert [secret for secret in secrets if secret in told] == []


@pytest.mark.parametrize("place", ["STENTOR_BROKER", "STENTOR_BROKER_FILE", "password_file"])
async def test_the_password_may_come_from(
    place: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The environment, a file that it names, or a file that the URL names; and is in no log."""
    caplog.set_level(logging.DEBUG)
    (tmp_path / "url").write_text(f"{url}\n", "utf-8")
    (tmp_path / "password").write_text(f"{PASSWORD}\n", "utf-8")
    quoted = quote(PASSWORD, safe="")
    values = {
        "STENTOR_BROKER": url,
        "STENTOR_BROKER_FILE": str(tmp_path / "url"),
        "password_file": f"{url.replace(f':{quoted}@', '@')}&password_file={tmp_path / 'password'}",
    }
    monkeypatch.setenv(place if place.isupper() else "STENTOR_BROKER", values[place])
    app = App("shop")
    app.publishes(Job)
    async with app.connected():
        assert (await app.publish(Job(key="a", n=1))).id
    assert PASSWORD not in caplog.text
    assert quoted not in caplog.text


@pytest.mark.parametrize("url", ["rabbitmq", "postgresql"], indirect=True)
async def test_a_certificate_in_place_of_a_password(url: str) -> None:
    """Where the server can take it for the user: RabbitMQ by a plugin, PostgreSQL by a line of pg_hba.conf."""
    if url.startswith("amqps"):
        alone = url.replace(f"{USER}:{quote(PASSWORD, safe='')}@", "")
    else:
        alone = url.replace(f":{quote(PASSWORD, safe='')}@", "@").replace(f"/{USER}?", f"/{CERTIFIED}?")
    assert PASSWORD not in alone
    broker = connect(alone)
    await broker.open()
    try:
        assert await broker.health() is None
    finally:
        await broker.close()
    with pytest.raises(AuthenticationFailed):
        await connect(without(alone)).open()


async def test_a_file_that_cannot_be_read(url: str, tmp_path: Path) -> None:
    (tmp_path / "client.key").write_text("no key")
    for key in (tmp_path / "client.key", tmp_path / "nowhere"):
        wrong = re.sub("key=[^&]*", f"key={quote(str(key))}", url)
        async with asyncio.timeout(60):
            with pytest.raises((ConfigError, AuthenticationFailed)) as caught:
                await connect(wrong).open()
        assert "\n" not in str(caught.value)
