-- ARGV: clock, id, ttl. A running job is canceled at once; its worker learns that it lost it.
local id = ARGV[2]
local f = redis.call('HMGET', job_key(id), 'status', 'pool', 'priority', 'tenant')
if f[1] ~= 'queued' and f[1] ~= 'running' then return 0 end
redis.call('ZREM', LEASE, id)
redis.call('ZREM', SCHEDULED, id)
redis.call('ZREM', pool_key('queued', f[2]), id)
redis.call('ZREM', pool_key('solo', f[2]), id)
if f[1] == 'queued' then leave_ready(id, f[2], f[3], f[4]) end
finish(id, 'canceled', tonumber(ARGV[3]))
return 1
