"""Low-rank adapters (LoRA) on a packed forward: what is added to which rows of which layer.

An adapted layer computes ``W x + scale * B (A x)``. Requests with different adapters, and with
none, share one forward: the sequences are sorted so that equal adapters lie together, and each
adapter is applied to its own rows. Where these lie is known on the host, so nothing waits for the
device, and what a row becomes depends on its own adapters only.

Shapes: r = rank, T = rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import NamedTuple

from torch import Tensor, nn


class LowRank(NamedTuple):
    """The change ``b @ a`` of one weight; alpha / rank is contained in ``b``."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]


_numbers = count()


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA on its device.

    Attributes:
        name: as requests call it.
        layers: the change of every linear layer that it adapts, by the layer's name in the network.
        number: of no other in this process; it may stand for the LoRA without keeping it alive.
    """

    name: str
    layers: Mapping[str, LowRank]
    number: int = field(default_factory=lambda: next(_numbers), init=False)

    @property
    def modulates(self) -> bool:
        """Whether it changes what becomes of a timestep."""
        return any(layer.startswith("time") or "modulation" in layer for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Memory of its numbers."""
        return sum(part.nbytes for change in self.layers.values() for part in change)


class Adapter(NamedTuple):
    """A LoRA and how strongly it is applied."""

    lora: Lora
    scale: float


Adapters = tuple[Adapter, ...]  # of one sequence, applied together; () = the network as it is


class Span(NamedTuple):
    """Rows ``start`` to ``stop`` and the adapter that acts on them."""

    start: int
    stop: int
    adapter: Adapter


Spans = tuple[Span, ...]


def adapter_order(adapters: Adapters) -> tuple[tuple[str, float], ...]:
    """Sorts sequences with equal adapters together, those without any first."""
    return tuple((adapter.lora.name, adapter.scale) for adapter in adapters)


def modulating(adapters: Adapters) -> tuple[tuple[int, float], ...]:
    """Stands for those adapters that change what becomes of a timestep."""
    return tuple((lora.number, scale) for lora, scale in adapters if lora.modulates)


def spans_of(adapters: Sequence[Adapters], lengths: Sequence[int]) -> Spans:
    """Where adapters act: neighbouring sequences with the same ones make one span for each.

    Args:
        adapters: of every sequence, in their packed order.
        lengths: rows of every sequence.
    """
    spans: list[Span] = []
    stop = 0
    for own, group in groupby(zip(adapters, lengths, strict=True), key=lambda pair: pair[0]):
        start, stop = stop, stop + sum(length for _, length in group)
        spans += [Span(start, stop, adapter) for adapter in own]
    return tuple(spans)


@dataclass(frozen=True)
class Adapted:
    """The adapters of a packed batch, for layers that see tokens and for those that see sequences.

    Attributes:
        tokens: spans of the tokens.
        sequences: spans of what exists once per sequence, such as the time embedding.
    """

    tokens: Spans = ()
    sequences: Spans = ()

    @classmethod
    def of(cls, adapters: Sequence[Adapters], lengths: Sequence[int]) -> Adapted:
        """Of sequences with these adapters and so many tokens."""
        return cls(spans_of(adapters, lengths), spans_of(adapters, [1] * len(lengths)))


UNADAPTED = Adapted()


class Linear(nn.Linear):
    """`nn.Linear` whose output may be adapted row by row.

    Attributes:
        name: of the layer in its network, under which a `Lora` knows it.
    """

    name = ""

    def forward(self, x: Tensor, spans: Spans = ()) -> Tensor:
        """``[T, in]`` to ``[T, out]``, with the adapters of ``spans`` added (inference only)."""
        return adapt(super().forward(x), x, self.name, spans)


def adapt(out: Tensor, x: Tensor, name: str, spans: Spans) -> Tensor:
    """Add to ``out``, in place, what adapters make of ``x`` in the layer `name`."""
    for start, stop, (lora, scale) in spans:
        change = lora.layers.get(name)
        if change is not None:
            out[start:stop].addmm_(x[start:stop] @ change.a.T, change.b.T, alpha=scale)
    return out
