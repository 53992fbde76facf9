"""A running app: broker opened, topics and groups declared, a worker for each group, and an orderly stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from stentor.broker import Broker, GroupInfo, weaker
from stentor.catalog import Catalog
from stentor.clock import Clock
from stentor.connect import broker_url, connect
from stentor.context import Runtime
from stentor.errors import ConfigError, DefinitionError, GroupsChanged, TooLarge
from stentor.event import Topic
from stentor.group import Group
from stentor.handler import AppScope, Handler
from stentor.message import Message, dead_topic, new_id
from stentor.plan import Plan, Route, keep
from stentor.priority import rank
from stentor.schedule import TimerDuty, timer_topic
from stentor.source import Publish, SourceDuty, SourceFunction, refused_spec, source_topic
from stentor.subscription import Subscription
from stentor.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("stentor")
OVERHEAD = 4096
"""Room for attributes beside the data, in bytes."""


class Program:
    """One run of an app, or one connection of it (``consume=False``)."""

    def __init__(
        self,
        name: str,
        catalog: Catalog,
        groups: Mapping[str, Group],
        *,
        app: Any,
        url: str | None,
        clock: Clock,
        durable: Any = None,
        broker: Broker | None = None,
        overrides: dict[Any, Any] | None = None,
        adapt: Callable[[Route], None] | None = None,
        threads: Executor | None = None,
    ) -> None:
        self.name = name
        self.catalog = catalog
        catalog.clock = clock
        self.groups = groups
        self.clock = clock
        self.url = broker_url(url)
        self.broker = broker if broker is not None else connect(self.url, clock)
        self._owns_broker = broker is None
        self.limit = self.broker.features.max_bytes
        self._plain = self.limit - OVERHEAD
        """Data up to this size needs no closer look, if the attributes are the usual ones."""
        self.workers: list[Worker] = []
        self.notes: list[str] = []
        """One line for each group at start."""
        self.scope = AppScope(sum(group.most for group in groups.values()), threads)
        self._app = app
        self._overrides = overrides or {}
        self._adapt = adapt
        self._declared: set[str] = set()
        self._each: list[asyncio.Task[None]] = []
        self.failure: BaseException | None = None
        self.worker: int | None = None
        """Its number among the workers of a supervisor, if it is one of several."""
        self.others: Callable[[], Awaitable[list[dict[str, Any]] | None]] | None = None
        """Asks for them: worker, state (ready, starting, stopping, silent) and figures of each."""
        self._on_fatal: Callable[[BaseException], None] | None = None
        self._durable = durable

    async def open(self, *, on_fatal: Callable[[BaseException], None] | None = None, new_groups: bool = False) -> None:
        """Connect and declare, after a look at the handlers.

        Raises DefinitionError (nothing is declared then), ConfigError (the broker is weaker than the app demands),
        GroupsChanged, Unsupported or a BrokerError.
        """
        self._on_fatal = on_fatal
        self.runtime = Runtime(self._app, self.encode, self._fatal, self.declare_new, asyncio.get_running_loop())
        for group in self.groups.values():
            refused = [source.again for source in group.sources if source.again is not None]
            for handler in [*group.handlers, *(handler for _, handler in group.timers), *refused]:
                handler.compile(self.scope, self._overrides)
        if self._owns_broker:
            await self.broker.open()
        try:
            self._check_durable()
            await self._declare(new_groups)
        except BaseException:
            if self._owns_broker:
                await self.broker.close()
            raise

    def _check_durable(self) -> None:
        """Some brokers learn what an event survives: from the server, as they open, and of the topics, as they declare.

        Raises ConfigError where that is less than the app demands.
        """
        has = self.broker.features.durable
        if self._durable is not None and weaker(has, self._durable):
            raise ConfigError(
                f"the app demands durable={self._durable!r}, but {self.broker.features.name} gives {has!r}; choose "
                f"another broker or setting, or lower the demand"
            )

    def _fatal(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            if self._on_fatal is not None:
                self._on_fatal(error)

    # ---- declaring ------------------------------------------------------------------------------------------------

    def subscriptions(self, instance: str = "") -> dict[str, Subscription]:
        """What each group subscribes to."""
        return {name: self._subscription(name, group, instance) for name, group in self.groups.items()}

    def _subscription(self, name: str, group: Group, instance: str) -> Subscription:
        topics: dict[str, None] = {}
        for handler in group.handlers:
            if handler.topic is not None:
                topics[handler.topic] = None
            for cls in handler.types:
                topics[self.catalog.add(cls, f"{handler.place}: ").topic.name] = None
        if group.timers:
            topics[timer_topic(name)] = None
        if any(source.instances == "one" or source.again for source in group.sources):
            topics[source_topic(name)] = None
        return Subscription(
            group=name, topics=tuple(topics), app=self.name, ordering=group.ordering, start=group.start,
            single=group.single, instance=(instance or new_id()) if group.broadcast else "",
        )  # fmt: skip

    async def _declare(self, new_groups: bool) -> None:
        self._subscriptions = self.subscriptions()
        for group in self.groups.values():
            for handler in group.handlers:
                for cls in handler.returns:
                    self.catalog.add(cls, f"{handler.place}: ")
        topics = self.catalog.topics()
        for name, subscription in self._subscriptions.items():
            topics[dead_topic(name)] = Topic(dead_topic(name))
            for topic in subscription.topics:
                topics.setdefault(topic, Topic(topic))
        await self._rename(await self.broker.admin.groups(), new_groups)
        persistent = [s for s in self._subscriptions.values() if not s.instance]
        await self.broker.declare(list(topics.values()), [s for s in persistent if s.topics])
        self._check_durable()
        self._declared.update(topics)

    async def _rename(self, existing: Sequence[GroupInfo], new_groups: bool) -> None:
        """Take over groups under former names; refuse when a group vanished while a new one appeared."""
        known = {info.name: info for info in existing}
        for name, group in self.groups.items():
            for old in group.was:
                former = old if old in known or "." in old else f"{self.name}.{old}"
                if former in known and name not in known:
                    await self.broker.admin.rename_group(former, name)
                    log.info("group %s is now called %s", former, name)
                    known[name] = known.pop(former)
        mine = {n for n, info in known.items() if info.app == self.name and "#" not in n}
        missing = sorted(mine - set(self.groups))
        lasting = {name for name, s in self._subscriptions.items() if s.topics and not s.instance}
        fresh = sorted(lasting - set(known))
        if missing and fresh and not new_groups:
            raise GroupsChanged(
                f"group {', '.join(missing)} lost its handler while {', '.join(fresh)} is new. If it was renamed, say "
                f"Group(was={missing[0]!r}) or group=Group({fresh[0]!r}, was={missing[0]!r}), so that history does not "
                f"run again; if not, start once with --new-groups, and drop the old one with: "
                f"stentor groups drop {missing[0]}"
            )

    # ---- publishing -----------------------------------------------------------------------------------------------

    def encode(self, events: Any) -> list[Message]:
        """The checked messages of an event, or of a list or tuple of events; raises InvalidEvent or TooLarge."""
        time, encode = self.catalog.stamp(), self.catalog.encode
        messages = (
            [encode(event, time) for event in events] if isinstance(events, (list, tuple)) else [encode(events, time)]
        )
        for message in messages:
            if message.extensions or len(message.data) > self._plain:
                self._check_size(message)
            if message.topic not in self._declared:
                topic = self.catalog.topics().get(message.topic)
                if topic is not None:  # of a class met only now; topics of events known by name are declared elsewhere
                    self.runtime.undeclared[message.topic] = topic
        return messages

    async def declare_new(self) -> None:
        """Declare the topics of classes that were first met at a publish."""
        topics = dict(self.runtime.undeclared)
        await self.broker.declare(list(topics.values()), [])
        self._check_durable()
        self._declared.update(topics)
        for name in topics:
            self.runtime.undeclared.pop(name, None)

    def _check_size(self, message: Message) -> None:
        size = len(message.data) + sum(len(name) + len(str(value)) for name, value in message.attributes().items())
        if size > self.limit:
            raise TooLarge(
                f"{message.type}: {size:,} bytes of attributes and data; {self.broker.features.name} takes "
                f"{self.limit:,}. Publish a reference to the data instead"
            )

    # ---- running --------------------------------------------------------------------------------------------------

    def plan(self, name: str, group: Group, subscription: Subscription) -> Plan:
        """A group ready to run; raises DefinitionError for a handler that cannot be served."""
        plan = Plan(
            name, subscription, {}, {}, ordered=group.ordering == "key", concurrency=group.most,
            auto=group.concurrency == "auto", rate=group.rate, key_rate=group.key_rate, breaker=group.breaker,
            priority=group.priority, park=group.on_dead == "park", broadcast=group.broadcast,
        )  # fmt: skip
        for handler in group.handlers:
            invoke = handler.compile(self.scope, self._overrides)
            if handler.topic is not None:
                plan.topics[handler.topic] = Route(handler, None, invoke)
            for cls in handler.types:
                spec = self.catalog.add(cls)
                route = Route(handler, None if handler.raw else spec, invoke)
                if spec.wire == "json":
                    plan.topics[spec.topic.name] = route
                for type in spec.names:
                    plan.routes[type] = route
        for timer, handler in group.timers:
            spec = group.timer_spec(timer, timer_topic(name))
            plan.routes[spec.type] = Route(handler, spec, handler.compile(self.scope, self._overrides))
        if group.timers:
            plan.duties[timer_topic(name)] = TimerDuty(name, [timer for timer, _ in group.timers])
        for source in group.sources:
            if source.again is not None:
                spec = refused_spec(source, name)
                plan.routes[spec.type] = Route(source.again, spec, source.again.compile(self.scope, self._overrides))
        alone = [source for source in group.sources if source.instances == "one"]
        if alone:
            plan.duties[source_topic(name)] = SourceDuty(name, alone, self.runtime, atomic=self.broker.features.atomic)
        if self._adapt is not None:
            for route in dict.fromkeys([*plan.routes.values(), *plan.topics.values()]):
                self._adapt(route)
        return plan

    async def start(self, only: Collection[str] = (), skip: Collection[str] = ()) -> None:
        """Start the workers of the chosen groups, all by default; names may leave out the app's prefix."""
        chosen = self.choose(only, skip)
        broadcast = [s for name, s in self._subscriptions.items() if s.instance and name in chosen]
        if broadcast:
            await self.broker.declare([], broadcast)
        plans = {name: self.plan(name, self.groups[name], self._subscriptions[name]) for name in chosen}
        for name in sorted(chosen, key=lambda name: -self.groups[name].priority):
            group = self.groups[name]
            if self._subscriptions[name].topics:
                await self._work(plans[name])
            for source in group.sources:
                if source.instances == "each":
                    self._each.append(asyncio.create_task(self._run_each(name, source)))
            self.notes.append(self.note(name, group))

    async def declare_group(self, name: str, group: Group, owner: str) -> Subscription:
        """Declare a group that is made while the app runs: it misses nothing from now on.

        ``owner`` stands where other groups have the app, which refuses to start when a group of its own is gone.
        """
        subscription = replace(self._subscription(name, group, ""), app=owner)
        await self.broker.declare([Topic(dead_topic(name))], [subscription])
        return subscription

    async def run_group(self, name: str, group: Group, owner: str) -> Worker:
        """Declare a group while the app runs, and run it in this process. The caller, or the app's stop, stops it."""
        subscription = await self.declare_group(name, group, owner)
        return await self._work(self.plan(name, group, subscription))

    async def _work(self, plan: Plan) -> Worker:
        worker = Worker(plan, self.broker, self.catalog, self.clock, self.runtime)
        self.workers.append(worker)
        rank(self.workers)
        await worker.start()
        return worker

    def choose(self, only: Collection[str], skip: Collection[str]) -> list[str]:
        def full(name: str) -> str:
            for candidate in (name, f"{self.name}.{name}"):
                if candidate in self.groups:
                    return candidate
            raise DefinitionError(f"no group {name!r} in {self.name}; there are {', '.join(self.groups) or 'none'}")

        wanted = {full(name) for name in only} or set(self.groups)
        return [name for name in self.groups if name in wanted - {full(name) for name in skip}]

    async def _run_each(self, group: str, source: SourceFunction) -> None:
        async def write(messages: list[Message], _: bytes | None) -> None:
            if self.runtime.undeclared:
                await self.declare_new()
            await self.broker.publish(messages)

        async def run() -> None:
            await source.run(Publish(source, group, self.runtime, write, None, keeps=False, atomic=False))

        await keep(self.clock, log, f"source {source.name}", run)

    def note(self, name: str, group: Group) -> str:
        def listed(handler: Handler) -> str:
            if handler.topic is not None:
                return f"all of {handler.topic}"
            return " + ".join(self.catalog.add(cls).type for cls in handler.types)

        parts = [listed(handler) for handler in group.handlers]
        parts += [f"timer {timer.name}" for timer, _ in group.timers]
        parts += [f"source {source.name}" for source in group.sources]
        extras = [f"concurrency {group.concurrency}"] if group.handlers else []
        extras += [f"priority {group.priority}"] if group.priority else []
        extras += ["unordered"] if group.ordering == "none" else []
        extras += ["broadcast"] if group.broadcast else []
        extras += ["single"] if group.single else []
        extras += ["parks on dead"] if group.on_dead == "park" else []
        return f"{name}: {', '.join(parts)}" + (f" ({', '.join(extras)})" if extras else "")

    async def stop(self, grace: float) -> None:
        """Stop the workers in order, then disconnect."""
        self.runtime.stopping.set()
        for task in self._each:
            task.cancel()
        await asyncio.gather(*self._each, return_exceptions=True)
        try:
            await asyncio.gather(*(worker.stop(grace) for worker in self.workers))
            self.workers.clear()
            await self.scope.close()
        finally:
            if self._owns_broker:
                await self.broker.close()
