-- ARGV: owed, attempt, expires_at ('' for none), the ended statuses.

local found = redis.call('HMGET', STATE, 'status', 'expires_at', 'owed', 'attempt')
local status, expires_at, owed, attempt = found[1], found[2], found[3], found[4]

if status and owed == ARGV[1] and attempt == ARGV[2] then
  redis.call('HDEL', STATE, 'owed')
  if not among(ARGV[4], status) then
    expires_at = ARGV[3] ~= '' and ARGV[3]
    expire(expires_at)
  end
end
return {status, status, expires_at}
