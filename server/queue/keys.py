"""Every Redis key and every TTL of the queue, for Python and, as a prelude, for the Lua scripts.

All keys share one hash tag, so that a script may touch any of them on a Redis Cluster too.
Times are integer milliseconds.

key                               type    holds
job:<id>                          hash    one job; TTL once it has ended
queued:<pool>                     zset    every queued job by submit order: depth and positions
work:<pool>                       hash    priority -> sum of the costs of its queued jobs, in ms
ready:<pool>:<priority>:<tenant>  zset    jobs to claim, by submit order
ring:<pool>                       zset    priorities with work -> virtual time (cost / weight)
served:<pool>                     hash    a priority's virtual time while it has no work
ring:<pool>:<priority>            zset    tenants with work -> virtual time (cost)
solo:<pool>                       zset    reclaimed jobs, each to run alone, by submit order
drain:<pool>                      string  the busy worker that empties itself for a solo job
lease                             zset    running jobs -> end of their lease
scheduled                         zset    jobs waiting out a backoff -> when they are due
deadline                          zset    jobs that must end by some time -> that time
dead                              zset    jobs that used up their attempts -> when
open:<tenant>                     zset    a tenant's jobs that have not ended
jobs:<tenant>                     zset    a tenant's jobs by submit order, as long as results live
usage:<tenant>:<day>              hash    jobs and cost of a UTC day; two days
idem:<tenant>:<sha256 of key>     hash    job of an Idempotency-Key, and hash of its body; TTL
events:<id>                       stream  what happened to a job; an hour after its end
preview:<id>                      string  latest preview picture; a minute
preview:<id>:<image>:<k>          string  partial picture k of picture `image`; a minute
watch:<id>                        string  somebody looks at the job's previews; a minute
outbox                            zset    jobs whose end a webhook must tell -> next try; a day
delivery:<id>                     hash    where to, what, and tries so far; a day
wake:<pool>                       list    tokens that wake idle workers
model:<pool>                      hash    what the workers of the pool serve, and who said so
pools                             set     pools with a published model
workers:<pool>                    zset    workers -> last heartbeat
worker:<id>                       hash    one worker; expires without heartbeats
seq                               string  logical time: grows with every job that comes or ends
epoch                             hash    names one unbroken history; when it was last looked at
stats                             hash    fenced writes and reclaimed jobs, counted
signing                           string  key of signed URLs
apikey:<sha256>                   hash    one API key, without the key itself
apikeys                           zset    sha256 of every API key -> when it was made
rate:<...>                        string  requests of a key in this minute (the library limits)
webhook-secret                    string  signs webhooks of callers without a key
sweep                             string  who sweeps the blob store; TTL
changes                           channel ids of jobs that changed; <id>:preview... of new pictures
"""

PREFIX = "{lumina}:"

QUEUED = PREFIX + "queued:"
LEASE = PREFIX + "lease"
SCHEDULED = PREFIX + "scheduled"
DEADLINE = PREFIX + "deadline"
DEAD = PREFIX + "dead"
POOLS = PREFIX + "pools"
SEQ = PREFIX + "seq"
EPOCH = PREFIX + "epoch"
STATS = PREFIX + "stats"
SWEEP = PREFIX + "sweep"
SIGNING = PREFIX + "signing"
API_KEYS = PREFIX + "apikeys"
RATES = PREFIX + "rate"
WEBHOOK_SECRET = PREFIX + "webhook-secret"
OUTBOX = PREFIX + "outbox"
CHANGES = PREFIX + "changes"

SECOND_MS = 1000
DAY_MS = 24 * 3600 * SECOND_MS
DEAD_TTL_MS = 7 * DAY_MS
DEAD_LIMIT = 10_000
EVENTS_TTL_MS = 3600 * SECOND_MS
EVENTS_LIMIT = 256
PREVIEW_TTL_MS = 60 * SECOND_MS
PREVIEW_LIMIT_BYTES = 64 * 1024
OUTBOX_TTL_MS = DAY_MS
USAGE_TTL_MS = 2 * DAY_MS
UNLIST_LIMIT = 8  # old entries of a tenant's list that one submission looks at
DRAIN_TTL_MS = 30 * SECOND_MS
WAKE_TTL_MS = 60 * SECOND_MS
WAKE_LIMIT = 64
BACKOFF_MS = 2 * SECOND_MS
BACKOFF_LIMIT_MS = 60 * SECOND_MS
IDEM_TTL_MS = DAY_MS
EXPIRE_LIMIT = 100  # late jobs that one claim ends

# Nobody reaped for so long: an outage. Then a claim gets so much more time to be renewed.
OUTAGE_MS = 3 * SECOND_MS
GRACE_MS = 5 * SECOND_MS

WEIGHTS = {"low": 1, "normal": 4, "high": 16}


def job(job_id: str) -> str:
    """The hash of one job."""
    return f"{PREFIX}job:{job_id}"


def events(job_id: str) -> str:
    """The stream of one job's events."""
    return f"{PREFIX}events:{job_id}"


def queued(pool: str) -> str:
    """Every queued job of a pool by submit order."""
    return QUEUED + pool


def solo(pool: str) -> str:
    """Reclaimed jobs of a pool, each to run alone."""
    return f"{PREFIX}solo:{pool}"


def ready(pool: str, priority: str, tenant: str) -> str:
    """The jobs of one tenant and priority that wait for a worker."""
    return f"{PREFIX}ready:{pool}:{priority}:{tenant}"


def work(pool: str) -> str:
    """The queued work of a pool by priority."""
    return f"{PREFIX}work:{pool}"


def open_jobs(tenant: str) -> str:
    """The jobs of a tenant that have not ended."""
    return f"{PREFIX}open:{tenant}"


def listed(tenant: str) -> str:
    """The jobs of a tenant by submit order."""
    return f"{PREFIX}jobs:{tenant}"


def usage(tenant: str, day: int) -> str:
    """What a tenant has used on a day, counted from 1 January 1970 UTC."""
    return f"{PREFIX}usage:{tenant}:{day}"


def api_key(sha256: str) -> str:
    """One API key, by the hash of its text."""
    return f"{PREFIX}apikey:{sha256}"


def preview(job_id: str) -> str:
    """The latest preview of a job."""
    return f"{PREFIX}preview:{job_id}"


def partial(job_id: str, image: int, number: int) -> str:
    """Partial picture `number` of a job's picture `image`."""
    return f"{PREFIX}preview:{job_id}:{image}:{number}"


def watch(job_id: str) -> str:
    """Exists while somebody looks at a job's previews."""
    return f"{PREFIX}watch:{job_id}"


def delivery(job_id: str) -> str:
    """One webhook delivery."""
    return f"{PREFIX}delivery:{job_id}"


def wake(pool: str) -> str:
    """The list idle workers of a pool block on."""
    return f"{PREFIX}wake:{pool}"


def model(pool: str) -> str:
    """What the workers of a pool serve."""
    return f"{PREFIX}model:{pool}"


def workers(pool: str) -> str:
    """The workers of a pool by last heartbeat."""
    return f"{PREFIX}workers:{pool}"


def worker(worker_id: str) -> str:
    """One worker's own entry."""
    return f"{PREFIX}worker:{worker_id}"


def lua_prelude() -> str:
    """Return the Lua line that gives the scripts these names and limits, as locals."""
    names = {
        "PREFIX": PREFIX,
        "LEASE": LEASE,
        "SCHEDULED": SCHEDULED,
        "DEADLINE": DEADLINE,
        "DEAD": DEAD,
        "POOLS": POOLS,
        "SEQ": SEQ,
        "EPOCH": EPOCH,
        "STATS": STATS,
        "CHANGES": CHANGES,
        "OUTBOX": OUTBOX,
        "DEAD_TTL": DEAD_TTL_MS,
        "DEAD_LIMIT": DEAD_LIMIT,
        "EVENTS_TTL": EVENTS_TTL_MS,
        "EVENTS_LIMIT": EVENTS_LIMIT,
        "DRAIN_TTL": DRAIN_TTL_MS,
        "PREVIEW_TTL": PREVIEW_TTL_MS,
        "OUTBOX_TTL": OUTBOX_TTL_MS,
        "USAGE_TTL": USAGE_TTL_MS,
        "UNLIST_LIMIT": UNLIST_LIMIT,
        "DAY": DAY_MS,
        "WAKE_TTL": WAKE_TTL_MS,
        "WAKE_LIMIT": WAKE_LIMIT,
        "BACKOFF": BACKOFF_MS,
        "BACKOFF_LIMIT": BACKOFF_LIMIT_MS,
        "IDEM_TTL": IDEM_TTL_MS,
        "EXPIRE_LIMIT": EXPIRE_LIMIT,
        "OUTAGE": OUTAGE_MS,
        "GRACE": GRACE_MS,
    }
    values = [f"'{value}'" if isinstance(value, str) else str(value) for value in names.values()]
    weights = ", ".join(f"{priority} = {weight}" for priority, weight in WEIGHTS.items())
    return f"local {', '.join(names)} = {', '.join(values)}\nlocal WEIGHTS = {{{weights}}}\n"
