-- ARGV: clock, pool. Reads only.
-- Gives {priority, queued, age of the oldest in ms, cost of the queued in ms, running, cost left of the
-- running in ms} for each priority. Costs a look at every tenant with work and every running job.
local pool, found = ARGV[2], {}
local work = {}
for priority in pairs(WEIGHTS) do found[priority] = {queued = 0, since = now, running = 0, left = 0} end

local function waits(id, number)
  local f = redis.call('HMGET', job_key(id), 'pool', 'priority', 'submitted_ms', 'status')
  local entry = found[f[2]]
  if not entry or f[1] ~= pool or f[4] ~= 'queued' then return end
  entry.queued = entry.queued + number
  entry.since = math.min(entry.since, tonumber(f[3]))
end

for priority in pairs(WEIGHTS) do
  for _, tenant in ipairs(redis.call('ZRANGE', pool_key('ring', pool) .. ':' .. priority, 0, -1)) do
    local list = ready_key(pool, priority, tenant)
    local first = redis.call('ZRANGE', list, 0, 0)[1]
    if first then waits(first, redis.call('ZCARD', list)) end
  end
end
for _, id in ipairs(redis.call('ZRANGE', pool_key('solo', pool), 0, -1)) do waits(id, 1) end
for _, id in ipairs(redis.call('ZRANGE', SCHEDULED, 0, -1)) do waits(id, 1) end

for _, id in ipairs(redis.call('ZRANGE', LEASE, 0, -1)) do
  local f = redis.call('HMGET', job_key(id), 'pool', 'priority', 'cost', 'step', 'total')
  local entry = found[f[2]]
  if entry and f[1] == pool then
    local step, total = tonumber(f[4] or 0), tonumber(f[5] or 0)
    entry.running = entry.running + 1
    entry.left = entry.left + tonumber(f[3]) * (total > 0 and 1 - step / total or 1)
  end
end

local costs = redis.call('HGETALL', pool_key('work', pool))
for i = 1, #costs, 2 do work[costs[i]] = costs[i + 1] end
local answer = {}
for priority, entry in pairs(found) do
  answer[#answer + 1] = {
    priority, entry.queued, now - entry.since, tonumber(work[priority] or 0), entry.running,
    math.floor(entry.left + 0.5),
  }
end
return answer
