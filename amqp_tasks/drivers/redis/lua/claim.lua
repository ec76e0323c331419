-- ARGV: the status of a task that runs, that of a canceled one, the ended statuses, attempt,
--       lease, now, the least fence, the lease whose owner is gone ('' for none), expires_at if it has ended, the channel for its end, job, parent (''
--       for none), ttl of an ended task, then fields and values of a task that nobody knows.

local RUNNING, CANCELED, ENDED = ARGV[1], ARGV[2], ARGV[3]
local found = redis.call('HMGET', STATE, 'status', 'expires_at', 'attempt', 'fence', 'lease',
  'crashes', 'cancel', 'owed', 'job', 'parent')
local status, expires_at, attempt = found[1], found[2], found[3]
local fence, lease, crashes = tonumber(found[4] or 0), found[5] or '', found[6] or '0'
local requested, owed = found[7], found[8]

local function owner_of(any_lease)
  return string.match(any_lease, '^(.*)/') or ''
end

local function refuse(...)
  return {status, status, expires_at, ...}
end

local function owing(due)
  return refuse('owing', owed, attempt, due, redis.call('HGET', STATE, 'error'), lease)
end

if status then
  local known, asked = tonumber(attempt), tonumber(ARGV[4])
  if among(ENDED, status) then
    if owed == 'error' and known == asked then
      return owing(false)
    end
    if not expires_at then
      expires_at = ARGV[9]
      local due = tonumber(redis.call('HGET', STATE, 'due') or 0)
      local now = tonumber(ARGV[6])
      if due > now and due < now + 1e9 then
        expires_at = string.format('%.17g', due + tonumber(ARGV[13]))
      end
      expire(expires_at)
    end
    return refuse('ended', status)
  end
  if asked < known then
    if owed == 'retry' and asked == known - 1 then
      return owing(redis.call('HGET', STATE, 'due'))
    end
    return refuse('duplicate', attempt)
  end
  if status == RUNNING then
    if lease == ARGV[5] then
      return refuse('granted', found[4], crashes)
    end
    if lease ~= ARGV[8] or lease == '' then
      return refuse('held', lease)
    end
    if requested then
      cancel(CANCELED, requested, ARGV[6], ARGV[9], ARGV[10])
      return {status, CANCELED, ARGV[9], 'ended', CANCELED}
    end
    -- Who takes a lease of his own again has not died under it; and if there is a message
    -- for a later attempt, this one was settled, and the store has lost that.
    if known == asked and owner_of(lease) ~= owner_of(ARGV[5]) then
      crashes = string.format('%.0f', tonumber(crashes) + 1)
    end
  end
else
  redis.call('HSET', STATE, unpack(ARGV, 14))
end

fence = string.format('%.0f', math.max(fence + 1, tonumber(ARGV[7])))
redis.call('HSET', STATE, 'status', RUNNING, 'attempt', ARGV[4], 'fence', fence,
  'lease', ARGV[5], 'crashes', crashes, 'started_at', ARGV[6], 'updated_at', ARGV[6])
redis.call('HDEL', STATE, 'due', 'owed')
-- A state that was written anew by a settlement knew neither of these.
if status and found[9] == '' then
  redis.call('HSET', STATE, 'job', ARGV[11])
end
if status and not found[10] and ARGV[12] ~= '' then
  redis.call('HSET', STATE, 'parent', ARGV[12])
end
if expires_at then
  expire(false)
end
return {status, RUNNING, false, 'granted', fence, crashes}
