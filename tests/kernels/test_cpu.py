"""The short cuts of fp32 inference on a CPU give what the operators give when differentiated."""

import pytest
import torch

from kernels.cpu import plain_inference
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import rms_norm
from kernels.silu_mul import silu_mul
from tests.kernels.yardstick import draw


def test_when_short_cuts_are_taken():
    x = draw(3, 4)
    graded = draw(3, 4).requires_grad_()
    assert plain_inference(x, x)
    assert not plain_inference(x, graded)
    assert not plain_inference(x, x.double())
    assert not plain_inference(x.bfloat16())
    assert not plain_inference(x.to("meta"))
    with torch.no_grad():
        assert plain_inference(graded)


CALLS = {
    "norm": (lambda x, w: rms_norm(x, w, 1e-5), (5, 48), (48,)),
    "norm by token": (lambda x, w: rms_norm(x, w, 1e-5), (5, 48), (5, 48)),
    "norm by row": (lambda x, w: rms_norm(x, w, 1e-5), (5, 48), (1, 48)),
    "gate": (lambda x, w: silu_mul(x) * w, (5, 48), (24,)),
    "query": (lambda x, w: rope(x, w)[0], (5, 6, 8), (8,)),
    "key": (lambda x, w: rope(x, w)[1], (5, 6, 8), (8,)),
}


def rope(x, weight):
    angles = draw(5, 4, seed=9)
    q, k = x.split((4, 2), dim=1)
    return qk_norm_rope(q, k, weight, weight, angles.cos(), angles.sin(), 1e-5)


@pytest.mark.parametrize("call", CALLS)
def test_same_numbers_and_inputs_untouched(call):
    operator, shape, weight_shape = CALLS[call]
    x, weight = draw(*shape), draw(*weight_shape, seed=1)
    before = x.clone(), weight.clone()
    fast = operator(x, weight)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])
    slow = operator(x.clone().requires_grad_(), weight)
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-6, atol=1e-6)
