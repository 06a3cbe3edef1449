-- ARGV: clock, limit, lease ms. Takes deliveries that are due; each is due again when the lease ends,
-- should its deliverer die. Gives {job id, url, status, tries so far, ms since the end, hash of the key
-- that signs}, ...
local due = redis.call('ZRANGEBYSCORE', OUTBOX, '-inf', now, 'LIMIT', 0, tonumber(ARGV[2]))
local taken = {}
for _, id in ipairs(due) do
  local delivery = PREFIX .. 'delivery:' .. id
  local f = redis.call('HMGET', delivery, 'url', 'status', 'since_ms', 'key')
  redis.call('ZREM', OUTBOX, id) -- a removal first: see common.lua
  if f[1] then -- otherwise its day is over
    redis.call('ZADD', OUTBOX, now + tonumber(ARGV[3]), id)
    local tries = redis.call('HINCRBY', delivery, 'tries', 1)
    taken[#taken + 1] = {id, f[1], f[2], tries, now - f[3], f[4] or ''}
  end
end
return taken
