-- ARGV: clock, worker, pool, lease ms, then id, claim_no of every job the worker holds
-- Renews the leases it still has and gives the state of every claim, in their order.
local worker, pool, lease_ms = ARGV[2], ARGV[3], tonumber(ARGV[4])
local states, held = {}, 0
for i = 5, #ARGV, 2 do
  local id = ARGV[i]
  local state = claim_state(id, ARGV[i + 1], worker)
  if state == 'held' then
    redis.call('ZREM', LEASE, id) -- frees memory first: at maxmemory a script must begin so
    redis.call('ZADD', LEASE, now + lease_ms, id)
    held = held + 1
  end
  states[#states + 1] = state
end
local workers = pool_key('workers', pool)
redis.call('ZREMRANGEBYSCORE', workers, '-inf', now - lease_ms)
redis.call('ZADD', workers, now, worker)
local entry = PREFIX .. 'worker:' .. worker
redis.call('HSET', entry, 'pool', pool, 'running', held, 'beat_ms', now)
redis.call('PEXPIRE', entry, lease_ms)
return states
