-- ARGV: clock, id, claim_no, worker, step, total, ttl and error of a job that missed its deadline
-- Gives the claim's state.
local id, job = ARGV[2], job_key(ARGV[2])
local state = claim_state(id, ARGV[3], ARGV[4])
if state ~= 'held' then return state end
if late(redis.call('HGET', job, 'deadline_ms')) then
  finish(id, 'expired', tonumber(ARGV[7]), 'error', ARGV[8])
  return 'expired'
end
redis.call('HDEL', job, 'step') -- a removal first: see common.lua
redis.call('HSET', job, 'step', ARGV[5], 'total', ARGV[6])
announce(id, 'progress', 'step', ARGV[5], 'total', ARGV[6])
return state
