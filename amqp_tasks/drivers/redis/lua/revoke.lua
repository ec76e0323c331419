-- ARGV: the status of a new task, nonce.

local found = redis.call('HMGET', STATE, 'status', 'expires_at', 'owed', 'nonce')
local status, expires_at, owed, nonce = found[1], found[2], found[3], found[4]

if not status then
  return {false, false, false, 1}
end
if status == ARGV[1] and owed == 'publish' and (nonce or '') == ARGV[2] then
  redis.call('DEL', STATE, EVENTS)
  return {status, false, false, 1}
end
return {status, status, expires_at, 0}
