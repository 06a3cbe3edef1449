"""The modulated blocks through `torch.compile`: one graph for sequences of any number and length.

Attention is one opaque operator in that graph. Which sequences there are decides what an attention
backend does (its kernel, a call per length, a mask on the host), and none of that may become part
of the graph: it would be compiled anew for every batch. The plan of the batch at hand is no tensor,
so it is set beside the operator (`attending`) for as long as the compiled code runs.

What stays eager: batches with LoRAs (their rows differ from batch to batch), gradients, a forward
without looked-up modulation, and a single token (a size of 1 would be compiled by itself).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from model.attention import Attend
from model.layers import Folded
from model.stack import EagerStack, StackInput

log = logging.getLogger(__name__)

# More graphs than torch allows for one function are no fault of the compiler: a class of its own.
_FAULTS = (TorchDynamoException, FailOnRecompileLimitHit)

_now = threading.local()


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Make `lumina::attend` on this thread attend by this plan."""
    before = getattr(_now, "attend", None)
    _now.attend = attend
    try:
        yield
    finally:
        _now.attend = before


@torch.library.custom_op("lumina::attend", mutates_args=())
def planned_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[T, heads, head_dim]`` by the plan in force; see `model.attention.Attend`."""
    out: Tensor = _now.attend(q, k, v)
    return out.contiguous()


@planned_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


class CompiledStack:
    """Runs stacks of blocks compiled, those it cannot compile eagerly.

    A fault of the compiler costs speed, not the service: it is logged once, and from then on
    everything is computed eagerly.

    Args:
        whole: one graph for all blocks of a stack in place of one that they share.
        backend: of `torch.compile`.
    """

    min_rows = 2  # a size of 1 would be compiled by itself

    def __init__(
        self, *, whole: bool = False, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self.whole = whole
        self.broken = False
        self._eager = EagerStack()
        self._compiled = torch.compile(_run, fullgraph=True, backend=backend)

    def __call__(self, blocks: nn.ModuleList, given: StackInput) -> Tensor:
        """See `StackRunner`."""
        if self.broken or not compilable(given):
            return self._eager(blocks, given)
        try:
            with attending(given.attend):
                return self._run(blocks, given)
        except _FAULTS as error:
            self.broken = True
            log.warning("torch.compile failed, computing eagerly: %s", _reason(error))
            return self._eager(blocks, given)

    def _run(self, blocks: nn.ModuleList, given: StackInput) -> Tensor:
        assert given.folded is not None
        hidden, rest = given.hidden, (given.cos, given.sin, given.sequence_index)
        for tensor in (hidden, *rest):
            dynamo.mark_dynamic(tensor, 0)
        if self.whole:
            for pair in given.folded:
                _mark_rows(pair)
            return self._compiled(tuple(blocks), hidden, *rest, given.folded)
        _mark_rows(given.folded[0])  # blocks after the first find its graph
        for block, pair in zip(blocks, given.folded, strict=True):
            hidden = self._compiled((block,), hidden, *rest, (pair,))
        return hidden


def compilable(given: StackInput) -> bool:
    """Whether a batch is of the kind that one graph fits."""
    return (
        given.folded is not None
        and given.folded[0][0].shape[0] >= CompiledStack.min_rows
        and not given.adapted.tokens
        and given.hidden.shape[0] > 1
        and not torch.is_grad_enabled()
    )


def _run(
    blocks: tuple[nn.Module, ...],
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequence_index: Tensor,
    folded: tuple[Folded, ...],
) -> Tensor:
    """What is compiled."""
    for block, pair in zip(blocks, folded, strict=True):
        hidden = block(hidden, planned_attention, cos, sin, None, sequence_index, pair)
    return hidden


def _mark_rows(pair: Folded) -> None:
    for rows in pair:
        dynamo.mark_dynamic(rows, 0)


def _reason(error: Exception) -> str:
    """One line: the compiler's first says who failed, its second why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:2]])
