"""How a network on a device is made faster than operator after operator, by name.

The names are those of `lumina worker --compile`; docs/performance.md says what each brings.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from model.stack import EagerStack, StackRunner

if TYPE_CHECKING:
    from model.next_dit import NextDiT

log = logging.getLogger(__name__)

COMPILE_MODES = ("off", "blocks", "full")


def default_compile(device: torch.device | str) -> str:
    """What serves best on a device."""
    return "blocks" if torch.device(device).type == "cuda" else "off"


def accelerate(dit: NextDiT, *, compile: str = "off", graph_tokens: int = 0) -> None:
    """Set what computes the modulated blocks of a network.

    Args:
        dit: on its device, its weights final.
        compile: `off`, `blocks` (one graph that all blocks share) or `full` (one graph of a whole
            stack).
        graph_tokens: batches of up to so many tokens are replayed from CUDA graphs, on a CUDA
            device and where the attention backend allows it; 0: none.

    Raises:
        ValueError: one sentence, for a mode that there is not.
    """
    if compile not in COMPILE_MODES:
        raise ValueError(f"compile {compile!r} is not allowed: give {' or '.join(COMPILE_MODES)}")
    runner: StackRunner = EagerStack()
    if compile != "off":
        from model.compiled import CompiledStack  # brings the compiler: 150 MB, seconds

        runner = CompiledStack(whole=compile == "full")
    if graph_tokens > 0 and dit.device.type == "cuda":
        runner = _graphed(runner, dit, graph_tokens)
    dit.run_stack = runner


def _graphed(runner: StackRunner, dit: NextDiT, graph_tokens: int) -> StackRunner:
    from model.graphs import GraphedStack

    backend = dit.attention
    if not backend.lengths_on_device:
        log.info("CUDA graphs are off: attention by %s reads lengths on the host", backend.name)
        return runner
    return GraphedStack(runner, backend, graph_tokens)
