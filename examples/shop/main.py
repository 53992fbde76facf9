"""The command: run the three services in processes of their own until every order is through, and check the books."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from examples.shop.books import ROOT, Books
from examples.shop.orders import make
from examples.shop.payments import LIMIT

SERVICES = ("orders", "payments", "shipping")
PATIENCE = 120.0
"""Seconds without anything new after which a run has failed."""


class Wrong(Exception):
    """The books do not say what they must, or a service ended."""


class Service:
    """A service in a process of its own: as `stentor run examples.shop.orders:app` starts it."""

    def __init__(self, name: str, broker: str, folder: Path) -> None:
        self.name = name
        with (folder / f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stentor", "run", f"examples.shop.{name}:app", "--broker", broker],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "SHOP_FOLDER": str(folder)},
            )  # fmt: skip

    def ended(self) -> None:
        """Wait for its end after a signal; it gets no second one, which would end it at once."""
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def declare(broker: str) -> None:
    """The deploy step: all topics and groups are there before anything is published."""
    for name in SERVICES:
        command = [sys.executable, "-m", "stentor", "declare", f"examples.shop.{name}:app", "--broker", broker]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Wrong(done.stderr.strip())


@contextmanager
def running(broker: str, folder: Path) -> Generator[dict[str, Service]]:
    """The three services; stopped in order at the end."""
    services: dict[str, Service] = {}
    try:
        for name in SERVICES:
            services[name] = Service(name, broker, folder)
        yield services
    finally:
        for service in services.values():
            service.process.terminate()
        for service in services.values():
            service.ended()


@contextmanager
def books_of(service: str, folder: Path) -> Generator[Books]:
    os.environ["SHOP_FOLDER"] = str(folder)
    books = Books(service)
    yield books
    books.close()


def wait(services: dict[str, Service], folder: Path, orders: int) -> None:
    """Until so many orders are through. Raises Wrong when a service ends, or nothing goes on any more."""
    with books_of("orders", folder) as books:
        last, since = -1, time.monotonic()
        while (count := books.count()) < orders:
            if count != last:
                last, since = count, time.monotonic()
            ended = [name for name, service in services.items() if service.process.poll() is not None]
            if ended:
                raise Wrong(f"{ended[0]} ended; see {folder / ended[0]}.log")
            if time.monotonic() - since > PATIENCE:
                raise Wrong(f"{count:,} of {orders:,} orders are through, and nothing goes on; see {folder}/*.log")
            time.sleep(0.02)


def check(folder: Path, orders: int) -> int:
    """How many handlings were repeated. Raises Wrong unless every order is through, each customer's in their order."""
    good = [number for number in range(1, orders + 1) if make(number).cents <= LIMIT]
    wanted = {"orders": range(1, orders + 1), "payments": range(1, orders + 1), "shipping": good}
    repeated = 0
    for service, numbers in wanted.items():
        with books_of(service, folder) as books:
            done = books.read()
        if sorted(entry.number for entry in done) != list(numbers):
            raise Wrong(f"{service} dealt with {len(done):,} orders, not {len(numbers):,}")
        last: dict[tuple[str, str], int] = {}
        for entry in done:
            # What is shipped and what is refused reaches the orders by two topics; order holds in each.
            way = (entry.customer, entry.outcome if service == "orders" else "")
            if last.get(way, 0) > entry.number:
                raise Wrong(f"{service}: order {entry.number} of {entry.customer} came after {last[way]}")
            last[way] = entry.number
        repeated += sum(entry.times - 1 for entry in done)
    return repeated


def main(arguments: list[str] | None = None) -> int:
    """Run the example; 0 when the books are right, 1 when not."""
    parser = argparse.ArgumentParser(prog="shop", description="Three services, and what they do with orders.")
    parser.add_argument("--broker", metavar="URL", default=os.environ.get("STENTOR_BROKER"), help="default: a file")
    parser.add_argument("--orders", type=int, default=1000, help="how many orders are placed (1000)")
    parser.add_argument("--rate", type=float, default=500, help="orders a second (500)")
    parser.add_argument("--kill", choices=SERVICES, help="kill -9 this service on the way, and start it again")
    options = parser.parse_args(arguments)
    os.environ |= {"SHOP_ORDERS": str(options.orders), "SHOP_RATE": str(options.rate)}
    folder = Path(tempfile.mkdtemp(prefix="shop-"))
    broker = options.broker or f"sqlite:///{folder / 'broker.db'}"
    begin = time.monotonic()
    try:
        declare(broker)
        with running(broker, folder) as services:
            if options.kill:
                wait(services, folder, options.orders // 3)
                services[options.kill].process.kill()
                services[options.kill].ended()
                print(f"killed {options.kill} (SIGKILL); starting it again")
                services[options.kill] = Service(options.kill, broker, folder)
            wait(services, folder, options.orders)
        repeated = check(folder, options.orders)
    except Wrong as wrong:
        print(f"shop: {wrong}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(
        f"{options.orders:,} orders are through in {time.monotonic() - begin:.1f} s, each customer's in their order; "
        f"{repeated:,} handlings were repeated"
    )
    return 0
