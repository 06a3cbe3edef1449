-- Prepended to every script, after the names of keys.py. ARGV[1] is the clock: 0 in production.
local function redis_ms() local t = redis.call('TIME') return t[1] * 1000 + math.floor(t[2] / 1000) end
local now = tonumber(ARGV[1]) > 0 and tonumber(ARGV[1]) or redis_ms()

local function job_key(id) return PREFIX .. 'job:' .. id end
local function pool_key(kind, pool) return PREFIX .. kind .. ':' .. pool end
local function ready_key(pool, priority, tenant)
  return PREFIX .. 'ready:' .. pool .. ':' .. priority .. ':' .. tenant
end

local function announce(id, kind, ...)
  redis.call('XADD', PREFIX .. 'events:' .. id, 'MAXLEN', EVENTS_LIMIT, '*', 'type', kind, ...)
  redis.call('PUBLISH', CHANGES, id)
end

-- Enter the fair rings where the others are, so that nobody gains by having been away. The few
-- priorities keep their own time meanwhile; a tenant's is forgotten with its last job.
local function join_rings(pool, priority, tenant)
  local ring = pool_key('ring', pool)
  if not redis.call('ZSCORE', ring, priority) then
    local t = redis.call('HMGET', pool_key('served', pool), priority, 'latest')
    redis.call('ZADD', ring, math.max(tonumber(t[1] or 0), tonumber(t[2] or 0)), priority)
  end
  local tenants = ring .. ':' .. priority
  if not redis.call('ZSCORE', tenants, tenant) then
    local first = redis.call('ZRANGE', tenants, 0, 0, 'WITHSCORES')
    redis.call('ZADD', tenants, first[2] or 0, tenant)
  end
end

local function wake(pool)
  local key = pool_key('wake', pool)
  redis.call('LPUSH', key, 1)
  redis.call('LTRIM', key, 0, WAKE_LIMIT - 1)
  redis.call('PEXPIRE', key, WAKE_TTL)
end

-- Let workers claim a queued job: alone if it was reclaimed before, else in its tenant's turn.
local function make_ready(id)
  local f = redis.call('HMGET', job_key(id), 'pool', 'priority', 'tenant', 'seq', 'solo')
  local pool, priority, tenant, seq = f[1], f[2], f[3], f[4]
  if f[5] == '1' then
    redis.call('ZADD', pool_key('solo', pool), seq, id)
  else
    redis.call('ZADD', ready_key(pool, priority, tenant), seq, id)
    join_rings(pool, priority, tenant)
  end
  wake(pool)
end

-- A running job is queued again, after `delay` ms.
local function requeue(id, delay)
  local f = redis.call('HMGET', job_key(id), 'pool', 'seq')
  redis.call('HSET', job_key(id), 'status', 'queued', 'worker', '', 'step', 0)
  redis.call('ZADD', pool_key('queued', f[1]), f[2], id)
  if delay > 0 then redis.call('ZADD', SCHEDULED, now + delay, id) else make_ready(id) end
  announce(id, 'queued')
end

-- The one way into a terminal status. Extra arguments are further fields of the job.
local function finish(id, status, ttl, ...)
  redis.call('HSET', job_key(id), 'status', status, 'finished_ms', now, 'expires_ms', now + ttl, ...)
  redis.call('PEXPIRE', job_key(id), ttl)
  announce(id, status)
  redis.call('PEXPIRE', PREFIX .. 'events:' .. id, math.min(ttl, EVENTS_TTL))
end

local function bury(id, error)
  redis.call('ZADD', DEAD, now, id)
  redis.call('ZREMRANGEBYRANK', DEAD, 0, -DEAD_LIMIT - 1)
  finish(id, 'failed', DEAD_TTL, 'error', error)
end

-- Take a job out of its tenant's list; a tenant or priority without work leaves its ring.
local function leave_ready(id, pool, priority, tenant)
  local list, ring = ready_key(pool, priority, tenant), pool_key('ring', pool)
  redis.call('ZREM', list, id)
  if redis.call('EXISTS', list) == 0 then
    redis.call('ZREM', ring .. ':' .. priority, tenant)
    if redis.call('EXISTS', ring .. ':' .. priority) == 0 then redis.call('ZREM', ring, priority) end
  end
end

-- The fence: 'held' if this claim is the job's current one, else why it is not.
local function claim_state(id, claim_no, worker)
  local f = redis.call('HMGET', job_key(id), 'status', 'claim_no', 'worker')
  if f[1] == 'running' and f[2] == claim_no and f[3] == worker then return 'held' end
  return f[1] == 'canceled' and 'canceled' or 'lost'
end

local function backoff(attempts, jitter)
  return math.floor(BACKOFF * 2 ^ (attempts - 1) * jitter)
end
