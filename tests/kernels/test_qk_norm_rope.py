import pytest
import torch

from kernels.qk_norm_rope import qk_norm_rope, rotate_ref
from tests.kernels.yardstick import draw, error, strided

EPS = 1e-5
# (tokens, heads, kv heads, head dimension)
SHAPES = [(5, 4, 2, 10), (7, 3, 3, 122), (33, 6, 2, 96), (1, 8, 1, 24), (0, 4, 2, 12)]


def reference(x, weight, cos, sin):
    """Normalise, then turn each adjacent pair as a complex number."""
    x = x.double()
    normed = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    pairs = torch.complex(normed[..., 0::2], normed[..., 1::2])
    turned = pairs * torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(turned).flatten(-2)


def inputs(shape, dtype=torch.float32):
    tokens, heads, kv_heads, dim = shape
    angles = draw(tokens, dim // 2, seed=4) * 30
    return (
        draw(tokens, heads, dim, dtype=dtype),
        draw(tokens, kv_heads, dim, seed=1, dtype=dtype),
        draw(dim, seed=2, dtype=dtype),
        draw(dim, seed=3, dtype=dtype),
        angles.cos(),
        angles.sin(),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_reference(shape):
    q, k, q_weight, k_weight, cos, sin = inputs(shape)
    new_q, new_k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS)
    assert (new_q.dtype, new_k.dtype) == (torch.float32, torch.float32)
    for result, x, weight in ((new_q, q, q_weight), (new_k, k, k_weight)):
        expected = reference(x, weight, cos, sin)
        torch.testing.assert_close(result.double(), expected, atol=3e-6, rtol=3e-6)


def test_q_and_k_as_slices_of_one_projection():
    q, k, *rest = inputs((9, 4, 2, 12))
    fused = torch.cat((q, k, torch.full_like(k, float("nan"))), dim=1)
    sliced = fused.split((4, 2, 2), dim=1)[:2]
    assert not sliced[0].is_contiguous()
    for result, expected in zip(
        (*qk_norm_rope(*sliced, *rest, EPS), *qk_norm_rope(strided(q), strided(k), *rest, EPS)),
        2 * qk_norm_rope(q, k, *rest, EPS),
        strict=True,
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", [(33, 6, 2, 96), (65, 8, 2, 10)], ids=str)
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(shape):
    q, k, q_weight, k_weight, cos, sin = inputs(shape, torch.bfloat16)
    results = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS)
    for result, x, weight in zip(results, (q, k), (q_weight, k_weight), strict=True):
        assert result.dtype == torch.bfloat16
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
        even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
        low_cos, low_sin = cos.bfloat16()[:, None], sin.bfloat16()[:, None]
        eager = torch.stack(
            (even * low_cos - odd * low_sin, even * low_sin + odd * low_cos), dim=-1
        ).flatten(-2)
        expected = reference(x, weight, cos, sin)
        assert error(result, expected) <= 2 * error(eager, expected)


def test_a_quarter_turn_of_adjacent_pairs():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    turned = rotate_ref(x, torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert turned.tolist() == [[[-2.0, 1.0, 3.0, 4.0]]]


def test_products_depend_on_the_distance_only():
    """What rotary positions are for."""
    vectors, frequencies = draw(2, 1, 12), torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1, 0.01])

    def product(position, other):
        angles = torch.outer(torch.tensor([float(position), float(other)]), frequencies)
        a, b = rotate_ref(vectors, angles.cos(), angles.sin())
        return float((a * b).sum())

    assert product(3, 7) == pytest.approx(product(40, 44), abs=1e-5)
    assert abs(product(3, 7) - product(3, 8)) > 1e-2
