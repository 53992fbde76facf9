"""How many processes a group needs, told to KEDA as an external scaler.

KEDA (https://keda.sh/docs/latest/concepts/external-scalers/) asks by gRPC, with the messages of its
``externalscaler.proto``; they are built here from their field numbers, as there is nothing else to generate.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn
from urllib.parse import urlsplit

from msgspec import Struct
from msgspec.structs import replace

from stentor.broker import Broker
from stentor.clock import seconds
from stentor.errors import BrokerError, ConfigError, DefinitionError, StentorError, UnknownGroup
from stentor.message import Lag
from stentor.observe.flow import Flow, Reading, between, read
from stentor.scaling.ahead import BINS, Ahead
from stentor.scaling.need import by_flow, by_lag

SERVICE = "externalscaler.ExternalScaler"
METRIC = "processes"
APART = 5.0
"""Seconds between two readings of the processes, at least: several triggers may ask at once."""
LOOK = 2.0
"""Seconds between two looks at whether there is work."""
_TEXT, _BOOL, _DOUBLE, _INT64, _PART = 9, 8, 1, 3, 11
_MESSAGES: dict[str, list[tuple[str, int, int, str]]] = {  # by name: fields with number, type, and the message of many
    "Entry": [("key", 1, _TEXT, ""), ("value", 2, _TEXT, "")],
    "ScaledObjectRef": [("name", 1, _TEXT, ""), ("namespace", 2, _TEXT, ""), ("scalerMetadata", 3, _PART, "Entry")],
    "IsActiveResponse": [("result", 1, _BOOL, "")],
    "MetricSpec": [("metricName", 1, _TEXT, ""), ("targetSize", 2, _INT64, ""), ("targetSizeFloat", 3, _DOUBLE, "")],
    "GetMetricSpecResponse": [("metricSpecs", 1, _PART, "MetricSpec")],
    "GetMetricsRequest": [("scaledObjectRef", 1, _PART, "ScaledObjectRef"), ("metricName", 2, _TEXT, "")],
    "MetricValue": [("metricName", 1, _TEXT, ""), ("metricValue", 2, _INT64, ""), ("metricValueFloat", 3, _DOUBLE, "")],
    "GetMetricsResponse": [("metricValues", 1, _PART, "MetricValue")],
}
_ONE = {("GetMetricsRequest", "scaledObjectRef")}
"""Messages that come once; the others are repeated. A map is a repeated message of key and value on the wire."""


class Wanted(Struct, frozen=True, kw_only=True):
    """What the metadata of a trigger asks for."""

    group: str
    lag: float = 10.0
    """Seconds that the oldest waiting event may be old."""
    busy: float = 0.7
    """The utilisation ρ to aim at."""
    url: str = ""
    """Where the processes serve HTTP: a name that stands for the addresses of all of them."""
    ahead: float = 0.0
    """Seconds that a new process takes to start; what is foreseen to come in them counts as well. 0: nothing is."""


def wanted(metadata: dict[str, str]) -> Wanted:
    """From the metadata ``group``, ``lag`` ("10s"), ``busy`` ("0.7"), ``url`` and ``ahead``. Raises ConfigError."""
    if not metadata.get("group"):
        raise ConfigError("the trigger's metadata lacks group, the full name of a group")
    try:
        busy = float(metadata.get("busy", "0.7"))
    except ValueError:
        busy = 0.0
    if not 0 < busy <= 1:
        raise ConfigError(f"metadata busy is above 0 and at most 1, not {metadata['busy']!r}")
    try:
        lag = seconds(metadata.get("lag", "10s"), "metadata lag")
        ahead = seconds(metadata["ahead"], "metadata ahead") if "ahead" in metadata else 0.0
    except DefinitionError as error:
        raise ConfigError(str(error)) from None
    if lag <= 0:
        raise ConfigError("metadata lag has to be above 0")
    if "ahead" in metadata and not (0 < ahead <= BINS[-1] and metadata.get("url")):
        raise ConfigError("metadata ahead is above 0 and at most 1h, and needs url: who measures what comes in")
    return Wanted(group=metadata["group"], lag=lag, busy=busy, url=metadata.get("url", ""), ahead=ahead)


class Scaler:
    """Answers KEDA for the groups of one broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._seen: dict[str, tuple[Reading, list[Flow]]] = {}
        """By URL: the last reading, and what lay between it and the one before."""
        self._ahead: dict[tuple[str, str, float], Ahead] = {}
        """By URL, group and seconds."""
        self._reading = asyncio.Lock()

    async def lags(self, group: str) -> list[Lag]:
        """What the group has to do. Raises UnknownGroup."""
        found = await self._broker.admin.lag()
        mine = [lag for lag in found if lag.group == group]
        if not mine:
            names = ", ".join(sorted({lag.group for lag in found})) or "none"
            raise UnknownGroup(f"there is no group {group!r}; there are {names}")
        return mine

    async def active(self, want: Wanted) -> bool:
        """Whether the group has work, so that a process has to run."""
        return any(lag.events or lag.parked for lag in await self.lags(want.group))

    async def need(self, want: Wanted) -> float:
        """The processes that the group needs now: for its backlog, or for what comes in if that is more."""
        backlog = by_lag(await self.lags(want.group), want.lag)
        foreseen = self.ahead(want).rate(time.time()) if want.ahead else None
        flow = await self._flow(want) if want.url else None
        if flow is None:
            return backlog
        return max(backlog, by_flow(replace(flow, arrivals=max(flow.arrivals, foreseen or 0.0)), want.busy))

    def ahead(self, want: Wanted) -> Ahead:
        """What foresees the arrivals that a trigger asks for; it learns from the first call on."""
        return self._ahead.setdefault((want.url, want.group, want.ahead), Ahead(want.group, want.ahead))

    async def _flow(self, want: Wanted) -> Flow | None:
        """What the group did until now; None before a second reading, or when no process runs."""
        if not want.url.startswith("http://"):
            raise ConfigError(f"metadata url is the http:// URL of the processes, not {want.url!r}")
        async with self._reading:  # two that ask at once are answered from one reading
            last, flows = self._seen.get(want.url, (None, []))
            if last is None or time.monotonic() - last.moment >= APART:
                try:
                    now = await asyncio.to_thread(lambda: read(_addresses(want.url)))
                except (BrokerError, OSError):  # none runs, or one has just gone: the backlog speaks for itself
                    self._seen.pop(want.url, None)
                    return None
                flows = between(last, now) if last is not None else []
                for (url, group, _), ahead in self._ahead.items():
                    for flow in flows:
                        if last is not None and (url, group) == (want.url, flow.group):
                            ahead.saw(time.time(), now.moment - last.moment, flow.arrivals)
                self._seen[want.url] = now, flows
        return next((flow for flow in flows if flow.group == want.group and flow.service.count), None)


def _addresses(url: str) -> list[str]:
    parts = urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    hosts = dict.fromkeys(str(address[4][0]) for address in found)
    return [f"http://{f'[{host}]' if ':' in host else host}:{parts.port or 80}" for host in hosts]


# ---- gRPC -----------------------------------------------------------------------------------------------------------


def messages() -> dict[str, Any]:
    """KEDA's message classes by name. Raises ConfigError: protobuf is not installed."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise ConfigError("a scaler needs gRPC: pip install 'stentor[keda]'") from None
    file = descriptor_pb2.FileDescriptorProto(name="externalscaler.proto", package="externalscaler", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, other in fields:
            many = bool(other) and (name, field) not in _ONE
            message.field.add(
                name=field, number=number, type=kind, label=3 if many else 1,
                type_name=f".externalscaler.{other}" if other else None,
            )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"externalscaler.{name}"))
        for name in _MESSAGES
    }


@asynccontextmanager
async def serve(scaler: Scaler, address: str) -> AsyncIterator[int]:
    """Answer KEDA at ``host:port``; gives the port.

    Raises ConfigError: grpcio is not installed, or the address cannot be used.
    """
    try:
        from grpc import aio, method_handlers_generic_handler, unary_stream_rpc_method_handler
        from grpc import unary_unary_rpc_method_handler as unary
    except ImportError:
        raise ConfigError("a scaler needs gRPC: pip install 'stentor[keda]'") from None
    kinds = messages()

    async def is_active(request: Any, context: Any) -> Any:
        return kinds["IsActiveResponse"](result=await _answered(context, scaler.active, request))

    async def stream_is_active(request: Any, context: Any) -> AsyncIterator[Any]:
        last: bool | None = None
        while True:
            now = await _answered(context, scaler.active, request)
            if now != last:
                last = now
                yield kinds["IsActiveResponse"](result=now)
            await asyncio.sleep(LOOK)

    async def get_metric_spec(request: Any, context: Any) -> Any:
        await _answered(context, _nothing, request)
        spec = kinds["MetricSpec"](metricName=METRIC, targetSize=1, targetSizeFloat=1.0)
        return kinds["GetMetricSpecResponse"](metricSpecs=[spec])

    async def get_metrics(request: Any, context: Any) -> Any:
        need = await _answered(context, scaler.need, request.scaledObjectRef)
        value = kinds["MetricValue"](metricName=METRIC, metricValue=-int(-need // 1), metricValueFloat=need)
        return kinds["GetMetricsResponse"](metricValues=[value])

    def answers(request: str, answer: str) -> dict[str, Any]:
        return {
            "request_deserializer": kinds[request].FromString, "response_serializer": kinds[answer].SerializeToString,
        }  # fmt: skip

    server = aio.server()
    methods = {
        "IsActive": unary(is_active, **answers("ScaledObjectRef", "IsActiveResponse")),
        "StreamIsActive": unary_stream_rpc_method_handler(
            stream_is_active, **answers("ScaledObjectRef", "IsActiveResponse")
        ),
        "GetMetricSpec": unary(get_metric_spec, **answers("ScaledObjectRef", "GetMetricSpecResponse")),
        "GetMetrics": unary(get_metrics, **answers("GetMetricsRequest", "GetMetricsResponse")),
    }
    server.add_generic_rpc_handlers((method_handlers_generic_handler(SERVICE, methods),))
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"cannot serve at {address}: {error}") from None
    await server.start()
    try:
        yield port
    finally:
        await server.stop(1.0)


async def _nothing(_: Wanted) -> None:
    return None


async def _answered(context: Any, ask: Callable[[Wanted], Awaitable[Any]], reference: Any) -> Any:
    """The answer, or KEDA's error: it logs the text, and leaves the number of processes as it is."""
    from grpc import StatusCode

    async def refuse(code: Any, error: Exception) -> NoReturn:
        await context.abort(code, str(error))
        raise AssertionError

    try:
        return await ask(wanted({entry.key: entry.value for entry in reference.scalerMetadata}))
    except ConfigError as error:
        await refuse(StatusCode.INVALID_ARGUMENT, error)
    except UnknownGroup as error:
        await refuse(StatusCode.NOT_FOUND, error)
    except StentorError as error:
        await refuse(StatusCode.UNAVAILABLE, error)
