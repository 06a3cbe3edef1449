"""Pulse: whether the engine still makes progress, judged from another thread."""

import time

MIN_HANG_S = 60.0
HANG_FACTOR = 10.0


class Pulse:
    """Beaten by the engine after every stage; hung when a beat is far overdue.

    The longest stage seen so far is the prediction for the next.
    """

    def __init__(self, min_hang_s: float = MIN_HANG_S) -> None:
        self._min_hang_s = min_hang_s
        self._longest_s = 0.0
        self._last = time.monotonic()

    def beat(self) -> None:
        """Say that a stage has ended."""
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._last)
        self._last = now

    def hung(self) -> bool:
        """Whether the engine has been silent for longer than any stage should take."""
        limit_s = max(self._min_hang_s, HANG_FACTOR * self._longest_s)
        return time.monotonic() - self._last > limit_s
