-- ARGV: clock, ids, .... A running job without a lease, which no transition leaves behind, gets one
-- that has ended: the reaper takes it back. Gives how many there were.
write_at_maxmemory()
local found = 0
for i = 2, #ARGV do
  local id = ARGV[i]
  if redis.call('HGET', job_key(id), 'status') == 'running' and not redis.call('ZSCORE', LEASE, id) then
    redis.call('ZADD', LEASE, now, id)
    found = found + 1
  end
end
return found
