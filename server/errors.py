"""The server's exceptions, each with the stable code and HTTP status a caller sees.

ServerError
├── MalformedBody       400  the body is no JSON
├── Unauthorized        401  no API key, or none that is valid
├── ForeignHost         403  the Host header names another machine
├── ForeignOrigin       403  a page of another site sent the request
├── MissingScope        403  the API key may not do this
├── BodyTimeout         408  the body did not arrive in time
├── BodyTooLarge        413  the body is longer than allowed
├── NotJson             415  the content type is not JSON
├── InvalidRequest      422  the caller's input, also a ValueError
│   ├── UnknownModel    422  no worker serves a model of that name
│   └── IdempotencyMismatch 422  an Idempotency-Key used before with another body
├── NotFound            404  no such job, image or blob (or somebody else's)
├── TooManyJobs         429  the tenant has as many open jobs as it may
├── QuotaExceeded       429  the tenant has submitted as many jobs today as it may
├── RateLimited         429  the API key has sent as many requests this minute as it may
├── QueueFull           503  depth or memory refuse new work
├── DeadlineTooShort    503  the estimated wait is beyond the caller's deadline
├── DataLost            503  Redis has lost acknowledged data, and no operator has accepted it
├── QueueUnavailable    503  Redis does not answer
├── BlobUnavailable     503  the blob store does not give or take a picture
├── ModelNotReady       503  no worker has published a model yet
└── ServiceError        500  `lumina serve` or a worker cannot start
"""


class ServerError(Exception):
    """Base of the tree: `detail` is one sentence for the caller, `code` and `status` are stable."""

    code = "internal"
    status = 500

    def __init__(self, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class InvalidRequest(ServerError, ValueError):
    """The input is wrong; `detail` names the field, the value and what is allowed."""

    code = "invalid-request"
    status = 422


class UnknownModel(InvalidRequest):
    """No worker serves a model of the name asked for."""

    code = "unknown-model"


class IdempotencyMismatch(InvalidRequest):
    """An Idempotency-Key was used before with another body."""

    code = "idempotency-mismatch"


class MalformedBody(ServerError):
    """The body is not the JSON it claims to be."""

    code = "malformed-body"
    status = 400


class Unauthorized(ServerError):
    """The request has no API key, or one that is unknown or revoked."""

    code = "unauthorized"
    status = 401


class ForeignHost(ServerError):
    """A service that is open to this machine only was addressed by another name."""

    code = "foreign-host"
    status = 403


class ForeignOrigin(ServerError):
    """A page of another site tries to use a service that is open to this machine only."""

    code = "foreign-origin"
    status = 403


class MissingScope(ServerError):
    """The API key is valid, but does not have the scope that this needs."""

    code = "missing-scope"
    status = 403


class BodyTimeout(ServerError):
    """The body did not arrive in time."""

    code = "body-timeout"
    status = 408


class BodyTooLarge(ServerError):
    """The body is longer than the API reads."""

    code = "body-too-large"
    status = 413


class NotJson(ServerError):
    """The body is not declared as JSON."""

    code = "not-json"
    status = 415


class NotFound(ServerError):
    """There is no such job, image or blob, or it belongs to somebody else."""

    code = "not-found"
    status = 404


class TooManyJobs(ServerError):
    """The tenant has as many jobs that have not ended as it may."""

    code = "too-many-jobs"
    status = 429


class QuotaExceeded(ServerError):
    """The tenant has submitted as many jobs today as it may."""

    code = "quota-exceeded"
    status = 429


class RateLimited(ServerError):
    """The API key has sent as many requests in this minute as it may."""

    code = "rate-limited"
    status = 429


class QueueFull(ServerError):
    """The queue holds as many jobs as it may, or Redis as much data."""

    code = "queue-full"
    status = 503


class DeadlineTooShort(ServerError):
    """By the measured costs of what waits already, the job cannot end by its deadline."""

    code = "deadline-too-short"
    status = 503


class DataLost(ServerError):
    """Redis no longer has what it acknowledged; an operator must accept that first."""

    code = "data-lost"
    status = 503


class QueueUnavailable(ServerError):
    """Redis cannot be reached or refuses to write."""

    code = "queue-unavailable"
    status = 503


class BlobUnavailable(ServerError, OSError):
    """The blob store fails: it cannot be reached, is full, or its bytes are not what was stored."""

    code = "storage-unavailable"
    status = 503


class ModelNotReady(ServerError):
    """No worker has published what it serves yet."""

    code = "model-not-ready"
    status = 503


class ServiceError(ServerError):
    """A process of the service cannot start or go on; `detail` is the line the operator reads."""

    code = "service-error"
    status = 500
