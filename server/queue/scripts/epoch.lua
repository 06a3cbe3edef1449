-- ARGV: clock, a fresh epoch. The operator accepts that data were lost: a new history begins.
redis.call('DEL', EPOCH)
redis.call('HSET', EPOCH, 'id', ARGV[2], 'accepted', 1, 'reaped_ms', now)
return ARGV[2]
