"""Backends whose kernel takes all sequences at once, whatever their lengths: one call per block."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from model.attention.plan import Attend, Plan, UnavailableError, probe, require_cuda
from model.packing import Layout

log = logging.getLogger(__name__)

FLASH_3_MODULE = "flash_attn_interface"  # what a FlashAttention-3 build installs
# Grouped heads have to be announced to torch 2.12 and later; 2.11 takes them as they come. One
# split keeps a sequence's sums in the same order in whatever company it is computed.
VARLEN_OPTIONS: dict[str, Any] = {"enable_gqa": True, "num_splits": 1}


@dataclass(frozen=True, slots=True)
class VarlenAttend:
    """`torch.nn.attention.varlen`: FlashAttention 2, or 3 where it is active."""

    cu_seqlens: Tensor
    max_length: int
    kernel: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        out: Tensor = self.kernel(*self.arguments(q, k, v), **self.options)
        return out

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """Positional arguments of `varlen_attn`: queries and keys have the same sequences.

        ``v`` is a slice of the fused projection; the kernels want only its last axis contiguous.
        """
        ends = self.cu_seqlens, self.cu_seqlens
        return (q, k, v, *ends, self.max_length, self.max_length)


@dataclass(frozen=True, slots=True)
class XformersAttend:
    """xformers' memory-efficient attention under a block-diagonal mask."""

    mask: Any
    kernel: Callable[..., Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        views = repeated_views if _needs_gradients(q, k, v) else grouped_views
        out: Tensor = self.kernel(*views(q, k, v), attn_bias=self.mask)
        return out.reshape(q.shape)


def grouped_views(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three as ``[1, T, kv_heads, heads / kv_heads, head_dim]``; nothing is copied.

    Keys and values have stride 0 along the heads of a group: xformers knows that for grouped
    queries and reads each of them once.
    """
    groups = q.shape[1] // k.shape[1]
    query = q.unflatten(1, (k.shape[1], groups))[None]
    key, value = (x[None, :, :, None].expand(-1, -1, -1, groups, -1) for x in (k, v))
    return query, key, value


def repeated_views(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three as ``[1, T, heads, head_dim]``, keys and values repeated.

    xformers has no backward for grouped queries.
    """
    groups = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1)[None] for x in (k, v))
    return q[None], key, value


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def open_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> Plan:
    """Raises UnavailableError where the kernel cannot take this."""
    require_cuda(device, dtype, head_dim, max_head_dim=256)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise UnavailableError(f"torch {torch.__version__} does not have it") from None
    options = known_options(varlen_attn)
    if activate_flash_3(device):
        try:
            return _tried_varlen(varlen_attn, options, device, dtype, head_dim)
        except UnavailableError as error:
            log.warning("FlashAttention 3 is installed but not used: %s", error)
            _restore_flash_2()
    return _tried_varlen(varlen_attn, options, device, dtype, head_dim)


def known_options(kernel: Callable[..., Any]) -> dict[str, Any]:
    """Those of `VARLEN_OPTIONS` that this torch's `varlen_attn` has."""
    parameters = inspect.signature(kernel).parameters
    return {name: value for name, value in VARLEN_OPTIONS.items() if name in parameters}


def _tried_varlen(
    kernel: Callable[..., Any],
    options: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> Plan:
    plan = partial(plan_varlen, kernel, options)
    try:
        probe(plan, device, dtype, head_dim)
    except UnavailableError:
        # Some builds know the number of splits and refuse it: FlashAttention 2 never splits here.
        if "num_splits" not in options:
            raise
        without = {name: value for name, value in options.items() if name != "num_splits"}
        return _tried_varlen(kernel, without, device, dtype, head_dim)
    return plan


def plan_varlen(kernel: Callable[..., Any], options: dict[str, Any], layout: Layout) -> Attend:
    """Plan `VarlenAttend` for a kernel like `varlen_attn`."""
    return VarlenAttend(layout.cu_seqlens, layout.max_length, kernel, options)


def activate_flash_3(device: torch.device) -> bool:
    """Make torch use FlashAttention 3 on a Hopper GPU where it is installed; says whether."""
    if find_spec(FLASH_3_MODULE) is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        log.warning("FlashAttention 3 is installed but not used: %s", error)
        return False
    return True


def _restore_flash_2() -> None:
    try:
        from torch.nn.attention import restore_flash_attention_impl
    except ImportError:
        raise UnavailableError("FlashAttention 3 is active and fails; uninstall it") from None
    restore_flash_attention_impl()


def open_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> Plan:
    """Raises UnavailableError where xformers is missing or cannot take this."""
    require_cuda(device, dtype, head_dim, max_head_dim=256)
    fmha = import_xformers()
    plan = partial(plan_xformers, fmha.memory_efficient_attention, fmha.attn_bias.BlockDiagonalMask)
    probe(plan, device, dtype, head_dim)
    return plan


def import_xformers() -> Any:
    """`xformers.ops.fmha`, without its greeting; raises UnavailableError where there is none."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers.ops import fmha
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(f"xformers cannot be imported ({error})") from None
    finally:
        logger.setLevel(level)
    return fmha


def plan_xformers(kernel: Callable[..., Any], mask: Any, layout: Layout) -> Attend:
    """Plan `XformersAttend`; the mask and its copy on the device are made once per layout."""
    device = layout.cu_seqlens.device
    return XformersAttend(mask.from_seqlens(layout.lengths, device=device), kernel)
