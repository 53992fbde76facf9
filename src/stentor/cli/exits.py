"""How a command ends: the exit codes, in one place, and the one clear line that goes with a failure."""

from __future__ import annotations

import shutil
import sys
import textwrap

import click

from stentor.errors import BrokerError, DefinitionError, StentorError, UnknownGroup, UnknownTopic, Unsupported

OK = 0
FAILED = 1
USAGE = 2
DEFINITION = 3
BROKER = 4
NOT_FOUND = 5
INTERRUPTED = 130

EXIT_CODES = {
    OK: "done",
    FAILED: "it ran and failed: a worker stopped by itself, an event was refused, doctor or docs --diff found a fault",
    USAGE: "wrong use of the command line",
    DEFINITION: "the app cannot be loaded, or it, the broker URL or a setting cannot work",
    BROKER: "the broker cannot be reached or used",
    NOT_FOUND: "there is no such group, topic, dead letter or delayed event",
    INTERRUPTED: "interrupted",
}


class NotFound(StentorError):
    """What the command line names is not there."""


def exit_code(error: BaseException) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, (UnknownGroup, UnknownTopic, NotFound)) or type(error).__name__ == "UnknownDeadLetter":
        return NOT_FOUND
    if isinstance(error, (DefinitionError, Unsupported)):
        return DEFINITION
    if isinstance(error, BrokerError):
        return BROKER
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return FAILED


def complain(text: object) -> None:
    """One line on standard error that says what is wrong."""
    _say("error:", "red", str(text))


def advise(text: str) -> None:
    """One line on standard error that is no failure."""
    _say("note:", "yellow", text)


def _say(label: str, colour: str, text: str) -> None:
    text = fold(text, len(label) + 1, 2) if sys.stderr.isatty() else text
    click.echo(f"{click.style(label, fg=colour, bold=True)} {text}", err=True)


def fold(text: str, first: int, rest: int) -> str:
    """A text in lines of whole words as wide as the terminal; the first leaves room for its indent, the others have it.

    For a terminal only: elsewhere a line stays one, so that it can be searched for.
    """
    width = max(shutil.get_terminal_size().columns, 40)
    lines = textwrap.fill(
        text, width, initial_indent=" " * first, subsequent_indent=" " * rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return lines[first:]
