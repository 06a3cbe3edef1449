-- ARGV: clock, id, claim_no, worker, error, ttl, retry ('1'), max attempts, jitter
-- Gives 1 if the claim was current: the job failed, or waits out a backoff for its next attempt.
local id = ARGV[2]
local state = claim_state(id, ARGV[3], ARGV[4])
if state == 'ended' then return redis.call('HGET', job_key(id), 'status') == 'succeeded' and 0 or 1 end
if state ~= 'held' then return 0 end
redis.call('ZREM', LEASE, id) -- a removal first: see common.lua
end_claim(id, ARGV[3])
local attempts = tonumber(redis.call('HGET', job_key(id), 'attempts'))
if ARGV[7] ~= '1' then
  finish(id, 'failed', tonumber(ARGV[6]), 'error', ARGV[5])
elseif attempts >= tonumber(ARGV[8]) then
  bury(id, ARGV[5])
else
  requeue(id, backoff(attempts, ARGV[9]))
end
return 1
