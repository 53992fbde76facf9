"""The relay behind a gateway: it stores an event that several services take, and hands it to each until that has it.

An app like any other: a group for each service, so acks, retries, order and dead letters are those of Stentor.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from stentor.app import App
from stentor.context import Context
from stentor.event import Outgoing
from stentor.gateway.routes import PATH, RELAY, TARGET, UNKNOWN, Model, load, specs_of
from stentor.group import Group
from stentor.message import Message
from stentor.retry import Retry


def relay(*apps: App, config: str | Path = "gateway.toml") -> App:
    """The relay of a gateway in front of these apps: an app called ``gateway``, to run and serve under its address.

    Each service is a group ``gateway.SERVICE``, which hands events on by the gateway's address ``inside``.
    Raises what making the gateway raises.
    """
    return relay_of(list(apps), load(apps, Path(config)))


def relay_of(apps: list[App], model: Model) -> App:
    """The relay of a model that was made of these apps."""
    from stentor.sinks.http import Target

    app = App(RELAY)
    specs = specs_of(apps)
    taken: dict[str, list[type[Any]]] = {}
    for route in model.routes[len(model.settings.routes) :]:
        for name in route.to:
            if specs[route.type].cls not in taken.setdefault(name, []):
                taken[name].append(specs[route.type].cls)
    for name, classes in taken.items():
        target = Target(f"http://{model.settings.inside}{PATH}", headers={TARGET: name})
        app.deliver(*classes, to=target, group=Group(f"{RELAY}.{name}"))

    async def unknown(message: Message, ctx: Context) -> None:
        """Dead, until it is redriven to a relay that knows its type."""
        spec = app.catalog.find(message.type)
        if spec is None:
            ctx.dead(f"no service takes {message.type!r}")
        time = None if message.time is None else datetime.fromisoformat(message.time)
        event = app.catalog.read(spec, message)
        await ctx.publish(
            Outgoing(event, id=message.id, source=message.source, subject=message.subject, key=message.key, time=time)
        )

    app.on(topic=UNKNOWN, group=Group(UNKNOWN, ordering="none"), retry=Retry(attempts=1))(unknown)
    return app
