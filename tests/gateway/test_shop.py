"""The shop example with a broker for each service and the real Envoy between them, through kill -9 of a service."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from examples.shop.books import ROOT
from examples.shop.main import SERVICES, check, wait
from servers import Missing, free_port
from servers.envoy import Envoy
from tests.real import unavailable

pytestmark = [pytest.mark.server, pytest.mark.slow]
ORDERS = 120


class Run:
    """A service in a process of its own, with its own broker."""

    def __init__(self, name: str, port: int, folder: Path, env: dict[str, str]) -> None:
        self._command = [
            sys.executable, "-m", "stentor", "run", f"examples.shop.bus:{name}",
            "--broker", f"sqlite:///{folder}/{name}-broker.db", "--http", f"127.0.0.1:{port}",
        ]  # fmt: skip
        self._log = folder / f"{name}.log"
        self._env = env
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env
            )

    def stop(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait(40)


@pytest.mark.timeout(300)
def test_the_shop_works_across_a_gateway_although_a_service_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_FOLDER", "")
    ports = {name: free_port() for name in (*SERVICES, "listen", "inside", "admin")}
    config = tmp_path / "gateway.toml"
    lines = [f"{name} = '127.0.0.1:{ports[name]}'" for name in ("listen", "inside", "admin")]
    lines += ["dead_letter = 'orders'", "[services]", *(f"{n} = ['127.0.0.1:{ports[n]}']" for n in SERVICES)]
    config.write_text("\n".join(lines))
    command = [sys.executable, "-m", "stentor", "gateway", "envoy", "--config", str(config), "--out", str(tmp_path)]
    command += ["--check"]
    for name in SERVICES:
        command += ["--app", f"examples.shop.bus:{name}"]
    envoy = Envoy(tmp_path, f"127.0.0.1:{ports['admin']}")
    try:
        envoy.install()
    except Missing as missing:
        unavailable(missing)
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    assert "4 routes to 3 services" in made.stdout
    env = os.environ | {
        "SHOP_FOLDER": str(tmp_path), "SHOP_ORDERS": str(ORDERS), "SHOP_RATE": "100",
        "SHOP_GATEWAY": f"http://127.0.0.1:{ports['listen']}/events",
    }  # fmt: skip
    services: dict[str, Run] = {}
    try:
        envoy.start()
        for name in SERVICES:
            services[name] = Run(name, ports[name], tmp_path, env)
        wait(cast(Any, services), tmp_path, ORDERS // 3)
        services["payments"].stop(signal.SIGKILL)
        services["payments"].start()
        wait(cast(Any, services), tmp_path, ORDERS)
    finally:
        for service in services.values():
            service.stop(signal.SIGTERM)
        envoy.kill()
    check(tmp_path, ORDERS)
