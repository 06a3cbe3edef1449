-- ARGV: clock, id, spec, result ('': none), error ('': none), pictures, partial pictures of each.
-- Puts what is given in the place of a finished job's own, so that its words and pictures are gone.
-- Gives 1 where there is such a job.
local id, job = ARGV[2], job_key(ARGV[2])
local status = redis.call('HGET', job, 'status')
if not status or status == 'queued' or status == 'running' then return 0 end
local preview = PREFIX .. 'preview:' .. id
redis.call('DEL', preview, PREFIX .. 'watch:' .. id) -- a removal first: see common.lua
for image = 0, tonumber(ARGV[6]) - 1 do
  for number = 0, tonumber(ARGV[7]) - 1 do
    redis.call('DEL', preview .. ':' .. image .. ':' .. number)
  end
end
redis.call('ZREM', DEAD, id) -- nobody can repeat it
redis.call('HSET', job, 'spec', ARGV[3])
if ARGV[4] ~= '' then redis.call('HSET', job, 'result', ARGV[4]) end
if ARGV[5] ~= '' then redis.call('HSET', job, 'error', ARGV[5]) end
return 1
