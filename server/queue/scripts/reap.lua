-- ARGV: clock, limit, max attempts, jitter, error. Gives the number of jobs taken from the lost.
local limit, max_attempts = tonumber(ARGV[2]), tonumber(ARGV[3])
local lost = redis.call('ZRANGEBYSCORE', LEASE, '-inf', now, 'LIMIT', 0, limit)
for _, id in ipairs(lost) do
  redis.call('ZREM', LEASE, id)
  local attempts = tonumber(redis.call('HGET', job_key(id), 'attempts'))
  if attempts and attempts >= max_attempts then
    bury(id, ARGV[5])
  elseif attempts then
    redis.call('HSET', job_key(id), 'solo', 1)
    requeue(id, attempts > 1 and backoff(attempts - 1, ARGV[4]) or 0)
  end
end
local due = redis.call('ZRANGEBYSCORE', SCHEDULED, '-inf', now, 'LIMIT', 0, limit)
for _, id in ipairs(due) do
  redis.call('ZREM', SCHEDULED, id)
  if redis.call('EXISTS', job_key(id)) == 1 then make_ready(id) end
end
redis.call('ZREMRANGEBYSCORE', DEAD, '-inf', now - DEAD_TTL)
return #lost
