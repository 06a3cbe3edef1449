"""When the eager operators may take short cuts: inference in fp32 on a CPU."""

import torch
from torch import Tensor


def plain_inference(*tensors: Tensor) -> bool:
    """Whether all are fp32 on a CPU and nobody differentiates or traces.

    Then operators may work in place on what they have just made. On a CPU a large fresh tensor
    costs more than the arithmetic: its pages have to be mapped and zeroed first.
    """
    if torch.compiler.is_compiling():
        return False
    graded = torch.is_grad_enabled()
    return all(
        x.device.type == "cpu" and x.dtype == torch.float32 and not (graded and x.requires_grad)
        for x in tensors
    )
