-- ARGV: clock, id, claim_no, worker. Hands a job back unfinished: its attempt is not charged.
local id = ARGV[2]
local state = claim_state(id, ARGV[3], ARGV[4])
if state == 'ended' then return redis.call('HGET', job_key(id), 'status') == 'succeeded' and 0 or 1 end
if state ~= 'held' then return 0 end
redis.call('ZREM', LEASE, id) -- a removal first: see common.lua
end_claim(id, ARGV[3])
redis.call('HINCRBY', job_key(id), 'attempts', -1)
requeue(id, 0)
return 1
