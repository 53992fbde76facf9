"""Subscriptions: other services say by themselves which events they want, and where.

Source: the Subscriptions API of https://github.com/cloudevents/spec (0.1-wip), and the handshake of its web hook
specification (1.0.2).

A subscription is a record in a topic of the app's own, of which the last by id counts, and a group of its own, which
misses nothing from the moment it is made. The API reads the topic at each request; every process that runs the app
follows it (``_Follower``), runs the groups of what is there and drops the groups of what was deleted. A declared group
that never reads the topic keeps its records from being removed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import inspect
import logging
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlencode
from uuid import uuid4

import aiohttp
import msgspec
from msgspec import Struct

from stentor.app import App
from stentor.clock import iso, parse_iso
from stentor.cloudevents import attributes
from stentor.context import Context
from stentor.errors import (
    BrokerError,
    ConfigError,
    DefinitionError,
    InvalidEvent,
    NotDelivered,
    StentorError,
    UnknownGroup,
)
from stentor.event import Topic, spec_of
from stentor.exchange import Endpoint, Exchange, Refused
from stentor.group import Group
from stentor.handler import Handler
from stentor.message import Message, new_id
from stentor.program import Program
from stentor.security.addresses import networks
from stentor.sinks.filters import Filter, compile_filters
from stentor.sinks.guard import Guard, Lookup, system_lookup
from stentor.sinks.http import Sender, Target, check_url, shown
from stentor.source import Publish
from stentor.subscription import Subscription
from stentor.worker import Worker

PATH = "/subscriptions"
CONFIRM = f"{PATH}/confirm/"
MOST = 1000
"""Subscriptions that an app has at most."""
SIZE = 64 * 1024
"""Bytes of a request."""
LOOK = 1.0
"""Seconds between looks at the records."""
PATIENCE = "10s"
"""For the answer to the handshake."""
WAIT = 24 * 3600.0
"""Seconds in which a sink may consent by the callback."""
GRACE = 10.0
log = logging.getLogger("stentor.subscriptions")
Allow = str | Callable[[Mapping[str, str]], Any]


class Settings(Struct, forbid_unknown_fields=True):
    """What a subscription may set of the protocol."""

    method: Literal["POST"] = "POST"


class Config(Struct, forbid_unknown_fields=True):
    """What is Stentor's own in a subscription."""

    mode: Literal["binary", "structured"] = "binary"


class Wanted(Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A subscription as its owner writes it; ``id``, and until when its sink may still consent, are ours to say."""

    sink: str
    protocol: Literal["HTTP"]
    id: str = ""
    source: str | None = None
    types: list[str] | None = None
    filters: list[Any] = []
    config: Config = msgspec.field(default_factory=Config)
    protocolsettings: Settings = msgspec.field(default_factory=Settings)
    pending: str = ""


class Record(Struct, kw_only=True, omit_defaults=True):
    """A subscription in the topic: whose it is, and the requests a minute that its target allows (0: any number)."""

    wanted: Wanted
    owner: str
    rate: int = 0
    deleted: bool = False


_decode = msgspec.json.Decoder(Record).decode


class Subscriptions:
    """The records, and what a record means."""

    def __init__(
        self,
        app: App,
        types: Sequence[type[Any]],
        allow: Allow,
        origin: str,
        secret: str | None,
        inside: Sequence[str],
        lookup: Lookup,
        rate: int,
        callback: str | None,
    ) -> None:
        self.app = app
        self.name = f"{app.name}.subscriptions"
        self._topic = f"stentor.subscriptions.{app.name}"
        self._allow = allow
        self._origin = origin
        self._secret = secret
        self._inside = networks(inside, "app.subscriptions: inside")
        self._lookup = lookup
        self._rate = rate
        self._callback = callback
        self._classes: dict[str, type[Any]] = {}
        for cls in types:
            self._classes |= dict.fromkeys(app.catalog.add(cls, "app.subscriptions: ").names, cls)
        self._program: Program | None = None
        self._found: dict[str, Record] = {}
        self._next = 0
        """The offset behind the last record that was read."""
        self.changed = asyncio.Event()
        """Set by this process's own changes: no need to wait for the next look."""

    # ---- records ------------------------------------------------------------------------------------------------

    async def declare(self, program: Program) -> None:
        if self._program is not program:
            keeper = Subscription(group=f"{self.name}.kept", topics=(self._topic,), app=self.name)
            await program.broker.declare([Topic(self._topic, partitions=1)], [keeper])
            self._program, self._found, self._next = program, {}, 0

    async def write(self, program: Program, record: Record) -> None:
        await self.declare(program)
        await program.broker.publish([
            Message(
                id=new_id(), source=f"/{self.app.name}", type="stentor.subscription", topic=self._topic,
                data=msgspec.json.encode(record), key="subscriptions", datacontenttype="application/json",
            )
        ])  # fmt: skip
        self.changed.set()

    async def read(self, program: Program) -> dict[str, Record]:
        """The last record of each id, deleted ones too."""
        await self.declare(program)
        async for offset, message in program.broker.browse(self._topic, self._next, follow=False):
            if offset >= self._next:  # another request may have read it meanwhile
                record = _decode(message.data)
                self._found[record.wanted.id] = record
                self._next = offset + 1
        return self._found.copy()

    async def delete(self, program: Program, record: Record) -> None:
        await self.write(program, msgspec.structs.replace(record, deleted=True))

    @staticmethod
    def late(program: Program, record: Record) -> bool:
        """Whether its sink was asked, and did not consent in time."""
        return bool(record.wanted.pending) and parse_iso(record.wanted.pending) < program.clock.now()

    # ---- what a record means ------------------------------------------------------------------------------------

    def group_name(self, id: str) -> str:
        return f"{self.app.name}.subscription.{id}"

    def secret_of(self, id: str) -> str | None:
        """The secret of a subscription: derived, so that none is stored."""
        if self._secret is None:
            return None
        return "whsec_" + b64encode(hmac.digest(self._secret.encode(), id.encode(), hashlib.sha256)).decode()

    def sender(self, record: Record) -> Sender:
        """What sends for a subscription. Raises ConfigError or NotDelivered for a sink that may not be sent to."""
        wanted = record.wanted
        guard = Guard(wanted.sink, self._inside, self._lookup)
        target = Target(
            wanted.sink, mode=wanted.config.mode, secret=self.secret_of(wanted.id),
            headers={"webhook-request-origin": self._origin},
        )  # fmt: skip

        def gone(ctx: Context) -> None:
            log.warning("%s says that it is gone: subscription %s is deleted", shown(wanted.sink), wanted.id)
            task = asyncio.create_task(self.delete(ctx.app.program, record))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        tasks: set[asyncio.Task[None]] = set()
        return Sender(target, resolver=guard, gone=gone, rate=record.rate)

    def group(self, record: Record, sender: Sender) -> Group:
        """The group of a subscription. Raises ValueError for a wrong filter or type."""
        wanted = record.wanted
        unknown = sorted(set(wanted.types or ()) - set(self._classes))
        if unknown or wanted.types == []:
            raise ValueError(f"types: there are {', '.join(self._classes)}, not {', '.join(unknown)[:200] or 'none'}")
        names = set(wanted.types or self._classes)
        matches = self._filter(wanted, names)
        group = Group(self.group_name(wanted.id), start="latest", single=bool(record.rate))
        group.add_handler(
            Handler(
                sender.handler(), types=tuple(dict.fromkeys(self._classes[name] for name in sorted(names))),
                where=lambda message: matches(attributes(message)),
            )
        )  # fmt: skip
        return group

    @staticmethod
    def _filter(wanted: Wanted, names: set[str]) -> Filter:
        matches, source = compile_filters(wanted.filters), wanted.source
        return lambda found: found["type"] in names and (source is None or found["source"] == source) and matches(found)

    # ---- the consent of a sink ----------------------------------------------------------------------------------

    async def consent(self, sender: Sender, wanted: Wanted) -> int | None:
        """Ask a sink whether it wants events from here; how many a minute, 0 for any number.

        None when it does not say, and may do so by the callback. Raises Refused.
        """
        headers = {"webhook-request-origin": self._origin}
        if self._rate:
            headers["webhook-request-rate"] = str(self._rate)
        if wanted.pending:
            proof = urlencode({"until": wanted.pending, "key": self._key(wanted.id, wanted.pending)})
            headers["webhook-request-callback"] = f"{self._callback}{CONFIRM}{wanted.id}?{proof}"
        try:
            async with sender.session().options(wanted.sink, headers=headers, allow_redirects=False) as answer:
                said = answer.headers
        except NotDelivered as error:
            raise Refused(400, f"sink: {error}") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise Refused(400, "sink: it did not answer to OPTIONS") from None
        origin = said.get("WebHook-Allowed-Origin")
        if origin is None and wanted.pending:
            return None
        if origin is None or origin.strip() not in ("*", self._origin):
            raise Refused(400, f"sink: it did not allow {self._origin} in WebHook-Allowed-Origin; it answers OPTIONS "
                               f"to WebHook-Request-Origin")  # fmt: skip
        return self._allowed(said.get("WebHook-Allowed-Rate", ""))

    def _allowed(self, said: str) -> int:
        """The requests a minute that a sink allows, 0 for any number; if it does not say, those that were asked for."""
        said = said.strip()
        if said == "*":
            return 0
        return (int(said[:9]) if said.isascii() and said.isdigit() else 0) or self._rate

    def _key(self, id: str, until: str) -> str:
        """What shows that a callback was told to the sink: derived, so that none is stored."""
        assert self._secret is not None
        return hmac.digest(self._secret.encode(), f"consent {id} {until}".encode(), hashlib.sha256).hex()

    async def confirm(self, exchange: Exchange) -> None:
        """``/subscriptions/confirm/<id>``: a sink consents. Only the sink was told the key, not who subscribed it."""
        query = exchange.query()
        until, key = (query.get(name, [""])[0] for name in ("until", "key"))
        if not hmac.compare_digest(key.encode(), self._key(exchange.below, until).encode()):
            raise Refused(404, "there is no such subscription")
        if exchange.method == "HEAD":  # that a link is looked at is no consent
            raise Refused(405, f"{CONFIRM} takes GET, POST", allow="GET, POST")
        program = exchange.program
        record = (await self.read(program)).get(exchange.below)
        if record is None or record.deleted or record.wanted.pending not in ("", until) or self.late(program, record):
            raise Refused(404, "there is no such subscription")
        if record.wanted.pending:
            rate = self._allowed(exchange.headers().get("webhook-allowed-rate", ""))
            try:
                await self._consented(program, record, rate)
            except BrokerError as error:
                raise Refused(503, f"{error}; call again", retry=2) from None
        await exchange.answer(200, {"id": exchange.below, "origin": self._origin})

    # ---- the API ------------------------------------------------------------------------------------------------

    async def _who(self, exchange: Exchange) -> str:
        headers = exchange.headers()
        if isinstance(self._allow, str):
            shown_token = headers.get("authorization", "")
            good = hmac.compare_digest(shown_token.encode(), f"Bearer {self._allow}".encode())
            who: Any = "" if good else None
        else:
            who = self._allow(headers)
            who = await who if inspect.isawaitable(who) else who
        if not isinstance(who, str):
            refused = Refused(401, "not authorized")
            refused.headers["www-authenticate"] = "Bearer"
            raise refused
        return who

    async def collection(self, exchange: Exchange) -> None:
        """``/subscriptions``: GET lists those of the caller, POST makes one."""
        who = await self._who(exchange)
        program = exchange.program
        records = [record for record in (await self.read(program)).values() if not record.deleted]
        if exchange.method != "POST":
            await exchange.answer(200, msgspec.json.encode([r.wanted for r in records if r.owner == who]))
            return
        if len(records) >= MOST:
            raise Refused(429, f"there are {MOST} subscriptions, which is the most", retry=60)
        wanted = msgspec.structs.replace(await self._wanted(exchange), id=uuid4().hex)
        wanted = await self._store(program, Record(wanted=wanted, owner=who), None)
        secret = self.secret_of(wanted.id)
        body = msgspec.to_builtins(wanted) | ({} if secret is None else {"secret": secret})
        await exchange.answer(202 if wanted.pending else 201, body, headers={"location": f"{PATH}/{wanted.id}"})

    async def item(self, exchange: Exchange) -> None:
        """``/subscriptions/<id>``: GET, PUT and DELETE of the caller's own."""
        who = await self._who(exchange)
        program = exchange.program
        record = (await self.read(program)).get(exchange.below)
        if record is None or record.deleted or record.owner != who:
            raise Refused(404, "there is no such subscription")
        wanted = record.wanted
        if exchange.method == "PUT":
            given = await self._wanted(exchange)
            if given.id not in ("", wanted.id):
                raise Refused(400, f"id: it is {wanted.id} and stays so")
            wanted = msgspec.structs.replace(given, id=wanted.id)
            wanted = await self._store(program, Record(wanted=wanted, owner=who), record)
        elif exchange.method == "DELETE":
            await self.delete(program, record)
        waits = exchange.method == "PUT" and wanted.pending
        await exchange.answer(202 if waits else 200, msgspec.json.encode(wanted))

    @staticmethod
    async def _wanted(exchange: Exchange) -> Wanted:
        body = await exchange.body()
        if len(body) > SIZE:
            raise Refused(413, f"a subscription has {SIZE:,} bytes at most")
        try:
            return msgspec.structs.replace(msgspec.json.decode(body, type=Wanted), pending="")
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise Refused(400, f"no subscription: {error}") from None

    async def _store(self, program: Program, record: Record, before: Record | None) -> Wanted:
        """Check a subscription (``before``: as it was), ask its sink, store it, and declare its group. Raises Refused.

        What is returned is pending while its sink may still consent.
        """
        try:
            sender = self.sender(record)
            self.group(record, sender)
        except (ConfigError, NotDelivered) as error:
            raise Refused(400, str(error) if str(error).startswith("sink") else f"sink: {error}") from None
        except (ValueError, InvalidEvent) as error:
            raise Refused(400, str(error)) from None
        wanted = record.wanted
        try:
            if self._callback is not None:  # it is stored before it is asked for: the callback may come at once
                wanted = msgspec.structs.replace(wanted, pending=iso(program.clock.now() + WAIT))
                await self.write(program, msgspec.structs.replace(record, wanted=wanted))
            try:
                rate = await self.consent(sender, wanted)
            except Refused:
                if wanted.pending:
                    await self.write(program, before or msgspec.structs.replace(record, deleted=True))
                raise
            finally:
                await sender.close()
            if rate is None:
                return wanted
            await self._consented(program, record, rate)
        except BrokerError as error:
            raise Refused(503, f"{error}; it may be stored: look before you try again", retry=2) from None
        return record.wanted

    async def _consented(self, program: Program, record: Record, rate: int) -> None:
        """Store a subscription to which its sink consented; from then on it misses nothing."""
        wanted = msgspec.structs.replace(record.wanted, pending="")
        record = msgspec.structs.replace(record, wanted=wanted, rate=rate)
        await self.write(program, record)
        await program.declare_group(self.group_name(wanted.id), self.group(record, self.sender(record)), self.name)

    # ---- running them -------------------------------------------------------------------------------------------

    async def follow(self, _: Publish) -> None:
        """Run the groups of the subscriptions that there are, in this process."""
        program = self.app.program
        assert program is not None
        follower = _Follower(self, program)
        while True:
            self.changed.clear()
            try:
                await follower.look()
            except StentorError as error:
                log.warning("%s: %s; trying again", self.name, error)
            try:
                async with asyncio.timeout(LOOK):
                    await self.changed.wait()
            except TimeoutError:
                pass


class _Follower:
    """What runs in this process of the subscriptions."""

    def __init__(self, subscriptions: Subscriptions, program: Program) -> None:
        self._all = subscriptions
        self._program = program
        self._running: dict[str, tuple[Record, Worker, Sender]] = {}
        self._broken: dict[str, Record] = {}
        self._dropped: set[str] = set()

    async def look(self) -> None:
        records = await self._all.read(self._program)
        for id, record in records.items():
            running = self._running.get(id)
            if running is not None and running[0] != record:
                await self._end(id)
            if record.deleted or id in self._running or self._broken.get(id) == record:
                continue
            if not record.wanted.pending:
                await self._begin(id, record)
            elif self._all.late(self._program, record):
                await self._all.delete(self._program, record)
        gone = {id for id, record in records.items() if record.deleted} - self._dropped
        if gone:
            await self._drop(gone)

    async def _begin(self, id: str, record: Record) -> None:
        try:
            sender = self._all.sender(record)
            group = self._all.group(record, sender)
        except (StentorError, ValueError) as error:  # settings of the app have changed; its group misses nothing
            log.warning("subscription %s cannot run: %s", id, error)
            self._broken[id] = record
            return
        worker = await self._program.run_group(self._all.group_name(id), group, self._all.name)
        self._running[id] = (record, worker, sender)

    async def _end(self, id: str) -> None:
        _, worker, sender = self._running.pop(id)
        self._program.workers.remove(worker)
        await worker.stop(GRACE)
        await sender.close()

    async def _drop(self, gone: set[str]) -> None:
        """Forget the groups of deleted subscriptions; whoever stops the last member of one manages to."""
        there = {info.name for info in await self._program.broker.admin.groups()}
        for id in gone:
            name = self._all.group_name(id)
            try:
                if name in there:
                    await self._program.broker.admin.drop_group(name)
            except UnknownGroup:
                pass
            except BrokerError as error:
                log.debug("%s: %s", name, error)
                continue
            self._dropped.add(id)


def subscriptions(
    app: App,
    *types: type[Any],
    allow: Allow | None,
    origin: str | None,
    secret: str | None,
    inside: Sequence[str],
    rate: int | None = None,
    callback: str | None = None,
    lookup: Lookup = system_lookup,
) -> None:
    """``App.subscriptions``; ``lookup`` resolves the hosts of sinks."""
    if not types or not all(spec_of(cls) for cls in types):
        raise DefinitionError("app.subscriptions: name the event types that may be subscribed to")
    if not (callable(allow) or (isinstance(allow, str) and len(allow) >= 16)):
        raise DefinitionError(
            "app.subscriptions: allow must be a token of at least 16 characters, or a function of the headers that "
            "returns who may; without it anybody could have events sent anywhere"
        )
    if secret is not None and len(secret) < 24:
        raise DefinitionError("app.subscriptions: secret must have at least 24 characters")
    if rate is not None and rate < 1:
        raise DefinitionError(f"app.subscriptions: rate is how many requests a minute are asked for, not {rate!r}")
    if callback is not None:
        if secret is None:
            raise DefinitionError("app.subscriptions: callback needs secret, of which its keys are made")
        check_url(callback, "app.subscriptions: callback")
        if not callback.startswith("https:") and not inside:
            raise DefinitionError(f"app.subscriptions: callback {callback} must be called by https")
        callback = callback.rstrip("/")
    found = Subscriptions(
        app, types, allow, origin or app.name, secret, inside, lookup, rate or 0, callback
    )  # fmt: skip
    app.mount(Endpoint(PATH, found.collection, ("GET", "POST")))
    if callback is not None:
        app.mount(Endpoint(CONFIRM, found.confirm, ("GET", "POST")))
    app.mount(Endpoint(f"{PATH}/", found.item, ("GET", "PUT", "DELETE")))

    async def subscriptions(publish: Publish) -> None:
        await found.follow(publish)

    app.source(instances="each")(subscriptions)
