"""docs/guarantees.md says what the suite showed: nobody edits its tables, and no cell claims what did not pass."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tasks
from docs import gen_guarantees as gen
from stentor.connect import _BUILT_IN
from stentor.testing.conformance import Conformance

FACTS = tomllib.loads((gen.ROOT / "docs" / "guarantees.toml").read_text("utf-8"))
FOUND: dict[str, Any] = json.loads(gen.FOUND.read_text("utf-8"))


def test_the_page_is_what_the_results_give() -> None:
    text = gen.PAGE.read_text("utf-8")
    assert gen.page(text, gen.generated(FOUND)) == text, "python3 tasks.py guarantees"


def test_every_broker_and_every_rule_is_there() -> None:
    other = {"amqp": "rabbitmq", "amqps": "rabbitmq", "rediss": "redis"}
    assert set(gen.BROKERS) == set(tasks.BROKERS) == {other.get(scheme, scheme) for scheme in _BUILT_IN}
    of_the_suite = {int(found[1]) for name in dir(Conformance) if (found := re.match(r"test_r(\d\d)_", name))}
    assert set(gen.RULES) == of_the_suite
    rows = [line.strip("| ").split(" | ") for line in gen.generated(FOUND).splitlines() if line.startswith("| ")]
    tables = rows[:16], rows[16:32]
    assert [name for table in tables for name in table[0][1:]] == list(gen.BROKERS.values())
    for table in tables:
        assert [line[0] for line in table[2:]] == [f"{rule} {name}" for rule, name in gen.RULES.items()]
        assert {len(line) for line in table} == {5}
        assert all(all(line) for line in table)
    for broker in gen.BROKERS:
        assert all(gen.declared(FACTS, rule, broker) for rule in gen.RULES)
        assert FACTS["durable"][broker].keys() == {"default", "strongest"}


@pytest.mark.parametrize("broker", FOUND)
def test_what_is_checked_in_has_passed(broker: str) -> None:
    ran = FOUND[broker]
    assert ran["date"]
    assert ran["version"] or broker == "memory"
    assert {int(rule) for rule in ran["rules"]} == set(gen.RULES)
    for rule in gen.RULES:
        assert re.match("native|emulated|refused", gen.cell(FACTS, ran, rule, broker)), rule


def result(**rule: Any) -> dict[str, Any]:
    return {"rules": {"4": {"passed": 0, "failed": [], "not shown": {}} | rule}, "features": {}}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"passed": 12}, "native 12"),
        ({"passed": 12, "not shown": {"test_r04_x": "why"}}, "native 12, 1 not shown"),
        ({"not shown": {"test_r04_x": "why"}}, "not shown"),
        ({"passed": 11, "failed": ["test_r04_x"]}, "**fails** 1"),
        ({"failed": ["test_r04_x"]}, "**fails** 1"),
    ],
)
def test_a_cell_claims_only_what_passed(rule: dict[str, Any], said: str) -> None:
    assert gen.cell(FACTS, result(**rule), 4, "redis") == said


def test_what_is_said_to_be_refused_is_refused() -> None:
    ran = {"rules": {"12": {"passed": 6, "failed": [], "not shown": {}}}, "features": {"dedupe": "False"}}
    assert gen.cell(FACTS, ran, 12, "kafka") == "refused 6"
    with pytest.raises(SystemExit, match="redis, rule 12"):
        gen.cell(FACTS, ran, 12, "redis")
    with pytest.raises(SystemExit, match="kafka, rule 12"):
        gen.cell(FACTS, ran | {"features": {"dedupe": "True"}}, 12, "kafka")


JUNIT = """<testsuites><testsuite timestamp="{when}">
<testcase classname="tests.conformance.test_memory.TestMemory" name="test_r04_a">{a}</testcase>
<testcase classname="tests.conformance.test_memory.TestMemory" name="test_r04_b"><skipped message="why"/></testcase>
<testcase classname="tests.conformance.test_memory.TestMemory" name="test_r13_features"><properties>
<property name="durable" value="process"/><property name="atomic" value="True"/><property name="dedupe" value="True"/>
<property name="replay" value="True"/><property name="cancel" value="True"/><property name="browse" value="True"/>
</properties></testcase>
<testcase classname="tests.brokers.test_memory.T" name="test_r11_x"><properties><property name="events" value="10"/>
<property name="duplicates" value="2"/></properties></testcase>
<testcase classname="tests.brokers.test_memory.T" name="test_r07_x"><properties><property name="late" value="0.5"/>
<property name="late" value="1"/><property name="takeover" value="3"/><property name="lease" value="2"/>
</properties></testcase>
</testsuite></testsuites>"""


def test_what_is_taken_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gen, "RESULTS", tmp_path)
    (tmp_path / "memory.xml").write_text(JUNIT.format(when="2026-01-01T10:00:00", a="<failure/>"))
    skipped = {"test_r04_b": "why"}
    assert gen.taken("memory")["rules"]["4"] == {"passed": 0, "failed": ["test_r04_a"], "not shown": skipped}
    (tmp_path / "memory.xml").write_text(JUNIT.format(when="2026-01-02T10:00:00", a=""))
    soak = {"minutes": 2.0, "events": 100.0, "duplicates": 3.0, "deaths": 9.0}
    properties = "".join(f'<property name="{name}" value="{value}"/>' for name, value in soak.items())
    cases = "".join(
        f'<testcase classname="tests.test_{name}.T" name="test_soak"><properties>{said}</properties></testcase>'
        for name, said in (("memory", properties), ("redis", ""))
    )
    (tmp_path / "soak.xml").write_text(f'<testsuite timestamp="2026-01-02T11:00:00">{cases}</testsuite>')
    found = gen.taken("memory")
    assert found["date"] == "2026-01-02"
    assert found["rules"]["4"] == {"passed": 1, "failed": [], "not shown": skipped}
    assert found["faults"] == {"events": 10, "duplicates": 2}
    assert found["late"] == {"events": 2, "p50": 0.75, "max": 1.0}
    assert found["takeover"] == {"seconds": 3.0, "lease": 2.0}
    assert found["soak"] == soak
