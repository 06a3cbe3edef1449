"""`lumina serve`: everything on one machine, children and all."""

from server.embedded.redis_server import EmbeddedRedis
from server.embedded.service import run_service

__all__ = ["EmbeddedRedis", "run_service"]
