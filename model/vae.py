"""The VAE between pixels and latents, and the latent normalisation.

Pixels are in [-1, 1]; normalised latents are ``(mode(encode(pixels)) - shift_factor) *
scaling_factor``, both factors from `vae/config.json`. The network only ever sees these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from model.checkpoint import (
    CheckpointError,
    WeightFiles,
    check_nothing_else,
    check_weight,
    load_weight,
    read_json,
    weight_files,
)

# Pixels decoded at once: bounds the activations (about 0.5 KiB per pixel and layer in float32).
_PIXELS_PER_DECODE = 2**20


class VAE:
    """diffusers' AutoencoderKL with the latent normalisation.

    Args:
        autoencoder: an `AutoencoderKL`, on its device and in its dtype.
    """

    def __init__(self, autoencoder: Any) -> None:
        self.autoencoder = autoencoder
        config = autoencoder.config
        self.latent_channels = int(config.latent_channels)
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor = float(config.scaling_factor)
        self.shift_factor = float(config.shift_factor or 0.0)
        # Twice the side it was trained at; a tile has once that side, as in diffusers.
        self.untiled_pixels = max(_PIXELS_PER_DECODE, 4 * _largest(config.sample_size) ** 2)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> VAE:
        """Load a `vae/` folder as diffusers writes it.

        Raises:
            CheckpointError: one line naming the file and the fault.
        """
        config = _checked_config(folder)
        stored = WeightFiles(weight_files(folder))
        try:
            with torch.device("meta"):
                autoencoder = AutoencoderKL.from_config(config)
        except Exception as error:  # whatever diffusers stumbles over, this file is at fault
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"vae/config.json: {reason}") from error
        expected = {key: value.shape for key, value in autoencoder.state_dict().items()}
        for key, shape in expected.items():
            check_weight(stored, key, shape)
        check_nothing_else(stored, stored.stored, expected)
        weights = {
            key: load_weight(stored, [key], shape, device=device, dtype=dtype)
            for key, shape in expected.items()
        }
        autoencoder.load_state_dict(weights, assign=True)
        return cls(autoencoder.eval().requires_grad_(False))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.autoencoder.device)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = self.autoencoder.dtype
        return dtype

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents of images; deterministic (the mode of the posterior).

        Args:
            pixels: [n, 3, H, W] in [-1, 1], H and W multiples of `downscale`.

        Returns:
            [n, C, H / downscale, W / downscale], float32.
        """
        posterior = self.autoencoder.encode(pixels.to(self.device, self.dtype)).latent_dist
        mode: Tensor = posterior.mode().float()
        return (mode - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor], *, tiled: bool = False) -> list[Tensor]:
        """Pixels of normalised latents of mixed sizes; equal sizes are decoded together.

        Pictures larger than `untiled_pixels` are always decoded in tiles: tiles change the
        statistics of the group norms, so that must depend on the picture alone.

        Args:
            latents: tensors [C, h_i, w_i].
            tiled: decode every picture alone and in tiles, to need less memory.

        Returns:
            Tensors [3, h_i * downscale, w_i * downscale], float32, about [-1, 1], in order.
        """
        groups: defaultdict[torch.Size, list[int]] = defaultdict(list)
        for index, sample in enumerate(latents):
            groups[sample.shape].append(index)
        pixels: dict[int, Tensor] = {}
        for shape, members in groups.items():
            area = shape[-2] * shape[-1] * self.downscale**2
            tiles = tiled or area > self.untiled_pixels
            size = 1 if tiles else max(1, _PIXELS_PER_DECODE // area)
            for start in range(0, len(members), size):
                chunk = members[start : start + size]
                decoded = self._decode_batch(torch.stack([latents[i] for i in chunk]), tiles)
                pixels.update(zip(chunk, decoded, strict=True))
        return [pixels[index] for index in range(len(latents))]

    def _decode_batch(self, latents: Tensor, tiles: bool) -> Tensor:
        raw = (latents.to(self.device) / self.scaling_factor + self.shift_factor).to(self.dtype)
        decode = self.autoencoder.tiled_decode if tiles else self.autoencoder.decode
        pixels: Tensor = decode(raw, return_dict=False)[0]
        return pixels.float()


def _largest(sample_size: int | Sequence[int]) -> int:
    return sample_size if isinstance(sample_size, int) else max(sample_size)


def to_pil(pixels: Tensor) -> Image.Image:
    """An RGB image of pixels [3, H, W] in [-1, 1]; values outside are clamped."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0.0, 1.0) * 255.0
    array = scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array)


def _checked_config(folder: Path) -> dict[str, Any]:
    """`config.json` of the VAE with the entries we rely on checked."""
    config = read_json(folder / "config.json")
    scaling = config.get("scaling_factor", 0.18215)  # diffusers' own default
    if not _is_number(scaling) or scaling == 0:
        raise CheckpointError(
            f"vae/config.json: scaling_factor {scaling!r} is not allowed: give a number other "
            "than 0"
        )
    shift = config.get("shift_factor")
    if shift is not None and not _is_number(shift):
        raise CheckpointError(
            f"vae/config.json: shift_factor {shift!r} is not allowed: give a number or null"
        )
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
