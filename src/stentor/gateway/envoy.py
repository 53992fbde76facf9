"""Envoy: a bootstrap file, and its listeners, routes, clusters and endpoints as files that Envoy watches (file xDS).

How an event passes: who sends it is checked (JWT, client certificate), a structured event's attributes are read
(json_to_metadata), the Lua in ``envoy_lua.py`` writes what the rest goes by into headers of its own (``x-stentor-*``),
then come who may publish what (RBAC), the rate limit of the route, and the service. Formats: the v3 API of Envoy 1.40.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stentor.errors import Unsupported
from stentor.gateway.envoy_lua import ACKED, DATA, KEY, READ, SOURCE, TYPE
from stentor.gateway.routes import (
    PATH,
    RELAY,
    TARGET,
    UNKNOWN,
    Model,
    Rate,
    Route,
    Service,
    address,
    host_names,
    quoted,
)

Json = dict[str, Any]
_KINDS = {
    "eds": "envoy.config.endpoint.v3.ClusterLoadAssignment",
    "cds": "envoy.config.cluster.v3.Cluster",
    "rds": "envoy.config.route.v3.RouteConfiguration",
    "lds": "envoy.config.listener.v3.Listener",
}
INSIDE = "stentor inside"
"""The cluster that leads to the listener ``inside``."""
TIMEOUT = "15s"
_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_JWT = "envoy.filters.http.jwt_authn"
_LIMIT = "envoy.filters.http.local_ratelimit"
_ACKED = "stentor.acked"
_STRUCTURED = r"(?i)application/cloudevents\+json\s*(;.*)?"
_JSON = r"(?i)application/([^;]*\+)?json\s*(;.*)?"


def _typed(kind: str, **fields: Any) -> Json:
    return {"@type": f"type.googleapis.com/{kind}", **fields}


def _filter(name: str, kind: str, **fields: Any) -> Json:
    return {"name": name, "typed_config": _typed(f"envoy.extensions.filters.http.{kind}", **fields)}


# ---- clusters -------------------------------------------------------------------------------------------------------


def _endpoints(name: str, places: tuple[str, ...]) -> Json:
    ends = [_address(address(place, name)) for place in places]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": end}} for end in ends]}]}


def _address(place: tuple[str, int]) -> Json:
    return {"socket_address": {"address": place[0], "port_value": place[1]}}


def _cluster(name: str, service: Service, folder: Path | None) -> Json:
    """A service: one host for a key, hosts that fail left out, and bounds so that one service cannot stop the rest."""
    cluster: Json = {
        "name": name,
        "connect_timeout": "1s",
        "lb_policy": "RING_HASH",
        "typed_extension_protocol_options": {
            # Below the 5 s after which common servers close an idle connection, as that races with the next request.
            _OPTIONS: _typed(_OPTIONS, common_http_protocol_options={"idle_timeout": "4s"},
                             explicit_http_config={"http_protocol_options": {}})
        },
        "circuit_breakers": {
            "thresholds": [{"max_connections": 1024, "max_pending_requests": 1024, "max_requests": 1024,
                            "max_retries": 256}]
        },
        "outlier_detection": {
            "consecutive_5xx": 5, "consecutive_gateway_failure": 5, "enforcing_consecutive_gateway_failure": 100,
            "interval": "1s", "base_ejection_time": "5s", "max_ejection_time": "60s", "max_ejection_percent": 50,
        },
    }  # fmt: skip
    if host_names(service):  # EDS takes addresses alone
        cluster |= {"type": "STRICT_DNS", "dns_refresh_rate": "5s", "load_assignment": _endpoints(name, service.at)}
    elif folder is None:
        cluster |= {"type": "STATIC", "load_assignment": _endpoints(name, service.at)}
    else:
        cluster |= {"type": "EDS", "eds_cluster_config": {"eds_config": _file(folder, f"eds.{name}")}}
    if service.health:
        cluster["ignore_health_on_host_removal"] = True  # who takes a host out is about to stop it
        cluster["health_checks"] = [{
            "timeout": "1s", "interval": "1s", "no_traffic_interval": "1s", "unhealthy_threshold": 2,
            "healthy_threshold": 1, "http_health_check": {"path": service.health},
        }]  # fmt: skip
    return cluster


def _clusters(model: Model, folder: Path | None) -> list[Json]:
    found = [_cluster(name, model.services[name], folder) for name in model.used]
    if model.broadcasts("acked"):
        found.append({
            "name": INSIDE, "type": "STATIC", "connect_timeout": "1s",
            "load_assignment": _endpoints(INSIDE, (model.settings.inside,)),
        })  # fmt: skip
    return found


# ---- routes ---------------------------------------------------------------------------------------------------------


def _header(name: str, pattern: str) -> list[Json]:
    if pattern == "*":
        return []
    kind, text = ("prefix", pattern[:-1]) if pattern.endswith("*") else ("exact", pattern)
    return [{"name": name, "string_match": {kind: quoted(text)}}]


def _match(headers: list[Json]) -> Json:
    return {"path": PATH, "headers": [{"name": ":method", "string_match": {"exact": "POST"}}, *headers]}


def _action(cluster: str) -> Json:
    """To one service: again on another host when one does not answer, is busy or fails; ids stay, so that is safe."""
    return {
        "cluster": cluster,
        "timeout": TIMEOUT,
        "hash_policy": [{"header": {"header_name": KEY}}],
        "retry_policy": {
            "retry_on": "connect-failure,reset,retriable-status-codes",
            "retriable_status_codes": [500, 502, 503, 504],
            "num_retries": 4,
            "per_try_timeout": "5s",
            "retry_back_off": {"base_interval": "0.025s", "max_interval": "1s"},
            "retry_host_predicate": [{
                "name": "previous_hosts",
                "typed_config": _typed("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
            }],
            # A retry goes on along the ring, where the next place is the same host's as likely as not.
            "host_selection_retry_max_attempts": 32,
        },
    }  # fmt: skip


def _bucket(rate: Rate) -> Json:
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    return _typed(
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        stat_prefix="limit", filter_enabled=always, filter_enforced=always,
        token_bucket={
            "max_tokens": rate.events, "tokens_per_fill": rate.events, "fill_interval": f"{rate.seconds}s",
        },
        response_headers_to_add=[{"header": {"key": "retry-after", "value": str(rate.seconds)}}],
    )  # fmt: skip


def _route(route: Route, fields: dict[str, int]) -> Json:
    conditions = [*_header(TYPE, route.type), *_header(SOURCE, route.source)]
    for name, value in route.data.items():
        conditions.append({"name": f"{DATA}{fields[name]}", "string_match": {"exact": _scalar(value)}})
    action = _action(route.to[0])
    made: Json = {"name": str(route), "match": _match(conditions), "route": action}
    per_filter: Json = {}
    if route.limit is not None:
        per_filter[_LIMIT] = _bucket(route.limit)
    if len(route.to) > 1:
        if route.grade == "relay":
            action["cluster"] = RELAY
        elif route.grade == "mirror":
            action["request_mirror_policies"] = [
                {"cluster": name, "disable_shadow_host_suffix_append": True} for name in route.to[1:]
            ]
        else:
            code = ACKED.replace("@TARGETS@", ", ".join(map(json.dumps, route.to)))
            per_filter[_ACKED] = _typed(
                "envoy.extensions.filters.http.lua.v3.LuaPerRoute", source_code={"inline_string": code}
            )
    if per_filter:
        made["typed_per_filter_config"] = per_filter
    return made


def _scalar(value: object) -> str:
    """A value as the Lua writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return quoted(f"{value:.14g}" if isinstance(value, (int, float)) else str(value))


def _answer(status: int, text: str) -> Json:
    return {"status": status, "body": {"inline_string": f"{text}\n"}}


def _virtual_host(routes: list[Json]) -> list[Json]:
    return [{"name": "events", "domains": ["*"], "routes": routes}]


def _route_configs(model: Model) -> list[Json]:
    """``events`` for publishers, and ``inside`` for the relay and acked broadcast: a service by its header."""
    fields = _fields(model)
    dead = _action(model.settings.dead_letter)
    if model.settings.dead_letter == RELAY:
        dead["prefix_rewrite"] = f"{PATH}?topic={UNKNOWN}"
    events = [_route(route, fields) for route in model.routes]
    events += [
        {
            "name": "unknown", "match": _match([]), "route": dead,
            "request_headers_to_add": [{"header": {"key": "x-dead-letter-reason", "value": "unknown type"},
                                        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
        },
        {"match": {"path": PATH}, "direct_response": _answer(405, "events are sent with POST")},
        {"match": {"prefix": "/"}, "direct_response": _answer(404, f"events are sent to {PATH}")},
    ]  # fmt: skip
    inside = [
        {
            "match": _match([{"name": TARGET, "string_match": {"exact": name}}]),
            "route": _action(name),
            "request_headers_to_remove": [TARGET],
        }
        for name in model.targets
    ]
    inside.append({"match": {"prefix": "/"}, "direct_response": _answer(404, f"name a service in {TARGET}")})
    return [
        {
            "name": "events", "virtual_hosts": _virtual_host(events), "validate_clusters": False,
            "request_headers_to_remove": [TYPE, SOURCE, *(f"{DATA}{number}" for number in fields.values())],
        },
        {"name": "inside", "virtual_hosts": _virtual_host(inside), "validate_clusters": False},
    ]  # fmt: skip


def _fields(model: Model) -> dict[str, int]:
    """The fields of data that routes ask for, numbered."""
    return {name: number for number, name in enumerate(sorted({name for r in model.routes for name in r.data}))}


# ---- listeners ------------------------------------------------------------------------------------------------------


def _json_to_metadata(model: Model) -> Json:
    """Attributes of structured events, and the data that routes ask for, as metadata ``stentor``."""
    rules = [("type", ["type"]), ("source", ["source"]), ("key", ["partitionkey"])]
    for name, number in _fields(model).items():
        rules += [(f"s{number}", ["data", *name.split(".")]), (f"b{number}", name.split("."))]
    return _filter(
        "envoy.filters.http.json_to_metadata", "json_to_metadata.v3.JsonToMetadata",
        request_rules={
            "rules": [
                {
                    "selectors": [{"key": key} for key in path],
                    "on_present": {"metadata_namespace": "stentor", "key": name},
                }
                for name, path in rules
            ],
            "allow_content_types_regex": {"regex": _JSON if _fields(model) else _STRUCTURED},
        },
    )  # fmt: skip


def _authentication(model: Model) -> list[Json]:
    jwt = model.settings.jwt
    if jwt is None:
        return []
    provider = {
        "issuer": jwt.issuer, "audiences": [jwt.audience], "local_jwks": {"filename": str(Path(jwt.jwks).absolute())},
        "forward": False, "payload_in_metadata": "token", "require_expiration": True,
    }  # fmt: skip
    by_certificate = model.settings.tls is not None and model.settings.tls.client_ca
    requires: Json = {"provider_name": "publishers"}
    if by_certificate:  # who has a certificate needs no token; who has neither is turned away by RBAC
        requires = {"requires_any": {"requirements": [requires, {"allow_missing": {}}]}}
    return [
        _filter(
            _JWT, "jwt_authn.v3.JwtAuthentication", providers={"publishers": provider},
            rules=[{"match": {"prefix": "/"}, "requires": requires}],
        )
    ]  # fmt: skip


def _access(model: Model) -> list[Json]:
    """Who may publish what. It binds for every path and type, so nothing is easier to reach than a route."""
    if not model.identified:
        return []
    policies = {}
    for subject, patterns in model.publishers.items():
        kinds = [{"header": one} for pattern in patterns for one in _header(TYPE, pattern)]
        who: list[Json] = []
        if model.settings.jwt is not None:
            value = {"string_match": {"exact": subject}}
            path = [{"key": "token"}, {"key": "sub"}]
            who.append({"sourced_metadata": {"metadata_matcher": {"filter": _JWT, "path": path, "value": value}}})
        if model.settings.tls is not None and model.settings.tls.client_ca:
            who.append({"authenticated": {"principal_name": {"exact": subject}}})
        everything = "*" in patterns
        policies[subject] = {
            "permissions": [{"any": True}] if everything else kinds,
            "principals": [{"or_ids": {"ids": who}}],
        }
    return [
        _filter("envoy.filters.http.rbac", "rbac.v3.RBAC", rules={"action": "ALLOW", "policies": policies}),
    ]


def _http(name: str, filters: list[Json], model: Model, folder: Path | None, **more: Any) -> Json:
    if folder is None:
        more["route_config"] = next(config for config in _route_configs(model) if config["name"] == name)
    else:
        more["rds"] = {"route_config_name": name, "config_source": _file(folder, f"rds.{name}")}
    router = _filter("envoy.filters.http.router", "router.v3.Router", suppress_envoy_headers=False)
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": _typed(
            "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            stat_prefix=name, codec_type="AUTO", http_filters=[*filters, router], normalize_path=True,
            merge_slashes=True, path_with_escaped_slashes_action="REJECT_REQUEST", server_name="stentor",
            request_headers_timeout="10s", stream_idle_timeout="60s",
            common_http_protocol_options={"idle_timeout": "3600s", "headers_with_underscores_action": "REJECT_REQUEST"},
            **more,
        ),
    }  # fmt: skip


def _listeners(model: Model, folder: Path | None) -> list[Json]:
    settings = model.settings
    lua = "lua.v3.Lua"
    fields = _fields(model)
    filters = [
        *_authentication(model),
        _filter("envoy.filters.http.buffer", "buffer.v3.Buffer", max_request_bytes=settings.max_bytes),
        _json_to_metadata(model),
        _filter("stentor.read", lua, default_source_code={"inline_string": READ.replace("@FIELDS@", str(len(fields)))}),
        *_access(model),
        _filter(_LIMIT, "local_ratelimit.v3.LocalRateLimit", stat_prefix="limit"),
    ]
    if model.broadcasts("acked"):
        filters.append(_filter(_ACKED, lua))
    chain: Json = {
        "filters": [
            _http("events", filters, model, folder, forward_client_cert_details="SANITIZE", use_remote_address=True)
        ]
    }
    if settings.tls is not None:
        chain["transport_socket"] = _transport(settings.tls.cert, settings.tls.key, model)
    room = {"per_connection_buffer_limit_bytes": settings.max_bytes + 65536}
    found = [
        {"name": "events", "address": _address(address(settings.listen, "listen")), "filter_chains": [chain], **room}
    ]
    if model.broadcasts("acked") or model.broadcasts("relay"):
        inside = {"filters": [_http("inside", [], model, folder)]}
        place = _address(address(settings.inside, "inside"))
        found.append({"name": "inside", "address": place, "filter_chains": [inside], **room})
    return found


def _transport(cert: str, key: str, model: Model) -> Json:
    def file(path: str) -> Json:
        return {"filename": str(Path(path).absolute())}

    tls = model.settings.tls
    common: Json = {
        "tls_certificates": [{"certificate_chain": file(cert), "private_key": file(key)}],
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
    }
    context: Json = {"common_tls_context": common}
    if tls is not None and tls.client_ca:
        common["validation_context"] = {"trusted_ca": file(tls.client_ca)}
        context["require_client_certificate"] = model.settings.jwt is None
    kind = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
    return {"name": "envoy.transport_sockets.tls", "typed_config": _typed(kind, **context)}


# ---- all of it ------------------------------------------------------------------------------------------------------


def _file(folder: Path, stem: str) -> Json:
    """Where Envoy reads resources; it reads them again when a file of the folder is replaced."""
    source = {"path": str(folder / f"{stem}.json"), "watched_directory": {"path": str(folder)}}
    return {"path_config_source": source, "resource_api_version": "V3"}


def resources(model: Model, folder: Path | None) -> dict[str, list[Json]]:
    """The resources by the stem of their file in ``folder``, what names others last; without one those that hold all.

    A file of endpoints or routes has one resource: Envoy refuses more.
    """
    made: dict[str, list[Json]] = {}
    if folder is not None:
        services = {name: model.services[name] for name in model.used if not host_names(model.services[name])}
        made = {f"eds.{name}": [_endpoints(name, service.at)] for name, service in services.items()}
    made["cds"] = _clusters(model, folder)
    if folder is not None:
        made |= {f"rds.{config['name']}": [config] for config in _route_configs(model)}
    made["lds"] = _listeners(model, folder)
    return {stem: [_typed(_KINDS[stem[:3]], **one) for one in found] for stem, found in made.items()}


def bootstrap(model: Model, folder: Path | None) -> Json:
    """What Envoy is started with; without a folder all resources stand in it, for ``envoy --mode validate``.

    Raises Unsupported for API keys.
    """
    if model.settings.keys:
        raise Unsupported("[keys]", "a gateway of Envoy", "use [jwt], or certificates: client_ca in [tls]")
    made: Json = {
        "node": {"id": "stentor", "cluster": "stentor"},
        "admin": {"address": _address(address(model.settings.admin, "admin"))},
    }
    if folder is not None:
        made["dynamic_resources"] = {"lds_config": _file(folder, "lds"), "cds_config": _file(folder, "cds")}
        return made
    found = resources(model, None)
    made["static_resources"] = {
        name: [{key: value for key, value in one.items() if key != "@type"} for one in found[kind]]
        for name, kind in (("listeners", "lds"), ("clusters", "cds"))
    }
    return made
