"""Packed ragged sequences: many samples of different length as one run of tokens.

Shapes: T = tokens of all sequences, n = sequences, d = width, h = heads.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from model.config import ROPE_THETA, NextDiTConfig


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring sequences of equal length: they are one dense batch, without padding."""

    start: int  # first token
    count: int  # sequences
    length: int  # tokens of each

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.count * self.length


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each sequence lies in the packed tokens."""

    lengths: tuple[int, ...]
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, lengths: list[int]) -> "Layout":
        """Lay out sequences of these lengths one after another."""
        runs, start = [], 0
        for length, group in groupby(lengths):
            run = Run(start, len(list(group)), length)
            runs.append(run)
            start = run.stop
        return cls(tuple(lengths), tuple(runs))

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    def sequence_index(self, device: torch.device) -> Tensor:
        """``[T]`` int64: the sequence each token belongs to."""
        lengths = torch.tensor(self.lengths, device=device)
        index = torch.arange(len(self.lengths), device=device)
        return torch.repeat_interleave(index, lengths, output_size=self.num_tokens)


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """A batch on its way through the joint blocks: per sample its caption, then its image tokens.

    Samples are sorted by size so that equal ones lie together; ``order[j]`` is the caller's
    index of the sample at place j.
    """

    hidden: Tensor  # [T, d]
    layout: Layout
    cos: Tensor  # [T, head_dim / 2] fp32
    sin: Tensor  # [T, head_dim / 2] fp32
    time_embedding: Tensor  # [n, modulation_dim], SiLU applied
    sequence_index: Tensor  # [T]
    grids: tuple[tuple[int, int], ...]  # patch rows and columns of each sample
    order: tuple[int, ...]


class RotaryTables:
    """Rotary factors of the three axes (caption position, row, column), real and fp32.

    Text token k sits at (k, 0, 0), image token (r, c) of a caption of L tokens at (L, r, c).
    Angles are computed in fp64. Tables are cached by shape.
    """

    def __init__(self, config: NextDiTConfig) -> None:
        self._max_positions = config.axes_lens
        self._frequencies = [
            ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
            for dim in config.axes_dim_rope
        ]
        self.caption = lru_cache(maxsize=1024)(self._caption)
        self.image = lru_cache(maxsize=1024)(self._image)

    def _caption(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin ``[length, head_dim / 2]`` of a caption."""
        if not 1 <= length < self._max_positions[0]:
            raise ValueError(
                f"a caption of {length} tokens is outside 1..{self._max_positions[0] - 1}"
            )
        zeros = torch.zeros(length, dtype=torch.float64)
        return self._table((torch.arange(length, dtype=torch.float64), zeros, zeros), device)

    def _image(
        self, caption_length: int, rows: int, columns: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos and sin ``[rows * columns, head_dim / 2]`` of an image after its caption."""
        if rows > self._max_positions[1] or columns > self._max_positions[2]:
            raise ValueError(
                f"an image of {rows} x {columns} tokens exceeds "
                f"{self._max_positions[1]} x {self._max_positions[2]}"
            )
        row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
        column = torch.arange(columns, dtype=torch.float64).repeat(rows)
        return self._table((torch.full_like(row, caption_length), row, column), device)

    def _table(
        self, positions: tuple[Tensor, Tensor, Tensor], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # cached tables must also serve training
            angles = torch.cat(
                [torch.outer(p, f) for p, f in zip(positions, self._frequencies, strict=True)], -1
            )
            return angles.cos().float().to(device), angles.sin().float().to(device)
