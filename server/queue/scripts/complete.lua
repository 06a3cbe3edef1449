-- ARGV: clock, id, claim_no, worker, result, ttl, steps
-- Gives the logical time if this claim's result stands, else 0.
local id = ARGV[2]
local f = redis.call('HMGET', job_key(id), 'status', 'claim_no', 'worker')
if f[1] == 'succeeded' and f[2] == ARGV[3] and f[3] == ARGV[4] then return 1 end -- said twice
if claim_state(id, ARGV[3], ARGV[4]) ~= 'held' then
  count('fenced', 1)
  return 0
end
return finish(id, 'succeeded', tonumber(ARGV[6]),
  'result', ARGV[5], 'step', ARGV[7], 'total', ARGV[7])
