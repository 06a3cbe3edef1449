"""diffusers' transformer with loud random weights, and ragged batches to compare it on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

CHANNELS, TEXT_WIDTH = 4, 20
SHAPES = {
    "4 heads, 2 kv": {"heads": 4, "kv_heads": 2, "axes": (4, 4, 4)},
    "6 heads, 2 kv, wide": {"heads": 6, "kv_heads": 2, "axes": (8, 12, 12)},
    "4 heads, 4 kv, narrow ffn": {
        "heads": 4,
        "kv_heads": 4,
        "axes": (4, 6, 6),
        "ffn_dim_multiplier": 0.7,
    },
    "8 heads, 1 kv, 2 refiners": {
        "heads": 8,
        "kv_heads": 1,
        "axes": (8, 8, 8),
        "num_refiner_layers": 2,
    },
}
PLAIN = SHAPES["4 heads, 2 kv"]


def make_reference(heads, kv_heads, axes, seed=0, **options):
    """diffusers' class; no weight is zero or one, norms and biases included."""
    diffusers = pytest.importorskip("diffusers")  # a GPU machine may be bare

    options = {"num_layers": 2, "num_refiner_layers": 1, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reference = diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=CHANNELS,
            hidden_size=heads * sum(axes),
            num_attention_heads=heads,
            num_kv_heads=kv_heads,
            multiple_of=16,
            axes_dim_rope=axes,
            cap_feat_dim=TEXT_WIDTH,
            **options,
        )
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if name.endswith("weight") else 0.0
                parameter.data.normal_(center, 0.3)
    return reference.eval()


def ours_from(reference, folder: Path):
    """Our network with the weights that diffusers saved to ``folder``."""
    from model.next_dit import NextDiT

    reference.save_pretrained(folder)
    return NextDiT.from_pretrained(folder)


def ragged_batch(seed: int = 0) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Latents, timesteps and prompt embeds: mixed sizes, captions of 1 to 256 tokens.

    Two samples share their image size, and two both size and caption length.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [(8, 8), (6, 12), (16, 4), (8, 8), (2, 2), (6, 12)]
    lengths = [1, 256, 17, 40, 3, 256]
    latents = [torch.randn(CHANNELS, *size, generator=generator) for size in sizes]
    prompts = [torch.randn(n, TEXT_WIDTH, generator=generator) * 10 for n in lengths]
    return latents, torch.tensor([0.0, 0.3, 0.77, 1.0, 0.5, 0.9]), prompts


def reference_velocity(reference, latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
    """Velocity of one sample; called directly, diffusers' class has our sign and timestep."""
    mask = torch.ones(1, len(prompt), dtype=torch.bool)
    return reference(latents[None], timestep.view(1), prompt[None], mask).sample[0]


def relative_l2(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())
