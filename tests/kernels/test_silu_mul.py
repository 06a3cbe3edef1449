import pytest
import torch

from kernels.silu_mul import silu_mul
from tests.kernels.yardstick import AWKWARD_SHAPES, draw, error, strided


def reference(gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", AWKWARD_SHAPES, ids=str)
def test_equals_the_float64_reference(shape):
    gate_up = draw(shape[0], 2 * shape[1]) * 3
    result = silu_mul(gate_up)
    assert result.shape == shape
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), reference(gate_up), atol=2e-6, rtol=2e-6)


def test_the_gate_half_comes_first():
    gate_up = torch.tensor([[0.0, 100.0, 7.0, 2.0]])
    assert silu_mul(gate_up).tolist() == [[0.0, 200.0]]


def test_large_gates_stay_finite():
    gate_up = torch.tensor([[-1e4, 1e4, 1.0, 1.0]])
    assert silu_mul(gate_up).tolist() == [[0.0, 1e4]]


def test_strided_input():
    gate_up = draw(9, 3, 20)
    assert torch.equal(silu_mul(strided(gate_up)), silu_mul(gate_up))


@pytest.mark.parametrize("shape", [(33, 192), (7, 246)], ids=str)
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(shape):
    gate_up = draw(*shape, dtype=torch.bfloat16)
    result = silu_mul(gate_up)
    assert result.dtype == torch.bfloat16
    gate, up = gate_up.chunk(2, dim=-1)
    eager = gate * torch.sigmoid(gate) * up
    expected = reference(gate_up)
    assert error(result, expected) <= 2 * error(eager, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_in_low_precision_is_silu_in_fp32_rounded_once(dtype):
    """So it makes no difference that diffusers computes it in fp32 and the official code does not.

    True of every number these dtypes have.
    """
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    gate_up = torch.stack((every, torch.ones_like(every)), dim=-1)
    assert torch.equal(silu_mul(gate_up)[:, 0], torch.nn.functional.silu(every.float()).to(dtype))
