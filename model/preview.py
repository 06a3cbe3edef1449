"""Rough pictures of latents in microseconds: a linear map from latent channels to colour.

Decoding with the VAE costs as much as several denoising steps of a small model; a linear map from
the channels of one latent place to its mean colour costs nearly nothing and shows what is drawn.
The map belongs to the autoencoder, so it is fitted to it once, on pictures made here.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from model.vae import VAE, to_pil

_CALIBRATION_PICTURES = 12
_CALIBRATION_SIZE = 64
_RIDGE = 1e-3


class LatentPreview:
    """Colours of latents, one pixel for each latent place.

    Args:
        weight: [C + 1, 3], the last row is the bias; maps normalised latents to pixels in [-1, 1].
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.float().cpu()

    @classmethod
    @torch.inference_mode()
    def fit(cls, vae: VAE) -> LatentPreview:
        """Least squares between the VAE's latents of plain pictures and their mean colours."""
        pixels = _calibration_pictures(vae.downscale)
        latents = vae.encode(pixels).cpu()
        colours = torch.nn.functional.avg_pool2d(pixels, vae.downscale)
        x = _with_bias(latents.movedim(1, -1).reshape(-1, latents.shape[1]))
        y = colours.movedim(1, -1).reshape(-1, 3)
        gram = x.T @ x
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        return cls(torch.linalg.solve(gram + ridge, x.T @ y))

    @torch.inference_mode()
    def draw(self, latents: Tensor) -> Image.Image:
        """An RGB picture [W, H] of normalised latents [C, H, W]."""
        channels, height, width = latents.shape
        flat = latents.detach().cpu().float().reshape(channels, -1).T
        colours = _with_bias(flat) @ self.weight
        return to_pil(colours.T.reshape(3, height, width))


def _with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)


def _calibration_pictures(downscale: int) -> Tensor:
    """Smooth random colours with flat patches on top: [n, 3, H, W] in [-1, 1], always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    count, size = _CALIBRATION_PICTURES, max(_CALIBRATION_SIZE, 4 * downscale)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    pictures = torch.nn.functional.interpolate(
        coarse, size=(size, size), mode="bilinear", align_corners=True
    )
    for picture in pictures:
        for _ in range(4):
            row, column = torch.randint(0, size * 3 // 4, (2,), generator=generator).tolist()
            side = int(torch.randint(size // 8, size // 2, (1,), generator=generator))
            colour = torch.rand(3, 1, 1, generator=generator) * 2 - 1
            picture[:, row : row + side, column : column + side] = colour
    return pictures


class LatentPainter:
    """Pictures of unfinished latents, off the thread that computes steps.

    Args:
        vae: of the checkpoint.
    """

    def __init__(self, vae: VAE) -> None:
        self._vae = vae
        self._map: LatentPreview | None = None
        self._stream = torch.cuda.Stream(vae.device) if vae.device.type == "cuda" else None

    def rough(self, latents: Tensor) -> Image.Image:
        """A small picture of latents [C, h, w] by the linear map, one pixel for each place."""
        with torch.cuda.stream(self._ready(latents)):
            if self._map is None:
                self._map = LatentPreview.fit(self._vae)
            return self._map.draw(latents)

    def full(self, latents: Tensor) -> Image.Image:
        """The picture of latents [C, h, w] by the VAE."""
        with torch.cuda.stream(self._ready(latents)), torch.inference_mode():
            (pixels,) = self._vae.decode([latents])
            return to_pil(pixels)

    def _ready(self, latents: Tensor) -> torch.cuda.Stream | None:
        """A stream of its own beside the steps, behind what made these latents."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(latents.device))
            latents.record_stream(self._stream)
        return self._stream
