"""Writes docs/reference/: pages of docstrings for what is public, and one of help for the command line."""

import ast
import shutil
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "reference"
PAGES = {  # module: what a reader finds there
    "stentor": "what an app is made of",
    "stentor.errors": "every error, and when it is raised",
    "stentor.testing": "tests of an app, with virtual time and faults",
    "stentor.message": "what travels between programs",
    "stentor.broker": "the protocol that a broker keeps",
    "stentor.testing.conformance": "the contract as a test suite for brokers",
}
FOLDERS = ("sources", "patterns", "sinks", "gateway", "security", "capacity", "observe")  # a page for each module
RULES = "    options: { inherited_members: true }\n"  # a suite's rules are in its parents


def subjects() -> dict[str, str]:
    """The modules to describe, each with a line about it: PAGES, and what a module of FOLDERS says of itself."""
    found = dict(PAGES)
    for folder in FOLDERS:
        for path in sorted((ROOT / "src" / "stentor" / folder).glob("[!_]*.py")):
            text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
            found[f"stentor.{folder}.{path.stem}"] = text.partition("\n")[0]
    return found


def command_page() -> str:
    """Every command of `stentor` with what its --help prints."""
    from stentor.cli import cli

    def texts(command: click.Command, context: click.Context) -> list[str]:
        found = [f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```"]
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                if inner is not None and not inner.hidden:
                    found += texts(inner, click.Context(inner, info_name=name, parent=context))
        return found

    return (
        "# The command line\n\n"
        + "\n\n".join(
            texts(cli, click.Context(cli, info_name="stentor", terminal_width=100, help_option_names=["-h", "--help"]))
        )
        + "\n"
    )


if __name__ == "__main__":
    modules = subjects()
    pages = {name: f"# {name}\n\n::: {name}\n{RULES if 'conformance' in name else ''}" for name in modules}
    pages["command-line"] = command_page()
    lines = [f"- [{name}]({name}.md): {line}" for name, line in modules.items()]
    lines.append("- [command line](command-line.md): every command with its options")
    pages["index"] = "# Reference\n\nMade from the code: its docstrings and its help.\n\n" + "\n".join(lines) + "\n"
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir()
    for name, text in pages.items():
        (TARGET / f"{name}.md").write_text(text, "utf-8")
