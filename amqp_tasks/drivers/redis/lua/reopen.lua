-- ARGV: the statuses that can be reopened, that of a new task, now, expires_at, then fields
--       and values of a task that is scheduled anew.

local found = redis.call('HMGET', STATE, 'status', 'expires_at', 'owed')
local status, expires_at, owed = found[1], found[2], found[3]

if status and not among(ARGV[1], status) then
  local first = status == ARGV[2] and owed == 'publish'
  return {status, status, expires_at, status, first and 1 or 0}
end

-- What is left of the life before is when it was created and last started, and the fence.
redis.call('HDEL', STATE, 'lease', 'crashes', 'ended_at', 'due', 'deadline', 'timeout', 'parent',
  'result', 'error', 'reason', 'cancel')
redis.call('HSET', STATE, unpack(ARGV, 5))
redis.call('HSETNX', STATE, 'created_at', ARGV[3])
redis.call('HSETNX', STATE, 'fence', '0')
expire(ARGV[4])
return {status, ARGV[2], ARGV[4], ARGV[2], 1}
