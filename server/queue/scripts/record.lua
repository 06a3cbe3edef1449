-- ARGV: clock, id. Gives the fields of a job and its rank among the queued of its pool.
return record(ARGV[2])
