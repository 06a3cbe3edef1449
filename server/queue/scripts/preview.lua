-- ARGV: clock, id, claim_no, worker, name below the job's preview ('': the latest), picture
-- Keeps a preview for a minute if the claim is current, and tells who looks. Gives the claim's state.
local id = ARGV[2]
local state = claim_state(id, ARGV[3], ARGV[4])
if state ~= 'held' then return state end
redis.call('SET', PREFIX .. 'preview:' .. id .. ARGV[5], ARGV[6], 'PX', PREVIEW_TTL)
redis.call('PUBLISH', CHANGES, id .. ':preview' .. ARGV[5])
return state
