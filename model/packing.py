"""Packed ragged sequences: many samples of different length as one run of tokens.

Shapes: T = tokens of all sequences, n = sequences, d = width, h = heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.adapters import Adapted, Adapters
from model.config import ROPE_THETA, NextDiTConfig
from model.tensor_cache import TensorCache

if TYPE_CHECKING:
    from model.attention import Attend
    from model.modulation import Modulation

ROTARY_CACHE_BYTES = 64 * 2**20  # ten pictures of 2048 x 2048, or hundreds of 256 x 256


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without the host waiting for a GPU: through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where each sequence lies in the packed tokens: on the host, and for ragged kernels on device.

    Lengths and maxima are known here without asking the device, so nobody has to wait for it.
    """

    lengths: tuple[int, ...]
    runs: tuple[Run, ...]
    cu_seqlens: Tensor  # [n + 1] int32: where each sequence starts, and at the end the total

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Layout":
        """Lay out sequences of these lengths one after another, for tokens on ``device``."""
        runs, start = [], 0
        for length, group in groupby(lengths):
            run = Run(start, len(list(group)), length)
            runs.append(run)
            start = run.stop
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        return cls(tuple(lengths), tuple(runs), upload(starts, torch.device(device)))

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def sequence_index(self, rows: Sequence[int] | None = None) -> Tensor:
        """``[T]`` int64: the sequence each token belongs to, or that sequence's entry of `rows`."""
        rows = range(len(self.lengths)) if rows is None else rows
        index = upload(torch.tensor(rows, device="cpu"), self.cu_seqlens.device)
        return torch.repeat_interleave(index, self.cu_seqlens.diff(), output_size=self.num_tokens)


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """A batch on its way through the joint blocks: per sample its caption, then its image tokens.

    Samples are sorted by adapters and size so that equal ones lie together; ``order[j]`` is the
    caller's index of the sample at place j.
    """

    hidden: Tensor  # [T, d], the residual stream
    layout: Layout
    attend: "Attend"  # attention inside the sequences of layout
    cos: Tensor  # [T, head_dim / 2] fp32
    sin: Tensor  # [T, head_dim / 2] fp32
    time_embedding: Tensor | None  # [n, modulation_dim], SiLU applied; None beside a modulation
    modulation: "Modulation | None"  # what the time embedding would say, looked up
    sequence_index: Tensor  # [T], row of the time embedding or of the modulation
    grids: tuple[tuple[int, int], ...]  # patch rows and columns of each sample
    order: tuple[int, ...]
    adapters: tuple[Adapters, ...]  # of each sample

    @property
    def adapted(self) -> Adapted:
        """Where the adapters act."""
        return Adapted.of(self.adapters, self.layout.lengths)

    def select(
        self, places: Sequence[int], plan: Callable[[Layout], "Attend"]
    ) -> "PackedSequences":
        """The sequences at these places alone, in the order given; `plan` is the backend's.

        The result is for the joint blocks alone: its `order` counts from 0 again.
        """
        lengths = self.layout.lengths
        device = self.hidden.device
        layout = Layout.of([lengths[place] for place in places], device)

        def taken(tokens: Tensor) -> Tensor:
            pieces = tokens.split(lengths)
            return torch.cat([pieces[place] for place in places])

        time_embedding, rows = self.time_embedding, None
        if self.modulation is not None:
            rows = [self.modulation.rows[self.order[place]] for place in places]
        if time_embedding is not None:
            time_embedding = time_embedding[upload(torch.tensor(places, device="cpu"), device)]
        return PackedSequences(
            hidden=taken(self.hidden),
            layout=layout,
            attend=plan(layout),
            cos=taken(self.cos),
            sin=taken(self.sin),
            time_embedding=time_embedding,
            modulation=self.modulation,
            sequence_index=layout.sequence_index(rows),
            grids=tuple(self.grids[place] for place in places),
            order=tuple(range(len(places))),
            adapters=tuple(self.adapters[place] for place in places),
        )


class RotaryTables:
    """Rotary factors of the three axes (caption position, row, column), real and fp32.

    Text token k sits at (k, 0, 0), image token (r, c) of a caption of L tokens at (L, r, c).
    Angles are computed in fp64. Tables are kept by shape, up to a number of bytes; they are shared:
    read only.
    """

    def __init__(self, config: NextDiTConfig, cache_bytes: int = ROTARY_CACHE_BYTES) -> None:
        self._max_positions = config.axes_lens
        self._frequencies = [
            ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
            for dim in config.axes_dim_rope
        ]
        self.cache: TensorCache[tuple[object, ...]] = TensorCache(cache_bytes)

    def caption(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin ``[length, head_dim / 2]`` of a caption: the head of the longest one's."""
        longest = self._max_positions[0] - 1
        if not 1 <= length <= longest:
            raise ValueError(f"a caption of {length} tokens is outside 1..{longest}")
        cos, sin = self.cache.get(("caption", device), partial(self._caption, longest, device))
        return cos[:length], sin[:length]

    def image(
        self, caption_length: int, rows: int, columns: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos and sin ``[rows * columns, head_dim / 2]`` of an image after its caption."""
        if rows > self._max_positions[1] or columns > self._max_positions[2]:
            raise ValueError(
                f"an image of {rows} x {columns} tokens exceeds "
                f"{self._max_positions[1]} x {self._max_positions[2]}"
            )
        place = caption_length, rows, columns, device
        cos, sin = self.cache.get(("image", *place), partial(self._image, *place))
        return cos, sin

    def _caption(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(length, dtype=torch.float64)
        return self._table((torch.arange(length, dtype=torch.float64), zeros, zeros), device)

    def _image(
        self, caption_length: int, rows: int, columns: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
        column = torch.arange(columns, dtype=torch.float64).repeat(rows)
        return self._table((torch.full_like(row, caption_length), row, column), device)

    def _table(
        self, positions: tuple[Tensor, Tensor, Tensor], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        # Neither of inference mode nor with a graph: a kept table also serves training.
        with torch.inference_mode(False), torch.no_grad():
            angles = torch.cat(
                [torch.outer(p, f) for p, f in zip(positions, self._frequencies, strict=True)], -1
            )
            return upload(angles.cos().float(), device), upload(angles.sin().float(), device)
