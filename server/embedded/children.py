"""Child processes that die with their parent, and their restarts with backoff."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

log = structlog.get_logger(__name__)

PR_SET_PDEATHSIG = 1
BACKOFF_S = (0.5, 30.0)
STEADY_S = 60.0  # a child that ran so long starts its next life without delay


def spawn(
    argv: Sequence[str], env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
) -> "subprocess.Popen[bytes]":
    """Start a process in a session of its own that is killed when this thread's process dies.

    Call from the main thread: the kernel's parent-death signal watches the thread that forks.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return subprocess.Popen(
        list(argv),
        env=None if env is None else dict(env),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=tuple(pass_fds),
        preexec_fn=die_with_parent,
    )


class Child:
    """One supervised process.

    Args:
        name: for logs, and the id a worker keeps over its restarts.
        start: spawns it.
        on_end: called with the process id when its end is noticed.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], "subprocess.Popen[bytes]"],
        on_end: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.name = name
        self._start = start
        self._on_end = on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_after = 0.0
        self._failures = 0

    @property
    def running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def failures(self) -> int:
        """How often in a row it ended soon after its start."""
        return self._failures

    def start(self) -> None:
        """Spawn the process."""
        self._process = self._start()
        self._started_at = time.monotonic()

    def check(self) -> int | None:
        """Restart the process if it ended and its backoff is over.

        Returns the exit code once, when the end is noticed; None otherwise.
        """
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_after:
                self.start()
            return None
        code = self._process.poll()
        if code is None:
            return None
        self._on_end(self._process.pid)
        self._process = None
        self._failures = 0 if now - self._started_at > STEADY_S else self._failures + 1
        first_s, longest_s = BACKOFF_S
        delay_s = min(longest_s, first_s * 2 ** (self._failures - 1)) if self._failures else 0.0
        self._start_after = now + delay_s
        log.warning("child ended", child=self.name, code=code, restart_in_s=delay_s)
        return code

    def signal(self, number: int) -> None:
        """Send a signal, if there is a process to get it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def stop_children(
    children: Sequence[Child], grace_s: float, impatient: Callable[[], bool] = lambda: False
) -> None:
    """Ask the children to end, and kill those that have not after `grace_s`.

    `impatient` cuts the grace short (a second Ctrl-C).
    """
    for child in children:
        child.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(child.running for child in children):
        if time.monotonic() > deadline or impatient():
            for child in children:
                child.signal(signal.SIGKILL)
        time.sleep(0.02)
