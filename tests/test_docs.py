"""README.md and docs/: links lead somewhere, and what they show is what happens: files are written, commands run.

Each page is a story in an empty folder, told from top to bottom. What counts there:

- a block with ``title="path"`` (in whatever language) is written to that path; a block of plain ``python`` is not part
  of the story, it runs by itself (see conftest.py);
- a ``console`` block runs: lines that begin with ``$ `` are commands, what follows is what they print. ``…`` stands for
  any text within a line, and alone on a line for any number of lines. Ids, times and sizes match others, the
  blanks between columns any number of blanks. A command that shows nothing may print anything;
- ``<!-- background -->`` before a console block leaves its command running; ``<!-- stop -->`` sends it the interrupt
  that Ctrl-C sends. It must have printed by then what the block shows;
- ``<!-- fails -->`` before a console block says that its last command ends with an error;
- ``sh`` and ``text`` blocks are shown, and not run.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$|^ *<!-- (?P<mark>background|stop|fails) -->$",
    re.MULTILINE | re.DOTALL,
)
PATIENCE = 60.0
VARIES = re.compile(
    r"(?P<any>…)|(?P<blanks> {2,})|(?P<id>\b[0-9a-f]{12,32}(?:-[0-9a-f]+)?\b)|(?P<ago>\b\d+ (?:s|m|h) ago\b)"
    r"|(?P<when>\b(?:\d{4}-\d\d-\d\d[ T])?\d\d:\d\d:\d\d(?:\.\d+)?(?:\+\d{4}|Z)?)|(?P<took>\b\d+(?:\.\d+)? ?(?:ms|s)\b)"
    r"|(?P<size>\b\d+(?:\.\d+)? [KMG]?i?B\b)"
)
MATCHES = {
    "any": ".*?", "blanks": " +", "id": r"[0-9a-f]+(?:-[0-9a-f]+)?", "ago": r"\d+ (?:ms|s|m|h) ago",
    "when": r"(?:[\d-]{10}[ T])?[\d:]{8}(?:\.\d+)?(?:\+\d{4}|Z)?", "took": r"\d+(?:\.\d+)? ?(?:ms|s)",
    "size": r"\d+(?:\.\d+)? [KMG]?i?B",
}  # fmt: skip
"""What is never twice the same, and what stands for it: ids, times, sizes, and how long something took."""
LOOKS = ("stentor lag", "stentor dead list", "stentor dead show", "stentor topics", "stentor groups list", "cat ")
"""Commands that change nothing: they are asked again until what a program does in the background has shown."""


def pages() -> list[Path]:
    """README and docs, without what is made from the code."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if path.parent != ROOT / "docs" / "reference"]


def stories() -> Iterator[Any]:
    for path in pages():
        name = path.relative_to(ROOT)
        text = path.read_text("utf-8")
        if "```console" in text:
            slow = ("<!-- background -->" in text) or text.count("\n$ ") > 6
            yield pytest.param(path, id=str(name), marks=[pytest.mark.slow] if slow else [])


def pattern(lines: list[str]) -> re.Pattern[str]:
    """What output must match, made of the lines that a page shows."""
    parts = []
    for line in lines:
        if line.strip() == "…":
            parts.append(r"(?:.*\n)*?")
            continue
        place = 0
        for varies in VARIES.finditer(line.rstrip()):
            parts += [re.escape(line[place : varies.start()]), MATCHES[varies.lastgroup or ""]]
            place = varies.end()
        parts.append(re.escape(line[place:].rstrip()) + r" *\n")
    return re.compile("".join(parts))


def commands(body: str) -> list[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that it shows."""
    found: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found and found[-1][0].endswith("\\") and not found[-1][1]:
            found[-1] = (f"{found[-1][0][:-1]} {line.removeprefix('>').strip()}", [])
        elif found:
            found[-1][1].append(line)
    for _, shown in found:
        while shown and not shown[-1].strip():
            shown.pop()
    return found


class Story:
    """A page on its way: its folder, and the programs that run in the background."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("STENTOR_", "PYTEST_"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "NO_COLOR": "1",
            "COLUMNS": "100",
            "TZ": "UTC",
            "HOME": str(folder),
            "PYTHONUNBUFFERED": "1",
        }
        self.running: list[tuple[subprocess.Popen[str], Path, list[str], str]] = []

    def write(self, name: str, body: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, "utf-8")

    def run(self, command: str, shown: list[str], *, fails: bool) -> None:
        if command.startswith("curl ") and shutil.which("curl") is None:
            pytest.skip("there is no curl here")
        deadline = time.monotonic() + (PATIENCE if command.startswith(LOOKS) else 0)
        while True:
            done = subprocess.run(
                ["bash", "-c", command], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
            )  # fmt: skip
            printed = done.stdout if done.stdout.endswith("\n") else f"{done.stdout}\n"
            matches = not shown or pattern(shown).fullmatch(printed)
            if matches and bool(done.returncode) == fails:
                return
            if time.monotonic() > deadline:
                wanted = "\n".join(shown)
                pytest.fail(f"$ {command}\nended with {done.returncode} and printed\n{done.stdout}\nnot\n{wanted}")
            time.sleep(0.2)

    def start(self, command: str, shown: list[str]) -> None:
        path = self.folder / f".background-{len(self.running)}"
        with path.open("w") as output:
            process = subprocess.Popen(
                shlex.split(command), cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip
        self.running.append((process, path, shown, command))
        ready = next((n for n, line in enumerate(shown, 1) if "ready" in line), 1)
        self.look(process, path, shown[:ready], command)

    def look(self, process: subprocess.Popen[str], path: Path, shown: list[str], command: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not pattern(shown).match(path.read_text("utf-8")):
            if time.monotonic() > deadline or process.poll() is not None:
                printed, wanted = path.read_text("utf-8"), "\n".join(shown)
                pytest.fail(f"$ {command}\nprinted in the background\n{printed}\nnot\n{wanted}")
            time.sleep(0.1)

    def stop(self) -> None:
        process, path, shown, command = self.running.pop()
        try:
            self.look(process, path, shown, command)
        finally:
            self.interrupt(process)

    def interrupt(self, process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def end(self) -> None:
        while self.running:
            self.stop()


@pytest.mark.parametrize("page", list(stories()))
def test_the_commands_of_a_page_print_what_it_shows(page: Path, tmp_path: Path) -> None:
    story = Story(tmp_path)
    mark = ""
    try:
        for match in FENCE.finditer(page.read_text("utf-8")):
            if match["mark"] == "stop":
                story.stop()
                continue
            if match["mark"]:
                mark = match["mark"]
                continue
            cut = len(match["indent"])
            body = "".join(line[cut:] for line in match["body"].splitlines(keepends=True))
            title = re.search(r'title="([^"]+)"', match["info"])
            if title is not None:
                story.write(title[1], body)
            elif match["info"].strip() == "console":
                found = commands(body)
                assert found, f"a console block without a command: {body}"
                for number, (command, shown) in enumerate(found, 1):
                    if mark == "background":
                        story.start(command, shown)
                    else:
                        story.run(command, shown, fails=mark == "fails" and number == len(found))
            mark = ""
        story.end()
    finally:
        for process, *_ in story.running:
            process.kill()
            process.wait()


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        target = page.parent / link
        made = (ROOT / "docs" / "reference") in target.resolve().parents  # by `tasks.py docs`
        assert re.match(r"https?:", link) or made or target.exists(), link
