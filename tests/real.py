"""Real servers for tests: one of each kind for all processes of a run, a fresh namespace for each test.

In CI a server that cannot be had fails the test; elsewhere the test is skipped and says why.
"""

import itertools
import os
import secrets
from pathlib import Path

import pytest

import servers

_count = itertools.count()
_run = secrets.token_hex(3)


def unavailable(error: Exception) -> None:
    """Skip on a laptop, fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"in CI every server is required: {error}")
    pytest.skip(str(error))


def server_url(name: str, factory: pytest.TempPathFactory, *, secure: bool = False) -> str:
    """The URL of a running server that all tests of this run share."""
    base = factory.getbasetemp()
    controller = int(os.environ.get("STENTOR_TEST_CONTROLLER", "0")) or os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = Path(base) / f"server-{name}{'-secure' if secure else ''}"
    try:
        return servers.shared(name, folder, controller, secure=secure)
    except servers.Missing as missing:
        unavailable(missing)
        raise AssertionError from missing  # not reached


def fresh(url: str, **options: object) -> str:
    """A URL with a namespace that nobody used before, and further options."""
    given = {"namespace": f"t{_run}{os.getpid():x}{next(_count)}", **options}
    return url + ("&" if "?" in url else "?") + "&".join(f"{name}={value}" for name, value in given.items())
