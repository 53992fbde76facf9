"""Options that many commands share, and the times that people write."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

from stentor.broker import Start
from stentor.clock import seconds
from stentor.errors import DefinitionError

F = TypeVar("F", bound=Callable[..., Any])

broker_option = click.option(
    "--broker", "url", metavar="URL", help="The broker; default $STENTOR_BROKER, else sqlite:///stentor.db."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON Lines, one object a line.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
gaps_option = click.option("--keep-gaps", is_flag=True, help="Take a recorded file as it is, also with a hole in it.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")

_AGO = re.compile(r"([\d.a-z]+?)(\s+ago)?")


def moment(text: str) -> datetime:
    """A time as people write it: ISO 8601 (the local zone where it names none), or a duration ago such as "10m".

    Raises ValueError.
    """
    found = _AGO.fullmatch(text.strip().lower())
    if found is not None and not found[1].isdigit():
        try:
            return datetime.now(UTC) - timedelta(seconds=seconds(found[1]))
        except DefinitionError:
            pass
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(
            f'{text!r} is no time; write "10m" (ago), "2026-05-01", "2026-05-01T12:30" or "2026-05-01T12:30:00Z"'
        ) from None
    return when.astimezone() if when.tzinfo is None else when


class Moment(click.ParamType[datetime]):
    """A time, see ``moment``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            return moment(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Place(click.ParamType[Start]):
    """A place in a topic: earliest, latest, an offset, or a time."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Start:
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        if value in ("earliest", "latest"):
            return value  # type: ignore[return-value]
        if value.isdigit():
            return int(value)
        try:
            return moment(value)
        except ValueError as error:
            self.fail(f'{error}; or "earliest", "latest", or an offset', param, ctx)


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check an option that is a duration."""
    if value is not None:
        try:
            seconds(value, str(param.opts[0]))
        except DefinitionError as error:
            raise click.BadParameter(str(error), ctx, param) from None
    return value


def confirm(question: str, yes: bool) -> None:
    """Ask before something that cannot be taken back; where nobody can answer, --yes must be given."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody is here to ask: say --yes, or --dry-run to see what it would do")
    if not click.confirm(question, err=True):
        raise click.Abort
