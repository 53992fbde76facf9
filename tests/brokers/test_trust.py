"""The options of a broker's URL for TLS: what is wrong with them is said before anybody connects."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from servers import Missing
from servers.tls import certificates
from stentor.brokers.trust import refused
from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError, Unavailable
from tests.real import brokers, server_url, unavailable

URLS = [
    "redis://h?tls=1", "rediss://h?", "amqps://h?", "amqp://h?tls=1", "kafka://h?tls=1", "nats://h?tls=1",
    "postgresql://h/d?tls=1", "rocketmq://h?tls=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return certificates(tmp_path_factory.mktemp("tls"))
    except Missing as missing:
        unavailable(missing)
        raise


@pytest.mark.parametrize("url", URLS)
def test_what_cannot_be_read_is_named(url: str, files: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    mine = f"{url}&ca={files}/ca.pem&cert={files}/client.pem"
    connect(f"{mine}&key={files}/client.key")
    for wrong in (
        f"{url}&ca={tmp_path}/nowhere",
        f"{mine}&key={tmp_path}/nowhere",
        f"{mine}&key={secret}",
        f"{mine}&key={files}/server.key",  # of another certificate
        f"{mine}",  # which has no key in it
    ):
        with pytest.raises(ConfigError) as caught:
            connect(wrong)
        text = str(caught.value)
        assert str(files if "ca.pem" in wrong else tmp_path) in text
        assert "\n" not in text
        assert "c2VjcmV0" not in text


@pytest.mark.parametrize(
    "url", ["redis://h?", "kafka://h?", "nats://h?", "postgresql://h/d?", "rocketmq://h?", "amqp://h?"]
)
def test_files_without_tls_are_a_mistake(url: str, files: Path) -> None:
    with pytest.raises(ConfigError, match="write tls=1 too"):
        connect(f"{url}ca={files}/ca.pem")


@pytest.mark.parametrize("url", URLS)
def test_a_key_without_a_certificate_is_a_mistake(url: str, files: Path) -> None:
    with pytest.raises(ConfigError, match="a key without cert"):
        connect(f"{url}&key={files}/client.key")


@pytest.mark.parametrize("url", [url.rstrip("?1").removesuffix("tls=").rstrip("?") for url in URLS])
def test_tls_is_on_or_off(url: str) -> None:
    """What somebody means by "maybe" nobody can know: it is neither taken for yes nor for no."""
    for text in ("0", "1"):
        connect(f"{url}?tls={text}")
    for text in ("maybe", "true", "2", ""):
        with pytest.raises(ConfigError, match=f"option tls='{text}': write 1 or 0"):
            connect(f"{url}?tls={text}")


async def greeted(url: str, greeting: bytes) -> tuple[bytes, Exception]:
    """What a server that greets and then is silent gets from a broker of the URL, and how its ``open`` ends."""
    got = bytearray()
    served = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        served.append(asyncio.current_task())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                got.extend(await reader.read(4096))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        broker = connect(url.format(port=server.sockets[0].getsockname()[1]))
        async with asyncio.timeout(30):
            with pytest.raises((AuthenticationFailed, Unavailable)) as caught:
                await broker.open()
            await asyncio.gather(*filter(None, served))
    return bytes(got), caught.value


@pytest.mark.parametrize(
    "more", ["", "&ca={files}/ca.pem", "&ca={files}/ca.pem&cert={files}/client.pem&key={files}/client.key"]
)
async def test_nats_says_nothing_in_clear(more: str, files: Path) -> None:
    """Whether there is TLS is not for the server to say: it would get the password, and whoever plays it, too."""
    info = b'INFO {"server_id":"x","version":"2.15.1","headers":true,"auth_required":true,"max_payload":1048576}\r\n'
    got, error = await greeted(f"nats://user:pass-word@127.0.0.1:{{port}}?tls=1{more.format(files=files)}", info)
    assert got == b""
    assert isinstance(error, AuthenticationFailed)
    assert str(error).endswith("speaks no TLS there, and the URL asks for it")
    got, error = await greeted("nats://user:pass-word@127.0.0.1:{port}", info)
    assert b"pass-word" in got, "else the test shows nothing"


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("kind", brokers())
async def test_a_server_without_tls_is_told_nothing(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """``tls=1`` and a server that has none, or one of its own authority: one line says so."""
    url = server_url(kind, tmp_path_factory)
    address = url.partition("://")[2].rpartition("@")[2]
    broker = connect(f"{url.partition('://')[0]}://user:pass-word@{address}{'&' if '?' in url else '?'}tls=1")
    others = {"rocketmq": "certificate", "kafka": "SSL_HANDSHAKE", "redis": "Timeout"}
    said = others.get(kind, "(?i)no TLS|support SSL")
    with pytest.raises((AuthenticationFailed, Unavailable), match=said) as caught:
        await broker.open()
    assert "\n" not in str(caught.value)


def test_whose_certificate_is_refused_is_said() -> None:
    ours = refused("kafka://h", "SSL routines::ssl/tls alert\nbad certificate")
    theirs = refused("kafka://h", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get issuer")
    assert isinstance(ours, AuthenticationFailed)
    assert "takes no client without a certificate" in str(ours)
    assert "\n" not in str(ours)
    assert "has a certificate that is not accepted here" in str(theirs)
