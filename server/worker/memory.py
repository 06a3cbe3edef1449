"""Device memory: what an out-of-memory error is, and how much of it work needs, by measurement.

Torch is used where it is loaded already, never imported first: see `server/worker/loading.py`.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.scheduler.budget import MemoryCost

USABLE = 0.9  # of what is free once the model is loaded; the rest is for what nobody measured
MARGIN = 1.1  # on measured needs


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or on the host."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    # The CPU allocator has no exception class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back what failed work left behind, so that a smaller attempt has all there is."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class PeakMemory:
    """The device memory a piece of work needs beyond what is taken before it.

    On the host it is the peak of the resident set as Linux counts it; elsewhere 0.

    Args:
        device: a `torch.device`; None for the host.
    """

    def __init__(self, device: Any = None) -> None:
        self._device = device
        self._cuda = sys.modules["torch"].cuda if device and device.type == "cuda" else None

    def of(self, work: Callable[[], object]) -> int:
        """Do the work; returns its peak in bytes."""
        if self._cuda:
            self._cuda.synchronize(self._device)
            self._cuda.reset_peak_memory_stats(self._device)
            allocated = self._cuda.memory_allocated(self._device)
            work()
            self._cuda.synchronize(self._device)
            return int(self._cuda.max_memory_allocated(self._device) - allocated)
        _reset_host_peak()
        before = _host_bytes("VmRSS")
        work()
        return max(0, _host_bytes("VmHWM") - before)

    def free_bytes(self) -> int:
        """Bytes that are neither used nor promised; 0 where that is unknown."""
        if self._cuda:
            free, _ = self._cuda.mem_get_info(self._device)
            cached = self._cuda.memory_reserved(self._device)
            return int(free + cached - self._cuda.memory_allocated(self._device))
        return _host_free_bytes()


@dataclass(frozen=True)
class Sample:
    """A measured step: its tokens, and its peak in bytes."""

    tokens: int
    peak_bytes: int


def fit_memory(samples: list[Sample], decode_bytes: int, free_bytes: int) -> MemoryCost:
    """The memory model of measured steps: a line through them, never below any.

    Args:
        samples: steps of several sizes.
        decode_bytes: peak of the largest decoding.
        free_bytes: what is left once the model is loaded; 0 for unknown, which means no limit.
    """
    assert samples
    small = min(samples, key=lambda s: s.tokens)
    large = max(samples, key=lambda s: s.tokens)
    token_bytes = large.peak_bytes / large.tokens
    if large.tokens > small.tokens:
        slope = (large.peak_bytes - small.peak_bytes) / (large.tokens - small.tokens)
        token_bytes = max(0.0, slope)
    fixed_bytes = max(0.0, *(s.peak_bytes - token_bytes * s.tokens for s in samples))
    return MemoryCost(
        fixed_bytes=MARGIN * fixed_bytes,
        token_bytes=MARGIN * token_bytes,
        decode_bytes=MARGIN * decode_bytes,
        limit_bytes=USABLE * free_bytes,
    )


def host_memory() -> tuple[int, int]:
    """Bytes this process has resident, and bytes of the machine; 0 where that is unknown."""
    return _host_bytes("VmRSS"), _host_bytes("MemTotal", "/proc/meminfo")


def _reset_host_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not Linux, or forbidden: the peak is then that of the whole process
        return


def _host_bytes(name: str, table: str = "/proc/self/status") -> int:
    try:
        lines = Path(table).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return int(found[0]) * 1024 if found else 0


def _host_free_bytes() -> int:
    """What the machine, or the container's limit if that is less, has left."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free[0] if free else 0
    return min([*free, *([int(limit) - used] if limit.isdigit() else [])], default=0)
