"""All seven brokers under one load, in one go: docs/bench/seven.html, what `stentor choose` ships with and says of it.

``python3 tasks.py seven`` starts the servers, runs ``stentor bench`` on them and on a file, and stops them. It takes
twenty minutes. With a FILE it only writes the three from that report.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

import servers
from stentor.bench import Report
from stentor.bench.choose import from_report
from stentor.bench.report import page

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "bench" / "seven.html"
SHIPPED = ROOT / "src" / "stentor" / "bench" / "measured.json"
GUIDE = ROOT / "docs" / "guides" / "bench.md"
CHOICE = re.compile(r"(?<=^\$ stentor choose\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
SERVERS = ("redis", "postgresql", "nats", "rabbitmq", "rocketmq", "kafka")
LOAD = ("--during", "4s", "--repeats", "3", "--fault", "kill", "--backlog", "10000", "--ramp", "--json")


def measure() -> bytes:
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        urls = ["sqlite:///bench.db", *(servers.shared(name, Path(folder, name), os.getpid()) for name in SERVERS)]
        where = [word for url in urls for word in ("--broker", url)]
        command = [sys.executable, "-m", "stentor", "bench", *where, *LOAD]
        return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True).stdout


def main() -> None:
    (ROOT / "build").mkdir(exist_ok=True)
    report = msgspec.json.decode(Path(sys.argv[1]).read_bytes() if sys.argv[1:] else measure(), type=Report)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(report), "utf-8")
    SHIPPED.write_bytes(msgspec.json.format(msgspec.json.encode(from_report(report))) + b"\n")
    command = [sys.executable, "-m", "stentor", "choose"]
    choice = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True).stdout
    GUIDE.write_text(CHOICE.sub(lambda _: choice, GUIDE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
