-- ARGV: clock, id, spec, tenant, pool, priority, cost, depth limit, tenant limit,
--   deadline (ms from now, 0: none), lease ms, hash of the idempotency key ('': none), of the body,
--   ttl of results, jobs a day (0: any), webhook ('': none), watched ('1': previews are asked for),
--   hash of the key that signs the webhook, weight of the tenant
-- Gives {state, job id, logical time, estimated wait ms, queued work ms per worker, found}: `found` is
--   the record of a job that exists, {now, rank, estimated start} of a new one.
-- A job that exists already is left as it is: repeating a submission is safe.
local id, spec, tenant, pool, priority = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local cost, deadline, key_hash = tonumber(ARGV[7]), tonumber(ARGV[10]), ARGV[12]
if redis.call('EXISTS', job_key(id)) == 1 then return {'exists', id, 0, 0, 0, record(id)} end
local idem = PREFIX .. 'idem:' .. tenant .. ':' .. key_hash
-- A key stands for its job's final answer; "not enough memory" is none, but says: come back later.
local function stands(other)
  local f = redis.call('HMGET', job_key(other), 'status', 'error')
  return f[1] and not (f[1] == 'failed' and string.find(f[2] or '', '"code":"out-of-memory"', 1, true))
end
if key_hash ~= '' then
  local known = redis.call('HMGET', idem, 'job', 'body')
  if known[1] and stands(known[1]) then
    local state = known[2] == ARGV[13] and 'exists' or 'mismatch'
    return {state, known[1], 0, 0, 0, record(known[1])}
  end
end

-- A class gets its share of the device while others have work; it never waits for more than all.
local total, mine, weights = 0, 0, WEIGHTS[priority]
local work = redis.call('HGETALL', pool_key('work', pool))
for i = 1, #work, 2 do
  local ms = tonumber(work[i + 1])
  total = total + ms
  if work[i] == priority then mine = ms elseif ms > 0 then weights = weights + WEIGHTS[work[i]] end
end
local workers = redis.call('ZCOUNT', pool_key('workers', pool), now - tonumber(ARGV[11]), '+inf')
workers = math.max(1, workers)
local wait = math.floor(math.min(total, mine * weights / WEIGHTS[priority]) / workers)
local each = math.floor(total / workers)

local function refuse(why) return {why, id, 0, wait, each, {}} end
local depth = redis.call('ZCARD', pool_key('queued', pool))
if depth >= tonumber(ARGV[8]) then return refuse('full') end
if redis.call('ZCARD', open_key(tenant)) >= tonumber(ARGV[9]) then return refuse('tenant') end
local daily = tonumber(ARGV[15])
if daily > 0 and tonumber(redis.call('HGET', usage_key(tenant), 'jobs') or 0) >= daily then
  return {'quota', id, 0, DAY - now % DAY, each, {}}
end
if deadline > 0 and wait + cost > deadline then return refuse('late') end

local fields = {}
if ARGV[16] ~= '' then fields = {'webhook', ARGV[16], 'webhook_key', ARGV[18]} end
if ARGV[19] ~= '1' then
  fields[#fields + 1] = 'weight'
  fields[#fields + 1] = ARGV[19]
end
if deadline > 0 then
  fields[#fields + 1] = 'deadline_ms'
  fields[#fields + 1] = now + deadline
  redis.call('ZADD', DEADLINE, now + deadline, id)
end
local seq = create(id, spec, tenant, pool, priority, cost, tonumber(ARGV[14]), unpack(fields))
if ARGV[17] == '1' then redis.call('SET', PREFIX .. 'watch:' .. id, 1, 'PX', PREVIEW_TTL) end
if key_hash ~= '' then
  redis.call('HSET', idem, 'job', id, 'body', ARGV[13])
  redis.call('PEXPIRE', idem, IDEM_TTL)
end
return {'queued', id, seq, wait, each, {now, depth, start_of(pool, depth)}}
