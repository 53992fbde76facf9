"""The real servers that `python3 tasks.py servers up` and the tests start: each can be asked for in the same way."""

import os
from pathlib import Path

import pytest

import servers
from tests.real import unavailable

TOGETHER = ["nats3", "rabbitmq3"]


@pytest.mark.parametrize("name", servers.SERVERS)
def test_each_is_made_alike(name: str, tmp_path: Path) -> None:
    assert servers.find(name)(tmp_path, secure=False).name == name


@pytest.mark.parametrize("name", TOGETHER)
def test_what_has_no_secure_kind_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(servers.Missing, match=f"{name} has no secure kind"):
        servers.find(name)(tmp_path, secure=True)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("name", TOGETHER)
def test_a_cluster_comes_up(name: str, tmp_path: Path) -> None:
    """As ``servers up`` starts it; it ends with this process."""
    try:
        url = servers.shared(name, tmp_path, os.getpid())
    except servers.Missing as missing:
        unavailable(missing)
    assert url.count(",") == 2
