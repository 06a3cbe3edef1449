-- ARGV: clock, id, claim_no, worker, result, ttl, steps
-- Gives the logical time if this claim's result stands, else 0.
local id = ARGV[2]
local state = claim_state(id, ARGV[3], ARGV[4])
if state == 'ended' and redis.call('HGET', job_key(id), 'status') == 'succeeded' then
  return 1 -- said twice
end
if state ~= 'held' then return 0 end
return finish(id, 'succeeded', tonumber(ARGV[6]),
  'result', ARGV[5], 'step', ARGV[7], 'total', ARGV[7])
