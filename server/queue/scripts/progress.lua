-- ARGV: clock, id, claim_no, worker, step, total. Gives the claim's state.
local id = ARGV[2]
local state = claim_state(id, ARGV[3], ARGV[4])
if state == 'held' then
  redis.call('HSET', job_key(id), 'step', ARGV[5], 'total', ARGV[6])
  announce(id, 'progress', 'step', ARGV[5], 'total', ARGV[6])
end
return state
