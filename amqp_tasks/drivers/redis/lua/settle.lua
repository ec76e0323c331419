-- ARGV: lease, fence, the statuses that the event may come from, the one it leads to,
--       attempt, now, expires_at ('' for none), the channel for its end ('' if it has not
--       ended), name; the status that a cancel request leads to instead ('' if the event
--       wins over one), expires_at ('' for none) and the channel if so; then the fields to be set and
--       their values.

local found = redis.call('HMGET', STATE, 'status', 'expires_at', 'attempt', 'fence', 'lease',
  'cancel')
local status, expires_at, attempt, fence, lease, requested = unpack(found)

if not status then
  redis.call('HSET', STATE, 'name', ARGV[9], 'job', '', 'fence', ARGV[2], 'lease', ARGV[1],
    'created_at', ARGV[6])
elseif (lease or '') ~= ARGV[1] or fence ~= ARGV[2] then
  return {status, status, expires_at, 'stale'}
elseif not among(ARGV[3], status) then
  local repeated = status == ARGV[4] and attempt == ARGV[5]
  return {status, status, expires_at, repeated and 'written' or 'stale'}
elseif requested and ARGV[10] ~= '' then
  local until_ = ARGV[11] ~= '' and ARGV[11]
  cancel(ARGV[10], requested, ARGV[6], until_, ARGV[12])
  return {status, ARGV[10], until_, 'stale'}
else
  redis.call('HDEL', STATE, 'due', 'result', 'reason', 'cancel', 'owed', 'ended_at')
end

redis.call('HSET', STATE, unpack(ARGV, 13))
local until_ = ARGV[7] ~= '' and ARGV[7]
if until_ or expires_at then
  expire(until_)
end
if ARGV[8] ~= '' then
  announce(ARGV[8], ARGV[4])
end
return {status, ARGV[4], until_, 'written'}
