"""Which arithmetic the machine at hand trains fastest in."""

from contextlib import AbstractContextManager
from functools import cache

import torch


@cache
def fast_dtype(device_type: str) -> torch.dtype:
    """bf16 where the hardware multiplies matrices in it, fp32 elsewhere.

    A CPU without AVX-512 BF16 or AMX converts back and forth instead: the demo recipe's
    autoencoder encoded 30 images a second in bf16 there and 300 in fp32.
    """
    if device_type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def mixed_precision(device_type: str) -> AbstractContextManager[None]:
    """Autocast to :func:`fast_dtype`; weights and reductions stay fp32."""
    dtype = fast_dtype(device_type)
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)
