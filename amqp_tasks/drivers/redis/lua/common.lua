-- Begins every script of this folder; `core.rules.change` says what they have to do.
--
-- KEYS: the task's state (a hash) and its events (a stream). Both are in the task's slot,
-- and a script touches nothing else. A field that is not in the hash has its default, which
-- is None for most. Numbers are kept as the texts that came in, so that they come out equal.
--
-- A script answers {status before, status after, expires_at after, ...}, with false for
-- what is not there, so that the index can follow.
--
-- Redis does not undo what a failed script has written. Therefore what can fail (memory,
-- permissions) fails at the first write, and expire() comes last: a time that is over
-- deletes the keys at once.

local STATE, EVENTS = KEYS[1], KEYS[2]

local function among(statuses, status)
  return string.find(statuses, ',' .. status .. ',', 1, true) ~= nil
end

local function expire_key(key, at)
  redis.call('PEXPIREAT', key, string.format('%.0f', math.ceil(tonumber(at) * 1000)))
end

-- Keep the task until `at` (seconds, as text), or for good if that is false.
local function expire(at)
  if at then
    redis.call('HSET', STATE, 'expires_at', at)
    expire_key(STATE, at)
    expire_key(EVENTS, at)
  else
    redis.call('HDEL', STATE, 'expires_at')
    redis.call('PERSIST', STATE)
    redis.call('PERSIST', EVENTS)
  end
end

-- Announcements may be lost, so one that is not permitted must not fail what was written.
local function announce(channel, text)
  redis.pcall('PUBLISH', channel, text)
end

-- `expires_at` is false if a message is on its way: the state is kept until that comes.
local function cancel(status, reason, now, expires_at, channel)
  redis.call('HDEL', STATE, 'cancel', 'owed')
  redis.call('HSET', STATE, 'status', status, 'reason', reason, 'updated_at', now, 'ended_at', now)
  expire(expires_at)
  announce(channel, status)
end
