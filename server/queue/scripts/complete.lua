-- ARGV: clock, id, claim_no, worker, result, ttl, steps
-- Gives the logical time if this claim's result stands, else 0.
local id = ARGV[2]
local state = claim_state(id, ARGV[3], ARGV[4])
if state == 'ended' then
  local f = redis.call('HMGET', job_key(id), 'status', 'claim_no')
  -- Said twice; an earlier claim that was handed back has no part in a later one's success.
  return f[1] == 'succeeded' and f[2] == ARGV[3] and 1 or 0
end
if state ~= 'held' then return 0 end
return finish(id, 'succeeded', tonumber(ARGV[6]),
  'result', ARGV[5], 'step', ARGV[7], 'total', ARGV[7])
