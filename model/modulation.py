"""Modulation by timestep: computed once for each timestep, looked up in every later step.

All the network learns from a timestep are scales and gates of its norms. They depend on nothing
else but the LoRAs that change them, and schedules repeat: so they are kept folded into the norm
weights, one row for each timestep and such LoRAs. A row is computed by itself, so that its rounding
cannot depend on which others were new.

Shapes: u = different rows of a batch, b = modulated blocks, d = width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import Adapters, Spans, modulating, spans_of
from model.layers import Block, Folded
from model.packing import upload
from model.tensor_cache import TensorCache

if TYPE_CHECKING:
    from model.next_dit import NextDiT

CACHE_BYTES = 256 * 2**20  # hundreds of timesteps of the released model in bf16


@dataclass(frozen=True, slots=True)
class Modulation:
    """The folded weights of a batch.

    Attributes:
        noise_refiner: of each noise refiner block, u rows.
        layers: of each joint block, u rows.
        final: scales [u, d] of the final layer, float32.
        rows: for each sample of the batch its row.
    """

    noise_refiner: tuple[Folded, ...]
    layers: tuple[Folded, ...]
    final: Tensor
    rows: tuple[int, ...]


class ModulationTable:
    """Folded weights of one network by timestep. One thread at a time; inference only.

    Args:
        dit: the network; its weights must stay as they are.
        cache_bytes: bound of what is kept.
    """

    def __init__(self, dit: NextDiT, cache_bytes: int = CACHE_BYTES) -> None:
        self._dit = dit
        self.cache: TensorCache[tuple[object, ...]] = TensorCache(cache_bytes)

    def of(self, timesteps: Sequence[float], adapters: Sequence[Adapters]) -> Modulation:
        """The weights of a batch with these timesteps (0 = noise) and LoRAs."""
        keys = [(t, modulating(own)) for t, own in zip(timesteps, adapters, strict=True)]
        different = dict(zip(keys, zip(timesteps, adapters, strict=True), strict=True))
        kept = [
            self.cache.get(key, lambda row=row: self._row(*row))  # type: ignore[misc]
            for key, row in different.items()
        ]
        # A stack may want several rows where one would do: it then repeats the first.
        kept += kept[:1] * (self._dit.run_stack.min_rows - len(kept))
        noise_scaled, noise_gated, scaled, gated, final = (
            torch.stack(parts, dim=1) for parts in zip(*kept, strict=True)
        )
        row_of = {key: row for row, key in enumerate(different)}
        return Modulation(
            noise_refiner=tuple(zip(noise_scaled, noise_gated, strict=True)),
            layers=tuple(zip(scaled, gated, strict=True)),
            final=final[0],
            rows=tuple(row_of[key] for key in keys),
        )

    def _row(self, timestep: float, adapters: Adapters) -> tuple[Tensor, ...]:
        """Folded weights [b, 2d] of the noise refiner and the joint blocks; final scale [1, d]."""
        dit = self._dit
        time = upload(torch.tensor([timestep], dtype=torch.float32), dit.device)
        spans = spans_of([adapters], [1])
        embedding = F.silu(dit.time_embedder(time, spans))
        folded: list[Tensor] = []
        for blocks, residual in (
            (dit.noise_refiner, dit.dtype),
            (dit.layers, dit.residual_dtype or dit.dtype),
        ):
            pairs = [_fold(block, embedding, residual, spans) for block in blocks]
            folded += [torch.cat(parts) for parts in zip(*pairs, strict=True)]
        return (*folded, dit.final_layer.scale(embedding, spans))


def _fold(block: object, embedding: Tensor, residual: torch.dtype, spans: Spans) -> Folded:
    assert isinstance(block, Block)
    return block.fold(embedding, residual, spans)
