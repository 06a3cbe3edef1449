"""fp8: what rounding costs against float64, which layers are spared, who is refused."""

import pytest
import torch
from torch import nn

from model.adapters import Adapter, Linear, Lora, LowRank, Span
from model.config import NextDiTConfig
from model.layers import Block
from model.next_dit import NextDiT
from model.quantize import (
    FP8,
    FP8_MAX,
    Fp8Linear,
    check_quantize,
    quantize_fp8,
    quantize_rows,
    scaled_matmul,
)

BF16 = torch.bfloat16
no_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="NO CUDA DEVICE WITH FP8: the scaled product is untested here",
)


def outliers(rows, columns, seed=0):
    """Normal values with a few rows and entries that are hundreds of times larger."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[::7] *= 300
    x[torch.rand(x.shape, generator=generator) < 0.001] *= 100
    return x


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_rows_are_rounded_as_three_bits_of_mantissa_allow(dtype):
    x = outliers(64, 256).to(dtype)
    x[3], x[4] = 0.0, 1e-30
    quantized, scale = quantize_rows(x)
    assert (quantized.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (64, 1))
    again, exact = quantized.double() * scale.double(), x.double()
    assert again.isfinite().all()
    # Half a unit of the last place, 2^-4 of the number; below the smallest normal 2^-6, of 2^-9.
    bound = torch.maximum(exact.abs() * 2**-4, scale.double() * 2**-10) * (1 + 1e-6)
    assert ((again - exact).abs() <= bound).all()
    large = exact.abs().amax(-1) > 1e-20
    assert torch.equal(
        quantized.float().abs().amax(-1)[large], torch.full((63,), FP8_MAX)[: large.sum()]
    )


def test_a_product_errs_as_two_roundings_of_each_factor_do():
    x, weight = outliers(33, 512), 0.05 * outliers(48, 512, seed=1)
    exact = x.double() @ weight.double().T
    found = scaled_matmul(*quantize_rows(x), *quantize_rows(weight), torch.float32).double()
    # Every term is off by at most 2 * 2^-4 + 2^-8 of itself, and by what the smallest cannot hold.
    (_, xs), (_, ws) = quantize_rows(x), quantize_rows(weight)
    tiny = 2**-10 * 512 * FP8_MAX * 1.1 * 2 * xs.double() * ws.double().T
    bound = (2**-3 + 2**-8) * (x.double().abs() @ weight.double().abs().T) + tiny
    assert ((found - exact).abs() <= bound).all()
    # Random roundings mostly cancel: typically a few hundredths, where a lost scale gives 1.
    assert float((found - exact).norm() / exact.norm()) < 0.05


@torch.no_grad()
def test_an_fp8_layer_is_its_linear_rounded_and_takes_adapters_in_full_precision():
    torch.manual_seed(0)
    linear = Linear(64, 32, bias=False)
    linear.name = "layers.0.attention.out"
    layer, x = Fp8Linear(linear), torch.randn(10, 64)
    plain = layer(x)
    assert plain.dtype == x.dtype
    assert float((plain - linear(x)).norm() / linear(x).norm()) < 0.06
    change = LowRank(torch.randn(2, 64), torch.randn(32, 2))
    spans = (Span(4, 10, Adapter(Lora("ink", {linear.name: change}), 0.5)),)
    adapted = layer(x, spans)
    assert torch.equal(adapted[:4], plain[:4])
    expected = plain[4:] + 0.5 * (x[4:] @ change.a.T) @ change.b.T
    torch.testing.assert_close(adapted[4:], expected)


def small_dit(num_layers=7):
    torch.manual_seed(0)
    config = NextDiTConfig(
        hidden_size=64, num_layers=num_layers, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 6, 6), cap_feat_dim=32, in_channels=16,
    )  # fmt: skip
    dit = NextDiT(config).eval().requires_grad_(False)
    for weight in dit.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    return dit


def velocity(dit):
    generator = torch.Generator().manual_seed(0)
    latents = [
        torch.randn(16, 8, 8, generator=generator),
        torch.randn(16, 4, 6, generator=generator),
    ]
    prompts = [torch.randn(n, 32, generator=generator) for n in (5, 9)]
    out = dit(latents, torch.tensor([0.3, 0.7]), prompts)
    return torch.cat([v.flatten() for v in out])


def test_late_blocks_and_everything_outside_the_blocks_stay_as_they_are():
    dit = small_dit()
    exact = velocity(dit)
    assert quantize_fp8(dit) == 4 * 5
    small = {name.split(".")[1] for name, m in dit.named_modules() if isinstance(m, Fp8Linear)}
    assert small == {"0", "1", "2", "3", "4"}  # of 7: the last 15 % are two
    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear):
            assert "modulation" in name or not name.startswith(
                tuple(f"layers.{k}." for k in range(5))
            )
    error = float((velocity(dit) - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.1


def test_weights_the_kernel_cannot_take_are_left():
    dit = small_dit(num_layers=2)
    block = dit.layers[0]
    assert isinstance(block, Block)
    block.feed_forward.down = Linear(block.feed_forward.down.in_features, 24, bias=False)
    assert quantize_fp8(dit) == 3
    assert isinstance(block.feed_forward.down, Linear)


def test_who_cannot_is_refused_in_one_sentence(tiny_folder, monkeypatch):
    from model import load_pipeline  # brings diffusers, which a GPU machine may lack

    with pytest.raises(ValueError, match=r"^quantize 'fp8' needs a CUDA device .* is a CPU$"):
        load_pipeline(tiny_folder, precision="bf16", quantize="fp8")
    with pytest.raises(ValueError, match=r"^quantize 'int4' is not allowed: give none or fp8$"):
        load_pipeline(tiny_folder, quantize="int4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match=r"8\.9 or newer; this one has 8\.0$"):
        check_quantize("fp8", "cuda", BF16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ValueError, match=r"needs precision 'bf16' or 'mixed'; .* are float32$"):
        check_quantize("fp8", "cuda", torch.float32)
    check_quantize("fp8", "cuda", BF16)
    check_quantize("none", "cpu", torch.float32)


@pytest.mark.gpu
@no_fp8
@pytest.mark.parametrize(
    ("rows", "columns", "outs"), [(1, 64, 32), (333, 2304, 3840), (17, 9216, 2304)]
)
def test_the_kernel_computes_the_reference(rows, columns, outs):
    x, weight = outliers(rows, columns), 0.05 * outliers(outs, columns, seed=1)
    quantized = *quantize_rows(x), *quantize_rows(weight)
    expected = scaled_matmul(*quantized, torch.float32)
    found = scaled_matmul(*(part.cuda() for part in quantized), BF16)
    assert float((found.cpu().float() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.gpu
@no_fp8
def test_a_quantised_network_on_a_gpu_stays_near_the_full_one():
    dit = small_dit().to("cuda", BF16)
    exact = velocity(dit).float()
    quantize_fp8(dit)
    assert float((velocity(dit).float() - exact).norm() / exact.norm()) < 0.15
