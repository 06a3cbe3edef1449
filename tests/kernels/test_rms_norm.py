import pytest
import torch

from kernels.rms_norm import rms_norm, rms_norm_ref
from tests.kernels.yardstick import AWKWARD_SHAPES, draw, error, strided

EPS = 1e-5
IMPLEMENTATIONS = [rms_norm, rms_norm_ref]


def reference(x, weight, eps=EPS):
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def eager_low_precision(x, weight, eps=EPS):
    """Every step in the dtype of the input: what the operator must not be worse than."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("norm", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", AWKWARD_SHAPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_equals_the_float64_reference(norm, shape, per_token):
    x = draw(*shape)
    weight = draw(*(shape if per_token else shape[-1:]), seed=1)
    result = norm(x, weight, EPS)
    assert result.shape == shape
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), reference(x, weight), atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("norm", IMPLEMENTATIONS)
def test_strided_input_and_heads(norm):
    x, weight = draw(9, 4, 10), draw(10, seed=1)
    expected = norm(x, weight, EPS)
    assert torch.equal(norm(strided(x), weight, EPS), expected)
    assert torch.equal(norm(x.transpose(0, 1), weight, EPS).transpose(0, 1), expected)


@pytest.mark.parametrize("norm", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(33, 96), (7, 123), (64, 2304)], ids=str)
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(norm, shape):
    x, weight = draw(*shape, dtype=torch.bfloat16), draw(shape[-1], seed=1, dtype=torch.bfloat16)
    result = norm(x, weight, EPS)
    assert result.dtype == torch.bfloat16
    expected = reference(x, weight)
    assert error(result, expected) <= 2 * error(eager_low_precision(x, weight), expected)


@pytest.mark.parametrize("norm", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("wide", "narrow"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
)
def test_a_wide_stream_meets_narrow_weights_and_the_reverse(norm, wide, narrow):
    """Into a block: the result is rounded once, to the weights' dtype. Out of one: not at all."""
    x, weight = draw(33, 96), draw(33, 96, seed=1)
    down = norm(x, weight.to(narrow), EPS)
    assert down.dtype == narrow
    exact = reference(x, weight.to(narrow))
    assert error(down, exact) <= 1.05 * error(exact.to(narrow), exact)
    up = norm(x.to(narrow), weight, EPS)
    assert up.dtype == wide
    assert error(up, reference(x.to(narrow), weight)) < 1e-6


@pytest.mark.parametrize("norm", IMPLEMENTATIONS)
def test_statistics_are_fp32_whatever_comes_in(norm):
    """In bf16 the mean of 2304 squares would be off by percents, and these would overflow fp16."""
    x = torch.full((2, 2304), 300.0, dtype=torch.float16)
    result = norm(x, torch.ones(2304), EPS)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.ones(2, 2304), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", IMPLEMENTATIONS)
def test_eps_keeps_zeros_finite_and_is_added_to_the_mean_square(norm):
    assert torch.equal(norm(torch.zeros(2, 8), torch.ones(8), EPS), torch.zeros(2, 8))
    result = norm(torch.full((1, 8), 1e-3), torch.ones(8), 3e-6)
    torch.testing.assert_close(result, torch.full((1, 8), 0.5))


def test_gradients():
    x, weight = draw(3, 10).double().requires_grad_(), draw(3, 10, seed=1).double().requires_grad_()
    rms_norm(x, weight, EPS).sum().backward()
    ours = x.grad, weight.grad
    x.grad = weight.grad = None
    reference(x, weight).sum().backward()
    torch.testing.assert_close(ours, (x.grad, weight.grad), atol=1e-5, rtol=1e-5)
