import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from model.vae import VAE, to_pil


@pytest.fixture(scope="module")
def vae(pipeline) -> VAE:
    return pipeline.vae


@pytest.fixture(scope="module")
def theirs(tiny_folder):
    return AutoencoderKL.from_pretrained(tiny_folder / "vae").eval()


def test_config_values(vae):
    assert (vae.latent_channels, vae.downscale) == (16, 8)
    assert (vae.scaling_factor, vae.shift_factor) == (0.3611, 0.1159)


@torch.no_grad()
def test_encode_is_the_normalised_mode(vae, theirs):
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    expected = (theirs.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611
    latents = vae.encode(pixels)
    assert latents.shape == (2, 16, 4, 6)
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_decode_undoes_the_normalisation(vae, theirs):
    latents = torch.randn(16, 4, 6)
    expected = theirs.decode(latents[None] / 0.3611 + 0.1159).sample[0]
    (decoded,) = vae.decode([latents])
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


def test_decode_keeps_order_and_does_not_depend_on_neighbours(vae):
    sizes = [(4, 4), (8, 4), (4, 4), (4, 8), (8, 4), (4, 4)]
    latents = [torch.randn(16, *size) for size in sizes]
    for sample, decoded in zip(latents, vae.decode(latents), strict=True):
        (alone,) = vae.decode([sample])
        assert decoded.shape == (3, sample.shape[1] * 8, sample.shape[2] * 8)
        assert (decoded - alone).abs().max() < 1e-4


def test_to_pil_rounds_and_clamps_like_diffusers():
    pixels = torch.linspace(-1.3, 1.3, 3 * 16 * 16).view(3, 16, 16)
    (expected,) = VaeImageProcessor().postprocess(pixels[None], output_type="pil")
    assert to_pil(pixels).tobytes() == expected.tobytes()


@torch.no_grad()
def test_tiles_are_diffusers_tiles(vae, theirs):
    latents = torch.randn(16, 12, 20)
    expected = theirs.tiled_decode(latents[None] / 0.3611 + 0.1159).sample[0]
    (tiled,) = vae.decode([latents], tiled=True)
    torch.testing.assert_close(tiled, expected, atol=1e-5, rtol=1e-5)
    (whole,) = vae.decode([latents])
    assert (tiled - whole).abs().max() > 1e-3  # the statistics of a tile are not the picture's


@torch.no_grad()
def test_large_pictures_are_tiled_whatever_their_company(theirs):
    vae = VAE(theirs)
    assert vae.untiled_pixels == 2**20  # four times the training size is less
    vae.untiled_pixels = 96 * 96
    small, large = torch.randn(16, 12, 12), torch.randn(16, 12, 20)
    decoded = vae.decode([small, large, large, small])
    (whole,), (tiled,) = vae.decode([small]), vae.decode([large], tiled=True)
    for index, expected in ((0, whole), (1, tiled), (2, tiled), (3, whole)):
        torch.testing.assert_close(decoded[index], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_checkpoint_of_large_pictures_decodes_them_whole():
    large = AutoencoderKL(
        block_out_channels=[4], norm_num_groups=2, layers_per_block=1, sample_size=1024
    )
    assert VAE(large).untiled_pixels == 2048 * 2048
