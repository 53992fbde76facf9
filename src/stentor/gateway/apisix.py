"""APISIX: the model as its standalone configuration, checked in full before anything takes it.

APISIX drops an invalid route with a line in its log, and the route's events fall through to another: so nothing is
written or pushed unless the JSON Schemas of a running APISIX (``GET /v1/schema`` of its control API) and a check of
references accept it. Formats: APISIX 3.16. It routes binary mode alone: structured events and batches get 415.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stentor.errors import ConfigError, Unavailable, Unsupported
from stentor.gateway.routes import PATH, RELAY, TARGET, UNKNOWN, Model, Route, Service, address, matches, quoted

Json = dict[str, Any]
OWN, TYPES, PREFIXES, REST = 5000, 1000, 100, 0
"""Priorities: routes of the file (each its own), types, prefixes that lead to the dead letters, all else."""

ACKED = """
return function(conf, ctx)
  local core, http = require("apisix.core"), require("resty.http")
  local body, headers = core.request.get_body() or "", {}
  for name, value in pairs(core.request.headers(ctx)) do
    name = name:lower()
    if name:find("^ce%-") or name == "content-type" then headers[name] = value end
  end
  local function send(places)
    local status = 503
    for _, place in ipairs(places) do
      local client = http.new()
      client:set_timeout(5000)
      local answer = client:request_uri("http://" .. place .. "/events",
                                        {method = "POST", body = body, headers = headers})
      status = answer and answer.status or 503
      if status < 500 then return status, answer.body end
    end
    return status
  end
  local threads, missing, refused, text = {}, {}, nil, nil
  local targets = @TARGETS@
  for index, target in ipairs(targets) do threads[index] = ngx.thread.spawn(send, target.places) end
  for index, target in ipairs(targets) do
    local ok, status, said = ngx.thread.wait(threads[index])
    status = ok and status or 503
    if status < 200 or status > 299 then
      table.insert(missing, target.name .. "=" .. status)
      local again = status == 408 or status == 409 or status == 425 or status == 429
      if status > 399 and status < 500 and not again and not refused then refused, text = status, said end
    end
  end
  if #missing == 0 then return 202, "{}" end
  core.response.set_header("x-not-acked", table.concat(missing, ", "))
  return refused or 503, text or "not taken by all: publish it again with the same id"
end
"""
"""Hands an event to all targets at once; 202 only when each took it. As in Envoy, nothing is remembered."""

UNSET = """
return function(conf, ctx)
  local request = require("apisix.core").request
  local args = request.get_uri_args(ctx) or {}
  for _, key in ipairs({request.header(ctx, "apikey") or "", args.apikey or ""}) do
    if type(key) ~= "string" or key:lower():find("$env://", 1, true) then return 401, "no API key\\n" end
  end
end
"""
"""Refuses ``$env://NAME`` as a key: where APISIX finds no such variable, it takes that text itself for the key."""


def configuration(model: Model) -> Json:
    """The routes, upstreams and consumers of a model. Raises ConfigError, Unsupported."""
    settings = model.settings
    if settings.tls is not None:
        raise Unsupported(
            "[tls] of a gateway", "APISIX", "let its config.yaml or its ssl objects have the certificates, or use Envoy"
        )
    if settings.jwt is not None and settings.keys:
        raise Unsupported("tokens and keys at once", "APISIX", "choose [jwt] or [keys]")
    made: Json = {
        "upstreams": [_upstream(name, model.services[name]) for name in model.used],
        "routes": list(_routes(model)),
    }
    if model.identified:
        made["consumers"] = list(_consumers(model))
    return made


def _upstream(name: str, service: Service) -> Json:
    places = [address(place, name) for place in service.at]
    made: Json = {
        "id": name, "type": "chash", "hash_on": "header", "key": "ce-partitionkey", "retries": len(places),
        "timeout": {"connect": 1, "send": 5, "read": 15},
        "nodes": [{"host": host, "port": port, "weight": 1} for host, port in places],
    }  # fmt: skip
    if service.health:
        made["checks"] = {
            "active": {
                "type": "http", "http_path": service.health, "timeout": 1,
                "healthy": {"interval": 1, "successes": 1},
                "unhealthy": {"interval": 1, "http_failures": 2, "tcp_failures": 2, "timeouts": 2},
            }
        }  # fmt: skip
    return made


# ---- routes ---------------------------------------------------------------------------------------------------------


def _condition(variable: str, pattern: str) -> list[list[Any]]:
    if pattern == "*":
        return []
    if pattern.endswith("*"):
        return [[variable, "~~", "^" + re.sub(r"([^\w/-])", r"\\\1", quoted(pattern[:-1]))]]
    return [[variable, "==", quoted(pattern)]]


def _routes(model: Model) -> Iterator[Json]:
    yield _refusal("structured", 415, "APISIX routes binary mode alone: put the attributes into ce- headers", OWN + 1,
                   [["http_content_type", "~*", "^application/cloudevents"]])  # fmt: skip
    inside = address(model.settings.inside, "inside")[1]
    if model.broadcasts("relay"):
        for name in model.targets:
            vars = [["server_port", "==", str(inside)], [f"http_{TARGET.replace('-', '_')}", "==", name]]
            yield _to(f"inside-{name}", name, OWN + 2, vars, {"proxy-rewrite": {"headers": {"remove": [TARGET]}}})
    own = 0
    for number, route in enumerate(model.routes):
        priority = TYPES
        if number < len(model.settings.routes):
            own += 1
            priority = OWN - own
        yield _route(model, route, f"route-{number}", priority)
    yield from _dead_letters(model)


def _to(id: str, upstream: str, priority: int, vars: list[list[Any]], plugins: Json) -> Json:
    made: Json = {"id": id, "uri": PATH, "methods": ["POST"], "priority": priority, "upstream_id": upstream}
    return made | ({"vars": vars} if vars else {}) | ({"plugins": plugins} if plugins else {})


def _refusal(id: str, status: int, text: str, priority: int, vars: list[list[Any]]) -> Json:
    made: Json = {"id": id, "uri": PATH, "methods": ["POST"], "priority": priority}
    plugin = {"fault-injection": {"abort": {"http_status": status, "body": f"{text}\n"}}}
    return made | ({"vars": vars} if vars else {}) | {"plugins": plugin}


def _route(model: Model, route: Route, id: str, priority: int) -> Json:
    vars = [*_condition("http_ce_type", route.type), *_condition("http_ce_source", route.source)]
    vars += [[f"post_arg.{name}", "==", value] for name, value in route.data.items()]
    plugins = _access(model, route.type)
    if route.limit is not None:
        plugins["limit-count"] = {
            "count": route.limit.events, "time_window": route.limit.seconds, "key_type": "constant", "key": id,
            "rejected_code": 429, "policy": "local",
        }  # fmt: skip
    upstream = route.to[0]
    if len(route.to) > 1 and route.grade == "relay":
        upstream = RELAY
    elif len(route.to) > 1 and route.grade == "mirror":
        places = model.services[route.to[1]].at
        if len(route.to) > 2 or len(places) > 1:
            raise Unsupported(
                f"mirroring {route.type} to more than one address", "APISIX", "set broadcast = 'relay' or 'acked'"
            )
        plugins["proxy-mirror"] = {"host": f"http://{places[0]}"}
    elif len(route.to) > 1:
        targets = ", ".join(
            f"{{name = {json.dumps(name)}, places = {{{', '.join(map(json.dumps, model.services[name].at))}}}}}"
            for name in route.to
        )
        # Post, not pre: it comes after those that say who may publish.
        plugins["serverless-post-function"] = {
            "phase": "access", "functions": [ACKED.replace("@TARGETS@", f"{{{targets}}}")]
        }  # fmt: skip
    return _to(id, upstream, priority, vars, plugins)


def _dead_letters(model: Model) -> Iterator[Json]:
    """What no route takes: where publishers are known, by the prefixes under which they may publish; else refused."""
    path = f"{PATH}?topic={UNKNOWN}" if model.settings.dead_letter == RELAY else PATH
    rewrite = {"proxy-rewrite": {"uri": path, "headers": {"set": {"x-dead-letter-reason": "unknown type"}}}}
    if not model.identified:
        yield _to("unknown", model.settings.dead_letter, REST, [], rewrite)
        return
    prefixes = sorted({one for patterns in model.publishers.values() for one in patterns if one.endswith("*")})
    for number, prefix in enumerate(prefixes):
        yield _to(f"unknown-{number}", model.settings.dead_letter, PREFIXES + len(prefix),
                  _condition("http_ce_type", prefix), _access(model, prefix) | rewrite)  # fmt: skip
    yield _refusal("refused", 403, "nobody may publish this type", REST, [])


# ---- who may publish what -------------------------------------------------------------------------------------------


def username(subject: str) -> str:
    """A subject as the name of a consumer, which has letters, digits, dash and underscore."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", subject)


def _covers(pattern: str, type: str) -> bool:
    return matches(pattern, type.rstrip("*")) if pattern.endswith("*") else pattern == type


def _access(model: Model, type: str) -> Json:
    """The plugins that let those through who may publish all that a route takes."""
    if not model.identified:
        return {}
    for subject, patterns in model.publishers.items():
        for pattern in patterns:
            if type.endswith("*") and matches(type, pattern) and not pattern.endswith("*") and pattern not in {
                route.type for route in model.routes
            }:  # fmt: skip
                raise Unsupported(
                    f"{subject!r} publishing {pattern!r} by the route {type}", "APISIX", "give that type a route"
                )
    allowed = [username(name) for name, patterns in model.publishers.items() if any(_covers(p, type) for p in patterns)]
    who: Json = {
        "key-auth": {"hide_credentials": True},
        "serverless-pre-function": {"phase": "rewrite", "functions": [UNSET]},
    }
    if model.settings.jwt is not None:
        who = {"jwt-auth": {"key_claim_name": "sub", "claims_to_verify": ["exp"], "hide_credentials": True}}
    return who | {"consumer-restriction": {"whitelist": allowed or ["-"], "rejected_code": 403}}


def _consumers(model: Model) -> Iterator[Json]:
    jwt, names = model.settings.jwt, dict[str, str]()
    for subject in model.publishers:
        other = names.setdefault(username(subject), subject)
        if other != subject:
            raise ConfigError(f"publishers {other!r} and {subject!r} have one name in APISIX: {username(subject)}")
        if jwt is None:
            if subject in model.settings.keys:
                key = {"key-auth": {"key": f"$env://{model.settings.keys[subject]}"}}
                yield {"username": username(subject), "plugins": key}
            continue
        if jwt.public_key is None:
            raise ConfigError("APISIX reads no JWKS: add public_key = 'FILE.pem' to [jwt]")
        try:
            public = Path(jwt.public_key).read_text("ascii")
        except (OSError, ValueError) as error:
            raise ConfigError(f"jwt.public_key: {jwt.public_key}: {error}") from None
        token = {"key": subject, "algorithm": "RS256", "public_key": public}
        yield {"username": username(subject), "plugins": {"jwt-auth": token}}


# ---- checks ---------------------------------------------------------------------------------------------------------


def check(made: Mapping[str, Any], schemas: Mapping[str, Any] | None) -> None:
    """Hold a configuration to the schemas, if given, and its references to each other. Raises ConfigError."""
    faults = [*_misled(made), *(_breaches(made, schemas) if schemas is not None else ())]
    if faults:
        raise ConfigError("APISIX would not do as told: " + "; ".join(faults))


def _misled(made: Mapping[str, Any]) -> Iterator[str]:
    upstreams = {one["id"] for one in made["upstreams"]}
    consumers = {one["username"] for one in made.get("consumers", ())} | {"-"}
    ids = [one["id"] for one in made["routes"]]
    for one in made["routes"]:
        id, plugins = one["id"], one.get("plugins", {})
        if ids.count(id) > 1:
            yield f"two routes are called {id}"
        if "upstream_id" in one and one["upstream_id"] not in upstreams:
            yield f"route {id} names the upstream {one['upstream_id']}, which is not there"
        if "upstream_id" not in one and "fault-injection" not in plugins:
            yield f"route {id} leads nowhere"
        for name in plugins.get("consumer-restriction", {}).get("whitelist", ()):
            if name not in consumers:
                yield f"route {id} lets {name} publish, which is no consumer"
    for one, two in combinations(made["routes"], 2):
        if one["priority"] == two["priority"] and not _apart(one, two):
            yield f"routes {one['id']} and {two['id']} take the same events at priority {one['priority']}"


def _apart(one: Json, two: Json) -> bool:
    """Whether no event matches both: a variable has two values, or begins in two ways."""
    for name, operator, *value in one.get("vars", ()):
        for other, second, *against in two.get("vars", ()):
            if name != other:
                continue
            if operator == second == "==" and value != against:
                return True
            if operator == second == "~~":
                first, last = sorted((str(value[0]), str(against[0])), key=len)
                if not last.startswith(first):
                    return True
    return False


def _breaches(made: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    try:
        from jsonschema import Draft7Validator
    except ImportError:
        raise ConfigError("checking for APISIX needs jsonschema: pip install 'stentor[gateway]'") from None

    def look(what: str, value: Any, schema: Any) -> Iterator[str]:
        for error in Draft7Validator(schema).iter_errors(value):
            yield f"{what}: {'.'.join(map(str, error.absolute_path)) or 'it'}: {error.message[:200]}"

    kinds = {"routes": ("route", "schema"), "upstreams": ("upstream", "schema"), "consumers": ("consumer",
             "consumer_schema")}  # fmt: skip
    for kind, (main, part) in kinds.items():
        for one in made.get(kind, ()):
            what = f"{main} {one.get('id') or one.get('username')}"
            yield from look(what, one, schemas["main"][main])
            for name, value in one.get("plugins", {}).items():
                if name not in schemas["plugins"]:
                    yield f"{what}: the plugin {name} is not enabled there"
                else:
                    yield from look(f"{what}, {name}", value, schemas["plugins"][name][part])


def read_schemas(place: str) -> Json:
    """The schemas of a file, or of a running APISIX (``http://HOST:9090``). Raises ConfigError, Unavailable."""
    if place.startswith(("http://", "https://")):
        status, body = _request("GET", place, "/v1/schema")
        if status != 200:
            raise ConfigError(f"{place}/v1/schema answered {status}; it is the control API of APISIX, by default :9090")
    else:
        try:
            body = Path(place).read_bytes()
        except OSError as error:
            raise ConfigError(f"{place}: {error.strerror}") from None
    try:
        found = json.loads(body)
        found["main"]["route"], found["plugins"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{place} holds no schemas of APISIX (GET /v1/schema of its control API)") from None
    return dict(found)


# ---- out ------------------------------------------------------------------------------------------------------------


def to_yaml(made: Mapping[str, Any]) -> str:
    """The text of apisix.yaml: blocks, and scalars as in JSON; APISIX reads it only when it ends in #END."""
    return "\n".join([*_lines(made, ""), "#END", ""])


def _lines(value: Any, indent: str) -> Iterator[str]:
    for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        head = f"{indent}{json.dumps(key)}:" if isinstance(value, Mapping) else f"{indent}-"
        if isinstance(part, (Mapping, list)) and part:
            yield head
            yield from _lines(part, indent + "  ")
        else:
            yield f"{head} {json.dumps(part)}"


def push(made: Mapping[str, Any], url: str, key: str) -> None:
    """Give it to an APISIX in API-driven standalone mode: all of it or nothing. Raises ConfigError, Unavailable."""
    body = json.dumps(made).encode()
    headers = {"X-API-KEY": key, "X-Digest": hashlib.sha256(body).hexdigest(), "Content-Type": "application/json"}
    status, said = _request("PUT", url, "/apisix/admin/configs", body, headers)
    if status not in (200, 202, 204):
        raise ConfigError(f"{url} refuses the configuration ({status}): {said[:500].decode(errors='replace').strip()}")


def _request(
    method: str, url: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is no URL of an APISIX, such as http://127.0.0.1:9180")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=10)
    try:
        connection.request(method, parts.path.rstrip("/") + path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, HTTPException) as error:
        raise Unavailable(f"no answer from {url}: {error}") from None
    finally:
        connection.close()
