"""``python -m benchmarks NAME... | all``: measure rows of the table of figures and say which bars hold."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import flow, measure
from benchmarks.measure import Bar, Row

ROWS = {
    "memory": "benchmarks.memory",
    "meter": "benchmarks.meter",
    "auto": "benchmarks.auto",
    "capacity": "benchmarks.capacity",
    "batching": "benchmarks.batching",
    "forecast": "benchmarks.forecast",
    "sqlite-publish": "benchmarks.sqlite_publish",
    "sqlite-consume": "benchmarks.sqlite_consume",
    "sqlite-latency": "benchmarks.sqlite_latency",
    "sqlite-writers": "benchmarks.sqlite_writers",
    "footprint": "benchmarks.footprint",
    "deliver": "benchmarks.deliver",
    "backlog": "benchmarks.backlog",
    "drain": "benchmarks.drain",
    "keys": "benchmarks.keys",
    "redis": "benchmarks.redis",
    "redis-everysec": "benchmarks.redis_everysec",
    "postgresql": "benchmarks.postgresql",
    "rabbitmq": "benchmarks.rabbitmq",
    "cdc": "benchmarks.cdc",
    "kafka": "benchmarks.kafka",
    "kafka-transactions": "benchmarks.kafka_transactions",
    "rocketmq": "benchmarks.rocketmq",
    "nats": "benchmarks.nats",
    "nats-unsynced": "benchmarks.nats_unsynced",
    "gateway": "benchmarks.gateway",
} | {f"flow-{name}": "" for name in flow.BROKERS}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure Stentor beside its peers; exit code 1 when a bar falls short."
    )
    parser.add_argument(
        "names", nargs="+", metavar="NAME", choices=[*ROWS, "flow", *flow.BROKERS, "all"],
        help=f"all, {', '.join(ROWS)}; `flow`, or `flow redis kafka`: the rows flow-*",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="how often each case runs (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only the cases whose name contains TEXT")
    parser.add_argument(
        "--dir", type=Path, default=Path("build/bench"), help="where files go: a real disk (default build/bench)"
    )
    return parser.parse_args()


def rows(names: list[str]) -> list[str]:
    """The rows meant: after ``flow`` come brokers, all of them if none is named."""
    if names[0] == "flow":
        return [f"flow-{name}" for name in names[1:] or flow.BROKERS]
    return list(ROWS if "all" in names else dict.fromkeys(names))


def find(name: str) -> Row:
    if name.startswith("flow-"):
        return flow.row(name.removeprefix("flow-"))
    row: Row = importlib.import_module(ROWS[name]).ROW
    return row


def chosen(row: Row, only: list[str] | None) -> Row:
    if not only:
        return row
    cases = [case for case in row.cases if any(text in case.name for text in only)]
    return replace(row, cases=cases)


def main() -> int:
    """Run the rows asked for; 1 when a bar falls short or a case of ours did not run."""
    options = arguments()
    options.dir.mkdir(parents=True, exist_ok=True)
    machine = measure.machine(options.dir)
    print(
        "{cores} cores, Python {python}, SQLite {sqlite}, {file_system}, fsync p50 {fsync_p50_us} µs".format(**machine)
        + (" (no disk: fsync costs nothing here, use --dir)" if machine["file_system"] == "tmpfs" else "")
    )
    report = []
    verdicts: list[tuple[str, Bar]] = []
    for name in rows(options.names):
        row = chosen(find(name), options.only)
        folder = options.dir / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        disk = measure.fsync_p50(folder)
        try:
            results = measure.run(row, options.rounds, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        bars = row.bars(results)
        verdicts += [(name, bar) for bar in bars]
        report.append(measure.as_json(row, results, bars))
        print(f"\n{name}: {row.title}")
        print(f"{options.rounds} rounds, median (min..max), fsync {disk:.0f} µs\n{measure.table(row, results)}\n")
        print("\n".join(map(str, bars)), flush=True)
    if len(report) > 1:
        print("\nBars")
        print("\n".join(f"{name:15} {bar}" for name, bar in verdicts))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": report}, indent=2) + "\n", "utf-8")
    return 0 if all(bar.verdict == "PASS" for _, bar in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
