-- ARGV: clock, pool, worker, hash, info. Puts up this worker's offer where there is none, or where
-- the one that stands is another model's whose worker is gone. Gives 1 if it did.
local pool, worker = ARGV[2], ARGV[3]
local f = redis.call('HMGET', pool_key('model', pool), 'info', 'worker', 'hash')
local stands = f[1] and (f[3] == ARGV[4]
  or f[2] and redis.call('ZSCORE', pool_key('workers', pool), f[2]))
if stands then return 0 end
redis.call('HSET', pool_key('model', pool), 'info', ARGV[5], 'worker', worker, 'hash', ARGV[4])
redis.call('SADD', POOLS, pool)
return 1
