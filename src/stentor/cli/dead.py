"""``stentor dead``: list, show, redrive and drop dead letters."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Literal, TypeVar, cast, get_args

import click
import msgspec

from stentor.broker import Broker
from stentor.cli.exits import advise
from stentor.cli.options import Moment, broker_option, confirm, dry_run_option, json_option, yes_option
from stentor.cli.output import ago, local, plural, print_json, print_table, printable, progress
from stentor.cli.session import opened, with_broker
from stentor.clock import iso
from stentor.patterns.dead_letter import DeadLetters, Entry, Filter, Status

F = TypeVar("F", bound=Callable[..., Any])
STATUSES = get_args(Status)
SHORT = 12
"""Characters of an id in a list: enough to be the only one that begins so."""
_VARYING = re.compile(r"\b[0-9a-fA-F-]{6,}\b|\d+|'[^']*'|\"[^\"]*\"")


def filters(function: F) -> F:
    """The options that say which dead letters are meant."""
    for option in reversed(
        (
            click.option("--group", "-g", metavar="NAME", help="Of this group."),
            click.option("--topic", metavar="NAME", help="From this topic."),
            click.option("--type", "type", metavar="TYPE", help="Of this event type."),
            click.option("--key", metavar="KEY", help="With this key."),
            click.option("--error", metavar="TEXT", help="Whose last error, class or text, holds this."),
            click.option(
                "--reason", metavar="TEXT", help='Dead for this: "attempts", "never", "undecodable", or your own.'
            ),
            click.option("--since", type=Moment(), help='That died since: "10m" (ago), "2026-05-01T12:30".'),
            click.option("--until", type=Moment(), help="That died until then."),
        )
    ):
        function = option(function)
    return function


@click.group()
def dead() -> None:
    """List, show, redrive or drop dead letters.

    An event is dead when its last attempt failed, when its error is one that never passes, or when it cannot be read.
    Looking at dead letters consumes nothing; they stay, with what became of them.
    """


# ---- list and show --------------------------------------------------------------------------------------------------


@dead.command("list")
@filters
@click.option(
    "--status", type=click.Choice([*STATUSES, "all"]), multiple=True, default=("open", "pending"), show_default=True
)
@click.option("--limit", "-n", metavar="N", default=5, show_default=True, help="How many of each error are shown.")
@broker_option
@json_option
def list_(status: tuple[str, ...], limit: int, url: str | None, as_json: bool, **which: Any) -> None:
    """List dead letters, by group and error."""
    chosen = Filter(status=cast("Sequence[Status]", STATUSES if "all" in status else status), **which)
    if as_json:
        with_broker(url, lambda broker: _print_all(broker, chosen))
        return
    found = with_broker(url, lambda broker: _collect(broker, chosen, limit))
    if not found:
        click.echo("no dead letters")
        return
    now = time.time()
    for (group, error), (count, entries) in sorted(found.items(), key=lambda item: -item[1][0]):
        click.echo(f"{click.style(group, bold=True)}  {click.style(printable(error), fg='red')}  {count:,}")
        rows = [
            (
                entry.letter.id[:SHORT], entry.letter.message.type or entry.letter.message.topic,
                entry.letter.message.key or "-", entry.letter.attempts, ago(entry.letter.time, now), _shown(entry),
            )
            for entry in entries
        ]  # fmt: skip
        print_table(("id", "~type", "~key", ">attempts", "died", "status"), rows, indent="  ")
        if count > len(entries):
            click.echo(click.style(f"  and {count - len(entries):,} more (--limit, or --json for all)", dim=True))
        click.echo()
    total = sum(count for count, _ in found.values())
    click.echo(f"{plural(total, 'dead letter')}. Next: stentor dead show ID, stentor dead redrive ID|--all")


def _shown(entry: Entry) -> str:
    return f"{entry.wish} asked for" if entry.status == "pending" else entry.status


async def _print_all(broker: Broker, chosen: Filter) -> None:
    async for entry in DeadLetters(broker).find(chosen):
        print_json(as_dict(entry))


async def _collect(broker: Broker, chosen: Filter, limit: int) -> dict[tuple[str, str], tuple[int, list[Entry]]]:
    """By group and error, where errors that differ in numbers, ids and quoted text only are one: count and examples."""
    alike: dict[tuple[str, str], tuple[str, str]] = {}
    found: dict[tuple[str, str], tuple[int, list[Entry]]] = {}
    async for entry in DeadLetters(broker).find(chosen):
        text = entry.letter.reason if entry.error is None else f"{entry.error.type}: {entry.error.text}"
        group = entry.letter.group
        name = alike.setdefault((group, _VARYING.sub("…", text)), (group, text[:200]))
        count, entries = found.get(name, (0, []))
        found[name] = count + 1, entries if len(entries) >= limit else [*entries, entry]
    return found


def as_dict(entry: Entry) -> dict[str, Any]:
    """A dead letter as ``--json`` prints it."""
    letter, message = entry.letter, entry.letter.message
    return {
        "id": letter.id,
        "type": message.type,
        "topic": message.topic,
        "key": message.key,
        "group": letter.group,
        "attempts": letter.attempts,
        "errors": [
            {"time": iso(error.time), "type": error.type, "text": error.text, "traceback": error.traceback}
            for error in letter.errors
        ],
        "time": iso(letter.time),
        "reason": letter.reason,
        "status": entry.status,
        "event": message.id,
        "offset": letter.offset,
    }


@dead.command()
@click.argument("id")
@click.option("--group", "-g", metavar="NAME", help="Of this group.")
@click.option("--traceback/--no-traceback", default=True, help="Show where the last error was raised.")
@broker_option
@json_option
def show(id: str, group: str | None, traceback: bool, url: str | None, as_json: bool) -> None:
    """Show one dead letter: its event, its data and every error. ID may be the beginning of one."""
    entry = with_broker(url, lambda broker: DeadLetters(broker).get(id, group))
    letter, message = entry.letter, entry.letter.message
    if as_json:
        print_json({**as_dict(entry), "attributes": message.attributes(), "data": _data(message.data)})
        return
    facts = {
        "dead letter": letter.id,
        "group": letter.group,
        "status": _shown(entry),
        "died": f"{local(letter.time)} ({ago(letter.time, time.time())}), after {plural(letter.attempts, 'attempt')}",
        "reason": letter.reason,
        "topic": f"{message.topic}, offset {letter.offset}",
        **{name: value for name, value in message.attributes().items() if name != "specversion"},
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{click.style(name.ljust(width), dim=True)}  {printable(str(value))}")
    click.echo(f"\n{click.style('data', bold=True)}")
    shown = _data(message.data)
    text = shown if isinstance(shown, str) else msgspec.json.format(message.data, indent=2).decode()
    click.echo("\n".join(f"  {line}" for line in text.splitlines()))
    click.echo(f"\n{click.style('errors', bold=True)}")
    for error in letter.errors:
        click.echo(f"  {local(error.time)}  {click.style(printable(f'{error.type}: {error.text}'), fg='red')}")
    if traceback and letter.errors and letter.errors[-1].traceback:
        click.echo("\n".join(f"  {line}" for line in letter.errors[-1].traceback.rstrip().splitlines()))


def _data(data: bytes) -> Any:
    """JSON data as it is, other data as text."""
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        return data.decode("utf-8", "backslashreplace")


# ---- redrive and drop -----------------------------------------------------------------------------------------------


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All open ones.")
@filters
@dry_run_option
@yes_option
@broker_option
@json_option
def redrive(ids: tuple[str, ...], **options: Any) -> None:
    """Run dead letters again in their group: some by ID, or by filter, or --all.

    The partition's owner does it, so that they take their place among the events of their key. Doing it twice changes
    nothing.
    """
    _act("redrive", ids, **options)


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All open ones.")
@filters
@dry_run_option
@yes_option
@broker_option
@json_option
def drop(ids: tuple[str, ...], **options: Any) -> None:
    """Give dead letters up for good: some by ID, or by filter, or --all.

    They stay in the list as dropped; a key that is parked behind one goes on.
    """
    _act("drop", ids, **options)


def _act(
    wish: Literal["redrive", "drop"],
    ids: tuple[str, ...],
    *,
    everything: bool,
    dry_run: bool,
    yes: bool,
    url: str | None,
    as_json: bool,
    **which: Any,
) -> None:
    if not ids and not everything and not any(which.values()):
        raise click.UsageError("say which: IDs, a filter such as --group or --error, or --all")
    if ids and (everything or any(which[name] for name in which if name != "group")):
        raise click.UsageError("IDs, filters and --all exclude each other")
    asyncio.run(_carry_out(wish, ids, which, url, dry_run=dry_run, yes=yes, as_json=as_json))


async def _carry_out(
    wish: Literal["redrive", "drop"],
    ids: tuple[str, ...],
    which: dict[str, Any],
    url: str | None,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    async with opened(url) as broker:
        letters = DeadLetters(broker)
        act = letters.redrive if wish == "redrive" else letters.drop
        chosen: list[Filter] = []
        for id in ids:
            entry = await letters.get(id, which["group"])
            if entry.status in ("redriven", "dropped"):
                advise(f"{entry.letter.id} was {entry.status} before")
            chosen.append(Filter(id=entry.letter.id, group=entry.letter.group))
        # What dies while the question stands is not part of it.
        until: datetime = which.pop("until", None) or datetime.now().astimezone()
        chosen = chosen or [Filter(until=until, **which)]
        counts: dict[str, int] = {}
        for one in chosen:
            for group, count in (await act(one, dry_run=True)).items():
                counts[group] = counts.get(group, 0) + count
        total = sum(counts.values())
        if total and not dry_run:
            if not ids:
                each = (f"{group} ({count:,})" for group, count in counts.items())
                where = ", ".join(each if len(counts) > 1 else counts)
                again = "Run again" if wish == "redrive" else "Give up for good"
                confirm(f"{again} {plural(total, 'dead letter')} of {where}?", yes)
            with progress(f"{wish[:-1]}ing" if wish == "redrive" else "dropping", total) as advance:
                before = 0
                for one in chosen:
                    done = await act(one, progress=lambda count, before=before: advance(before + count))  # type: ignore[misc]
                    before += sum(done.values())
        members = {group.name: group.members for group in await broker.admin.groups()}
    if as_json:
        for group, count in counts.items():
            print_json({"group": group, "action": wish, "count": count, "dry_run": dry_run})
        return
    if not total:
        click.echo(f"nothing to {wish}")
    for group, count in counts.items():
        click.echo(_said(wish, group, count, dry_run=dry_run, running=bool(members.get(group))))


def _said(wish: str, group: str, count: int, *, dry_run: bool, running: bool) -> str:
    what = f"{plural(count, 'dead letter')} of {group}"
    if dry_run:
        return f"{what} would be {'run again' if wish == 'redrive' else 'dropped'}"
    then = "run again" if wish == "redrive" else "are dropped"
    return f"{what} {then} now" if running else f"{what} {then} when a worker of {group} runs; none does now"
