"""The autoencoder stage: diffusers' AutoencoderKL on rendered demo scenes."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from trainer.config import SizeShare, VaeConfig
from trainer.demo.render import render
from trainer.demo.scenes import sample_dense_scene, sample_scene
from trainer.distributed import World
from trainer.ema import Ema
from trainer.loss import kl_loss, reconstruction_loss
from trainer.precision import mixed_precision
from trainer.stages.base import WholeStage
from trainer.stages.whiten import fold_into, whitening

STATISTICS_IMAGES = 512


class VaeStage(WholeStage):
    """Trains the autoencoder; scenes are rendered as they are needed."""

    name = "vae"
    module: AutoencoderKL
    whitens = False  # whether the latents are whitened once trained

    def __init__(self, config: VaeConfig, seed: int, world: World) -> None:
        self.optimizer = config.optimizer
        self.total_steps = config.steps
        self._config, self._seed, self._world = config, seed, world
        self._kl_weight = config.kl_weight
        torch.manual_seed(seed)
        self.module = build_vae(config)
        self.images_per_step = world.size * batch_size(config.batch_pixels, config.sizes[0])

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Reconstruction plus a small KL term, on one batch of one size."""
        rng = np.random.default_rng((self._seed, step, self._world.rank))
        weights = np.array([size.weight for size in self._config.sizes])
        # All ranks draw the same size, or the slower one would hold up the others.
        shared = np.random.default_rng((self._seed, step))
        size = self._config.sizes[shared.choice(len(weights), p=weights / weights.sum())]
        images = self._batch(rng, size).to(self._world.device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with mixed_precision(images.device.type):
            mean, logvar = self.module.encode(images).latent_dist.parameters.chunk(2, dim=1)
            mean, logvar = mean.float(), logvar.float().clamp(-30.0, 20.0)
            noise = torch.randn(mean.shape, generator=generator).to(mean.device)
            decoded = self.module.decode(mean + (0.5 * logvar).exp() * noise).sample
        loss, mse = reconstruction_loss(images, decoded, self._config.gradient_weight)
        kl = kl_loss(mean, logvar)
        psnr = -10.0 * math.log10(max(mse.item() / 4.0, 1e-12))
        report = {"psnr": psnr, "kl": kl.item(), "width": float(size.width)}
        return loss + self._kl_weight * kl, report

    def _batch(self, rng: np.random.Generator, size: SizeShare) -> Tensor:
        images = []
        for _ in range(batch_size(self._config.batch_pixels, size)):
            dense = rng.random() < self._config.dense_share
            scene = sample_dense_scene(rng) if dense else sample_scene(rng)
            images.append(render(scene, size.width, size.height))
        return to_tensor(np.stack(images))

    @torch.no_grad()
    def finish(self, ema: Ema, folder: Path) -> None:
        """Save the averaged weights, with the latent scale and shift measured on fresh scenes."""
        vae = self.module.to("cpu")
        vae.load_state_dict(ema.weights())
        vae.eval()
        rng = np.random.default_rng((self._seed, 2**31))
        size = self._config.sizes[0]
        images = np.stack(
            [render(sample_scene(rng), size.width, size.height) for _ in range(STATISTICS_IMAGES)]
        )
        latents = _modes(vae, to_tensor(images))
        if self.whitens:
            matrix = whitening(latents)
            fold_into(vae, matrix)
            latents = torch.einsum("ij,njhw->nihw", matrix.to(latents), latents)
        vae.register_to_config(
            scaling_factor=round(1.0 / latents.std().item(), 5),
            shift_factor=round(latents.mean().item(), 5),
        )
        vae.save_pretrained(folder)


class CompactStage(VaeStage):
    """Continues a trained autoencoder under a KL weight that makes every nat pay for itself.

    Left alone, an encoder writes more into its latents than the decoder needs (each cell sees far
    beyond itself, and group norms mix in the whole picture); the transformer would have to learn
    all of that. At a weight of about (error per number) * (latent numbers / pixel numbers) the
    objective is the true evidence bound, and what buys no sharper picture is dropped.
    """

    name = "compact"
    whitens = True

    def __init__(self, config: VaeConfig, seed: int, world: World, trained: Path) -> None:
        super().__init__(config, seed + 1, world)
        self.optimizer = config.compact.optimizer
        self.total_steps = config.compact.steps
        self._kl_weight = config.compact.kl_weight
        vae = AutoencoderKL.from_pretrained(trained)
        self.module.load_state_dict(vae.state_dict())
        self._rescale(config.compact.latent_std * vae.config.scaling_factor)

    @torch.no_grad()
    def _rescale(self, factor: float) -> None:
        """Scale the latents by ``factor``, unseen by the decoder, and widen the posterior."""
        channels = self._config.latent_channels
        encoder_out, decoder_in = self.module.encoder.conv_out, self.module.decoder.conv_in
        encoder_out.weight[:channels].mul_(factor)
        encoder_out.bias[:channels].mul_(factor)
        decoder_in.weight.div_(factor)
        encoder_out.weight[channels:].zero_()
        encoder_out.bias[channels:].fill_(2.0 * math.log(self._config.compact.noise_std))


def _modes(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(64)])


def batch_size(pixels: int, size: SizeShare) -> int:
    """Images of ``size`` that hold about ``pixels`` pixels."""
    return max(1, pixels // (size.width * size.height))


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 ``[B, H, W, 3]`` to fp32 ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """An 8x autoencoder of the released model's kind: no quant convolutions, and here no attention
    (it would make the decoder's cost quadratic and buys nothing on this world).
    """
    levels = len(config.block_out_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
        sample_size=config.sizes[0].width,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    start_near_identity(vae)
    return vae


@torch.no_grad()
def start_near_identity(vae: AutoencoderKL) -> None:
    """Begin as a linear pyramid: average down, repeat up, every residual branch at zero.

    From PyTorch's defaults the first thousands of images only teach blobs of brightness; from
    here colours and places are right within a few hundred.
    """
    for name, module in vae.named_modules():
        if name.endswith(".conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith((".conv_shortcut", ".upsamplers.0.conv")):
            nn.init.dirac_(module.weight)
            module.weight.add_(0.02 * torch.randn_like(module.weight))
        elif name.endswith(".downsamplers.0.conv"):
            averaging = torch.zeros_like(module.weight)
            for channel in range(len(averaging)):
                averaging[channel, channel % averaging.shape[1], :2, :2] = 0.25
            module.weight.copy_(averaging + 0.02 * torch.randn_like(averaging))
    # A small posterior variance: a unit one would drown the latents until they have grown.
    vae.encoder.conv_out.bias[vae.config.latent_channels :].fill_(-6.0)
