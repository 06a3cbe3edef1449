-- ARGV: clock, id of a dead job, id of the new one. Gives 1 if the new job exists.
local old, id = ARGV[2], ARGV[3]
local f = redis.call('HMGET', job_key(old), 'spec', 'tenant', 'pool', 'priority', 'cost', 'retried_as')
if f[6] == id then return 1 end -- said twice
if redis.call('ZREM', DEAD, old) == 0 or not f[1] then return 0 end
create(id, f[1], f[2], f[3], f[4], f[5], 'retry_of', old)
redis.call('HSET', job_key(old), 'retried_as', id)
return 1
