"""What every test gets: a clean environment, reproducible Hypothesis, the snippets of README and docs."""

import ast
import asyncio
import inspect
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from sybil import Example, Sybil
from sybil.parsers.markdown import ClearNamespaceParser, CodeBlockParser, SkipParser
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

# Shared machines are slow at times: no deadline. In CI the same examples each run: a red run is about the change.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

# A shell that runs this in the background has SIGINT ignored, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_snippet(example: Example) -> None:
    """Run a block of Python as its page shows it, with `await` at the top level if it has one."""
    source = "\n" * (example.line + example.parsed.line_offset) + example.parsed
    code = compile(source, example.path, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, example.namespace))
    else:
        exec(code, example.namespace)


SNIPPETS = Sybil(
    path=str(Path(__file__).parents[1]),
    pattern="*.md",
    parsers=[CodeBlockParser("python", run_snippet), SkipParser(), ClearNamespaceParser()],
    fixtures=["snippet_folder"],
)


class Snippets:
    """Collects the snippets of every Markdown page that pytest is given; one page's snippets share their names."""

    pytest_collect_file = staticmethod(SNIPPETS.pytest())

    @pytest.fixture
    def snippet_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An empty folder for the files that a snippet makes."""
        monkeypatch.chdir(tmp_path)


def pytest_configure(config: pytest.Config) -> None:
    """A conftest serves its own folder only; what it registers serves README and docs too."""
    config.pluginmanager.register(Snippets(), "snippets")
    if "PYTEST_XDIST_WORKER" not in os.environ:  # shared servers end with this process
        os.environ["STENTOR_TEST_CONTROLLER"] = str(os.getpid())


class Spread(LoadScopeScheduling):  # type: ignore[misc]
    """Each process gets the next class or module, but of the contract's rules the next test: none needs another."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith("tests/conformance/") else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Spread | None:
    return Spread(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the settings of the developer's own programs."""
    for name in os.environ:
        if name.startswith("STENTOR_") and not name.startswith(("STENTOR_SOAK_", "STENTOR_TEST_", "STENTOR_SERVERS")):
            monkeypatch.delenv(name)
