"""The files that a broker's URL names for TLS: what is wrong with them is said before anybody connects."""

from pathlib import Path

import pytest

from servers import Missing
from servers.tls import certificates
from stentor.brokers.trust import refused
from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError
from tests.real import unavailable

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


def test_whose_certificate_is_refused_is_said() -> None:
    ours = refused("kafka://h", "SSL routines::ssl/tls alert\nbad certificate")
    theirs = refused("kafka://h", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get issuer")
    assert isinstance(ours, AuthenticationFailed)
    assert "takes no client without a certificate" in str(ours)
    assert "\n" not in str(ours)
    assert "has a certificate that is not accepted here" in str(theirs)
