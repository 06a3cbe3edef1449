"""Small steps as CUDA graphs: the host launches a whole stack of blocks as one.

Below about 512 x 512 pixels a GPU finishes a kernel before the host has launched the next. A graph
is captured once for each bucket of total tokens, on buffers that stay where they are; a step copies
its tensors there and replays. What is left of the bucket is one more sequence at the end, a dummy
that attends to itself alone; cumulative lengths are written in place, and sequences that are not
there are empty.

Shapes: T = tokens, n = sequences, u = rows of modulation, b = blocks, d = width.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.adapters import UNADAPTED
from model.attention import Backend
from model.layers import Folded
from model.packing import Layout, Run
from model.stack import StackInput, StackRunner

log = logging.getLogger(__name__)

MAX_SEQUENCES = 16  # of a batch; one with more is not small
MAX_GRAPHS = 32  # per stack: all buckets of up to 4096 tokens; the least recently used goes first
SMALLEST = 64  # tokens of a bucket
PER_OCTAVE = 8  # buckets between a number and its double: at most an eighth is dummy
# Relative L2 between a graph's first replay and the same work done directly. Products of another
# size are summed otherwise, which 26 blocks in bf16 carry to about 0.01; what is wrong is near 1.
TOLERANCE = 0.05


class Graph(Protocol):
    """Work recorded once and done again on the same memory."""

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """Record it; the tensor returned is what every replay writes to."""

    def replay(self) -> None:
        """Do it again."""


class CudaGraph:
    """`torch.cuda.CUDAGraph`.

    Args:
        pool: of memory, shared by graphs of which no two replay at the same time.
        stream: to warm up and capture on; libraries keep a workspace for every stream they see.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool, self._stream = pool, stream

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """See `Graph`."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # libraries choose and allocate before recording
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        # Other threads may go on using the device.
        with torch.cuda.graph(
            self._graph, self._pool, self._stream, capture_error_mode="thread_local"
        ):
            return work()

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()


def cuda_graphs() -> Callable[[], CudaGraph]:
    """Makes graphs that share memory; torch takes no new ones into a pool that has lost all."""
    return partial(CudaGraph, torch.cuda.graph_pool_handle(), torch.cuda.Stream())


def bucket_of(num_tokens: int) -> int:
    """The tokens of the graph that takes so many: up to an eighth more, `SMALLEST` at least."""
    if num_tokens <= SMALLEST:
        return SMALLEST
    octave = 1 << (num_tokens - 1).bit_length() - 1  # below num_tokens, and at least half of it
    step = max(octave // PER_OCTAVE, SMALLEST)
    return -(-num_tokens // step) * step


@dataclass(frozen=True, slots=True)
class Buffers:
    """Where the graphs of one stack read; those of a bucket read the head of each."""

    hidden: Tensor  # [limit, d]
    cos: Tensor  # [limit, head_dim / 2]
    sin: Tensor  # [limit, head_dim / 2]
    sequence_index: Tensor  # [limit]
    cu_seqlens: Tensor  # [MAX_SEQUENCES + 2] int32: the dummy is one more
    scaled: Tensor  # [b, MAX_SEQUENCES, 2d]
    gated: Tensor  # [b, MAX_SEQUENCES, 2d]

    @classmethod
    def like(cls, given: StackInput, limit: int) -> Buffers:
        """For batches of this kind of up to `limit` tokens."""
        assert given.folded is not None
        b, (scaled, gated) = len(given.folded), given.folded[0]
        rows = b, MAX_SEQUENCES

        def tokens(like: Tensor) -> Tensor:
            return like.new_zeros(limit, *like.shape[1:])

        return cls(
            hidden=tokens(given.hidden),
            cos=tokens(given.cos),
            sin=tokens(given.sin),
            sequence_index=tokens(given.sequence_index),
            cu_seqlens=given.layout.cu_seqlens.new_zeros(MAX_SEQUENCES + 2),
            scaled=scaled.new_zeros(*rows, *scaled.shape[1:]),
            gated=gated.new_zeros(*rows, *gated.shape[1:]),
        )

    def fill(self, given: StackInput, bucket: int) -> None:
        """Write a batch, and behind it the dummy sequence, which must only be finite."""
        assert given.folded is not None
        T, n = given.hidden.shape[0], len(given.layout.lengths)
        self.hidden[:T].copy_(given.hidden)
        self.hidden[T:bucket].zero_()
        self.cos[:T].copy_(given.cos)
        self.sin[:T].copy_(given.sin)
        self.sequence_index[:T].copy_(given.sequence_index)
        self.sequence_index[T:bucket].zero_()
        self.cu_seqlens[: n + 1].copy_(given.layout.cu_seqlens)
        self.cu_seqlens[n + 1 :].fill_(bucket)
        for buffer, parts in zip(
            (self.scaled, self.gated), zip(*given.folded, strict=True), strict=True
        ):
            buffer[:, : parts[0].shape[0]].copy_(torch.stack(parts))

    def view(self, bucket: int, backend: Backend) -> StackInput:
        """What the work of a bucket reads, whatever batch is there."""
        run = Run(0, 1, bucket)  # no sequence is longer; how long each is stands on the device
        layout = Layout((bucket,), (run,), self.cu_seqlens)
        folded: tuple[Folded, ...] = tuple(zip(self.scaled, self.gated, strict=True))
        return StackInput(
            hidden=self.hidden[:bucket],
            layout=layout,
            attend=backend.plan(layout),
            cos=self.cos[:bucket],
            sin=self.sin[:bucket],
            sequence_index=self.sequence_index[:bucket],
            time_embedding=None,
            folded=folded,
            adapted=UNADAPTED,
        )


@dataclass(slots=True)
class _StackGraphs:
    """The graphs of one stack by bucket, least recently used first."""

    buffers: Buffers
    graphs: OrderedDict[int, tuple[Graph, Tensor]] = field(default_factory=OrderedDict)


class GraphedStack:
    """Replays small batches from graphs and hands all others to another runner.

    A graph is trusted once its first replay gave what the other runner gives. A fault costs speed,
    not the service: it is logged once, and from then on the other runner computes everything.

    Args:
        inner: what is recorded.
        backend: of attention; it must read lengths on the device.
        limit: tokens of the largest batch that is replayed.
        make_graph: an empty graph; None: those of `cuda_graphs`.
        max_graphs: of each stack.
    """

    def __init__(
        self,
        inner: StackRunner,
        backend: Backend,
        limit: int,
        make_graph: Callable[[], Graph] | None = None,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        assert backend.lengths_on_device
        self.min_rows = inner.min_rows
        self.broken = False
        self.num_captures = 0
        self._inner, self._backend = inner, backend
        self._make_graph = cuda_graphs() if make_graph is None else make_graph
        self._limit, self._max_graphs = limit, max_graphs
        # Tensors of inference mode can be written to in that mode only, and compiled code tells
        # them from others: a stack has buffers for each.
        self._stacks: dict[tuple[int, bool], _StackGraphs] = {}

    def __call__(self, blocks: nn.ModuleList, given: StackInput) -> Tensor:
        """See `StackRunner`."""
        if self.broken or not self._takes(given):
            return self._inner(blocks, given)
        bucket = bucket_of(given.hidden.shape[0])
        kind = id(blocks), torch.is_inference_mode_enabled()
        stack = self._stacks.get(kind)
        if stack is None:
            stack = _StackGraphs(Buffers.like(given, bucket_of(self._limit)))
            self._stacks[kind] = stack
        stack.buffers.fill(given, bucket)
        if bucket not in stack.graphs:
            return self._first(blocks, given, stack, bucket)
        stack.graphs.move_to_end(bucket)
        graph, out = stack.graphs[bucket]
        graph.replay()
        return out[: given.hidden.shape[0]].clone()

    def _takes(self, given: StackInput) -> bool:
        return (
            given.folded is not None
            and given.hidden.shape[0] <= self._limit
            and len(given.layout.lengths) <= MAX_SEQUENCES
            and not given.adapted.tokens
            and not torch.is_grad_enabled()
        )

    def _first(
        self, blocks: nn.ModuleList, given: StackInput, stack: _StackGraphs, bucket: int
    ) -> Tensor:
        """Capture a bucket and compare its replay with the same batch computed directly."""
        direct = self._inner(blocks, given)
        try:
            self._make_room(stack)
            graph = self._make_graph()
            view = stack.buffers.view(bucket, self._backend)
            out = graph.capture(lambda: self._inner(blocks, view))
            graph.replay()
            error = _relative(out[: direct.shape[0]], direct)
        except RuntimeError as fault:
            self._give_up(str(fault).strip().splitlines()[0] if str(fault).strip() else "no reason")
            return direct
        if not error <= TOLERANCE:
            self._give_up(f"a replay of {bucket} tokens is off by {error:.1e}")
            return direct
        self.num_captures += 1
        stack.graphs[bucket] = graph, out
        return direct

    def _make_room(self, stack: _StackGraphs) -> None:
        while len(stack.graphs) >= self._max_graphs:
            stack.graphs.popitem(last=False)

    def _give_up(self, reason: str) -> None:
        self.broken = True
        self._stacks.clear()
        log.warning("CUDA graphs are off: %s", reason)


def _relative(value: Tensor, expected: Tensor) -> float:
    difference = (value.float() - expected.float()).norm()
    return float(difference / expected.float().norm().clamp_min(1e-20))
