"""The NATS JetStream broker: a stream for each topic, a subject of it for each partition.

Streams are read by consumers without acks that begin at an offset: what a group has settled is in its spaces. Spaces
and leases are streams, too. ``docs/decisions`` says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from base64 import b64decode
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from stentor.broker import Durable, Features, Finding
from stentor.brokers import findings
from stentor.brokers.log_state import LogStateBroker, MessageHeart, encode_lease
from stentor.brokers.nats_client import (
    ASK_PATIENCE,
    Frame,
    Link,
    NatsFeed,
    Place,
    Refused,
    Silent,
    refusal,
    status,
    stream_of,
)
from stentor.brokers.storage import Entry, Stored
from stentor.brokers.trust import refused, refuses_certificate, trust
from stentor.brokers.wire import unpack
from stentor.clock import Clock
from stentor.connect import BrokerUrl, count, one_of
from stentor.errors import AuthenticationFailed, ConfigError, PublishUnknown, StentorError, Unavailable, UnknownTopic
from stentor.message import new_id

BATCH = 1000
"""Messages of an atomic batch; the server's limit."""
SINGLY = 20
"""Below so many messages each is faster by itself."""
OPEN_PATIENCE = 5.0
ELECTION_PATIENCE = 15.0
"""Seconds that a cluster may take to have a leader again."""
OVERHEAD = 4096
"""Bytes of a message that are not its payload, at most."""

_decode = msgspec.json.decode

_EXISTS = {10058}
_LIMITS = ("max_age", "max_msgs", "max_bytes", "max_msgs_per_subject")
_OVERLAPS = {10065}
_NO_MESSAGE = {10037}


def _moment(text: str) -> float:
    """Seconds since the epoch of a time of the server's, which has nanoseconds."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{fraction or 0}")


class NatsBroker(LogStateBroker):
    """``nats://[user:password@]host[:4222][,another]``. NATS 2.9 or newer with JetStream.

    Options: those of ``LogBroker``, ``tls=1``, ``ca``, ``cert``, ``key`` (files; TLS always verifies the server),
    ``creds`` (a credentials file), ``replicas`` (of the streams that this program makes, default 1) and ``durable``:
    ``host`` where the server has ``sync_interval: always``, which it tells nobody; by default it syncs every two
    minutes, and what it confirmed survives its process only.
    """

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        super().__init__(url, clock)
        self.tls = tls = trust(url, 4222, greeted=True)
        creds = url.option("creds", "")
        self._replicas = url.option("replicas", 1, count)
        self._alone: Durable = url.option("durable", "process", one_of("process", "host"))
        self._options: dict[str, Any] = {"servers": [f"nats://{server}" for server in url.addresses(4222)]}
        if url.user:
            self._options |= {"user": url.user, "password": url.password or ""}
        if creds:
            self._options["user_credentials"] = creds
        if tls:
            self._options["tls"] = tls.context
        self.features = Features(
            name="nats", durable=self._alone, shared=True, atomic=False, dedupe=False,
            replay=True, cancel=True, browse=True,
        )  # fmt: skip
        self._link: Link | None = None
        self._reading: Link | None = None
        self._batches = False
        self._trimmed: dict[tuple[str, int], int] = {}

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def native(self) -> Client:
        """The connection of the nats-py library that events are published with."""
        return self.link.nc

    @property
    def link(self) -> Link:
        if self._link is None:
            raise Unavailable(f"{self} is not open")
        return self._link

    def new_link(self) -> Link:
        """A connection that is not open yet."""
        return Link(self, self._options)

    async def connect(self) -> None:
        self._link, self._reading = self.new_link(), self.new_link()
        await self._reach(self._link)
        await self._reach(self._reading)
        await self._answers(self._link)
        version = self._link.nc.connected_server_version
        self._batches = (version.major, version.minor) >= (2, 12)
        most = min(self.features.max_bytes, self._link.nc.max_payload - OVERHEAD)
        self.features = msgspec.structs.replace(self.features, max_bytes=most)
        await self.open_state()

    async def _answers(self, link: Link) -> None:
        """Until JetStream answers: a cluster whose leader died is silent until there is another."""
        deadline = time.monotonic() + ELECTION_PATIENCE
        while True:
            try:
                await link.api("INFO", patience=2.0)
                return
            except Silent:
                if time.monotonic() > deadline or not link.nc.is_connected:
                    raise

    async def _reach(self, link: Link) -> None:
        try:
            async with asyncio.timeout(OPEN_PATIENCE):
                await link.open()
        except ssl.SSLError as error:
            raise refused(self, str(error)) from None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            text = link.trouble or " ".join(str(error).split()) or f"no answer within {OPEN_PATIENCE:g} s"
            if refuses_certificate(text):
                raise refused(self, text) from None
            if any(word in text for word in ("uthoriz", "uthenticat")):
                raise AuthenticationFailed(f"{self}: {text}") from None
            raise Unavailable(f"{self} cannot be reached: {text}") from None

    async def disconnect(self) -> None:
        await self.close_state()
        for link in (self._link, self._reading):
            if link is not None:
                await link.close()
        self._link = self._reading = None

    async def ping(self) -> None:
        await self.link.api(f"STREAM.INFO.{stream_of(self.lease_topic)}", patience=3.0)
        await self.stores()

    async def review(self) -> list[Finding]:
        before = time.time()
        found = await self.link.api(f"STREAM.INFO.{stream_of(self.lease_topic)}")
        version = self.link.nc.connected_server_version
        reviewed = [findings.version("NATS", f"{version.major}.{version.minor}.{version.patch}", (2, 9))]
        if "ts" in found:  # since 2.10
            reviewed.append(findings.clock(datetime.fromisoformat(found["ts"]).timestamp(), before, time.time()))
        configs = [(await self._info(record.stored))["config"] for record in (await self.records())[0].values()]
        copies = min(config["num_replicas"] for config in [found["config"], *configs])
        alone = not (found.get("cluster") or {}).get("name")
        advice = "" if copies >= 3 or alone else "a cluster can keep three: replicas=3 for new topics"
        reviewed.append(Finding("replicas", "warn" if advice else "ok", str(copies), advice))
        if self.features.durable == "host":
            text = "taken on trust: the server does not tell its sync_interval"
            reviewed.append(Finding("sync_interval", "ok", text))
        limited = [config["name"] for config in configs if any(config.get(limit, -1) > 0 for limit in _LIMITS)]
        told = ", ".join(f"{name} has a limit" for name in limited)
        why = "events are removed or refused, whoever still needs them"
        reviewed.append(findings.setting("retention", told or "without limits", ["without limits"], why))
        account = await self.link.api("INFO")
        limits = account["limits"]
        full = "the account's events, topics or members are refused: raise it"
        return [
            *reviewed,
            findings.room("storage", account["storage"] >> 20, limits["max_storage"] >> 20, full, " MiB"),
            findings.room("streams", account["streams"], limits["max_streams"], full),
            findings.room("consumers", account["consumers"], limits["max_consumers"], full),
        ]

    # ---- data -------------------------------------------------------------------------------------------------------

    async def make(self, topic: str, partitions: int = 1, keep: float = -1, *, fewer: bool = False) -> None:  # noqa: ARG002  two replicas of three would have no majority when one goes
        subjects = [f"{topic}.{index}" for index in range(partitions)]
        config: dict[str, Any] = {
            "name": stream_of(topic), "subjects": subjects, "retention": "limits", "storage": "file", "discard": "new",
            "max_age": 0 if keep < 0 else int(keep * 1e9), "num_replicas": self._replicas, "allow_direct": True,
            "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_msg_size": -1,
        }  # fmt: skip
        if self._batches:
            config["allow_atomic"] = True
        deadline = time.monotonic() + ASK_PATIENCE
        while True:
            try:
                await self.link.api(f"STREAM.CREATE.{stream_of(topic)}", **config)
                return
            except Refused as error:
                if error.number in _OVERLAPS:
                    raise ConfigError(f"{self}: topic {topic}: its subjects are another stream's: {error}") from None
                if error.number not in _EXISTS:
                    raise
                break
            except Unavailable:
                if time.monotonic() > deadline or not self.link.nc.is_connected:
                    raise
                await asyncio.sleep(0.2)  # a cluster may still be choosing a leader
        there = len((await self._info(topic))["config"].get("subjects") or ())
        if there != partitions:
            raise self.otherwise(topic, there, partitions)

    async def _info(self, topic: str) -> dict[str, Any]:
        return await self.link.api(f"STREAM.INFO.{stream_of(topic)}")

    async def survives(self, topics: Sequence[str]) -> Durable:
        infos = await asyncio.gather(*map(self._info, topics))
        return "replica" if all(info["config"]["num_replicas"] >= 3 for info in infos) else self._alone

    async def remove(self, topic: str) -> None:
        with contextlib.suppress(UnknownTopic):
            await self.link.api(f"STREAM.DELETE.{stream_of(topic)}")

    async def append(self, entries: Sequence[Entry]) -> Sequence[int | StentorError]:
        if not self.link.nc.is_connected:
            raise Unavailable(f"{self} is away{f': {self.link.trouble}' if self.link.trouble else ''}")
        results: list[int | StentorError] = [Unavailable(f"{self}: not sent")] * len(entries)
        topics: dict[str, list[int]] = {}
        for number, entry in enumerate(entries):
            topics.setdefault(entry.topic, []).append(number)
        steps = [self._append(entries, numbers, results) for numbers in topics.values()]
        await (asyncio.gather(*steps) if len(steps) != 1 else steps[0])  # an event alone needs no task
        return results

    async def _append(self, entries: Sequence[Entry], left: list[int], results: list[int | StentorError]) -> None:
        """Store the entries of a topic in steps: each is begun when all of the one before is stored."""
        for numbers in self._steps(entries, left):
            part = [entries[number] for number in numbers]
            try:
                if self._batches and len(part) >= SINGLY:
                    outcome: Sequence[int | StentorError] = await self._store_batch(part)
                else:
                    outcome = await self._store_each(part)
            except StentorError as error:
                outcome = [error] * len(part)
            for number, result in zip(numbers, outcome, strict=True):
                results[number] = result
            wrong = next((result for result in outcome if not isinstance(result, int)), None)
            if wrong is not None:
                return

    def _steps(self, entries: Sequence[Entry], left: list[int]) -> Iterable[list[int]]:
        """What can be stored at once: a batch, else messages of different keys, since each may be refused alone."""
        if self._batches and len(left) >= SINGLY:
            yield from (left[at : at + BATCH] for at in range(0, len(left), BATCH))
            return
        step: list[int] = []
        keys: set[str] = set()
        for number in left:
            key = entries[number].message.key
            if key is not None and key in keys:
                yield step
                step, keys = [], set()
            step.append(number)
            if key is not None:
                keys.add(key)
        yield step

    async def _store_batch(self, entries: Sequence[Entry]) -> list[int | StentorError]:
        """All of them or none, as one message of the stream's log (ADR-50)."""
        batch, last = new_id(), len(entries)
        messages = []
        for number, entry in enumerate(entries, 1):
            commit = "Nats-Batch-Commit: 1\r\n" if number == last else ""
            headers = f"NATS/1.0\r\nNats-Batch-Id: {batch}\r\nNats-Batch-Sequence: {number}\r\n{commit}\r\n"
            messages.append(Frame(f"{entry.topic}.{entry.partition}", entry.body, headers=headers.encode()))
        self.link.send(*messages[:-1])
        [answer] = await self.link.post(messages[-1])
        if isinstance(answer, Unavailable):
            return [PublishUnknown([entry.message.id], str(answer)) for entry in entries]
        stored = await self._sequence(entries[-1].topic, answer)
        return list(range(stored - last + 1, stored + 1)) if isinstance(stored, int) else [stored] * last

    async def _store_each(self, entries: Sequence[Entry]) -> list[int | StentorError]:
        answers = await self.link.post(*(Frame(f"{entry.topic}.{entry.partition}", entry.body) for entry in entries))
        return [
            PublishUnknown([entry.message.id], str(answer))
            if isinstance(answer, Unavailable)
            else await self._sequence(entry.topic, answer)
            for entry, answer in zip(entries, answers, strict=True)
        ]

    async def _sequence(self, topic: str, message: Msg) -> int | StentorError:
        if status(message):  # nobody listens: there is no such stream, or it has no leader
            try:
                await self._info(topic)
            except StentorError as error:
                return error
            return Unavailable(f"{self}: topic {topic} has no leader now")
        found = _decode(message.data)
        if "error" in found:
            refused = refusal(self, found["error"])
            return Unavailable(str(refused)) if isinstance(refused, Refused) else refused
        return int(found["seq"])

    async def tell(self, topic: str, value: bytes) -> int:
        result = await self._sequence(topic, await self.link.ask(f"{topic}.0", value))
        if isinstance(result, int):
            return result
        raise result if isinstance(result, UnknownTopic) else Unavailable(str(result))

    async def told(self, topic: str) -> list[bytes]:
        try:
            found = await self.link.api(f"STREAM.MSG.GET.{stream_of(topic)}", last_by_subj=f"{topic}.0")
        except Refused as error:
            if error.number in _NO_MESSAGE:
                return []
            raise
        return [b64decode(found["message"].get("data", ""))]

    def feed(self) -> NatsFeed:
        if self._reading is None:
            raise Unavailable(f"{self} is not open")
        return NatsFeed(self._reading)

    async def bounds(self, topic: str, partitions: Sequence[int]) -> list[tuple[int, int]]:
        state = (await self._info(topic))["state"]
        end = state["last_seq"] + 1
        first = min(max(1, state["first_seq"]), end)
        return [(first, end)] * len(partitions)

    async def find(self, topic: str, partitions: Sequence[int], moment: float) -> list[int]:
        text = datetime.fromtimestamp(max(0.0, moment), UTC).isoformat().replace("+00:00", "Z")
        stream = stream_of(topic)
        name, found = await self.link.consumer(
            stream, f"{topic}.*", deliver_policy="by_start_time", opt_start_time=text
        )
        self.link.discard(stream, name)
        return [found["delivered"]["stream_seq"] + 1] * len(partitions)

    async def pending(self, places: Sequence[tuple[str, int, int]]) -> list[tuple[int, float | None]]:
        return list(await asyncio.gather(*(self._pending(*place) for place in places)))

    async def _pending(self, topic: str, index: int, offset: int) -> tuple[int, float | None]:
        name, count = await self._look(topic, index, offset)
        self.link.discard(stream_of(topic), name)
        if not count:
            return 0, None
        try:
            found = await self.link.api(
                f"STREAM.MSG.GET.{stream_of(topic)}", seq=max(1, offset), next_by_subj=f"{topic}.{index}"
            )
        except Refused:
            return 0, None  # removed just now
        return count, _moment(found["message"]["time"])

    async def _look(self, topic: str, index: int, offset: int) -> tuple[str, int]:
        """A consumer from an offset on, and how many messages are there for it."""
        name, found = await self.link.consumer(
            stream_of(topic), f"{topic}.{index}", deliver_policy="by_start_sequence", opt_start_seq=max(1, offset)
        )
        return name, found["num_pending"]

    async def page(self, topic: str, index: int, offset: int, limit: int) -> Sequence[Stored]:
        link, stream = self.link, stream_of(topic)
        name, count = await self._look(topic, index, offset)
        limit = min(limit, count)
        found: list[Msg] = []
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def end(whole: bool = False) -> None:
            if not done.done():
                done.set_result(whole)

        def came(message: Msg) -> None:
            if not (told := status(message)):
                found.append(message)
            if told or len(found) == limit:
                end(True)

        inbox = await link.listen(came)
        link.on_lost.append(end)
        try:
            if limit:
                body = msgspec.json.encode({"batch": limit, "expires": int(ASK_PATIENCE * 1e9)})
                link.send(Frame(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", body, inbox.subject))
                async with asyncio.timeout(ASK_PATIENCE):
                    while not (await asyncio.wait((done,), timeout=0.5))[0]:  # it may be removed meanwhile
                        left = await link.api(f"CONSUMER.INFO.{stream}.{name}")
                        if not left["num_pending"] and left["delivered"]["consumer_seq"] <= len(found):
                            end(True)
                if not done.result():
                    raise Unavailable(f"{self}: the connection was lost")
        except TimeoutError:
            raise Unavailable(f"{self} does not answer within {ASK_PATIENCE:g} s") from None
        finally:
            link.on_lost.remove(end)
            await link.mute(inbox)
        link.discard(stream, name)
        stored = []
        for message in found:
            place = Place.of(message)
            event = unpack(message.data, topic.removeprefix(self.prefix), f"{index}-{place.offset}")
            stored.append(Stored(place.offset, place.time, event))
        return stored

    async def trim(self, topic: str, index: int, offset: int) -> None:
        if self._trimmed.get((topic, index), 0) >= offset or offset < 2:
            return
        await self.link.api(f"STREAM.PURGE.{stream_of(topic)}", filter=f"{topic}.{index}", seq=offset)
        self._trimmed[topic, index] = offset

    # ---- leases -----------------------------------------------------------------------------------------------------

    def heart(self) -> _Heart:
        return _Heart(self)


class _Heart(MessageHeart):
    def __init__(self, broker: NatsBroker) -> None:
        super().__init__(broker)
        self._runner = asyncio.Runner()
        self._link: Link | None = None

    def beat(self, name: str, value: bytes, lease: float) -> None:
        self._runner.run(self._beat(encode_lease((name, value, lease))))

    async def _beat(self, body: bytes) -> None:
        async with asyncio.timeout(self._patience):
            if self._link is None:
                link = self._broker.new_link()
                await link.open()
                self._link = link
            answer = await self._link.ask(f"{self._broker.lease_topic}.0", body, self._patience)
        found = {} if status(answer) else _decode(answer.data)
        if "seq" not in found:
            raise OSError(f"the lease was not taken: {found or 'no stream'}")
        self._broker.beaten = max(self._broker.beaten, found["seq"])

    def close(self) -> None:
        if self._link is not None:
            self._runner.run(self._link.close())
        self._runner.close()
