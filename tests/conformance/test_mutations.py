"""The suite is worth something: it catches every one of these broken brokers, and lets the sound one pass."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.mutants import MUTANTS

pytestmark = [pytest.mark.slow, pytest.mark.conformance]
ROOT = Path(__file__).parents[2]


def run(mutant: str, tests: str) -> subprocess.CompletedProcess[str]:
    """The chosen tests of the suite on a mutant, in a process of their own; a mutant is not waited for as long."""
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "tests/conformance/mutants.py", "-k", tests, "-x", "-q", "--tb=short",
            "-p", "no:cacheprovider", "--timeout=40",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"CONFORMANCE_MUTANT": mutant, "STENTOR_CONFORMANCE_PATIENCE": "4" if mutant else "60"},
    )  # fmt: skip


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 12


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_suite_catches(mutant: str) -> None:
    result = run(mutant, MUTANTS[mutant][1])
    assert result.returncode == 1, f"{mutant} passed: {result.stdout[-3000:]}{result.stderr[-2000:]}"
    assert "1 failed" in result.stdout


def test_the_sound_broker_passes() -> None:
    result = run("", " or ".join(f"({tests})" for _, tests in MUTANTS.values()))
    assert result.returncode == 0, result.stdout[-3000:]
