"""The Redis broker: a stream for each partition, spaces as hashes, everything that must be one step in Lua.

An entry's id is ``<n>-<m>``: ``n`` counts the messages of the topic (the offset), ``m`` those of the partition, so that
what waits can be counted without reading it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import Any

import redis as client
import redis.asyncio as aio
from msgspec.msgpack import encode
from redis.backoff import NoBackoff
from redis.retry import Retry

from stentor.broker import Durable, Features, Finding
from stentor.brokers import findings
from stentor.brokers.log import LogBroker
from stentor.brokers.log_state import Feed, FeedReader, Read
from stentor.brokers.storage import DUPLICATE, Entry, Stored, Write
from stentor.brokers.trust import refused, refuses_certificate, trust
from stentor.brokers.wire import pack_delayed, unpack, unpack_delayed, unpack_waiting
from stentor.clock import Clock
from stentor.connect import BrokerUrl, one_of
from stentor.errors import (
    AuthenticationFailed,
    BrokerError,
    PublishUnknown,
    StentorError,
    StorageFull,
    Unavailable,
    UnknownTopic,
)
from stentor.message import Message, new_id

BLOCK = 1000
"""Milliseconds for which a read waits."""
CONNECTIONS = 64
"""Commands that are under way at once."""
WINDOW = 7 * 86400
"""Seconds for which a source and id are remembered."""
FALL = 500
"""Delayed messages that one step lets appear."""

_STORE = """
local tops = {}
local function store(topic, part, id, due, now, body)
  if id ~= '' and not redis.call('SET', 'P:seen:' .. id, '1', 'NX', 'EX', WINDOW) then return -1 end
  if due ~= 0 then
    local at = redis.call('INCR', 'P:delays')
    redis.call('ZADD', 'P:due', due, at)
    redis.call('HSET', 'P:delayed', at, body)
    return 0
  end
  local top = tops[topic]
  if not top then
    top = {n = tonumber(redis.call('HGET', 'P:topic:' .. topic, 'n') or 0), m = {}}
    tops[topic] = top
  end
  local n = top.n + 1
  local m = (top.m[part] or tonumber(redis.call('HGET', 'P:topic:' .. topic, part) or 0)) + 1
  redis.call('XADD', 'P:log:' .. topic .. ':' .. part, n .. '-' .. m, 't', now, 'e', body)
  top.n = n
  top.m[part] = m
  return n
end
local function store_all(now, at)
  local found, heads = {}, cmsgpack.unpack(ARGV[at])
  for i = 1, #ARGV - at do
    local h = i * 4
    found[i] = store(heads[h - 3], heads[h - 2], heads[h - 1], heads[h], now, ARGV[at + i])
  end
  return found
end
local function count()
  for topic, top in pairs(tops) do
    redis.call('HSET', 'P:topic:' .. topic, 'n', top.n)
    for part, m in pairs(top.m) do redis.call('HSET', 'P:topic:' .. topic, part, m) end
  end
end
"""
# A process numbers its batches: a repeated one is answered as it was, a late one refused. ``lost``, by number: the ids
# of batches of unknown fate; those of the one that turns out to be stored are remembered as if they had been given.
# Entries come as one list of heads (topic, partition, identity, due), then a body each: fewer words cost less.
_APPEND = (
    _STORE
    + """
local now, who, number, lost = ARGV[1], 'P:batch:' .. ARGV[2], tonumber(ARGV[3]), cmsgpack.unpack(ARGV[4])
local last = cmsgpack.unpack(redis.call('GET', who) or cmsgpack.pack({0, {}}))
if last[1] == number then return last[2] end
if last[1] > number then return redis.error_reply('ERR a later batch is stored already') end
for _, id in ipairs(lost[last[1]] or {}) do redis.call('SET', 'P:seen:' .. id, '1', 'EX', WINDOW) end
local found = store_all(now, 5)
count()
redis.call('SET', who, cmsgpack.pack({number, found}), 'EX', 86400)
return found
"""
)
_WRITE = (
    _STORE
    + """
local space, name, wanted, now = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local held = redis.call('HGET', space, name)
if (held and 'v' .. held or '') ~= wanted then return 0 end
local changes = tonumber(ARGV[4])
for i = 5, 4 + changes * 2, 2 do
  if ARGV[i + 1] == '' then redis.call('HDEL', space, ARGV[i])
  else redis.call('HSET', space, ARGV[i], string.sub(ARGV[i + 1], 2)) end
end
if #ARGV > 4 + changes * 2 then
  store_all(now, 5 + changes * 2)
  count()
end
return 1
"""
)
_FALL = (
    _STORE
    + """
local due = redis.call('ZRANGE', 'P:due', '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, MOST)
local found = {}
for i, at in ipairs(due) do found[i] = {at, redis.call('HGET', 'P:delayed', at)} end
return found
"""
)
_FELL = (
    _STORE
    + """
local now = ARGV[1]
for i = 2, #ARGV, 4 do
  if redis.call('ZREM', 'P:due', ARGV[i]) == 1 then
    redis.call('HDEL', 'P:delayed', ARGV[i])
    store(ARGV[i + 1], tonumber(ARGV[i + 2]), '', 0, now, ARGV[i + 3])
  end
end
count()
return 1
"""
)


def _error(error: Exception, broker: object) -> BrokerError:
    """What an error of the client is in Stentor's tree."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, client.AuthenticationError | client.exceptions.NoPermissionError) or "WRONGPASS" in text:
        return AuthenticationFailed(f"{broker} refuses the user or password: {text}")
    if refuses_certificate(text):
        return refused(broker, text)
    if isinstance(error, client.exceptions.OutOfMemoryError) or text.startswith(("OOM", "MISCONF")):
        return StorageFull(f"{broker} has no room: {text}")
    if isinstance(error, client.ConnectionError | client.TimeoutError | OSError):
        return Unavailable(f"{broker} cannot be reached: {text}")
    if isinstance(error, client.exceptions.BusyLoadingError | client.exceptions.ReadOnlyError):
        return Unavailable(f"{broker} does not take writes now: {text}")
    return BrokerError(f"{broker}: {text}")


async def _whole(call: Awaitable[Any]) -> Any:
    """Await a call of the client, which swallows about one cancellation in five (redis-py 8.1): it runs to its end in a
    task of its own, whoever waits for it.
    """
    task = asyncio.ensure_future(call)
    task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return await asyncio.shield(task)


class RedisBroker(LogBroker):
    """``redis://[user:password@]host[:port][/database]``, or ``rediss://`` for TLS. Redis 7.0 or newer.

    Options: those of ``LogBroker``, ``tls=1``, ``ca``, ``cert``, ``key`` (files; TLS always verifies the server), and
    ``durable`` ("host", the default: Redis is expected to run with ``appendfsync always``; "process": not).
    """

    native_delay = True

    def __init__(self, url: BrokerUrl, clock: Clock) -> None:
        super().__init__(url, clock)
        host, port = url.address(6379)
        self.tls = tls = trust(url, 6379, secure=url.scheme == "rediss")
        self.options: dict[str, Any] = {
            "host": host, "port": port, "db": int(url.path.strip("/") or 0),
            "username": url.user, "password": url.password, "socket_connect_timeout": 5.0,
            "retry": Retry(NoBackoff(), 0), "health_check_interval": 0, "protocol": 2,
        }  # fmt: skip
        if tls:
            self.options |= {
                "ssl": True, "ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True,
                "ssl_ca_certs": tls.ca or None, "ssl_certfile": tls.cert or None, "ssl_keyfile": tls.key or None,
            }  # fmt: skip
        durable: Durable = url.option("durable", "host", one_of("host", "process"))
        self._wanted = {"maxmemory-policy": "noeviction"}
        if durable == "host":
            self._wanted |= {"appendonly": "yes", "appendfsync": "always"}
        self._root = f"stentor:{{{self.prefix}}}"
        self.features = Features(
            name="redis", durable=durable, shared=True, atomic=True, dedupe=True, replay=True, cancel=True, browse=True
        )
        self._scripts: dict[str, str] = {}
        self._name = new_id()
        self._batch = 0
        self._lost: dict[int, list[str]] = {}
        self._redis: aio.Redis | None = None
        self._line: Line | None = None
        """Of appends: one is under way at a time."""
        self._turns = asyncio.Semaphore(CONNECTIONS)

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def native(self) -> aio.Redis:
        """The ``redis.asyncio.Redis`` in use. Raises Unavailable when the broker is not open."""
        if self._redis is None:
            raise Unavailable(f"{self} is not open")
        return self._redis

    async def connect(self) -> None:
        self._redis = self.client()
        try:
            await self._redis.ping()
        except Exception as error:
            raise _error(error, self) from None

    @property
    def patience(self) -> float:
        """Seconds for an answer: a connection that is half open shows by silence alone. No read blocks for longer."""
        return max(2.0, self.lease / 2)

    def client(self) -> aio.Redis:
        """A client of its own, with further connections."""
        made = aio.Redis(**self.options, socket_timeout=self.patience, max_connections=CONNECTIONS)
        made.response_callbacks.clear()  # answers as Redis gives them: quicker, and the same for every command
        return made

    async def disconnect(self) -> None:
        if self._line is not None:
            await self._line.close()
            self._line = None
        if self._redis is not None:
            await self._redis.aclose()
            self._redis = None

    async def ping(self) -> None:
        """That it answers, and keeps what it is given: what its settings would let go is told."""
        await self._ask("PING")
        if weak := await self._weak():
            raise BrokerError(f"{self}: {weak}")

    async def _weak(self) -> str:
        """Which of the server's settings may lose events, where a user is allowed to read them."""
        settings = await self._settings()
        for name, wanted in self._wanted.items():
            if settings.get(name, wanted) != wanted:
                return f"{name} is {settings[name]}, so that events can be lost; set it to {wanted}"
        return ""

    async def _settings(self) -> dict[str, str]:
        try:
            found = await self._ask("CONFIG GET", "maxmemory-policy", "appendonly", "appendfsync")
        except StentorError:
            return {}  # a user without +config, or a hosted Redis that has no CONFIG
        return {name.decode(): value.decode() for name, value in zip(found[::2], found[1::2], strict=True)}

    async def review(self) -> list[Finding]:
        before = time.time()
        moment, micros = await self._ask("TIME")
        found = [findings.clock(int(moment) + int(micros) / 1e6, before, time.time())]
        lines = (await self._ask("INFO", "everything")).decode().splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        found.append(findings.version("Redis", info["redis_version"], (7,)))
        settings = await self._settings()
        for name, wanted in self._wanted.items():
            found.append(findings.setting(name, settings.get(name), [wanted], "events can be lost"))
        found.append(findings.setting("role", info["role"], ["master"], "a replica takes no events", "fail"))
        if int(info["connected_slaves"]):
            text = f"{info['connected_slaves']}: what was confirmed last is lost when one takes over"
            found.append(Finding("replicas", "warn", text, "WAIT is not asked for: replication is asynchronous"))
        used, most = int(info["used_memory"]), int(info["maxmemory"]) or int(info.get("total_system_memory", 0))
        full = "publishers are refused: give it more memory, or let groups catch up"
        return [*found, findings.room("memory", used >> 20, most >> 20, full, " MiB")]

    async def _turn(self, call: Awaitable[Any]) -> Any:
        """Wait for a connection: the client's pool raises an error where none is left."""
        async with self._turns:
            return await call

    async def _ask(self, *command: Any) -> Any:
        try:
            return await _whole(self._turn(self.native.execute_command(*command)))  # type: ignore[no-untyped-call]
        except (client.RedisError, OSError) as error:
            raise await self._failed(error) from None

    async def _failed(self, error: Exception) -> BrokerError:
        """What an error of the client means. Where a connection fell silent, those that idle may have, too."""
        if isinstance(error, client.TimeoutError):
            await self.native.connection_pool.disconnect(inuse_connections=False)
        return _error(error, self)

    async def _pipe(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Many commands in one round trip; their answers, errors among them."""
        if not commands:
            return []
        pipe = self.native.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        try:
            found: list[Any] = await _whole(self._turn(pipe.execute(raise_on_error=False)))
        except (client.RedisError, OSError) as error:
            raise await self._failed(error) from None
        return found

    def _check(self, answers: Sequence[Any]) -> None:
        for answer in answers:
            if isinstance(answer, Exception):
                raise _error(answer, self)

    async def _run(self, script: str, keys: Sequence[str], *args: Any) -> Any:
        """Run a Lua script, by its digest once Redis has it."""
        return (await self._run_all(script, [(keys, args)]))[0]

    async def _run_all(self, script: str, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
        found: list[Any] = []
        for _ in range(2):
            digest = await self._digest(script)
            found = await self._pipe([("EVALSHA", digest, len(keys), *keys, *args) for keys, args in calls])
            if not any(isinstance(answer, client.exceptions.NoScriptError) for answer in found):
                break
            del self._scripts[script]
        return found

    async def _digest(self, script: str) -> str:
        digest = self._scripts.get(script)
        if digest is None:
            text = script.replace("P:", f"{self._root}:").replace("WINDOW", str(WINDOW)).replace("MOST", str(FALL))
            loaded = await self._ask("SCRIPT LOAD", text)
            digest = self._scripts[script] = loaded.decode()
        return digest

    # ---- data -------------------------------------------------------------------------------------------------------

    def log(self, topic: str, index: int) -> str:
        return f"{self._root}:log:{topic}:{index}"

    async def make_topic(self, topic: str, partitions: int) -> None:
        """Streams come into being with their first entry."""

    def _arguments(self, entries: Sequence[Entry]) -> list[Any]:
        """Entries as a script takes them; nothing where there are none."""
        heads: list[str | float] = []
        found: list[Any] = [b""]
        for topic, index, body, message, due in entries:
            heads += (topic, index, "" if message.fresh else _identity(message), due)
            found.append(pack_delayed(message) if due else body)
        found[0] = encode(heads)
        return found if entries else []

    async def append(self, entries: Sequence[Entry]) -> Sequence[int | StentorError]:
        self._batch += 1
        arguments = repr(self.clock.now()), self._name, self._batch, encode(self._lost), *self._arguments(entries)
        try:
            found = await self._sent(arguments)
        except PublishUnknown as error:
            self._lost[self._batch] = [_identity(e.message) for e in entries if e.message.fresh]
            raise PublishUnknown([entry.message.id for entry in entries], error.why) from None
        if isinstance(found, Exception):
            return [_error(found, self)] * len(entries)
        self._lost.clear()
        return [DUPLICATE if number == -1 else number for number in found]

    async def _sent(self, batch: Sequence[Any]) -> Any:
        """The answer to a batch, which is sent again, once, when its answer is lost."""
        lost = ""
        if self._line is None:
            self._line = Line(self)
        while True:
            try:
                digest = await self._digest(_APPEND)
                await self._line.connect()
            except (client.RedisError, OSError, BrokerError) as error:  # nothing was sent this time
                if lost:
                    raise PublishUnknown([], lost) from None
                raise (error if isinstance(error, BrokerError) else _error(error, self)) from None
            try:
                return await self._line.ask("EVALSHA", digest, 0, *batch)
            except client.exceptions.NoScriptError:
                self._scripts.pop(_APPEND, None)
            except (client.ResponseError, client.exceptions.BusyLoadingError) as answer:
                return answer
            except (client.RedisError, OSError) as error:
                if lost:
                    raise PublishUnknown([], lost) from None
                lost = str(await self._failed(error))

    def reader(self) -> FeedReader:
        return FeedReader(RedisFeed(self), self.prefix)

    async def bounds(self, topic: str, partitions: Sequence[int]) -> list[tuple[int, int]]:
        end = int(await self._ask("HGET", f"{self._root}:topic:{topic}", "n") or 0) + 1
        firsts = await self._pipe([("XRANGE", self.log(topic, i), "-", "+", "COUNT", 1) for i in partitions])
        return [(_offset(found[0][0]) if found else end, end) for found in firsts]

    async def find(self, topic: str, partitions: Sequence[int], moment: float) -> list[int]:
        return [await self._search(topic, index, moment) for index in partitions]

    async def _search(self, topic: str, index: int, moment: float) -> int:
        [(low, high)] = await self.bounds(topic, [index])
        while low < high:
            middle = (low + high) // 2
            page = await self.page(topic, index, middle, 1)
            if not page or page[0].offset >= high or page[0].time >= moment:
                high = middle
            else:
                low = page[0].offset + 1
        return low

    async def pending(self, places: Sequence[tuple[str, int, int]]) -> list[tuple[int, float | None]]:
        commands: list[Sequence[Any]] = []
        for topic, index, offset in places:
            commands.append(("XRANGE", self.log(topic, index), f"{max(offset, 0)}-0", "+", "COUNT", 1))
            commands.append(("HGET", f"{self._root}:topic:{topic}", index))
        answers = await self._pipe(commands)
        found: list[tuple[int, float | None]] = []
        for first, last in zip(answers[::2], answers[1::2], strict=True):
            if first:
                id, fields = first[0]
                found.append((int(last) - int(id.partition(b"-")[2]) + 1, float(fields[1])))
            else:
                found.append((0, None))
        return found

    async def page(self, topic: str, index: int, offset: int, limit: int) -> Sequence[Stored]:
        rows = await self._ask("XRANGE", self.log(topic, index), f"{max(offset, 0)}-0", "+", "COUNT", limit)
        name = topic.removeprefix(self.prefix)
        return [
            Stored(_offset(id), float(fields[1]), unpack(fields[3], name, f"{index}-{_offset(id)}"))
            for id, fields in rows
        ]

    async def trim(self, topic: str, index: int, offset: int) -> None:
        await self._ask("XTRIM", self.log(topic, index), "MINID", f"{offset}-0")

    # ---- spaces -----------------------------------------------------------------------------------------------------

    def _space(self, space: str) -> str:
        return f"{self._root}:space:{space}"

    async def names(self, space: str) -> list[str]:
        return [name.decode() for name in await self._ask("HKEYS", self._space(space))]

    async def get(self, wanted: Sequence[tuple[str, str]]) -> list[bytes | None]:
        found = await self._pipe([("HGET", self._space(space), name) for space, name in wanted])
        self._check(found)
        return found

    async def write(self, writes: Sequence[Write]) -> list[bool]:
        now = repr(self.clock.now())
        calls: list[tuple[Sequence[str], Sequence[Any]]] = []
        for write in writes:
            name, value = write.fence
            arguments: list[Any] = [name, b"" if value is None else b"v" + value, now, len(write.changes)]
            for changed, content in write.changes.items():
                arguments += (changed, b"" if content is None else b"v" + content)
            arguments += self._arguments(write.outputs)
            calls.append(([self._space(write.space)], arguments))
        found = await self._run_all(_WRITE, calls)
        self._check(found)
        return [answer == 1 for answer in found]

    async def forget(self, spaces: Sequence[str]) -> None:
        await self._ask("UNLINK", *map(self._space, spaces))

    # ---- leases -----------------------------------------------------------------------------------------------------

    def heart(self) -> RedisHeart:
        return RedisHeart(client.Redis(**self.options, socket_timeout=self.lease / 2), f"{self._root}:lease:")

    async def leases(self) -> dict[str, bytes]:
        registry = f"{self._root}:lease:"
        names = [name.decode() for name in await self._ask("SMEMBERS", registry)]
        values = await self._pipe([("GET", registry + name) for name in names])
        gone = [name for name, value in zip(names, values, strict=True) if value is None]
        if gone:
            await self._ask("SREM", registry, *gone)
        return {name: value for name, value in zip(names, values, strict=True) if isinstance(value, bytes)}

    # ---- delays -----------------------------------------------------------------------------------------------------

    async def delayed(self, now: float) -> float:
        due = await self._run(_FALL, (), now)
        if isinstance(due, Exception):
            raise _error(due, self)
        arguments: list[Any] = []
        for at, body in due:
            message = unpack_delayed(body)
            try:
                entry = await self.entry(message, now)
            except UnknownTopic:
                continue
            arguments += (at, entry.topic, entry.partition, entry.body)
        if arguments:
            await self._run(_FELL, (), repr(now), *arguments)
        first = await self._ask("ZRANGE", f"{self._root}:due", 0, 0, "WITHSCORES")
        return max(0.0, float(first[1]) - self.clock.now()) if first else 0.5

    async def withdraw(self, id: str) -> bool:
        cursor: Any = 0
        while True:
            cursor, rows = await self._ask("HSCAN", f"{self._root}:delayed", cursor, "COUNT", 500)
            for at, body in zip(rows[::2], rows[1::2], strict=True):
                if unpack_delayed(body).id == id:
                    removed = await self._ask("ZREM", f"{self._root}:due", at)
                    await self._ask("HDEL", f"{self._root}:delayed", at)
                    return bool(removed)
            if int(cursor) == 0:
                return False

    async def waiting(self) -> list[Message]:
        rows = await self._ask("HGETALL", f"{self._root}:delayed")
        bodies = rows.values() if isinstance(rows, dict) else rows[1::2]
        return sorted(map(unpack_waiting, bodies), key=lambda message: message.due)


def _identity(message: Message) -> str:
    return f"{message.source}\0{message.id}"


def _offset(id: bytes) -> int:
    return int(id.partition(b"-")[0])


class Line:
    """A connection for one command at a time. It connects by itself, also again."""

    def __init__(self, broker: RedisBroker) -> None:
        self._patience = broker.patience
        # Without a limit of the client's for each step, which on Python 3.11 is a task and a turn of the loop.
        pool = aio.Redis(**broker.options, socket_timeout=None).connection_pool
        self._connection: aio.Connection = pool.make_connection()  # type: ignore[no-untyped-call]

    async def connect(self) -> None:
        """Connect where it is not. Raises RedisError or OSError."""
        connection = self._connection
        reader = connection._reader
        if reader is not None and reader.at_eof():  # hung up meanwhile: what is sent would be lost
            await connection.disconnect(nowait=True)
        if connection.is_connected:
            return
        try:
            async with asyncio.timeout(self._patience):
                await connection.connect()  # type: ignore[no-untyped-call]
        except TimeoutError:
            await connection.disconnect(nowait=True)
            raise client.TimeoutError(f"no answer to connecting within {self._patience:g} s") from None

    async def ask(self, *command: Any) -> Any:
        """The server's answer. Raises RedisError or OSError."""
        await self.connect()
        try:
            async with asyncio.timeout(self._patience):
                await self._connection.send_command(*command, check_health=False)
                return await self._connection.read_response()
        except TimeoutError:
            raise client.TimeoutError(f"no answer within {self._patience:g} s") from None

    async def close(self) -> None:
        await self._connection.disconnect(nowait=True)


class RedisFeed(Feed):
    """Reads streams by XREAD, on a connection of its own."""

    def __init__(self, broker: RedisBroker) -> None:
        super().__init__()
        self._broker = broker
        self._line = Line(broker)
        self._next: dict[bytes, tuple[Any, int]] = {}
        """By stream: its token and the offset to read next."""
        self._buffer: deque[Read] = deque()
        self._limit = 1
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._blocked = False

    def seek(self, token: Any, topic: str, index: int, offset: int) -> None:
        self.drop(token)
        self._next[self._broker.log(topic, index).encode()] = (token, offset)
        self._work.set()
        if self._task is None or self._blocked:  # what waits for the others would not hear of this one
            self._blocked = False
            self._task = self._start(self._run(self._task), "stentor redis reader")

    def drop(self, token: Any) -> None:
        self._next = {stream: place for stream, place in self._next.items() if place[0] is not token}
        self._buffer = deque(read for read in self._buffer if read.token is not token)

    def take(self, limit: int) -> list[Read]:
        self._limit = limit
        found = [self._buffer.popleft() for _ in range(min(limit, len(self._buffer)))]
        if not self._buffer:
            self._work.set()
        return found

    async def _run(self, former: asyncio.Task[None] | None) -> None:
        if former is not None:
            former.cancel()
            await asyncio.gather(former, return_exceptions=True)
        while asyncio.current_task() is self._task:  # the client swallows a cancellation now and then
            self._work.clear()
            if self._buffer or not self._next:
                await self._work.wait()
                await asyncio.sleep(0)  # what was just taken is handled first
                continue
            self._blocked = True
            try:
                await self._read(dict(self._next))
            except (client.RedisError, OSError) as error:
                self.fail(_error(error, self._broker))
                await asyncio.sleep(0.1)
            finally:
                self._blocked = False

    async def _read(self, streams: dict[bytes, tuple[Any, int]]) -> None:
        # XREAD gives what is after an id: that of the last entry which is not wanted.
        after = [f"{offset - 1}-18446744073709551615" if offset > 0 else "0-0" for _, offset in streams.values()]
        count = max(1, self._limit // len(streams))
        rows = await self._line.ask("XREAD", "COUNT", count, "BLOCK", BLOCK, "STREAMS", *streams, *after)
        self._trouble = None
        for stream, entries in rows or ():
            if self._next.get(stream) != streams[stream]:
                continue
            token, offset = streams[stream]
            for id, fields in entries:
                offset = int(id.partition(b"-")[0])
                self._buffer.append(Read(token, offset, 0.0, fields[3]))
            self._next[stream] = (token, offset + 1)
        if self._buffer:
            self._ready.set()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._line.close()


class RedisHeart:
    """A lease is a key that expires; a set has their names."""

    def __init__(self, redis: client.Redis, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix

    def beat(self, name: str, value: bytes, lease: float) -> None:
        pipe = self._redis.pipeline(transaction=False)
        pipe.execute_command("SET", self._prefix + name, value, "PX", int(lease * 1000))  # type: ignore[no-untyped-call]
        pipe.execute_command("SADD", self._prefix, name)  # type: ignore[no-untyped-call]
        pipe.execute()

    def end(self, name: str) -> None:
        self._redis.execute_command("DEL", self._prefix + name)  # type: ignore[no-untyped-call]
        self._redis.execute_command("SREM", self._prefix, name)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._redis.close()
