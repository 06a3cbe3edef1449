-- ARGV: clock, id, claim_no, worker, result, ttl, steps. Gives 1 if this claim's result stands.
local id = ARGV[2]
local f = redis.call('HMGET', job_key(id), 'status', 'claim_no', 'worker')
if f[1] == 'succeeded' and f[2] == ARGV[3] and f[3] == ARGV[4] then return 1 end -- said twice
if claim_state(id, ARGV[3], ARGV[4]) ~= 'held' then return 0 end
redis.call('ZREM', LEASE, id)
finish(id, 'succeeded', tonumber(ARGV[6]), 'result', ARGV[5], 'step', ARGV[7], 'total', ARGV[7])
return 1
