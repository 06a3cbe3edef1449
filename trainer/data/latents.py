"""Demo scenes rendered and encoded once, kept as a memory map of latents.

A scene is a function of (seed, index), so only latents are stored; captions are written anew each
time a scene is drawn.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.vae import VAE
from trainer.config import SizeShare
from trainer.demo.render import render
from trainer.demo.scenes import Scene, sample_scene
from trainer.precision import mixed_precision
from trainer.stages.vae import to_tensor

ENCODE_PIXELS = 262_144  # per call: 64 images of 64 px


class LatentPool:
    """Latents of ``num`` scenes of one size: fp16 ``[num, C, H/8, W/8]``, normalised."""

    def __init__(
        self, folder: Path, vae: VAE, size: SizeShare, num: int, seed: int, first: int
    ) -> None:
        self._seed, self._first = seed, first
        path = folder / f"latents-{size.width}x{size.height}-{first}-{num}.npy"
        if not path.is_file():
            self._encode(path, vae, size, num)
        self._latents = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._latents)

    def draw(self, rng: np.random.Generator, num: int) -> tuple[Tensor, list[Scene]]:
        """``num`` random scenes: latents fp32 ``[num, C, h, w]`` and what they show."""
        index = rng.integers(len(self._latents), size=num)
        latents = torch.from_numpy(self._latents[np.sort(index)].astype(np.float32))
        return latents, [self._scene(int(i)) for i in np.sort(index)]

    def _scene(self, index: int) -> Scene:
        return sample_scene(np.random.default_rng((self._seed, self._first + index)))

    def _encode(self, path: Path, vae: VAE, size: SizeShare, num: int) -> None:
        """Render and encode all scenes, then publish the file by an atomic rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npy")
        batch = max(1, ENCODE_PIXELS // (size.width * size.height))
        shape = (num, vae.latent_channels, size.height // 8, size.width // 8)
        out = np.lib.format.open_memmap(temporary, "w+", dtype=np.float16, shape=shape)
        started = reported = time.monotonic()
        for start in range(0, num, batch):
            stop = min(start + batch, num)
            images = [render(self._scene(i), size.width, size.height) for i in range(start, stop)]
            with torch.no_grad(), mixed_precision(vae.device.type):
                latents = vae.encode(to_tensor(np.stack(images)))
            out[start:stop] = latents.float().cpu().numpy().astype(np.float16)
            if time.monotonic() - reported > 15.0:
                reported = time.monotonic()
                rate = stop / (reported - started)
                print(
                    f"encoding {size.width}x{size.height} {stop}/{num}  {rate:.0f} img/s  "
                    f"ETA {(num - stop) / rate:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        out.flush()
        del out
        os.replace(temporary, path)
