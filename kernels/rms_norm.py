"""RMS normalisation, with one weight for all tokens or one for each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import plain_inference
from kernels.dispatch import MAX_WIDTH, uses_kernel, works


def weight_by_row(weight: Tensor, index: Tensor | None) -> Tensor:
    """A weight ``[n, D]`` by the rows of an index; one for all rows is broadcast where it is used.

    Args:
        weight: ``[D]`` or ``[n, D]``.
        index: ``[T]`` integers below n; None: the weight is for all rows, or by row already.

    Returns:
        ``[D]``, ``[1, D]`` or ``[T, D]``.
    """
    if index is None or weight.ndim == 1 or weight.shape[0] == 1:
        return weight
    return weight.index_select(0, index)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, index: Tensor | None = None) -> Tensor:
    """Normalise the last axis by its root mean square; fp32 inside, rounded once at the end.

    ``y = x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich 2019). Input and weight may
    differ in dtype: a wide residual stream with narrow weights gives what a narrow matrix product
    takes, and a narrow x with wide weights what a wide stream is added to.

    Args:
        x: ``[..., D]``, any floating dtype.
        weight: ``[D]``, or ``[..., D]`` where a modulation or a gate is folded into it; with an
            index ``[n, D]``.
        eps: added to the mean square.
        index: ``[T]`` for x ``[T, D]``: the row of the weight that each token takes.

    Returns:
        ``[..., D]`` in the dtype of ``weight``.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight_by_row(weight, index)).to(weight.dtype)


def _compute(x: Tensor, weight: Tensor, eps: float, index: Tensor | None) -> Tensor:
    """The kernel where Triton works, for tensors that `uses_kernel` let pass."""
    if not works(x.device):
        return rms_norm_ref(x, weight, eps, index)
    from kernels.gpu.rms_norm import launch_rms_norm

    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    launch_rms_norm(out, x, weight, eps, index)()
    return out


rms_norm_op = torch.library.custom_op(
    "lumina::rms_norm",
    _compute,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, float eps, Tensor? index) -> Tensor",
)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, index: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=weight.dtype, device=x.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float, index: Tensor | None = None) -> Tensor:
    """Like :func:`rms_norm_ref`; the fastest implementation for the device."""
    if x.shape[-1] <= MAX_WIDTH and uses_kernel("rms_norm", x, weight):
        compute = rms_norm_op if torch.compiler.is_compiling() else _compute
        return compute(x, weight, eps, index)
    if plain_inference(x, weight):
        weight = weight_by_row(weight, index)
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    return rms_norm_ref(x, weight, eps, index)
