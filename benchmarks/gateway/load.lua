-- One request again and again: MODEL, KEY and STREAM come from the environment; every prompt has the same twelve sentences.
local prompt = string.rep("The quick brown fox jumps over the lazy dog near the river bank. ", 12)
local stream = os.getenv("STREAM") == "1" and ',"stream":true,"stream_options":{"include_usage":true}' or ""
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.headers["authorization"] = "Bearer " .. os.getenv("KEY")
for name, value in string.gmatch(os.getenv("HEADERS") or "", "([^:;]+):([^;]+)") do wrk.headers[name] = value end
wrk.body = '{"model":"' .. os.getenv("MODEL") .. '","max_tokens":256,"messages":[{"role":"user","content":"' .. prompt .. '"}]' .. stream .. "}"

done = function(summary, latency)
  local e = summary.errors
  io.write(string.format('{"requests":%d,"seconds":%.6f,"p50_us":%d,"p99_us":%d,"failed":%d}\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
