"""Faults of a real server and of the way to it: a TCP proxy that cuts, swallows and delays, and tests with both.

Each broker's tests say which server they mean, and get the rest:

    @pytest.mark.server
    @pytest.mark.slow
    class TestRedisServer(ServerFaults):
        name = "redis"
        options = ServerFaults.options | {"partitions": 4}  # where it needs more than these

``name`` is of ``servers.SERVERS``; ``options`` are the broker's own, as in a URL. A broker whose server tells its
clients other addresses (Kafka's advertised listeners, say) makes the proxy known to it: it overrides the fixtures
``server`` and ``proxy``, and ``through``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import pytest

import servers
from stentor.connect import BrokerUrl, connect
from stentor.errors import PublishUnknown, Unavailable
from stentor.event import Outgoing
from stentor.health import Health
from stentor.message import Receipt
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from stentor.testing.conformance.events import Job
from stentor.testing.conformance.fleet import Fleet, FleetScene
from stentor.testing.conformance.program import Act
from stentor.testing.conformance.soak import number
from stentor.testing.conformance.stage import LEASE, Stage, until
from stentor.testing.conformance.stands import stands
from tests.real import fresh, unavailable

T = TypeVar("T")
How = Literal["stop", "kill"]
Way = Literal["requests", "replies"]


class Report(Protocol):
    """Tells figures of a run: as properties of the test, and on its output."""

    def __call__(self, **found: object) -> None: ...


class _Link:
    """One connection through a proxy: two pumps, each a reader and a writer with the delay between them."""

    def __init__(self, proxy: Proxy, client: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self.proxy = proxy
        self.client = client
        self.swallows: set[Way] = set(proxy.swallows)
        self._writers = [client[1]]
        self._tasks: list[asyncio.Task[None]] = []
        self._cut = False

    async def run(self) -> None:
        try:
            server = await asyncio.open_connection("127.0.0.1", self.proxy.target_port)
        except OSError:
            self.cut()
            return
        self._writers.append(server[1])
        if self._cut:  # meanwhile
            self.cut()
            return
        ways: list[tuple[Way, Any, Any]] = [("requests", self.client, server), ("replies", server, self.client)]
        for way, source, target in ways:
            queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
            self._tasks += [
                asyncio.create_task(self._read(way, source[0], queue)),
                asyncio.create_task(self._write(queue, target[1])),
            ]
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()
        for writer in self._writers:
            with suppress(OSError):
                await writer.wait_closed()

    async def _read(self, way: Way, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await reader.read(65536)
            except OSError:
                data = b""
            if way in self.swallows:
                self.proxy.swallowed += len(data)
            else:
                await queue.put((loop.time() + self.proxy.seconds, data))
            if not data:
                return

    async def _write(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await queue.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            try:
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()
            except OSError:
                self.cut()
                return

    def cut(self) -> None:
        self._cut = True
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()


class Proxy:
    """A TCP proxy on a port of its own, in a thread of its own, to a port of this machine.

    Every method is back when it has taken effect, and may be called from any thread. While the target refuses
    connections, those to the proxy are accepted and closed.
    """

    def __init__(self, target_port: int, port: int = 0, host: str = "127.0.0.1") -> None:
        self.target_port = target_port
        self.seconds = 0.0
        """Delay of all that passes, each way."""
        self.swallows: tuple[Way, ...] = ()
        """What new connections lose without a word."""
        self.swallowed = 0
        """Bytes that were read and not forwarded, so far."""
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._listener = self._call(self._listen(host, port))
        self.port: int = self._listener.sockets[0].getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def drop(self) -> None:
        """Cut all connections; new ones pass."""
        self._call(self._drop())

    def blackhole(self, *ways: Way) -> None:
        """From now on read all and forward nothing, of present and new connections; neither end is told.

        With "requests" or "replies" only what goes to the server, or comes from it, is lost.
        """
        self._call(self._swallow(ways or ("requests", "replies")))

    def delay(self, seconds: float) -> None:
        """Let everything take so much longer, each way."""
        self.seconds = seconds

    def heal(self) -> None:
        """Let new connections pass without delay; those of a blackhole stay half-open, as they lost bytes."""
        self.seconds = 0.0
        self.swallows = ()

    @property
    def connections(self) -> int:
        """Connections that are open on either side."""
        return len(self._links)

    def close(self) -> None:
        """Cut all and listen no more."""
        if self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _end(self) -> None:
        self._listener.close()  # in its own thread, as all of asyncio
        await self._drop()

    async def _listen(self, host: str, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._accept, host, port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, (reader, writer))
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)

    async def _drop(self) -> None:
        cut = list(self._links)
        for link in cut:
            link.cut()
        while not self._links.isdisjoint(cut):  # others may come meanwhile
            await asyncio.sleep(0)

    async def _swallow(self, ways: tuple[Way, ...]) -> None:
        self.swallows = ways
        for link in self._links:
            link.swallows.update(ways)


AHEAD = 500
"""Events that publishers are ahead of the handlers at most, so that no slow machine has a heap of them to work off."""


class Load:
    """Publishers that never give up: what is not confirmed they publish again, in order, under the same ids."""

    def __init__(self, fleet: Fleet, publishers: int = 3, keys: int = 8) -> None:
        self.refused: Counter[str] = Counter()
        """By error: how often a publish was not confirmed."""
        self._fleet = fleet
        self._keys = keys
        self._ending = False
        self._ahead = 0
        self._tasks = [asyncio.create_task(self._run(who)) for who in range(publishers)]
        self._watching = asyncio.create_task(self._watch())

    async def _run(self, who: int) -> None:
        n = 0
        while not self._ending:
            jobs = [Job(key=f"{who}.{key}", n=n) for key in range(self._keys)]
            await self._confirm([Outgoing(job, id=f"{job.key}.{n}") for job in jobs])
            self._fleet.published += [(job.key, n) for job in jobs]
            n += 1
            await asyncio.sleep(0.05)
            while self._ahead > AHEAD and not self._ending:
                await asyncio.sleep(0.05)

    async def _watch(self) -> None:
        while True:
            self._ahead = len(self._fleet.published) - len(self._fleet.handled())
            await asyncio.sleep(0.2)

    async def _confirm(self, events: list[Outgoing]) -> None:
        while True:
            try:
                await self._fleet.stage.publish(events)
            except (Unavailable, PublishUnknown) as error:
                self.refused[type(error).__name__] += 1
                await asyncio.sleep(0.05)
            else:
                return

    async def goes_on(self, patience: float) -> None:
        """Wait until events are confirmed and handled that were published from now on."""
        published = self._fleet.published
        enough = len(published) + 2 * self._keys * len(self._tasks)

        def further() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()
            return len(published) >= enough and self._fleet.handled().issuperset(published[:enough])

        try:
            await until(further, "publishing and handling go on", patience)
        except AssertionError as error:
            left = set(published[:enough]) - self._fleet.handled()
            told = "\n".join([stands(), *[await member.stands() for member in self._fleet.members if not member.dead]])
            pytest.fail(
                f"{error}; published {len(published)} of {enough}, not handled {sorted(left)[:5]}, refused "
                f"{dict(self.refused)}\n{told}"
            )

    async def end(self) -> None:
        """Stop publishing, once all is confirmed that was begun."""
        self._ending = True
        await asyncio.gather(*self._tasks)

    async def cancel(self) -> None:
        for task in (*self._tasks, self._watching):
            task.cancel()
        await asyncio.gather(*self._tasks, self._watching, return_exceptions=True)


@asynccontextmanager
async def away(server: servers.Server, how: How) -> AsyncIterator[None]:
    """The server is stopped or killed, and started again at the end, also when the test fails meanwhile."""
    await asyncio.to_thread(server.kill if how == "kill" else server.stop)
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


@pytest.mark.timeout(300)
class ServerScene(FleetScene):
    """A real server of the class's own, and members that are under load on it while it fails.

    Always: nothing confirmed is lost, order and exclusion per key hold, no worker ends by itself, and all goes on
    within ``patience`` seconds of the end of the fault. Duplicates are counted and reported as properties of the test.
    """

    name: ClassVar[str]
    options: ClassVar[dict[str, object]] = {"lease": LEASE, "beat": LEASE / 4}
    """What makes the broker notice things soon."""
    patience: ClassVar[float] = 45.0 * LEASE
    """Seconds within which the broker states to go on, half-open connections included."""
    outage: ClassVar[float] = 2.5 * LEASE
    """Seconds that the server is away: more than a lease."""

    # ---- hooks ----------------------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
        """A server of this class's own, which its tests stop, kill and start."""
        kind = servers.find(cls.name)
        try:
            kind.install()
        except servers.Missing as missing:
            unavailable(missing)
        with kind(tmp_path_factory.mktemp(cls.name)) as server:
            yield server

    def url_of(self, server: servers.Server, **options: object) -> str:
        """The URL of a namespace of its own on the server."""
        return fresh(server.url, **{**self.options, **options})

    # ---- the scene ------------------------------------------------------------------------------------------------

    @pytest.fixture
    def broker_url(self, server: servers.Server) -> str:
        return self.url_of(server)

    async def patient(self, ask: Callable[[], Awaitable[T]]) -> T:
        """An answer, once the broker is there again."""
        answer: list[T] = []

        async def answered() -> bool:
            with suppress(Unavailable):
                answer.append(await ask())
            return bool(answer)

        await until(answered, "the broker answers", self.patience)
        return answer[0]

    @pytest.fixture
    def report(self, record_property: Callable[[str, object], None]) -> Report:
        def tell(**found: object) -> None:
            for name, value in found.items():
                record_property(name, value)
            sys.stdout.write(", ".join(f"{name} {value}" for name, value in found.items()) + "\n")

        return tell

    @asynccontextmanager
    async def under_load(self, fleet: Fleet, report: Report, members: int = 2) -> AsyncIterator[Load]:
        """Members work off what publishers bring while the body does its worst; then all must be as it should."""
        for _ in range(members):
            await fleet.start(acts=[Act(do="sleep", seconds=0.002)], makes=True, first="50ms")
        load = Load(fleet)
        try:
            await load.goes_on(self.patience)
            yield load
            await load.goes_on(self.patience)
            await load.end()
        finally:
            await load.cancel()
        await fleet.all_handled(patience=2 * self.patience)
        await fleet.stage.settled("work", patience=self.patience)
        for member in fleet.members:
            if not member.dead:
                await member.stop()  # fails where it had ended by itself
        audit = fleet.audit()
        report(
            events=len(fleet.published), duplicates=audit.duplicates, burnt=audit.burnt, refused=load.refused.total()
        )
        assert audit.clean, audit
        assert await fleet.stage.letters("work") == []
        made = await fleet.stage.browse("made")
        assert {(message.key, number(message.data)) for message in made} == set(fleet.published)
        if fleet.stage.features.dedupe:
            for topic in ("jobs", "made"):
                ids = Counter(message.id for message in await fleet.stage.browse(topic))
                assert [id for id, times in ids.items() if times > 1] == []


class ThreeNodes(ServerScene):
    """Three nodes with three copies of everything, two of which confirm; the server ends and starts nodes."""

    async def leader(self, broker: Any, server: Any, topic: str) -> int:
        """The node that leads a topic of one partition, counted from 0."""
        raise NotImplementedError

    async def in_step(self, broker: Any) -> bool | None:
        """Whether all copies are; None where the server does not tell."""
        return None

    async def well(self, broker: Any) -> bool:
        return await broker.health() is None

    @asynccontextmanager
    async def lost(self, server: Any, *nodes: int, sign: signal.Signals = signal.SIGKILL) -> AsyncIterator[None]:
        """Nodes are killed or stopped, and started again at the end."""
        await asyncio.gather(*(asyncio.to_thread(server.end_node, node, sign) for node in nodes))
        try:
            yield
        finally:
            await asyncio.gather(*(asyncio.to_thread(server.start_node, node) for node in nodes))

    async def test_r02_a_node_is_lost(self, fleet: Fleet, server: servers.Server, report: Report) -> None:
        """Killed, then another stopped in order: all goes on, also what is started meanwhile; they come back."""
        broker: Any = fleet.stage.broker
        assert broker.features.durable == "replica"
        async with self.under_load(fleet, report) as load:
            for topic, sign in (("stentor.state.0", signal.SIGKILL), ("stentor.leases", signal.SIGTERM)):
                async with self.lost(server, await self.leader(broker, server, broker.prefix + topic), sign=sign):
                    await fleet.start(acts=[Act(do="sleep", seconds=0.002)], makes=True)
                    await load.goes_on(self.patience)
                    await until(lambda: self.well(broker), "two of three are enough", self.patience)
                    assert not await self.in_step(broker)

                async def again() -> bool:
                    return await self.in_step(broker) is not False

                await until(again, "the node is in step again", self.patience)
                await load.goes_on(self.patience)

    async def test_r01_two_nodes_are_lost(self, fleet: Fleet, server: servers.Server, report: Report) -> None:
        """One copy is not enough: nothing is confirmed and health says so, until they are back."""
        broker = fleet.stage.broker
        async with self.under_load(fleet, report) as load:
            async with self.lost(server, 1, 2):
                before = load.refused.total()
                await until(lambda: load.refused.total() > before, "what is published is refused", self.patience)
                confirmed = len(fleet.published)
                await until(broker.health, "health knows", self.patience)
                assert len(fleet.published) == confirmed
            await load.goes_on(self.patience)
            await until(lambda: self.well(broker), "health knows", self.patience)


class ServerFaults(ServerScene):
    """Rules 1, 2, 4, 10, 11 and 12 while the server and the connections to it fail."""

    one_address: ClassVar[str] = ""
    """Why no single client can be cut off, where it is so."""

    @pytest.fixture
    def proxy(self, server: servers.Server) -> Iterator[Proxy]:
        """A proxy in front of the server; a test that asks for it goes through it with all it does."""
        port = urlsplit(server.url).port
        assert port is not None
        with Proxy(port) as proxy:
            yield proxy

    def through(self, url: str, proxy: Proxy) -> str:
        """The URL by way of a proxy."""
        port = urlsplit(url).port
        return url.replace(f":{port}", f":{proxy.port}", 1)

    @pytest.fixture
    def broker_url(self, server: servers.Server, request: pytest.FixtureRequest) -> str:
        url = self.url_of(server)
        return self.through(url, request.getfixturevalue("proxy")) if "proxy" in request.fixturenames else url

    # ---- the server -----------------------------------------------------------------------------------------------

    async def test_r04_nothing_begins_once_the_lease_is_over(
        self, fleet: Fleet, server: servers.Server, request: pytest.FixtureRequest
    ) -> None:
        """A member that is cut off begins nothing of what it has in memory once another may; then it comes back."""
        if self.one_address:
            pytest.skip(self.one_address)
        acts = [Act(do="sleep", seconds=0.02)]
        proxy: Proxy = request.getfixturevalue("proxy")
        away = await fleet.start(url=self.through(fleet.stage.url, proxy), acts=acts)
        await fleet.publish([Job(key=f"k{key}", n=n) for n in range(200) for key in range(4)])
        await until(lambda: len(fleet.handled()) > 20, "it has begun", self.patience)
        proxy.blackhole()
        await fleet.start(acts=acts)
        await fleet.all_handled(patience=2 * self.patience)
        proxy.heal()
        proxy.drop()
        await fleet.publish([Job(key=f"k{key}", n=200) for key in range(4)])
        await fleet.all_handled(patience=2 * self.patience)
        await fleet.stage.settled("work", patience=self.patience)
        assert fleet.audit().clean, fleet.audit()
        assert not away.dead

    @pytest.mark.parametrize("how", ["stop", "kill"])
    async def test_r11_the_server_is_away(self, fleet: Fleet, server: servers.Server, how: How, report: Report) -> None:
        """Stopped, or killed with -9, under load and started again, twice, for longer than a lease and for less."""
        async with self.under_load(fleet, report) as load:
            for seconds in (self.outage, 0.0):
                async with away(server, how):
                    await asyncio.sleep(seconds)  # how long the fault lasts
                await load.goes_on(self.patience)

    @pytest.mark.parametrize("how", ["stop", "kill"])
    async def test_r01_publishing_while_the_server_is_away(
        self, stage: Stage, server: servers.Server, how: How
    ) -> None:
        """A publish waits, or ends in Unavailable or PublishUnknown; repeated under its id it is stored, once."""
        await stage.publish(Job(key="a", n=0))
        async with away(server, how):
            given = asyncio.create_task(stage.publish(Job(key="a", n=1), id="given"))
            made = asyncio.create_task(stage.publish(Job(key="b", n=1)))
            await asyncio.wait([given, made], timeout=self.outage)
        await asyncio.wait([given, made], timeout=self.patience)
        assert given.done(), "a publish neither ends nor is stored"
        assert made.done(), "a publish neither ends nor is stored"
        assert (await self.confirmed(stage, given, Job(key="a", n=1), "given")).id == "given"
        id = (await self.confirmed(stage, made, Job(key="b", n=1))).id
        ids = Counter(message.id for message in await stage.browse("jobs"))
        assert ids.keys() >= {"given", id}
        assert len(ids) == 3
        assert ids.total() == 3 or not stage.features.dedupe

    async def confirmed(self, stage: Stage, publish: asyncio.Task[Receipt], job: Job, id: str | None = None) -> Receipt:
        """The receipt of a publish, which is repeated, as its errors say, where it has none."""
        unknown = False
        while True:
            try:
                return await publish
            except PublishUnknown as error:
                unknown = True
                if len(error.ids) != 1:
                    pytest.fail(f"one event was published, and the error names those of others: {error}")
                id = id or error.ids[0]
            except Unavailable:
                stored = await self.patient(lambda: stage.browse("jobs"))
                assert unknown or (job.key, job.n) not in {(m.key, number(m.data)) for m in stored}, (
                    "Unavailable, and yet stored"
                )
            publish = asyncio.create_task(stage.publish(job, id=id))

    @pytest.mark.parametrize("how", ["stop", "kill"])
    async def test_r11_health_tells_the_truth(self, stage: Stage, server: servers.Server, how: How) -> None:
        """While the server is away a running program is not ready and says why, without the password; then it is."""
        app = stage.app()
        seen: list[int] = []

        @app.on(Job)
        async def work(job: Job) -> None:
            seen.append(job.n)

        async with stage.running(app) as program:
            health = Health(program)

            async def ready(wanted: str) -> dict[str, Any] | None:
                found = await health.ready()
                return found if found["status"] == wanted else None

            await until(lambda: ready("ready"), "ready at first", self.patience)
            async with away(server, how):
                said = await until(lambda: ready("not ready"), "not ready", self.patience)
                assert said["reasons"], said
                assert await program.broker.health(), "the broker itself knows"
                password = BrokerUrl(stage.url).password
                assert password is None or password not in str(said)
            await until(lambda: ready("ready"), "ready again", self.patience)
            assert await program.broker.health() is None
            await self.patient(lambda: stage.publish(Job(key="a", n=1), id="1"))
            await until(lambda: seen == [1], "handled", self.patience)
            assert [worker.failure for worker in program.workers] == [None]

    async def test_r10_rolling_restart(self, fleet: Fleet, report: Report) -> None:
        """Three processes are replaced one by one under load: nothing is lost, nothing comes twice."""
        async with self.under_load(fleet, report, members=3) as load:
            for member in list(fleet.members):
                stopping = asyncio.create_task(member.stop())
                await fleet.start(acts=[Act(do="sleep", seconds=0.002)], makes=True)
                await stopping
                await load.goes_on(self.patience)
        audit = fleet.audit()
        assert (audit.duplicates, audit.burnt) == (0, 0)

    # ---- the connection -------------------------------------------------------------------------------------------

    async def test_r11_cut_connections(self, fleet: Fleet, proxy: Proxy, report: Report) -> None:
        """All connections are cut under load, three times."""
        async with self.under_load(fleet, report) as load:
            for _ in range(3):
                proxy.drop()
                await load.goes_on(self.patience)

    async def test_r11_half_open_connections(self, fleet: Fleet, proxy: Proxy, report: Report) -> None:
        """All connections fall silent under load and nobody is told; new ones pass."""
        async with self.under_load(fleet, report) as load:
            proxy.blackhole()
            proxy.heal()
            await load.goes_on(self.patience)

    async def test_r11_a_net_that_loses_everything(self, fleet: Fleet, proxy: Proxy, report: Report) -> None:
        """For longer than a lease nothing passes, on new connections either."""
        async with self.under_load(fleet, report) as load:
            proxy.blackhole()
            await asyncio.sleep(self.outage)  # how long the fault lasts
            proxy.heal()
            await load.goes_on(self.patience)

    async def test_r11_a_slow_connection(self, fleet: Fleet, proxy: Proxy, report: Report) -> None:
        """With 50 ms each way all goes on."""
        async with self.under_load(fleet, report) as load:
            proxy.delay(0.05)
            await load.goes_on(self.patience)
        audit = fleet.audit()
        assert (audit.duplicates, audit.burnt) == (0, 0)

    async def test_r01_a_lost_confirmation(self, stage: Stage, proxy: Proxy) -> None:
        """The server has the event and its answer is lost: never Unavailable, and the same id stores nothing twice."""
        await stage.publish(Job(key="a", n=0))
        proxy.blackhole("replies")
        tasks = [
            asyncio.create_task(stage.publish(Job(key="a", n=1), id="given")),
            asyncio.create_task(stage.publish(Job(key="b", n=1))),
        ]
        await asyncio.wait(tasks, timeout=self.outage)
        proxy.heal()
        await asyncio.wait(tasks, timeout=self.patience)
        assert [task.done() for task in tasks] == [True, True], "a publish neither ends nor is stored"
        receipts = [
            await self.confirmed(stage, tasks[0], Job(key="a", n=1), "given"),
            await self.confirmed(stage, tasks[1], Job(key="b", n=1)),
        ]
        seen = await self.patient(lambda: stage.browse("jobs"))  # another connection may have been silent as long
        ids = Counter(message.id for message in seen)
        assert ids.keys() >= {receipt.id for receipt in receipts}
        assert len(ids) == 3
        assert ids.total() == 3 or not stage.features.dedupe

    # ---- the address ----------------------------------------------------------------------------------------------

    async def test_r11_a_wrong_address_at_the_start(self, server: servers.Server) -> None:
        """Nobody listens: ``open`` says so in one line without the password; it succeeds once the server is there."""
        url = self.url_of(server)
        broker = connect(url)
        async with away(server, "stop"):
            async with asyncio.timeout(self.patience):
                with pytest.raises(Unavailable) as caught:
                    await broker.open()
            text = str(caught.value)
            assert "\n" not in text
            password = BrokerUrl(url).password
            assert password is None or password not in text
        await broker.open()
        assert await broker.health() is None
        await broker.close()

    async def test_r11_a_wrong_address_under_load(self, fleet: Fleet, proxy: Proxy, report: Report) -> None:
        """For a while the address leads nowhere."""
        async with self.under_load(fleet, report) as load:
            right, proxy.target_port = proxy.target_port, servers.free_port()
            proxy.drop()
            await asyncio.sleep(self.outage)  # how long the fault lasts
            proxy.target_port = right
            await load.goes_on(self.patience)
