-- ARGV: clock, worker, pool, max jobs, max cost, lease ms, idle ('1': the worker runs nothing),
--   ttl and error of a job that missed its deadline
-- Gives {id, claim_no, attempts, tenant, solo, waited ms, cost, spec, priority,
--   ms to its deadline or -1}, ...
write_at_maxmemory() -- what is queued must get done, or no memory is ever freed
local worker, pool, room, lease_ms = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[6])
local budget, idle = tonumber(ARGV[5]), ARGV[7] == '1'
local ring, solo, drain = pool_key('ring', pool), pool_key('solo', pool), pool_key('drain', pool)
local claims, expired = {}, 0

-- Whether a job is too late to begin; it expires here rather than take a device.
local function too_late(id, deadline_ms)
  if not late(deadline_ms) then return false end
  finish(id, 'expired', tonumber(ARGV[8]), 'error', ARGV[9])
  expired = expired + 1
  return true
end

local function look(id)
  return redis.call('HMGET', job_key(id), 'tenant', 'solo', 'submitted_ms', 'cost', 'spec',
    'priority', 'claim_no', 'attempts', 'started_ms', 'deadline_ms', 'weight')
end

local function take(id, f)
  local job = job_key(id)
  local claim_no, attempts = f[7] + 1, f[8] + 1
  redis.call('HSET', job, 'status', 'running', 'worker', worker, 'step', 0, 'claim_no', claim_no,
    'attempts', attempts, 'started_ms', f[9] or now)
  leave_queue(id, pool, f[6], f[4])
  redis.call('ZADD', LEASE, now + lease_ms, id)
  announce(id, 'started', 'attempt', attempts)
  claims[#claims + 1] = {id, claim_no, attempts, f[1], f[2], now - f[3], f[4], f[5], f[6],
    f[10] and f[10] - now or -1}
end

-- The oldest solo job with its fields. One without a record, as an evicting Redis leaves behind, would
-- stop every claim for ever: it is forgotten, here and below.
local function next_lone()
  while expired < EXPIRE_LIMIT do
    local id = redis.call('ZRANGE', solo, 0, 0)[1]
    local f = id and look(id)
    if not id then return nil end
    if not f[1] then
      redis.call('ZREM', solo, id)
    elseif not too_late(id, f[10]) then
      return id, f
    end
  end
end

local lone, fields
if room > 0 then lone, fields = next_lone() end
if lone and idle then
  redis.call('ZREM', solo, lone)
  redis.call('DEL', drain)
  take(lone, fields)
  return claims
end
-- A solo job needs an idle worker; one busy worker at a time takes nothing new until it is.
if lone then
  redis.call('SET', drain, worker, 'NX', 'PX', DRAIN_TTL)
  if redis.call('GET', drain) == worker then return claims end
end

while #claims < room and expired < EXPIRE_LIMIT do
  local first = redis.call('ZRANGE', ring, 0, 0, 'WITHSCORES')
  local priority = first[1]
  if not priority then break end
  local tenants = ring .. ':' .. priority
  local next_tenant = redis.call('ZRANGE', tenants, 0, 0, 'WITHSCORES')
  local tenant = next_tenant[1]
  local id = redis.call('ZRANGE', ready_key(pool, priority, tenant), 0, 0)[1]
  local f = look(id)
  if not f[1] then
    leave_ready(id, pool, priority, tenant)
  elseif not too_late(id, f[10]) then
    local cost = tonumber(f[4])
    if cost > budget and not (idle and #claims == 0) then break end
    budget = budget - cost
    local spent = redis.call('ZINCRBY', ring, cost / WEIGHTS[priority], priority)
    redis.call('HSET', pool_key('served', pool), priority, spent, 'latest', first[2])
    -- A tenant's time passes more slowly the more it weighs; it stays whole (see join_rings).
    local passed = math.ceil(cost / (tonumber(f[11]) or 1))
    redis.call('ZADD', tenants, math.ceil(tonumber(next_tenant[2])) + passed, tenant)
    leave_ready(id, pool, priority, tenant)
    take(id, f)
  end
end
return claims
