-- ARGV: clock, limit, max attempts, jitter, error of a lost job, lease ms, ttl and error of a job
--   that missed its deadline, epoch and logical time that the caller knows ('', 0), a fresh epoch
-- Gives {jobs taken from the lost, epoch, logical time, why data must have been lost ('': no)}.
local limit, max_attempts, lease_ms = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[6])
redis.call('ZREMRANGEBYSCORE', DEAD, '-inf', now - DEAD_TTL) -- a removal first: see common.lua

for _, id in ipairs(redis.call('ZRANGEBYSCORE', DEADLINE, '-inf', now, 'LIMIT', 0, limit)) do
  finish(id, 'expired', tonumber(ARGV[7]), 'error', ARGV[8])
end

-- Every process reaps about once a second. If nobody did for longer, Redis was away or everybody
-- was: then workers have had no chance to renew, and each claim gets one more while.
local reaped = tonumber(redis.call('HGET', EPOCH, 'reaped_ms') or now)
local outage = now - reaped > math.max(OUTAGE, lease_ms / 3)
local grace = math.min(lease_ms, GRACE)
local taken = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASE, '-inf', now, 'LIMIT', 0, limit)) do
  local f = redis.call('HMGET', job_key(id), 'status', 'attempts', 'claim_no', 'graced', 'pool')
  local attempts = tonumber(f[2])
  redis.call('ZREM', LEASE, id)
  if f[1] == 'running' and outage and f[4] ~= f[3] then
    redis.call('HSET', job_key(id), 'graced', f[3])
    redis.call('ZADD', LEASE, now + grace, id)
  elseif f[1] == 'running' then
    taken = taken + 1
    tell('reclaimed', f[5])
    if attempts >= max_attempts then
      bury(id, ARGV[5])
    else
      redis.call('HSET', job_key(id), 'solo', 1)
      requeue(id, attempts > 1 and backoff(attempts - 1, ARGV[4]) or 0)
    end
  end
end
if taken > 0 then count('reclaimed', taken) end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', SCHEDULED, '-inf', now, 'LIMIT', 0, limit)) do
  redis.call('ZREM', SCHEDULED, id)
  local f = redis.call('HMGET', job_key(id), 'status', 'pool', 'priority', 'tenant', 'seq', 'solo')
  if f[1] == 'queued' then make_ready(id, f[2], f[3], f[4], f[5], f[6]) end
end

-- The epoch names one unbroken history; SEQ is its logical time. What the caller has seen and
-- Redis no longer knows was lost, until an operator accepts it (epoch.lua).
local known, known_seq = ARGV[9], tonumber(ARGV[10])
local e = redis.call('HMGET', EPOCH, 'id', 'lost', 'accepted')
local seq = redis.call('INCR', SEQ)
local epoch, lost = e[1] or ARGV[11], e[2] or ''
if known ~= '' and lost == '' then
  if not e[1] then
    epoch, lost = known, 'the epoch is gone'
  elseif e[1] ~= known and e[3] ~= '1' then
    lost = 'the epoch is another one'
  elseif e[1] == known and seq <= known_seq then
    lost = 'the newest changes are gone'
  end
end
redis.call('HSET', EPOCH, 'id', epoch, 'reaped_ms', now)
if lost ~= '' then redis.call('HSET', EPOCH, 'lost', lost) end
return {taken, epoch, seq, lost}
