"""The command line ``stentor``: one file a command, each imported when it is used.

A command's first line of help stands in SECTIONS, so that ``stentor --help`` loads none of them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import click

from stentor import __version__
from stentor.cli.exits import EXIT_CODES, complain, exit_code
from stentor.errors import StentorError

SECTIONS = {
    "Start": {
        "new": "Make a project that runs and has a passing test.",
        "demo": "Watch a small shop: order, retries, a dead letter and its redrive.",
        "run": "Run an app until SIGTERM or Ctrl-C, then stop in order.",
        "declare": "Make an app's topics and groups: the deploy step.",
    },
    "Look": {
        "tail": "Show events as they are published.",
        "topics": "List the topics and what they hold.",
        "groups": "List, rename or drop consumer groups.",
        "lag": "Show what each group has still to do.",
        "top": "Show what running programs do now: arrivals, throughput, how busy, how long.",
        "dead": "List, show, redrive or drop dead letters.",
        "doctor": "Find what weakens durability, or stands in the way.",
        "docs": "Write an AsyncAPI document and a picture of services, or tell what changed.",
    },
    "Plan": {
        "capacity": "Predict throughput and latency, and how many workers a load needs.",
        "bench": "Put an app under load, on one broker or several, with faults or without.",
        "choose": "Say which queue fits a load, and what would change that.",
    },
    "Connect": {
        "gateway": "Make Envoy or APISIX the event bus between services.",
        "scaler": "Tell KEDA how many processes a group needs, as an external scaler.",
    },
    "Act": {
        "publish": "Publish an event, or many from standard input.",
        "replay": "Set a group back (or forward), so that it sees events again.",
        "cancel": "Drop a delayed event that has not fallen due.",
        "mirror": "Copy topics from one broker to another, keeping id, key, order and time.",
    },
}


class Stentor(click.Group):
    """The group of all commands: imports them late, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [name for section in SECTIONS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        found: click.Command = getattr(importlib.import_module(f"stentor.cli.{cmd_name}"), cmd_name)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.list_commands(ctx) and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f"did you mean {near[0]!r}?" if near else "`stentor --help` lists them"
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        width = max(len(name) for section in SECTIONS.values() for name in section)
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in section.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])
        super().format_epilog(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        if "NO_COLOR" in os.environ:
            ctx.color = False
        try:
            return super().invoke(ctx)
        except StentorError as error:
            complain(error)
            ctx.exit(exit_code(error))
        except KeyboardInterrupt as error:
            ctx.exit(exit_code(error))


@click.group(
    "stentor",
    cls=Stentor,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=(
        "Every command has --help. The broker is --broker, else $STENTOR_BROKER, else the file that "
        "$STENTOR_BROKER_FILE names, else sqlite:///stentor.db. For completion in the shell, put "
        'eval "$(_STENTOR_COMPLETE=bash_source stentor)" into ~/.bashrc (zsh_source for zsh; for fish: '
        "_STENTOR_COMPLETE=fish_source stentor | source)."
    ),
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run event-driven apps, and look after what they handle."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; ends with SystemExit."""
    cli.main(args=None if args is None else list(args), prog_name="stentor")
