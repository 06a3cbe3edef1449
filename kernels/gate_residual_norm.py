"""What lies between two layers of a block: gate, residual addition and the next norm.

The gate and the scale of a modulation are folded into norm weights, one row for each sequence
(docs/adr/0004-modulation-in-norm-weights.md); tokens find theirs by an index.
"""

import torch
from torch import Tensor

from kernels.cpu import plain_inference
from kernels.dispatch import MAX_WIDTH, uses_kernel, works
from kernels.rms_norm import rms_norm, rms_norm_ref


def gate_residual_norm_ref(
    branch: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor,
    eps: float,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a normalised, gated branch to the residual stream, and normalise that for what follows.

    ``stream = residual + RMS(branch) * gate`` and ``normed = RMS(stream) * scale``.

    Args:
        branch: ``[T, D]``, output of attention or feed-forward.
        residual: ``[T, D]``, the stream; it may be wider than the rest.
        gate: ``[D]``, or ``[n, D]`` with an index: norm weights with a gate folded in.
        scale: likewise, with a scale.
        eps: of both norms.
        index: ``[T]`` integers below n, each token's row of the weights.

    Returns:
        The stream in the wider dtype of residual and gate, and the normed ``[T, D]`` in the dtype
        of ``scale``.
    """
    stream = gate_residual_ref(branch, residual, gate, eps, index)
    return stream, rms_norm_ref(stream, scale, eps, index)


def gate_residual_ref(
    branch: Tensor, residual: Tensor, gate: Tensor, eps: float, index: Tensor | None = None
) -> Tensor:
    """The stream of :func:`gate_residual_norm_ref` alone, as at the end of a block."""
    return residual + rms_norm_ref(branch, gate, eps, index)


def _empty_stream(residual: Tensor, gate: Tensor) -> Tensor:
    dtype = torch.promote_types(residual.dtype, gate.dtype)
    return torch.empty(residual.shape, dtype=dtype, device=residual.device)


def _empty_normed(residual: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(residual.shape, dtype=scale.dtype, device=residual.device)


def _compute_both(
    branch: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor,
    eps: float,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernel where Triton works, for tensors that `uses_kernel` let pass."""
    if not works(branch.device):
        return gate_residual_norm_ref(branch, residual, gate, scale, eps, index)
    from kernels.gpu.gate_residual_norm import launch_gate_residual_norm

    stream, normed = _empty_stream(residual, gate), _empty_normed(residual, scale)
    launch_gate_residual_norm(stream, normed, branch, residual, gate, scale, eps, index)()
    return stream, normed


def _compute_stream(
    branch: Tensor, residual: Tensor, gate: Tensor, eps: float, index: Tensor | None
) -> Tensor:
    if not works(branch.device):
        return gate_residual_ref(branch, residual, gate, eps, index)
    from kernels.gpu.gate_residual_norm import launch_gate_residual_norm

    stream = _empty_stream(residual, gate)
    launch_gate_residual_norm(stream, None, branch, residual, gate, None, eps, index)()
    return stream


gate_residual_norm_op = torch.library.custom_op(
    "lumina::gate_residual_norm",
    _compute_both,
    mutates_args=(),
    schema="(Tensor branch, Tensor residual, Tensor gate, Tensor scale, float eps, Tensor? index)"
    " -> (Tensor, Tensor)",
)
gate_residual_op = torch.library.custom_op(
    "lumina::gate_residual",
    _compute_stream,
    mutates_args=(),
    schema="(Tensor branch, Tensor residual, Tensor gate, float eps, Tensor? index) -> Tensor",
)


@gate_residual_norm_op.register_fake
def _(
    branch: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor,
    eps: float,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _empty_stream(residual, gate), _empty_normed(residual, scale)


@gate_residual_op.register_fake
def _(branch: Tensor, residual: Tensor, gate: Tensor, eps: float, index: Tensor | None) -> Tensor:
    return _empty_stream(residual, gate)


def gate_residual_norm(
    branch: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor,
    eps: float,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Like :func:`gate_residual_norm_ref`; the fastest implementation for the device."""
    if _uses_kernel(branch, residual, gate, scale):
        compute = gate_residual_norm_op if torch.compiler.is_compiling() else _compute_both
        return compute(branch, residual, gate, scale, eps, index)
    stream = _eager_stream(branch, residual, gate, eps, index)
    return stream, rms_norm(stream, scale, eps, index)


def gate_residual(
    branch: Tensor, residual: Tensor, gate: Tensor, eps: float, index: Tensor | None = None
) -> Tensor:
    """Like :func:`gate_residual_ref`; the kernel of :func:`gate_residual_norm` without its end."""
    if _uses_kernel(branch, residual, gate):
        compute = gate_residual_op if torch.compiler.is_compiling() else _compute_stream
        return compute(branch, residual, gate, eps, index)
    return _eager_stream(branch, residual, gate, eps, index)


def _uses_kernel(branch: Tensor, *others: Tensor) -> bool:
    return branch.shape[-1] <= MAX_WIDTH and uses_kernel("gate_residual_norm", branch, *others)


def _eager_stream(
    branch: Tensor, residual: Tensor, gate: Tensor, eps: float, index: Tensor | None
) -> Tensor:
    normed = rms_norm(branch, gate, eps, index)
    if plain_inference(branch, residual, gate):
        return normed.add_(residual)
    return residual + normed
