-- ARGV: clock, id, tries as taken, ms until the next try (-1: it was delivered, or never will be),
--   untried ('1': it is put back as it was)
-- Gives 1 unless another deliverer has taken it since.
local id, delivery = ARGV[2], PREFIX .. 'delivery:' .. ARGV[2]
if redis.call('HGET', delivery, 'tries') ~= ARGV[3] then return 0 end
redis.call('ZREM', OUTBOX, id)
if ARGV[4] == '-1' then
  redis.call('DEL', delivery)
else
  redis.call('ZADD', OUTBOX, now + tonumber(ARGV[4]), id)
  if ARGV[5] == '1' then redis.call('HINCRBY', delivery, 'tries', -1) end
end
return 1
