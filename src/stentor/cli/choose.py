"""``stentor choose``: which queue for this load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import msgspec

from stentor.bench.choose import CRITERIA, NEEDS, SKILLS, Choice, Known, Place, Wish, known, shipped
from stentor.bench.choose import choose as ranked
from stentor.cli.capacity import Rate
from stentor.cli.exits import advise
from stentor.cli.options import duration, json_option
from stentor.cli.output import print_json, print_table
from stentor.clock import seconds


def _numbers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for value in values:
        name, equals, number = value.partition("=")
        try:
            found[name.strip().replace("-", " ")] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise click.BadParameter(f"{value!r} is no NAME=NUMBER", ctx, param)
    return found


@click.command()
@click.option(
    "--need",
    "needs",
    metavar="NEED",
    type=click.Choice([*NEEDS, SKILLS]),
    multiple=True,
    help=f"It must do this: {', '.join([*NEEDS, SKILLS])}; repeatable.",
)
@click.option("--rate", type=Rate(), metavar="RATE", help="It must keep up with this many events a second.")
@click.option("--p99", metavar="TIME", callback=duration, help="99 % of the events must be handled within this.")
@click.option("--have", metavar="NAME", multiple=True, help="A broker that you run already; repeatable.")
@click.option(
    "--price", "prices", metavar="NAME=MONEY", multiple=True, callback=_numbers, help="What one costs you a month."
)
@click.option(
    "--weight", "weights", metavar="NAME=NUMBER", multiple=True, callback=_numbers,
    help=f"Of {', '.join(CRITERIA)}; each is 1.",
)  # fmt: skip
@click.option("--bench", "file", type=click.Path(path_type=Path), help="Your own measurements: `stentor bench --json`.")
@json_option
def choose(
    needs: tuple[str, ...], rate: float | None, p99: str | None, have: tuple[str, ...], prices: dict[str, float],
    weights: dict[str, float], file: Path | None, *, as_json: bool,
) -> None:  # fmt: skip
    """Say which queue fits a load, and what would change that.

    What you need comes first, and who cannot do it is out. The others are compared by what was measured: by this
    project's own run, or by yours (--bench). A figure that nobody measured is unknown and weighs nothing, and brokers
    whose ranges meet are not ranked.

    \b
      stentor choose --need replay --need hosts --rate 2k/s
      stentor choose --have postgresql --weight cost=3 --price kafka=900
      stentor choose --bench report.json
    """  # noqa: D301
    data = known(file) if file is not None else shipped()
    wish = Wish(
        needs=needs, rate=rate, p99=seconds(p99) if p99 is not None else None, have=have, prices=prices,
        weights=weights,
    )  # fmt: skip
    found = ranked(data.brokers, wish)
    if as_json:
        print_json({**msgspec.to_builtins(found), "measured": msgspec.to_builtins(data)})
        return
    _show(data, found)


def _show(data: Known, found: Choice) -> None:
    click.echo(f"as measured {data.made[:10]} on {data.machine}; --json has the command\n")
    rows: list[tuple[Any, ...]] = []
    for place in found.places:
        total = place.total
        span = f"{total.value:.2f}" + (f" ({total.least:.2f} to {total.most:.2f})" if total.least < total.most else "")
        cells = ["?" if score is None else f"{score.value:.2f}" for score in place.scores.values()]
        rows.append(((place.broker, "bold"), *cells, span))
    asked = list(dict.fromkeys(need for verdicts in found.needs.values() for need in verdicts))
    if asked:
        words = {True: ("yes", ""), False: ("no", "red"), None: ("?", "yellow")}
        print_table(
            ("broker", *asked),
            [(name, *(words[verdicts[need]] for need in asked)) for name, verdicts in found.needs.items()],
        )
        click.echo()
    servers = {one.broker: one.server if re.search(r"\d", one.server) else "unknown" for one in data.brokers}
    if rows:
        print_table(("broker", *(f">{name}" for name in CRITERIA), ">of 1"), rows)
        click.echo()
        print_table(
            ("broker", "version", "~what was seen"),
            [(place.broker, servers[place.broker], "; ".join(_seen(place))) for place in found.places],
        )
    if found.failed:
        click.echo()
        print_table(("out", "~because it does not do"), [(name, ", ".join(why)) for name, why in found.failed.items()])
    click.echo()
    if not found.places:
        click.echo("none of them does all that is needed")
    elif found.tied:
        names = ", ".join([found.places[0].broker, *found.tied])
        click.echo(f"no one choice: the ranges of {names} meet, so these runs cannot tell which is best")
    else:
        click.echo(f"choose {click.style(found.places[0].broker, bold=True)}")
    if found.alike:
        pairs = ", ".join(f"{one} and {other}" for one, other in found.alike)
        click.echo(f"  cannot be told apart, as their ranges meet: {pairs}")
    for turn in found.turns:
        click.echo(f"  {turn}")
    for name, needs in found.unknown.items():
        advise(f"{name}: not known to do {', '.join(needs)}; it was not tried")


def _seen(place: Place) -> list[str]:
    return [score.raw for score in place.scores.values() if score is not None]
