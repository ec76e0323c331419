-- ARGV: the status of a task that runs, that of a canceled one, the ended statuses, reason,
--       now, the channel for its end, the channel for cancel requests without the owner,
--       task id.

local found = redis.call('HMGET', STATE, 'status', 'expires_at', 'lease', 'cancel')
local status, expires_at, lease, requested = found[1], found[2], found[3], found[4]

if not status then
  return {false, false, false, 'unknown'}
end
if among(ARGV[3], status) then
  return {status, status, expires_at, 'ended'}
end
if status == ARGV[1] then
  if not requested or requested == '' then
    redis.call('HSET', STATE, 'cancel', ARGV[4])
  end
  local owner = string.match(lease or '', '^(.*)/') or ''
  announce(ARGV[7] .. owner, ARGV[8])
  return {status, status, expires_at, 'requested'}
end
cancel(ARGV[2], ARGV[4], ARGV[5], false, ARGV[6])
return {status, ARGV[2], false, 'canceled'}
