"""What Envoy's Lua filter does in a gateway: read what routes go by, and hand an event to several services."""

from __future__ import annotations

TYPE, SOURCE, KEY, DATA = "x-stentor-type", "x-stentor-source", "x-stentor-key", "x-stentor-data-"

READ = """
local FIELDS = @FIELDS@
local ONCE = {"ce-type", "ce-source", "ce-partitionkey", "content-type"}

local function quoted(value)
  if type(value) == "number" then value = string.format("%.14g", value) end
  if type(value) == "boolean" then value = tostring(value) end
  if type(value) ~= "string" then return nil end
  return (value:gsub("[^!#-$&-~]", function(c) return string.format("%%%02X", c:byte()) end))
end

-- One way to write a value, so that no other way to encode it passes by a route or a rule.
local function canonical(value)
  return value and (value:gsub("%%(%x%x)", function(hex)
    local byte = tonumber(hex, 16)
    if byte > 32 and byte < 127 and byte ~= 34 and byte ~= 37 then return string.char(byte) end
    return "%" .. hex:upper()
  end))
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local function set(name, value)
    if value then headers:replace(name, value) else headers:remove(name) end
  end
  local function refuse(status, text)
    handle:respond({[":status"] = status, ["content-type"] = "text/plain"}, text .. "\\n")
  end
  for _, name in ipairs({"type", "source", "key"}) do headers:remove("x-stentor-" .. name) end
  for field = 0, FIELDS - 1 do headers:remove("x-stentor-data-" .. field) end
  headers:remove("x-dead-letter-reason")
  if headers:get(":method") ~= "POST" or headers:get(":path"):match("^[^?]*") ~= "/events" then return end
  headers:replace(":path", "/events")
  for _, name in ipairs(ONCE) do
    if headers:getNumValues(name) > 1 then return refuse("400", name .. " stands twice") end
  end
  local media = (headers:get("content-type") or ""):lower():match("^%s*([^;%s]*)")
  local structured = media == "application/cloudevents+json"
  if media:match("^application/cloudevents") and not structured then
    return refuse("415", "a gateway routes single events, in binary mode or as application/cloudevents+json")
  end
  local found = handle:streamInfo():dynamicMetadata():get("stentor") or {}
  local event = {type = canonical(headers:get("ce-type")), source = canonical(headers:get("ce-source")),
                 key = canonical(headers:get("ce-partitionkey"))}
  if structured then
    event = {type = quoted(found["type"]), source = quoted(found["source"]), key = quoted(found["key"])}
  end
  if not event.type or event.type == "" then
    return refuse("400", structured and "the body is no CloudEvent with a type" or "ce-type is missing")
  end
  for name, value in pairs(event) do set("x-stentor-" .. name, value) end
  for field = 0, FIELDS - 1 do
    set("x-stentor-data-" .. field, quoted(found[(structured and "s" or "b") .. field]))
  end
  handle:clearRouteCache()
end
"""
"""Writes type, source, key and the fields of data into headers of their own, in one way whatever the mode.

A client cannot set these headers, and what is ambiguous (a header twice, a batch) is refused: what is checked here is
what the service reads.
"""

ACKED = """
local TARGETS = {@TARGETS@}

function envoy_on_request(handle)
  local body = handle:body(true)
  body = body and body:getBytes(0, body:length()) or ""
  local missing, refused = {}, nil
  for _, target in ipairs(TARGETS) do
    local headers = {}
    for name, value in pairs(handle:headers()) do
      if name:match("^ce%-") or name == "content-type" or name == "x-stentor-key" then headers[name] = value end
    end
    headers[":method"], headers[":path"], headers[":authority"] = "POST", "/events", target
    headers["x-stentor-target"] = target
    local answer, text = handle:httpCall("stentor inside", headers, body, 15000)
    local status = tonumber(answer[":status"])
    if status < 200 or status > 299 then
      table.insert(missing, target .. "=" .. status)
      local again = status == 408 or status == 409 or status == 425 or status == 429
      if status > 399 and status < 500 and not again and not refused then refused = {status, text} end
    end
  end
  if #missing == 0 then
    return handle:respond({[":status"] = "202", ["content-type"] = "application/json"}, "{}")
  end
  local status, text = "503", "not taken by all: publish it again with the same id\\n"
  if refused then status, text = tostring(refused[1]), refused[2] or "" end
  handle:respond({[":status"] = status, ["x-not-acked"] = table.concat(missing, ", ")}, text)
end
"""
"""Hands an event to each target in turn; 202 only when all took it, else what is to be done is said.

A 4xx of a target is the answer, since sending the event again would not help. Nothing is remembered: what is published
again reaches those that had it already a second time, with the same id.
"""
