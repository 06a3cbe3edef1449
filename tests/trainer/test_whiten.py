import torch
from diffusers import AutoencoderKL

from trainer.stages.whiten import fold_into, whitening

CHANNELS = 4


def correlated_latents() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[3.0, 0, 0, 0], [1, 0.5, 0, 0], [0, 1, 0.2, 0], [2, 0, 0, 0.1]])
    white = torch.randn(64, CHANNELS, 6, 8, generator=generator)
    shift = torch.tensor([0.5, -1.0, 0.0, 2.0])[:, None, None]
    return torch.einsum("ij,njhw->nihw", mixing, white) + shift


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).eval()


def test_whitened_channels_are_uncorrelated_of_unit_variance_and_equal_mean():
    latents = correlated_latents()
    white = torch.einsum("ij,njhw->nihw", whitening(latents), latents.double())
    flat = white.movedim(1, 0).flatten(1)
    assert torch.allclose(torch.cov(flat), torch.eye(CHANNELS).double(), atol=1e-5)
    means = flat.mean(1)
    assert torch.allclose(means, means.mean().expand(CHANNELS), atol=1e-5)
    assert means[0] > 0.1, "a mean of zero would have proved nothing"


@torch.no_grad()
def test_folding_changes_the_latents_and_not_the_pictures():
    vae, matrix = small_vae(), whitening(correlated_latents())
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before = vae.encode(pixels).latent_dist
    picture = vae.decode(before.mode()).sample
    fold_into(vae, matrix)
    after = vae.encode(pixels).latent_dist
    expected = torch.einsum("ij,njhw->nihw", matrix, before.mode().double()).float()
    assert torch.allclose(after.mode(), expected, atol=1e-5)
    assert not torch.allclose(after.mode(), before.mode(), atol=1e-1)
    assert torch.allclose(vae.decode(after.mode()).sample, picture, atol=1e-4)
    assert torch.isfinite(after.std).all()
