-- ARGV: clock, worker, pool, lease ms, draining ('1'), then id, claim_no of every job it holds
-- Renews the leases it still has and gives the state of every claim, in their order.
-- A draining worker keeps its leases but no longer counts as one that takes work.
local worker, pool, lease_ms = ARGV[2], ARGV[3], tonumber(ARGV[4])
local states, held = {}, 0
for i = 6, #ARGV, 2 do
  local id = ARGV[i]
  local state = claim_state(id, ARGV[i + 1], worker)
  if state == 'held' then
    redis.call('ZREM', LEASE, id) -- a removal first: see common.lua
    redis.call('ZADD', LEASE, now + lease_ms, id)
    held = held + 1
  end
  states[#states + 1] = state
end
local workers, entry = pool_key('workers', pool), PREFIX .. 'worker:' .. worker
redis.call('ZREMRANGEBYSCORE', workers, '-inf', now - lease_ms)
if ARGV[5] == '1' then
  redis.call('ZREM', workers, worker)
  redis.call('DEL', entry)
else
  redis.call('ZADD', workers, now, worker)
  redis.call('HSET', entry, 'pool', pool, 'running', held, 'beat_ms', now)
  redis.call('PEXPIRE', entry, lease_ms)
end
return states
