-- Prepended to every script, after the names of keys.py. ARGV[1] is the clock: 0 in production.
-- At maxmemory Redis refuses a script at its first write, if that may grow. Scripts that free work
-- therefore begin with a removal.
local function redis_ms() local t = redis.call('TIME') return t[1] * 1000 + math.floor(t[2] / 1000) end
local now = tonumber(ARGV[1]) > 0 and tonumber(ARGV[1]) or redis_ms()

-- What the process that runs a script counts in its metrics: {'finished', pool, status, error code},
-- {'submitted', pool}, {'reclaimed', pool} or {'fenced', pool}. Every script answers with it, beside its own answer.
local told = {}
local function tell(...) told[#told + 1] = {...} end

local function job_key(id) return PREFIX .. 'job:' .. id end
local function pool_key(kind, pool) return PREFIX .. kind .. ':' .. pool end
local function open_key(tenant) return PREFIX .. 'open:' .. tenant end
local function ready_key(pool, priority, tenant)
  return PREFIX .. 'ready:' .. pool .. ':' .. priority .. ':' .. tenant
end

local function announce(id, kind, ...)
  redis.call('XADD', PREFIX .. 'events:' .. id, 'MAXLEN', EVENTS_LIMIT, '*', 'type', kind, ...)
  redis.call('PUBLISH', CHANGES, id)
end

-- Enter the fair rings where the others are, so that nobody gains by having been away. The few
-- priorities keep their own time meanwhile; a tenant's is forgotten with its last job. A tenant that
-- joins comes just before those whose last job brought them to the ring's minimum, a whole number, and
-- behind those who have joined like it: a fraction says when.
local function join_rings(pool, priority, tenant, seq)
  local ring = pool_key('ring', pool)
  if not redis.call('ZSCORE', ring, priority) then
    local t = redis.call('HMGET', pool_key('served', pool), priority, 'latest')
    redis.call('ZADD', ring, math.max(tonumber(t[1] or 0), tonumber(t[2] or 0)), priority)
  end
  local tenants = ring .. ':' .. priority
  if not redis.call('ZSCORE', tenants, tenant) then
    local first = redis.call('ZRANGE', tenants, 0, 0, 'WITHSCORES')
    local joined = math.ceil(tonumber(first[2] or 0)) - 1 + (1 + seq % 9998) / 10000
    redis.call('ZADD', tenants, joined, tenant)
  end
end

local function wake(pool)
  local key = pool_key('wake', pool)
  local tokens = redis.call('LPUSH', key, 1)
  if tokens == 1 then redis.call('PEXPIRE', key, WAKE_TTL) end
  if tokens > WAKE_LIMIT then redis.call('LTRIM', key, 0, WAKE_LIMIT - 1) end
end

-- Let workers claim a queued job: alone if it was reclaimed before, else in its tenant's turn.
local function make_ready(id, pool, priority, tenant, seq, solo)
  if solo == '1' then
    redis.call('ZADD', pool_key('solo', pool), seq, id)
  else
    redis.call('ZADD', ready_key(pool, priority, tenant), seq, id)
    join_rings(pool, priority, tenant, seq)
  end
  wake(pool)
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

-- The queued jobs of a pool by submit order, and the sum of their costs by priority.
local function enter_queue(id, pool, priority, seq, cost)
  redis.call('ZADD', pool_key('queued', pool), seq, id)
  redis.call('HINCRBY', pool_key('work', pool), priority, cost)
end

local function leave_queue(id, pool, priority, cost)
  local queued, work = pool_key('queued', pool), pool_key('work', pool)
  if redis.call('ZREM', queued, id) == 0 then return end
  if redis.call('EXISTS', queued) == 0 then
    redis.call('DEL', work)
  else
    redis.call('HINCRBY', work, priority, -cost)
  end
end

-- A tenant's list keeps what has not ended, and the rest for `ttl` ms from its submission.
local function list(id, tenant, seq, ttl)
  local listed = PREFIX .. 'jobs:' .. tenant
  for _, other in ipairs(redis.call('ZRANGE', listed, 0, UNLIST_LIMIT - 1)) do
    local at = redis.call('HGET', job_key(other), 'submitted_ms')
    if at and tonumber(at) > now - ttl then break end
    if not redis.call('ZSCORE', open_key(tenant), other) then redis.call('ZREM', listed, other) end
  end
  redis.call('ZADD', listed, seq, id)
  local life = math.max(ttl, DEAD_TTL)
  if redis.call('PTTL', listed) < life - DAY / 2 then redis.call('PEXPIRE', listed, life) end
end

local function usage_key(tenant) return PREFIX .. 'usage:' .. tenant .. ':' .. math.floor(now / DAY) end

-- Extra arguments are further fields of the job.
local function create(id, spec, tenant, pool, priority, cost, ttl, ...)
  local seq = redis.call('INCR', SEQ)
  redis.call('HSET', job_key(id), 'status', 'queued', 'tenant', tenant, 'pool', pool,
    'priority', priority, 'spec', spec, 'cost', cost, 'seq', seq, 'claim_no', 0, 'attempts', 0,
    'worker', '', 'step', 0, 'total', 0, 'solo', 0, 'submitted_ms', now, ...)
  enter_queue(id, pool, priority, seq, cost)
  redis.call('ZADD', open_key(tenant), seq, id)
  list(id, tenant, seq, ttl)
  local usage = usage_key(tenant)
  if redis.call('HINCRBY', usage, 'jobs', 1) == 1 then redis.call('PEXPIRE', usage, USAGE_TTL) end
  redis.call('HINCRBY', usage, 'cost_ms', cost)
  make_ready(id, pool, priority, tenant, seq)
  announce(id, 'queued')
  tell('submitted', pool)
  return seq
end

-- A running job is queued again, after `delay` ms.
local function requeue(id, delay)
  local f = redis.call('HMGET', job_key(id), 'pool', 'priority', 'tenant', 'seq', 'solo', 'cost')
  redis.call('HSET', job_key(id), 'status', 'queued', 'worker', '', 'step', 0)
  enter_queue(id, f[1], f[2], f[4], f[6])
  if delay > 0 then
    redis.call('ZADD', SCHEDULED, now + delay, id)
  else
    make_ready(id, f[1], f[2], f[3], f[4], f[5])
  end
  announce(id, 'queued')
end

-- A webhook must hear of the end of a job that has one. Whoever delivers it needs nothing else.
local function tell_webhook(id, status, url, key)
  local delivery = PREFIX .. 'delivery:' .. id
  redis.call('HSET', delivery, 'url', url, 'key', key, 'status', status, 'tries', 0,
    'since_ms', now)
  redis.call('PEXPIRE', delivery, OUTBOX_TTL)
  redis.call('ZADD', OUTBOX, now, id)
end

-- The code of the error among the fields of an ending job.
local function error_code(...)
  local fields = {...}
  for i = 1, #fields, 2 do
    if fields[i] == 'error' then return cjson.decode(fields[i + 1]).code end
  end
  return ''
end

-- The one way into a terminal status, from any other. Gives the service's logical time (SEQ), or
-- nothing where there is no such job. Extra arguments are further fields of the job.
local function finish(id, status, ttl, ...)
  local job = job_key(id)
  local f = redis.call('HMGET', job, 'status', 'pool', 'priority', 'tenant', 'cost', 'webhook',
    'webhook_key')
  redis.call('ZREM', LEASE, id)
  redis.call('ZREM', DEADLINE, id)
  if f[1] == 'queued' then
    redis.call('ZREM', SCHEDULED, id)
    redis.call('ZREM', pool_key('solo', f[2]), id)
    leave_ready(id, f[2], f[3], f[4])
    leave_queue(id, f[2], f[3], f[5])
  elseif f[1] ~= 'running' then
    return nil
  end
  redis.call('ZREM', open_key(f[4]), id)
  redis.call('HSET', job, 'status', status, 'finished_ms', now, 'expires_ms', now + ttl, ...)
  redis.call('PEXPIRE', job, ttl)
  if f[6] then tell_webhook(id, status, f[6], f[7] or '') end
  announce(id, status)
  tell('finished', f[2], status, error_code(...))
  redis.call('PEXPIRE', PREFIX .. 'events:' .. id, math.min(ttl, EVENTS_TTL))
  return redis.call('INCR', SEQ)
end

local function bury(id, error)
  redis.call('ZREM', LEASE, id)
  redis.call('ZADD', DEAD, now, id)
  redis.call('ZREMRANGEBYRANK', DEAD, 0, -DEAD_LIMIT - 1)
  return finish(id, 'failed', DEAD_TTL, 'error', error)
end

-- When the queued job of this rank may start: the work before it in submit order, shared by the workers.
local function start_of(pool, rank)
  local total, work = 0, redis.call('HVALS', pool_key('work', pool))
  for i = 1, #work do total = total + tonumber(work[i]) end
  local depth = math.max(1, redis.call('ZCARD', pool_key('queued', pool)))
  local workers = redis.call('ZCOUNT', pool_key('workers', pool), now - DRAIN_TTL, '+inf')
  return now + math.floor(total * rank / depth / math.max(1, workers))
end

-- What is known of a job: its fields as a flat list, and its place among the queued with the time it may
-- start, if it is.
local function record(id)
  local fields, rank, start = redis.call('HGETALL', job_key(id)), false, false
  for i = 1, #fields, 2 do
    if fields[i] == 'pool' then
      rank = redis.call('ZRANK', pool_key('queued', fields[i + 1]), id)
      if rank then start = start_of(fields[i + 1], rank) end
    end
  end
  return {fields, rank, start}
end

local function late(deadline_ms) return deadline_ms and tonumber(deadline_ms) <= now end

-- For scripts that have nothing to remove: this removes nothing, and lets them write at maxmemory.
local function write_at_maxmemory() redis.call('HDEL', STATS, '-') end

-- Counters for operators.
local function count(what, number)
  write_at_maxmemory()
  redis.call('HINCRBY', STATS, what, number)
end

-- The fence: 'held' if this claim is the job's current one, else why it is not: the job was
-- 'canceled' or 'expired', this very claim has 'ended' already (an answer was lost, or a heartbeat
-- crossed the commit), or it is 'lost' to another. Only the last is a stale write, and is counted.
local function claim_state(id, claim_no, worker)
  local f = redis.call('HMGET', job_key(id), 'status', 'claim_no', 'worker', 'ended_claim', 'pool')
  local mine = f[2] == claim_no and f[3] == worker
  if mine and f[1] == 'running' then return 'held' end
  if f[1] == 'canceled' or f[1] == 'expired' then return f[1] end
  if (mine and f[1] == 'succeeded') or f[4] == claim_no then return 'ended' end
  count('fenced', 1)
  tell('fenced', f[5] or '')
  return 'lost'
end

-- Remember that this claim has said its last word, other than by success.
local function end_claim(id, claim_no) redis.call('HSET', job_key(id), 'ended_claim', claim_no) end

local function backoff(attempts, jitter)
  return math.floor(math.min(BACKOFF * 2 ^ (attempts - 1), BACKOFF_LIMIT) * jitter)
end
