-- ARGV: clock, id, spec, tenant, pool, priority, cost, depth limit
-- A job that exists already is left as it is: repeating a submission is safe.
local id, spec, tenant, pool, priority = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if redis.call('EXISTS', job_key(id)) == 1 then return 'exists' end
local queued = pool_key('queued', pool)
if redis.call('ZCARD', queued) >= tonumber(ARGV[8]) then return 'full' end
local seq = redis.call('INCR', PREFIX .. 'seq')
redis.call('HSET', job_key(id), 'status', 'queued', 'tenant', tenant, 'pool', pool,
  'priority', priority, 'spec', spec, 'cost', ARGV[7], 'seq', seq, 'claim_no', 0, 'attempts', 0,
  'worker', '', 'step', 0, 'total', 0, 'solo', 0, 'submitted_ms', now)
redis.call('ZADD', queued, seq, id)
make_ready(id)
announce(id, 'queued')
return 'queued'
