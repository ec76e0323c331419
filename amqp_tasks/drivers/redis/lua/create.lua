-- ARGV: nonce, expires_at, status, then the fields of a new task and their values.

local found = redis.call('HMGET', STATE, 'status', 'expires_at', 'owed', 'nonce')
local status, expires_at, owed, nonce = found[1], found[2], found[3], found[4]

if status then
  local new = (nonce or '') == ARGV[1]
  return {status, status, expires_at, new and 1 or 0, owed == 'publish' and 1 or 0}
end

redis.call('HSET', STATE, unpack(ARGV, 4))
expire(ARGV[2])
return {false, ARGV[3], ARGV[2], 1, 1}
