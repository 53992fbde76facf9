"""``stentor new``: a project that runs, with a test that passes."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template

import click

from stentor.cli.exits import advise

TEMPLATE = Path(__file__).parent / "template"
DOTTED = {"gitignore": ".gitignore"}


@click.command()
@click.argument("name")
def new(name: str) -> None:
    """Make a project that runs and has a passing test.

    NAME is the project's folder, and with "_" for "-" its package.
    """
    target = Path(name)
    package = _package(target.name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise click.UsageError(f"{target} exists already and is not empty; choose another name")
    words = {"name": target.name, "package": package}
    made = []
    try:
        for place, text in _files(words):
            path = target / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            made.append(path)
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    for path in made:
        click.echo(f"  {path}")
    click.echo(f"\n{click.style('Next', bold=True)}")
    for command in (f"cd {target}", "python -m pytest", f"stentor run {package}.app --reload"):
        click.echo(f"  {click.style(command, fg='cyan')}")
    try:
        import pytest  # noqa: F401
    except ImportError:
        advise("pytest is not installed here; pip install pytest")


def _package(name: str) -> str:
    package = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", package) or keyword.iskeyword(package):
        raise click.UsageError(f"{name!r} cannot name a package; use lower-case letters, digits, '-' and '_'")
    if package in sys.stdlib_module_names or package in ("stentor", "tests", "test"):
        raise click.UsageError(f"{name!r} would hide the module of that name; choose another")
    return package


def _files(words: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Place and text of each file of a new project."""
    for source in sorted(TEMPLATE.rglob("*.txt")):
        parts = list(source.relative_to(TEMPLATE).with_suffix("").parts)
        if parts[0] == "package":
            parts[0] = words["package"]
        parts[-1] = DOTTED.get(parts[-1], parts[-1])
        yield "/".join(parts), Template(source.read_text(encoding="utf-8")).substitute(words)
