-- ARGV: clock, id of a dead job, id of the new one, ttl. Gives 1 if the new job exists.
local old, id = ARGV[2], ARGV[3]
local f = redis.call('HMGET', job_key(old), 'spec', 'tenant', 'pool', 'priority', 'cost', 'retried_as',
  'webhook', 'webhook_key', 'weight')
if f[6] == id then return 1 end -- said twice
if redis.call('ZREM', DEAD, old) == 0 or not f[1] then return 0 end
local fields = {'retry_of', old, 'weight', f[9] or 1}
if f[7] then fields = {'retry_of', old, 'weight', f[9] or 1, 'webhook', f[7], 'webhook_key', f[8] or ''} end
create(id, f[1], f[2], f[3], f[4], f[5], tonumber(ARGV[4]), unpack(fields))
redis.call('HSET', job_key(old), 'retried_as', id)
return 1
