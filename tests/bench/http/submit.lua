-- Submits a new erasure with each call: wrk -t2 -c32 -d10s -s tests/bench/http/submit.lua http://HOST:PORT
-- AUTH holds the value of the header Authorization ("Basic …").
local counter = 0
local thread_id = 0
local threads = 0
function setup(thread) thread:set("id", threads); threads = threads + 1 end
function init(args)
  math.randomseed(os.time() * 1000 + id)
end
local function hex(n) return string.format("%0" .. n .. "x", math.random(0, 16 ^ n - 1)) end
request = function()
  counter = counter + 1
  local uuid = hex(8) .. "-" .. hex(4) .. "-4" .. hex(3) .. "-a" .. hex(3) .. "-" .. hex(6) .. hex(6)
  local body = '{"regulation":"gdpr","subject_request_id":"' .. uuid .. '","subject_request_type":"erasure","submitted_time":"2026-10-02T15:00:00Z","subject_identities":{"email":{"value":"' .. hex(8) .. '@example.com","encoding":"raw"}},"api_version":"3.0"}'
  return wrk.format("POST", "/v3/requests", {["content-type"]="application/json", ["authorization"]=os.getenv("AUTH")}, body)
end
