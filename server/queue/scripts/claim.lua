-- ARGV: clock, worker, pool, max jobs, max cost, lease ms, idle ('1': the worker runs nothing)
-- Gives {id, claim_no, attempts, tenant, solo, waited ms, cost, spec}, ...
local worker, pool, room, lease_ms = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[6])
local budget, idle = tonumber(ARGV[5]), ARGV[7] == '1'
local ring, solo, drain = pool_key('ring', pool), pool_key('solo', pool), pool_key('drain', pool)
local claims = {}

local function take(id)
  local job = job_key(id)
  local claim_no = redis.call('HINCRBY', job, 'claim_no', 1)
  local attempts = redis.call('HINCRBY', job, 'attempts', 1)
  local f = redis.call('HMGET', job, 'tenant', 'solo', 'submitted_ms', 'cost', 'spec')
  redis.call('HSET', job, 'status', 'running', 'worker', worker, 'step', 0)
  redis.call('HSETNX', job, 'started_ms', now)
  redis.call('ZREM', pool_key('queued', pool), id)
  redis.call('ZADD', LEASE, now + lease_ms, id)
  announce(id, 'started', 'attempt', attempts)
  claims[#claims + 1] = {id, claim_no, attempts, f[1], f[2], now - f[3], f[4], f[5]}
end

local lone = redis.call('ZRANGE', solo, 0, 0)[1]
if lone and idle then
  redis.call('ZREM', solo, lone)
  redis.call('DEL', drain)
  take(lone)
  return claims
end
-- A solo job needs an idle worker; one busy worker at a time takes nothing new until it is.
if lone then
  redis.call('SET', drain, worker, 'NX', 'PX', DRAIN_TTL)
  if redis.call('GET', drain) == worker then return claims end
end

while #claims < room do
  local first = redis.call('ZRANGE', ring, 0, 0, 'WITHSCORES')
  local priority = first[1]
  if not priority then break end
  local tenants = ring .. ':' .. priority
  local tenant = redis.call('ZRANGE', tenants, 0, 0)[1]
  local id = redis.call('ZRANGE', ready_key(pool, priority, tenant), 0, 0)[1]
  local cost = tonumber(redis.call('HGET', job_key(id), 'cost'))
  if cost > budget and not (idle and #claims == 0) then break end
  budget = budget - cost
  local spent = redis.call('ZINCRBY', ring, cost / WEIGHTS[priority], priority)
  redis.call('HSET', pool_key('served', pool), priority, spent, 'latest', first[2])
  redis.call('ZINCRBY', tenants, cost, tenant)
  leave_ready(id, pool, priority, tenant)
  take(id)
end
return claims
