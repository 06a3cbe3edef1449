-- ARGV: clock, ids of dead jobs, .... Forgets them; gives how many there were.
local purged = 0
for i = 2, #ARGV do
  if redis.call('ZREM', DEAD, ARGV[i]) == 1 then
    redis.call('DEL', job_key(ARGV[i]), PREFIX .. 'events:' .. ARGV[i])
    purged = purged + 1
  end
end
return purged
