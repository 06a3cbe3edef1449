-- ARGV: clock, id, claim_no, worker. Hands a job back unfinished: its attempt is not charged.
local id = ARGV[2]
if claim_state(id, ARGV[3], ARGV[4]) ~= 'held' then return 0 end
redis.call('ZREM', LEASE, id)
redis.call('HINCRBY', job_key(id), 'attempts', -1)
requeue(id, 0)
return 1
