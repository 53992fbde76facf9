"""Remote handlers: CloudEvents over HTTP to a service, as a handler like any other (retry, order, dead letter).

``deliver`` (which is ``app.deliver``) registers a handler whose function is ``Sender.send``. A 2xx answer is the ack.
The target is away when it cannot be reached or says so: then its ``Breaker`` holds the whole group instead of burning
the attempts of every event. Sources: the HTTP protocol binding and the web hook specification of
https://github.com/cloudevents/spec (1.0.2), RFC 9110 (Retry-After), RFC 6749 4.4 (client credentials).
"""
# Annotations are objects here: `handler` below injects what it makes itself.

import asyncio
import json
import re
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast
from urllib.parse import quote_plus, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver

from stentor.app import App
from stentor.clock import Clock, Duration, SystemClock, seconds
from stentor.cloudevents import BATCH, STRUCTURED, to_batch, to_headers, to_structured
from stentor.context import Context, Dead, Depends, RetryLater, derived_id
from stentor.errors import BatchFailed, ConfigError, DefinitionError, NotDelivered
from stentor.event import Topic
from stentor.group import Group
from stentor.handler import Batch
from stentor.message import Message
from stentor.retry import Retry
from stentor.security.signing import Signer

AGAIN = frozenset({408, 409, 425, 429})
"""Of the answers 400 to 499 those after which the same request may succeed."""
AWAY = frozenset({502, 503, 504})
"""Answers of a service that is not there, rather than of one that fails with this event."""
FAILURES = 5
"""Failures in a row after which the target is left alone for a while."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
LONGEST_WAIT = 3600.0
"""Seconds of a Retry-After that are respected at most."""
SAID = 4096
"""Bytes of an answer that are read; 200 characters of it are shown."""
IDLE = 4.0
"""Seconds for which an idle connection is kept: less than the 5 after which common servers close theirs."""
Mode = Literal["binary", "structured"]


class OAuth2:
    """An access token by client credentials: fetched at first use, kept, renewed before it expires and when refused.

    ``secret`` is the client's, or a Path to a file that holds it. The client says who it is by HTTP Basic.
    """

    def __init__(
        self, token_url: str, client: str, secret: str | Path, *, scope: str | None = None, audience: str | None = None
    ) -> None:
        check_url(token_url, "OAuth2: token_url")
        self._url = token_url
        self._client = client
        self._secret = secret
        self._form = {"grant_type": "client_credentials"}
        self._form |= {name: value for name, value in (("scope", scope), ("audience", audience)) if value}
        self._header = ""
        self._until = 0.0
        self._lock = asyncio.Lock()

    async def header(self, session: aiohttp.ClientSession, clock: Clock, refused: str) -> str:
        """The Authorization header to use, which is not the one that was ``refused``. Raises NotDelivered."""
        async with self._lock:  # many requests that find it expired fetch one
            if not self._header or self._header == refused or clock.monotonic() >= self._until:
                token, lifetime = await self._fetch(session)
                self._header = f"Bearer {token}"
                self._until = clock.monotonic() + lifetime - min(30.0, lifetime / 4)
            return self._header

    async def _fetch(self, session: aiohttp.ClientSession) -> tuple[str, float]:
        try:
            who = f"{quote_plus(self._client)}:{quote_plus(_read(self._secret))}"
            headers = {"authorization": f"Basic {b64encode(who.encode()).decode()}", "accept": "application/json"}
            async with session.post(self._url, data=self._form, headers=headers, allow_redirects=False) as answer:
                said = await _bounded(answer, 65536)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise NotDelivered(f"no token from {shown(self._url)}: {_why(error)}", away=True) from None
        try:
            found = json.loads(said)
            return str(found["access_token"]), float(found.get("expires_in", 300))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise NotDelivered(
                f"no token from {shown(self._url)}: it answered {answer.status}", answer.status, away=True
            ) from None


class Target:
    """A service that takes events by POST.

    ``secret`` signs by Standard Webhooks: ``whsec_...``, or an Ed25519 key ``whsk_...``, or several while they change.
    ``mode``: "binary" (attributes in headers) or "structured" (one JSON object). ``authorization``: a Path to a file
    with the value of the Authorization header, read again when it changes, or an ``OAuth2``. ``certificate`` and
    ``key``: PEM files that this client shows (the key may stand in the first). ``ca``: a PEM file of the authorities
    that may vouch for the service, instead of the system's. ``headers``: more of them.

    Raises:
        ConfigError: a URL, key or file is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: str | Sequence[str] | None = None,
        mode: Mode = "binary",
        authorization: Path | OAuth2 | None = None,
        certificate: Path | str | None = None,
        key: Path | str | None = None,
        ca: Path | str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        check_url(url, "to")
        if mode not in ("binary", "structured"):
            raise ConfigError(f'{shown(url)}: mode must be "binary" or "structured", not {mode!r}')
        self.url = url
        self.mode = mode
        self.authorization = authorization
        self.headers = dict(headers or {})
        self.signer = Signer(secret, f"{shown(url)}: secret") if secret else None
        self.tls: ssl.SSLContext | bool = True
        try:
            if certificate is not None or ca is not None:
                self.tls = ssl.create_default_context(cafile=ca)
                if certificate is not None:
                    self.tls.load_cert_chain(certificate, key)
        except OSError as error:  # an SSLError is one
            raise ConfigError(f"{shown(url)}: certificate, key or ca: {error}") from None

    def __repr__(self) -> str:
        return f"Target({shown(self.url)!r})"

    @property
    def name(self) -> str:
        """The host, and the port unless it is the usual one, as a group may be called."""
        parts = urlsplit(self.url)
        host = (parts.hostname or "").replace(":", "-").strip("-.")
        return host if parts.port is None else f"{host}-{parts.port}"


class Breaker:
    """Whether a target is there: closed; open for a while after failures in a row; then one request tries."""

    def __init__(self) -> None:
        self.failures = 0
        self._pause = FIRST_PAUSE
        self._until: float | None = None
        self._trial: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        return self._until is None

    async def enter(self, clock: Clock) -> float:
        """0: send; else the seconds for which nothing is to be sent. While one request tries, others wait for it."""
        while self._trial is not None:
            await asyncio.wait([self._trial])
        if self._until is None:
            return 0.0
        left = self._until - clock.monotonic()
        if left <= 0:
            self._trial = asyncio.get_running_loop().create_future()
        return max(left, 0.0)

    def leave(self) -> None:
        """A request ended, somehow; if it was the one that tries, the next may."""
        trial, self._trial = self._trial, None
        if trial is not None and not trial.done():
            trial.set_result(None)

    def worked(self) -> None:
        self.failures, self._pause, self._until = 0, FIRST_PAUSE, None

    def failed(self, clock: Clock, wait: float | None) -> float:
        """Count a failure; the seconds for which the target is left alone now. ``wait``: what it asked for itself."""
        self.failures += 1
        now = clock.monotonic()
        if self._until is not None and self._until > now:
            self._until = max(self._until, now + (wait or 0.0))
        elif wait is not None:
            self._until = now + wait
        elif self._until is not None or self.failures >= FAILURES:
            self._until = now + self._pause
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        return 0.0 if self._until is None else self._until - now


class Sender:
    """Sends to one target, over connections that are kept, for one group in this process.

    For targets that others name: ``resolver`` finds (and checks) their addresses, ``gone`` is called when one answers
    410, and ``rate`` is how many requests a minute it allows (0: any number).
    """

    def __init__(
        self,
        target: Target,
        timeout: Duration = "30s",
        *,
        batch: bool = False,
        resolver: AbstractResolver | None = None,
        gone: Callable[[Context], None] | None = None,
        rate: int = 0,
    ) -> None:
        self._target = target
        self._shown = shown(target.url)
        self._timeout = seconds(timeout, f"{self._shown}: timeout")
        if batch and target.mode != "binary":
            raise ConfigError(f"{self._shown}: batch= is a mode of its own; leave mode= out")
        self._batch = batch
        self._resolver = resolver
        self._gone = gone
        self._interval = 60 / rate if rate else 0.0
        self._next = 0.0
        self._breaker = Breaker()
        self._session: aiohttp.ClientSession | None = None
        self._file: tuple[int, str] = (0, "")

    def session(self) -> aiohttp.ClientSession:
        """The connections; no proxy of the environment, no cookies, no redirects, and each answer read in bounds."""
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0, keepalive_timeout=IDLE, ssl=self._target.tls, resolver=self._resolver,
                use_dns_cache=self._resolver is None,
            )  # fmt: skip
            limits = aiohttp.ClientTimeout(total=self._timeout, sock_connect=min(10.0, self._timeout * 0.9))
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, auto_decompress=False,
                timeout=limits, headers={"User-Agent": "stentor"},
                skip_auto_headers=("Content-Type",),
            )  # fmt: skip
        return self._session

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def opened(self) -> AsyncIterator["Sender"]:
        """For ``Depends(scope="app")``: the connections are closed when the app stops."""
        yield self
        await self.close()

    async def send(self, ctx: Context, messages: Sequence[Message]) -> None:
        """Send one event, or a batch as a whole; returns when the target has it. Else raises what the worker knows."""
        program = ctx.app.program
        clock: Clock = SystemClock() if program is None else program.clock
        wait = await self._breaker.enter(clock)
        if wait > 0:
            self._hold(ctx, wait, "it is left alone for a while")
            _fail(messages, RetryLater(wait + 0.05, count=False))
        try:
            await self._pace(clock)
            await self._send(ctx, messages, clock)
            self._breaker.worked()
        except NotDelivered as error:
            self._failed(ctx, messages, clock, error)
        finally:
            self._breaker.leave()

    async def _pace(self, clock: Clock) -> None:
        """Wait for this request's turn among those that are allowed a minute."""
        if self._interval:
            turn = max(self._next, clock.monotonic())
            self._next = turn + self._interval
            await clock.sleep(turn - clock.monotonic())

    def _failed(self, ctx: Context, messages: Sequence[Message], clock: Clock, error: NotDelivered) -> NoReturn:
        """What a failure means for the events, and for the target."""
        status = error.status
        if status == HTTPStatus.GONE and self._gone is not None:
            self._gone(ctx)
            _fail(messages, RetryLater(LONGEST_WAIT, count=False))
        if not error.away and status is not None and status < 500 and status not in AGAIN:
            self._breaker.worked()
            if len(messages) > 1:
                raise error  # whose fault it is shows one by one
            raise Dead(str(error))
        asked = error.after if status in (429, 503) else None
        blamed = self._breaker.closed or not (error.away or status in AWAY)
        if status in (408, 409, 425):
            self._breaker.worked()
            pause = 0.0
        else:
            pause = self._breaker.failed(clock, asked)
        if pause > 0:
            self._hold(ctx, pause, str(error))
        if asked is not None and status == 429:
            blamed = False  # it asks for patience: no fault of the event
        if error.after is None and blamed:
            _fail(messages, error)
        later = RetryLater(max(error.after or 0.0, pause + 0.05), count=blamed)
        later.__cause__ = error
        _fail(messages, later)

    def _hold(self, ctx: Context, pause: float, why: str) -> None:
        ctx.hold(timedelta(seconds=pause), f"{self._shown} is away: {why}")

    async def _send(self, ctx: Context, messages: Sequence[Message], clock: Clock) -> None:
        target = self._target
        headers, body = self._request(messages)
        headers.update(target.headers)
        if target.signer is not None:
            id = derived_id(messages[0], ctx.group, "webhook", len(messages), ctx.replayed)
            headers |= target.signer.headers(id, body, clock.now())
        session = self.session()
        used = await self._authorization(session, clock, "")
        status, said, after = await self._post(session, headers, body, used)
        if status == HTTPStatus.UNAUTHORIZED and used:
            fresh = await self._authorization(session, clock, used)
            if fresh != used:
                status, said, after = await self._post(session, headers, body, fresh)
        if not 200 <= status < 300:
            phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
            text = f"{self._shown} answered {status} {phrase}".rstrip() + (f": {said}" if said else "")
            raise NotDelivered(text, status, after=_retry_after(after, clock))

    def _request(self, messages: Sequence[Message]) -> tuple[dict[str, str], bytes]:
        if self._batch:
            return {"content-type": f"{BATCH}; charset=utf-8"}, to_batch(messages)
        [message] = messages
        if self._target.mode == "structured":
            return {"content-type": f"{STRUCTURED}; charset=utf-8"}, to_structured(message)
        return to_headers(message), message.data

    async def _authorization(self, session: aiohttp.ClientSession, clock: Clock, refused: str) -> str:
        given = self._target.authorization
        if isinstance(given, OAuth2):
            return await given.header(session, clock, refused)
        if given is None:
            return ""
        try:
            changed = given.stat().st_mtime_ns
            if changed != self._file[0] or refused:
                self._file = (changed, _read(given))
        except OSError as error:
            raise NotDelivered(f"authorization for {self._shown}: {error}", away=True) from None
        return self._file[1]

    async def _post(
        self, session: aiohttp.ClientSession, headers: Mapping[str, str], body: bytes, authorization: str
    ) -> tuple[int, str, str]:
        """Status, the beginning of what was said, and Retry-After. Raises NotDelivered without an answer."""
        if authorization:
            headers = {**headers, "authorization": authorization}
        try:
            async with session.post(self._target.url, data=body, headers=headers, allow_redirects=False) as answer:
                said = await _bounded(answer, SAID)
        except (aiohttp.ServerTimeoutError, TimeoutError) as error:
            away = isinstance(error, aiohttp.ConnectionTimeoutError)
            raise NotDelivered(f"{self._shown} did not answer within {self._timeout:g} s", away=away) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NotDelivered(f"{self._shown}: {_why(error)}", away=True) from None
        text = "" if 200 <= answer.status < 300 else " ".join(said.decode("utf-8", "replace").split())[:200]
        return answer.status, text, answer.headers.get("Retry-After", "")

    def handler(self) -> Callable[..., Any]:
        """The function of a handler."""
        own = Annotated[Sender, Depends(self.opened, scope="app")]

        async def one(message: Message, ctx: Context, _: own) -> None:
            await self.send(ctx, [message])

        async def many(messages: list[Message], ctx: Context, _: own) -> None:
            await self.send(ctx, messages)

        function = many if self._batch else one
        function.__name__ = self._target.name
        function.__dict__["target"] = self._target  # by which `stentor gateway` and `stentor docs` know it
        return function


def deliver(
    app: App,
    *types: type[Any],
    to: Any,
    secret: str | None = None,
    topic: str | Topic | None = None,
    group: str | Group | None = None,
    retry: Retry | None = None,
    timeout: Duration = "30s",
    where: Callable[[Any], bool] | str | None = None,
    batch: Batch | None = None,
) -> None:
    """``App.deliver``."""
    if isinstance(to, str):
        to = Target(to, secret=secret)
    elif not isinstance(to, Target):
        raise DefinitionError(f"app.deliver: to must be a URL or a Target, not {to!r}")
    elif secret is not None:
        raise DefinitionError(f"app.deliver: give the secret to {to!r}")
    if callable(where) and topic is None:
        where = _of_event(app, where)
    function = Sender(to, timeout, batch=batch is not None).handler()
    cast(Any, app.on)(*types, topic=topic, group=group, retry=retry, where=where, batch=batch)(function)


def _of_event(app: App, where: Callable[[Any], bool]) -> Callable[[Message], bool]:
    def matches(message: Message) -> bool:
        spec = app.catalog.find(message.type)
        assert spec is not None
        return where(app.catalog.read(spec, message))

    return matches


def check_url(url: str, what: str) -> None:
    """Raises ConfigError for what is no http(s) URL, or one that would put a password into logs."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(f"{what}: no URL; write for example https://host/path") from None
    if not good or re.search(r"[\s\x00-\x1f]", url):
        raise ConfigError(f"{what}: {shown(url)!r} is no URL; write for example https://host/path")
    if "@" in parts.netloc or parts.fragment:
        raise ConfigError(f"{what}: {shown(url)} must have no user, password or fragment; see authorization=")


def shown(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _fail(messages: Sequence[Message], error: BaseException) -> NoReturn:
    raise BatchFailed(dict.fromkeys(range(len(messages)), error)) if len(messages) > 1 else error


def _read(secret: str | Path) -> str:
    return secret.read_text("utf-8").strip() if isinstance(secret, Path) else secret


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _retry_after(text: str, clock: Clock) -> float | None:
    """Seconds of a Retry-After header, at least 1, at most LONGEST_WAIT; None for none and for nonsense."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        wait = float(text[:9])
    else:
        try:
            wait = parsedate_to_datetime(text).timestamp() - clock.now()
        except (ValueError, TypeError):
            return None
    return min(max(wait, 1.0), LONGEST_WAIT)


async def _bounded(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """The first bytes of a body; a connection whose body is longer is not used again."""
    said = b""
    while len(said) < limit and (chunk := await answer.content.read(limit - len(said))):
        said += chunk
    return said
