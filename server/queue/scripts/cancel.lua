-- ARGV: clock, id, ttl. A running job is canceled at once; its worker learns that it lost it.
return finish(ARGV[2], 'canceled', tonumber(ARGV[3])) or 0
