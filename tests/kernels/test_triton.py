"""Every Triton kernel against float64 and its eager reference.

On a GPU: `pytest -m gpu tests/kernels`. On a CPU these run in Triton's interpreter, in a process
of their own, as `tests/kernels/test_interpreted.py` starts it.
"""

import pytest
import torch

from kernels import dispatch
from kernels.rms_norm import rms_norm
from tests.kernels.operators import BY_TOKEN, EPS, OPERATORS, listed
from tests.kernels.yardstick import draw, error

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(5, 10), (7, 123), (5, 96), (2, 2304), (1, 96), (1, 1), (0, 96)]
FLOOR = 1.2e-7  # relative: two roundings to fp32, where a few numbers say nothing of an average
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not dispatch.INTERPRETED,
            reason="test_interpreted.py runs these with TRITON_INTERPRET=1",
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not torch.cuda.is_available(), reason="NO CUDA DEVICE: kernels untested here"
            ),
        ],
    ),
]
everywhere = pytest.mark.parametrize("device", DEVICES)
every_operator = pytest.mark.parametrize("name", OPERATORS)


def drawn(name, tokens, width, narrow=FP32, wide=FP32, device="cpu"):
    inputs = OPERATORS[name].inputs(tokens, width, narrow, wide)
    # A copy would be contiguous: slices of fused projections stay such.
    return {key: moved(x, device) for key, x in inputs.items()}


def moved(x, device):
    if device == "cpu":
        return x
    base = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return base.copy_(x)


def rows(inputs, chosen):
    return {key: x[chosen] if key in BY_TOKEN else x for key, x in inputs.items()}


@everywhere
@every_operator
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_error_is_at_most_twice_that_of_the_reference(name, shape, device):
    check_error(name, drawn(name, *shape, device=device))


@everywhere
@every_operator
@pytest.mark.parametrize("wide", [BF16, FP32], ids=["bf16", "mixed"])
def test_narrow_error_is_at_most_twice_that_of_the_reference(name, wide, device):
    for shape in ((4, 123), (3, 2304)):
        inputs = drawn(name, *shape, narrow=BF16, wide=wide, device=device)
        if device == "cuda":
            check_error(name, inputs)
        else:
            check_last_place(name, inputs)


def check_error(name, inputs):
    """All of a poisoned output is written, and well."""
    operator = OPERATORS[name]
    references = listed(operator.reference(**inputs))
    for result, eager, exact in zip(
        operator.poisoned(inputs), references, listed(operator.exact(**inputs)), strict=True
    ):
        assert (result.shape, result.dtype) == (eager.shape, eager.dtype)
        assert not result.isnan().any()
        if exact.numel():
            assert error(result, exact) <= max(2 * error(eager, exact), FLOOR)


def check_last_place(name, inputs):
    """The interpreter cuts bf16 off where a GPU rounds: one unit in the last place."""
    operator = OPERATORS[name]
    for result, exact in zip(
        operator.poisoned(inputs), listed(operator.exact(**inputs)), strict=True
    ):
        place = 2.0**-7 if result.dtype == BF16 else 2.0**-20
        assert ((result.double() - exact).abs() <= place * exact.abs() + 1e-5).all()


@everywhere
@every_operator
def test_a_row_does_not_see_its_neighbours(name, device):
    """Bit by bit: alone, among others, and among rows that are not numbers."""
    operator = OPERATORS[name]
    inputs = drawn(name, 6, 123, device=device)
    together = operator.poisoned(inputs)
    spoiled = {
        key: torch.cat((x[:3], x[3:] * float("nan"))) if key in BY_TOKEN - {"index"} else x
        for key, x in inputs.items()
    }
    for among, alone, beside in zip(
        together,
        operator.poisoned(rows(inputs, slice(2, 3))),
        operator.poisoned(spoiled),
        strict=True,
    ):
        assert torch.equal(among[2:3], alone)
        assert torch.equal(among[:3], beside[:3])
        assert beside[3:].isnan().all()


@everywhere
@every_operator
def test_strided_inputs(name, device):
    """Every other row of wider tensors whose rest is NaN, and features that are not neighbours."""
    operator = OPERATORS[name]
    inputs = drawn(name, 5, 24, device=device)

    def wide(x):
        base = x.new_full((2 * x.shape[0], *x.shape[1:-1], x.shape[-1] + 3), float("nan"))
        base[::2, ..., : x.shape[-1]] = x
        return base[::2, ..., : x.shape[-1]]

    def transposed(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    tensors = [key for key in inputs if key in BY_TOKEN - {"index"}]
    for change in (wide, transposed):
        changed = inputs | {key: change(inputs[key]) for key in tensors}
        for result, expected in zip(
            operator.poisoned(changed), operator.poisoned(inputs), strict=True
        ):
            assert torch.equal(result, expected)


@everywhere
@every_operator
def test_the_public_function_takes_the_kernel_when_forced(name, device):
    operator = OPERATORS[name]
    inputs = drawn(name, 4, 48, device=device)
    with dispatch.forced(**dict.fromkeys(dispatch.DEFAULTS, True)):
        results = listed(operator.public(**inputs))
    for result, expected in zip(results, operator.poisoned(inputs), strict=True):
        assert torch.equal(result, expected)
    graded = {key: x.clone().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    with dispatch.forced(**dict.fromkeys(dispatch.DEFAULTS, True)):
        sum(out.square().sum() for out in listed(operator.public(**graded))).backward()
    assert all(x.grad is not None for x in graded.values() if x.requires_grad)


@everywhere
def test_kernels_compute_only_what_they_can(device):
    x = torch.ones(2, 4, device=device)
    graded = x.clone().requires_grad_()
    assert dispatch.uses_kernel("rms_norm", x) == (device == "cuda")  # the default when eager
    with dispatch.forced(rms_norm=False):
        assert not dispatch.uses_kernel("rms_norm", x)
    with dispatch.forced(rms_norm=True):
        assert dispatch.uses_kernel("rms_norm", x)
        assert not dispatch.uses_kernel("rms_norm", x.double())
        assert not dispatch.uses_kernel("rms_norm", x, graded)
        with torch.no_grad():
            assert dispatch.uses_kernel("rms_norm", x, graded)


@everywhere
def test_heads_and_other_leading_axes(device):
    x, weight = draw(4, 3, 10).to(device), draw(10, seed=1).to(device)
    with dispatch.forced(rms_norm=True):
        result = rms_norm(x, weight, EPS)
    flat = OPERATORS["rms_norm"].poisoned({"x": x.reshape(12, 10), "weight": weight})[0]
    assert torch.equal(result, flat.view(4, 3, 10))


@everywhere
def test_one_row_of_weights_serves_every_index(device):
    inputs = drawn("rms_norm by sequence", 5, 24, device=device)
    one = inputs | {"weight": inputs["weight"][:1]}
    result = OPERATORS["rms_norm by sequence"].poisoned(one)[0]
    plain = {"x": inputs["x"], "weight": inputs["weight"][0]}
    assert torch.equal(result, OPERATORS["rms_norm"].poisoned(plain)[0])


@everywhere
def test_gates_beyond_the_range_of_exp(device):
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 1.0, 1.0, 5.0]], device=device)
    result = OPERATORS["silu_mul"].poisoned({"gate_up": gate_up})[0]
    assert result.tolist() == [[0.0, 1e4, 0.0]]


@everywhere
def test_zeros_stay_finite(device):
    zeros = torch.zeros(2, 24, device=device)
    given = {"branch": zeros, "residual": zeros, "gate": zeros[0] + 1, "scale": zeros[0] + 1}
    for result in OPERATORS["gate_residual_norm, one weight"].poisoned(given):
        assert torch.equal(result, zeros)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: offsets untested here")
@every_operator
def test_a_million_tokens(name):
    """Offsets beyond 2^31 elements: the last rows are what they are alone."""
    tokens, width = 10**6, {"qk_norm_rope": 256, "silu_mul": 1100}.get(name, 2304)
    operator, last = OPERATORS[name], slice(10**6 - 3, None)
    inputs = {
        key: x.cuda().expand(tokens, *x.shape[1:]).contiguous() if key in BY_TOKEN else x.cuda()
        for key, x in operator.inputs(1, width, BF16, BF16).items()
    }
    for key in inputs.keys() & BY_TOKEN - {"index"}:
        inputs[key][last] = draw(3, *inputs[key].shape[1:], seed=7).to(inputs[key])
    assert max(x.numel() for x in inputs.values()) > 2**31
    results = operator.poisoned(inputs)
    for result, alone in zip(results, operator.poisoned(rows(inputs, last)), strict=True):
        assert torch.equal(result[last], alone)
        assert not result[:: tokens // 1000].isnan().any()
    torch.cuda.empty_cache()
