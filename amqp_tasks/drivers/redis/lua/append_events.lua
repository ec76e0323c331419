-- ARGV: fence, then the entries. The answer is 1, or 0 if the fence is stale.

local found = redis.call('HMGET', STATE, 'fence', 'expires_at')

if found[1] ~= ARGV[1] then
  return 0
end
for i = 2, #ARGV do
  redis.call('XADD', EVENTS, '*', 'data', ARGV[i])
end
if found[2] then
  expire_key(EVENTS, found[2])
end
return 1
