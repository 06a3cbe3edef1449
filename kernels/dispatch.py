"""Triton kernel or eager operator: who computes a call, and the switch that forces it.

A kernel can compute where its tensors are on a CUDA device, Triton works there, and nobody
differentiates. Whether it then does is a default per operator, one for eager execution and one for
graphs of torch.compile (docs/performance.md), unless it is forced: for a process by the variable
`LUMINA_KERNELS`, for a block of code by :func:`forced`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

VARIABLE = "LUMINA_KERNELS"
# Triton's own variable: kernels are then interpreted, which works on a CPU. For tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_WIDTH = 8192  # features that a program normalises at once without spilling registers

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Default(NamedTuple):
    """Whether the kernel computes when nothing is forced."""

    eager: bool
    compiled: bool


# In a compiled graph Inductor fuses the references, and an opaque operator is in its way: a kernel
# is on there only where a measurement on a GPU has shown that it wins.
DEFAULTS = {
    "rms_norm": Default(eager=True, compiled=False),
    "qk_norm_rope": Default(eager=True, compiled=False),
    "gate_residual_norm": Default(eager=True, compiled=False),
    "silu_mul": Default(eager=True, compiled=False),
}


def parse(value: str) -> dict[str, bool | None]:
    """The switches of a value of `LUMINA_KERNELS`; None = the default.

    Args:
        value: ``auto`` or nothing, ``all``, ``none``, or the operators whose kernels are on (all
            others are then off), separated by commas.

    Raises:
        ValueError: one sentence, for anything else.
    """
    if value in ("", "auto"):
        return dict.fromkeys(DEFAULTS)
    if value in ("all", "none"):
        return dict.fromkeys(DEFAULTS, value == "all")
    named = [name.strip() for name in value.split(",")]
    unknown = [name for name in named if name not in DEFAULTS]
    if unknown:
        raise ValueError(
            f"{VARIABLE} {unknown[0]!r} is not allowed: give auto, all, none or some of "
            f"{', '.join(DEFAULTS)}, separated by commas"
        )
    return {name: name in named for name in DEFAULTS}


# A plain dictionary: torch.compile guards what it reads of it, so a switch means a new graph.
_switches: dict[str, bool | None] = {}
_fault = ""
try:
    _switches.update(parse(os.environ.get(VARIABLE, "")))
except ValueError as error:  # said by `settle` or the first use: an import must not raise it
    _fault = str(error)


@contextmanager
def forced(**switches: bool | None) -> Iterator[None]:
    """Kernels by name on, off, or (None) as by default inside the block; for this process."""
    assert switches.keys() <= DEFAULTS.keys(), switches
    before = dict(_switches)
    _switches.update(switches)
    try:
        yield
    finally:
        _switches.update(before)


def uses_kernel(operator: str, x: Tensor, *others: Tensor) -> bool:
    """Whether the Triton kernel of `operator` computes on these tensors.

    Raises:
        ValueError: one sentence, when `LUMINA_KERNELS` has a value that is not allowed.
    """
    if not (x.is_cuda or INTERPRETED):
        return False
    if _fault:
        raise ValueError(_fault)
    wanted = _switches[operator]
    if wanted is None:
        default = DEFAULTS[operator]
        wanted = x.is_cuda and (
            default.compiled if torch.compiler.is_compiling() else default.eager
        )
    # In a graph the operator itself looks whether Triton works, when it runs.
    return wanted and _takes(x, *others) and (torch.compiler.is_compiling() or works(x.device))


def _takes(*tensors: Tensor) -> bool:
    """Whether kernels know these dtypes and nobody differentiates: they have no backward."""
    graded = torch.is_grad_enabled()
    return all(x.dtype in _DTYPES and not (graded and x.requires_grad) for x in tensors)


def works(device: torch.device) -> bool:
    """Whether Triton compiles and runs a kernel there; tried once, the reason why not is logged."""
    if device.type != "cuda" and not INTERPRETED:
        return False
    return _reason_against(device) is None


@lru_cache
def _reason_against(device: torch.device) -> str | None:
    reason = None
    if find_spec("triton") is None:
        reason = "triton is not installed"
    else:
        try:
            _probe(device)
        except Exception as error:  # of a driver, a compiler, a cache folder: anything may be amiss
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason is None:
        log.info("kernels: Triton works on %s", device)
    else:
        log.warning("kernels: eager operators on %s, as Triton does not work: %s", device, reason)
    return reason


def _probe(device: torch.device) -> None:
    """Run a small kernel and look at what it gives."""
    from kernels.gpu.rms_norm import launch_rms_norm

    x = torch.tensor([[3.0, -4.0, 0.0], [1.0, 1.0, -1.0]], device=device)
    out = torch.full_like(x, float("nan"))
    launch_rms_norm(out, x, torch.ones(3, device=device), 0.0, None)()
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    if not torch.allclose(out, expected, rtol=1e-5, atol=1e-6):
        raise RuntimeError("a kernel gave wrong numbers")


def settle(device: torch.device) -> None:
    """Check the switch and try Triton now, rather than at the first picture.

    Raises:
        ValueError: one sentence, when `LUMINA_KERNELS` has a value that is not allowed.
    """
    if _fault:
        raise ValueError(_fault)
    if device.type == "cuda":
        works(torch.empty(0, device=device).device)  # with its number
