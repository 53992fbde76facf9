"""Webhooks: what third parties post becomes typed events, once it is known to be theirs.

A request's way: body (bounded) -> ``verify.check`` -> payload -> ``to`` makes events of it -> their id is that of the
delivery, so that a repetition is the same event -> published durably -> 202.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec

from stentor.cloudevents import check_uri_reference
from stentor.errors import DefinitionError, InvalidEvent
from stentor.event import EventSpec, Outgoing
from stentor.exchange import Endpoint, Exchange, Refused, Verify
from stentor.ingress import publish
from stentor.sources.signatures import bearer, github, slack, standard, stripe

if TYPE_CHECKING:
    from stentor.app import App

__all__ = ["bearer", "github", "slack", "standard", "stripe", "webhook"]

FORM = "application/x-www-form-urlencoded"
log = logging.getLogger("stentor.webhook")


def webhook(app: App, path: str, verify: Verify, to: Any) -> None:
    """What ``App.webhook`` does."""
    if not (hasattr(verify, "check") and hasattr(verify, "names")):
        raise DefinitionError(f"webhook {path}: verify must say who signs, as github('…') does; it is {verify!r}")
    app.mount(Endpoint(path, Webhook(app, path, verify, to).answer))


class Webhook:
    """One sender's endpoint."""

    def __init__(self, app: App, path: str, verify: Verify, to: Any) -> None:
        self._path = path
        self._verify = verify
        self._source = check_uri_reference(f"{app.catalog.source}{path}", "source")
        self._to = self._target(app, to)
        self._by_name: dict[str, Any] | None = None
        if isinstance(to, Mapping):
            self._by_name = {name: self._target(app, target) for name, target in to.items()}

    def _target(self, app: App, to: Any) -> Any:
        """An event class becomes its EventSpec, so that its topic is declared with the app's others."""
        if isinstance(to, type):
            return app.catalog.add(to, f"webhook {self._path}: ")
        if not callable(to) and not isinstance(to, Mapping):
            raise DefinitionError(
                f"webhook {self._path}: to= is an event class, a function of payload and headers, or a dict of these "
                f"by name; it is {to!r}"
            )
        return to

    async def answer(self, exchange: Exchange) -> None:
        """Verify, map, publish. Raises Refused."""
        program, headers = exchange.program, exchange.headers()
        body = await exchange.body()
        self._verify.check(headers, body, program.clock.now())
        body, payload = self._payload(headers, body)
        id, name = self._verify.names(headers, payload)
        if name == "url_verification" and "x-slack-signature" in headers:
            await exchange.answer(200, {"challenge": payload.get("challenge")})
            return
        try:
            events = await self._events(headers, body, payload, name)
            messages = program.encode([self._outgoing(event, id, index) for index, event in enumerate(events)])
        except InvalidEvent as error:
            # Only who has the secret comes here, so a line for each cannot be abused.
            log.warning("%s: %s %s is refused: %s", self._path, name or "delivery", id or "", error)
            raise Refused(400, str(error)) from None
        await exchange.accept(await publish(program, messages) if messages else ())

    @staticmethod
    def _payload(headers: Mapping[str, str], body: bytes) -> tuple[bytes, Any]:
        """The JSON, and what it says; of a form it is the field ``payload``, or else the fields themselves."""
        try:
            if headers.get("content-type", "").partition(";")[0].strip().lower() == FORM:
                fields = parse_qs(body.decode(), keep_blank_values=True, strict_parsing=True, max_num_fields=1000)
                if "payload" not in fields:
                    return body, {name: values[-1] for name, values in fields.items()}
                body = fields["payload"][-1].encode()
            return body, msgspec.json.decode(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON: {error}") from None

    async def _events(self, headers: Mapping[str, str], body: bytes, payload: Any, name: str | None) -> list[Any]:
        to = self._to if self._by_name is None else self._by_name.get(name or "")
        if to is None or (to is self._to and name == "ping" and "x-github-event" in headers):
            return []
        if isinstance(to, EventSpec):
            try:
                return [to.decode(body)]
            except (ValueError, TypeError) as error:
                raise InvalidEvent(f"it is no {to.type}: {error}") from None
        made = to(payload, headers)
        if inspect.isawaitable(made):
            made = await made
        if made is None:
            return []
        return list(made) if isinstance(made, (list, tuple)) else [made]

    def _outgoing(self, event: Any, id: str | None, index: int) -> Outgoing:
        out = event if isinstance(event, Outgoing) else Outgoing(event)
        own = id if id is None or index == 0 else f"{id}.{index}"
        return msgspec.structs.replace(out, id=out.id or own, source=out.source or self._source)
