"""A run of modulated blocks on packed tokens, and who computes it.

The network says what is computed (`StackInput`); a runner says how: block after block as here,
compiled (`model/compiled.py`), or replayed from a CUDA graph (`model/graphs.py`).

Shapes: T = tokens of all sequences, n = sequences, u = rows of modulation, d = width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from model.adapters import Adapted
from model.attention import Attend
from model.layers import Folded
from model.packing import Layout


@dataclass(frozen=True, slots=True)
class StackInput:
    """What the blocks of a stack compute on."""

    hidden: Tensor  # [T, d]
    layout: Layout
    attend: Attend  # attention inside the sequences of layout
    cos: Tensor  # [T, head_dim / 2] fp32
    sin: Tensor  # [T, head_dim / 2] fp32
    sequence_index: Tensor  # [T], row of the time embedding or of the folded weights
    time_embedding: Tensor | None  # [n, modulation_dim], SiLU applied
    folded: tuple[Folded, ...] | None  # of each block [u, 2d] twice, in place of the time embedding
    adapted: Adapted


class StackRunner(Protocol):
    """Computes a stack of blocks.

    Attributes:
        min_rows: rows that a looked-up modulation should have at least.
    """

    min_rows: int

    def __call__(self, blocks: nn.ModuleList, given: StackInput, /) -> Tensor:
        """``[T, d]`` after the last block, in no memory that a later call writes to."""


class EagerStack:
    """Block after block, operator after operator: takes everything, training and LoRAs too."""

    min_rows = 1

    def __call__(self, blocks: nn.ModuleList, given: StackInput) -> Tensor:
        """See `StackRunner`."""
        hidden = given.hidden
        for number, block in enumerate(blocks):
            hidden = block(
                hidden,
                given.attend,
                given.cos,
                given.sin,
                given.time_embedding,
                given.sequence_index,
                None if given.folded is None else given.folded[number],
                given.adapted,
            )
        return hidden
