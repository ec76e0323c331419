-- ARGV: the status of a new task, nonce; then, for one that is kept: the status it ends in, the
--       reason, expires_at, the channel for its end, and the fields to be set and their values.

local found = redis.call('HMGET', STATE, 'status', 'expires_at', 'owed', 'nonce', 'reason')
local status, expires_at, owed, nonce, reason = unpack(found)

if not status then
  return {false, false, false, 1}
end
if (nonce or '') ~= ARGV[2] then
  return {status, status, expires_at, 0}
end
if status ~= ARGV[1] or owed ~= 'publish' then
  return {status, status, expires_at, reason and reason == ARGV[4] and 1 or 0}
end
if not ARGV[3] then
  redis.call('DEL', STATE, EVENTS)
  return {status, false, false, 1}
end
redis.call('HDEL', STATE, 'owed')
redis.call('HSET', STATE, 'status', ARGV[3], 'reason', ARGV[4], unpack(ARGV, 7))
expire(ARGV[5])
announce(ARGV[6], ARGV[3])
return {status, ARGV[3], ARGV[5], 1}
