"""The job queue on Redis, and the blob store beside it."""
