"""The AsyncAPI 3.1 document of an Overview (https://www.asyncapi.com/docs/reference/specification/v3.1.0).

A topic is a channel, an event type a message, a handler an operation that receives, and what an app publishes one that
sends. What Stentor promises beyond that stands in ``x-stentor``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from stentor.brokers.wire import CONTENT_TYPE
from stentor.clock import seconds
from stentor.connect import BrokerUrl, switch
from stentor.docs.example import example
from stentor.docs.overview import Overview
from stentor.event import EventSpec
from stentor.gateway.routes import PATH, Model, key_name

VERSION = "3.1.0"
_REFERENCE = "#/components/schemas/"
_ENVELOPE = "CloudEvent"
_PROTOCOLS = {"amqp": "amqp", "amqps": "amqps", "kafka": "kafka", "nats": "nats", "redis": "redis", "rediss": "rediss"}
"""By the scheme of a broker URL, the protocol's name in AsyncAPI; others keep their scheme."""

Object = dict[str, Any]


def document(overview: Overview, version: str = "1.0.0") -> Object:
    """The document; ``version`` is that of what it describes."""
    names, schemas = _schemas(overview.events.values())
    messages = {_name(type): _message(overview, spec, names[type], schemas) for type, spec in overview.events.items()}
    servers, security = _servers(overview)
    made: Object = {
        "asyncapi": VERSION,
        "info": {"title": ", ".join(overview.services), "version": version},
        "defaultContentType": CONTENT_TYPE,
        "servers": servers,
        "channels": _channels(overview, list(servers)),
        "operations": {_name(one.id): _operation(overview, one) for one in overview.operations},
        "components": {"messages": messages, "schemas": {**schemas, _ENVELOPE: _envelope()}},
    }
    if security:
        made["components"]["securitySchemes"] = security
    return made


def _name(text: str) -> str:
    """A text as the name of a component, which has letters, digits, ``.``, ``-`` and ``_``."""
    return re.sub(r"[^A-Za-z0-9._-]", lambda found: f"_{ord(found[0]):x}_", text)


def _ref(*path: str) -> Object:
    return {"$ref": "#/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)}


# ---- messages -------------------------------------------------------------------------------------------------------


def _schemas(specs: Iterable[EventSpec]) -> tuple[dict[str, Object], Object]:
    """By type the schema of its data, and all schemas by name."""
    found: dict[str, Object] = {}
    schemas: Object = {}
    plain: list[EventSpec] = []
    for spec in specs:
        if hasattr(spec.cls, "model_json_schema"):
            own = dict(spec.cls.model_json_schema(ref_template=_REFERENCE + "{model}"))
            schemas |= own.pop("$defs", {})
            schemas[spec.cls.__name__] = own
            found[spec.type] = {"$ref": _REFERENCE + spec.cls.__name__}
        else:
            plain.append(spec)
    while plain:
        try:
            refs, named = msgspec.json.schema_components([one.cls for one in plain], ref_template=_REFERENCE + "{name}")
        except TypeError:  # a type that JSON Schema has no word for, in one of them
            plain = [one for one in plain if not _opaque(one, found)]
            continue
        found |= {spec.type: ref for spec, ref in zip(plain, refs, strict=True)}
        schemas |= named
        break
    return found, {_name(name): _draft7(schema) for name, schema in sorted(schemas.items())}


def _opaque(spec: EventSpec, found: dict[str, Object]) -> bool:
    try:
        spec.schema()
    except TypeError:
        found[spec.type] = {"type": "object", "title": spec.cls.__name__}
        return True
    return False


def _draft7(schema: Any) -> Any:
    """A schema of 2020-12 in the words of draft 7, of which AsyncAPI's are a superset."""
    if isinstance(schema, list):
        return [_draft7(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _draft7(value) for name, value in schema.items()}
    if "prefixItems" in made:
        rest = made.pop("items", None)
        made["items"] = made.pop("prefixItems")
        if rest is not None:
            made["additionalItems"] = rest
    return made


def _message(overview: Overview, spec: EventSpec, schema: Object, schemas: Object) -> Object:
    told: Object = {"key": key_name(spec), "version": spec.version, "newer": spec.newer}
    if spec.also:
        told["also"] = list(spec.also)
    if spec.upcasts:
        told["upcasts"] = sorted(spec.upcasts)
    if owners := overview.owners.get(spec.type):
        told["publishedBy"] = list(owners)
    found = schemas.get(schema.get("$ref", "").removeprefix(_REFERENCE), {})
    made: Object = {"name": spec.type, "title": spec.cls.__name__, "x-stentor": told}
    if found.get("description"):
        made["summary"] = str(found["description"]).partition("\n")[0]
    data = example(spec, schema, schemas)
    if spec.wire == "json":
        made |= {"contentType": "application/json", "payload": schema}
        shown = data
    else:
        own: Object = {"properties": {"type": {"enum": list(spec.names)}, "data": schema}, "required": ["data"]}
        made |= {"contentType": CONTENT_TYPE, "payload": {"allOf": [{"$ref": _REFERENCE + _ENVELOPE}, own]}}
        source = f"/{overview.owners.get(spec.type, overview.services)[0]}"
        shown = {"specversion": "1.0", "id": "0190f3a47c1e7a2b9d543f6a1b2c4d5e", "source": source, "type": spec.type}
        shown["time"] = "2026-01-31T12:30:00Z"
        if spec.key is not None and data is not None:
            shown["partitionkey"] = _key(spec, data)
        shown |= {"datacontenttype": "application/json", "data": data}
    if data is not None:
        made["examples"] = [{"name": "example", "payload": shown}]
    return made


def _key(spec: EventSpec, data: Any) -> str:
    try:
        return str(spec.key_of(spec.convert(data)))
    except Exception:  # whatever a key function of the user's raises
        return "key"


def _envelope() -> Object:
    """A CloudEvent in structured JSON, as it stands in a broker's message."""
    text: Object = {"type": "string", "minLength": 1}
    return {
        "title": "CloudEvent",
        "description": "CloudEvents 1.0.2, JSON format; partitionkey is the key whose events are handled in order.",
        "type": "object",
        "properties": {
            "specversion": {"const": "1.0"}, "id": text, "source": text, "type": text, "partitionkey": text,
            "time": {"type": "string", "format": "date-time"}, "subject": text, "datacontenttype": text,
            "dataschema": text, "schemaversion": {"type": "integer", "minimum": 1}, "correlationid": text,
            "causationid": text, "traceparent": text, "recordedtime": {"type": "string", "format": "date-time"},
        },
        "required": ["specversion", "id", "source", "type"],
    }  # fmt: skip


# ---- channels and operations ----------------------------------------------------------------------------------------


def _channels(overview: Overview, servers: Sequence[str]) -> Object:
    topics: dict[str, list[EventSpec]] = {}
    for spec in overview.events.values():
        topics.setdefault(spec.topic.name, []).append(spec)
    for operation in overview.operations:
        topics.setdefault(operation.topic, [])
    return {name: _channel(name, specs, servers) for name, specs in sorted(topics.items())}


def _channel(name: str, specs: Sequence[EventSpec], servers: Sequence[str]) -> Object:
    made: Object = {
        "address": name,
        "servers": [_ref("servers", server) for server in servers],
        "messages": {_name(one.type): _ref("components", "messages", _name(one.type)) for one in specs},
    }
    if specs:
        topic = specs[0].topic
        kept = None if topic.retention is None else seconds(topic.retention, "retention")
        made["x-stentor"] = {"partitions": topic.partitions, "retention": kept}
    return made


def _operation(overview: Overview, one: Any) -> Object:
    types = one.types or [spec.type for spec in overview.events.values() if spec.topic.name == one.topic]
    made: Object = {"action": one.action, "channel": _ref("channels", one.topic)}
    if one.summary:
        made["summary"] = one.summary
    if types:
        made["messages"] = [_ref("channels", one.topic, "messages", _name(type)) for type in types]
    return made | {"x-stentor": {"app": one.service, **one.facts}}


# ---- servers --------------------------------------------------------------------------------------------------------


def _servers(overview: Overview) -> tuple[Object, Object]:
    """The servers, and how clients say who they are."""
    if overview.gateway is not None:
        return _of_gateway(overview.gateway)
    if overview.broker is None:
        return {}, {}
    return _of_broker(overview.broker)


def _of_broker(url: BrokerUrl) -> tuple[Object, Object]:
    secure = url.option("tls", False, switch)
    protocol = _PROTOCOLS.get(url.scheme, url.scheme)
    if secure and protocol in ("kafka", "amqp", "redis"):
        protocol = {"kafka": "kafka-secure", "amqp": "amqps", "redis": "rediss"}[protocol]
    server: Object = {"host": url.host or "localhost", "protocol": protocol}
    if url.path.strip("/"):
        server["pathname"] = "/" + url.path.lstrip("/")
    schemes: Object = {}
    if url.user is not None:
        sasl = url.option("sasl", "SCRAM-SHA-512")
        kafka = {"PLAIN": "plain", "SCRAM-SHA-256": "scramSha256"}.get(sasl, "scramSha512")
        schemes["login"] = {"type": kafka if url.scheme == "kafka" else "userPassword"}
    if url.option("cert", ""):
        schemes["certificate"] = {"type": "X509"}
    if schemes:
        server["security"] = [_ref("components", "securitySchemes", name) for name in schemes]
    return {"broker": server}, schemes


def _of_gateway(model: Model) -> tuple[Object, Object]:
    settings = model.settings
    schemes: Object = {}
    if settings.jwt is not None:
        schemes["token"] = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    if settings.tls is not None and settings.tls.client_ca:
        schemes["certificate"] = {"type": "X509"}
    if settings.keys:
        schemes["key"] = {"type": "httpApiKey", "name": "apikey", "in": "header"}
    front: Object = {"host": settings.listen, "protocol": "http" if settings.tls is None else "https", "pathname": PATH}
    if schemes:
        front["security"] = [_ref("components", "securitySchemes", name) for name in schemes]
    servers = {"gateway": front}
    for name, service in sorted(model.services.items()):
        servers[_name(name)] = {"host": service.at[0], "protocol": "http", "pathname": PATH}
    return servers, schemes
