"""Counts that say whether the engine does no more than it must; they hold on every machine.

    python -m benchmarks.counters

Seconds depend on the machine, counts do not: tests/test_counters.py holds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import claim_of, diffusers_pipeline, mixed_requests
from benchmarks.report import BUNDLED, surroundings, write_result
from model import load_pipeline
from model.cache_config import CacheConfig
from model.config import NextDiTConfig
from model.modulation import ModulationTable
from model.next_dit import NextDiT
from model.pipeline import Pipeline
from server.scheduler.request import RunningRequest
from server.scheduler.scheduler import StepBatch
from server.worker.engine import Engine

# Each of these makes the host wait for a GPU (or would, on one: they are counted on a CPU too).
_WAITING = {
    "tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__",
    "unique", "masked_select", "is_nonzero", "equal", "allclose",
}  # fmt: skip
_VIEWS = {
    "view", "as_strided", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze",
    "squeeze", "split", "split_with_sizes", "unbind", "detach", "alias", "_unsafe_view",
    "_reshape_alias", "unfold", "narrow", "chunk", "lift_fresh", "view_as_real", "view_as_complex",
}  # fmt: skip


class _Waits(TorchFunctionMode):
    """Counts calls after which the host knows what the device computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += getattr(func, "__name__", "") in _WAITING
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    """Counts operators that compute or copy (views are free), and those with complex results."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.complex = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket.__name__ not in _VIEWS
        result = func(*args, **(kwargs or {}))
        made = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.complex += any(tensor.is_complex() for tensor in made)
        return result


@contextmanager
def calls_of(*modules: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """The positional arguments of every call of these modules."""
    seen: list[tuple[Any, ...]] = []
    hooks = [
        module.register_forward_hook(lambda _, args, __: seen.append(args)) for module in modules
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def engine_counts(pipeline: Pipeline, settings: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Run a crowd of requests through the engine and count what each step did.

    Args:
        pipeline: any.
        settings: of each request, over the mixed ones of `common.mixed_requests`.
    """
    dit, engine = pipeline.dit, Engine(pipeline)
    crowd = [mixed_requests(index + 1, 0, **each)[index] for index, each in enumerate(settings)]
    with calls_of(dit.context_refiner[0]) as refined, _Ops() as preparing:
        prepared = [engine.prepare(claim_of(r, f"job{i}"), 0.0) for i, r in enumerate(crowd)]
    assert all(isinstance(each, RunningRequest) for each in prepared), prepared
    keys = [each.key for each in prepared if isinstance(each, RunningRequest)]
    states = [engine._jobs[key].state for key in keys]
    branches = sum(1 + (state.uncond is not None) for state in states)
    totals = Counter(complex=preparing.complex)
    waits = []
    while running := [k for k, s in zip(keys, states, strict=True) if not s.finished]:
        valid = sum(s.num_tokens for s in states)
        with (
            calls_of(dit.final_layer) as heads,
            calls_of(dit.layers[0]) as blocks,
            calls_of(dit.context_refiner[0]) as again,
            calls_of(dit.time_embedder) as times,
            _Waits() as waited,
            _Ops() as ops,
        ):
            failures = engine.step(StepBatch(tuple(running)))
        assert not failures, failures
        waits.append(waited.count)
        totals["complex"] += ops.complex
        totals.update(
            steps=1, heads=len(heads), refined=len(again), times=len(times), blocks=len(blocks)
        )
        totals["padded"] += sum(len(args[0]) for args in heads) - valid
    timesteps = {s.sampler.sigma_at(i) for s in states for i in range(s.num_steps)}
    return {
        "forwards_per_step": totals["heads"] / totals["steps"],
        "block_runs_per_step": totals["blocks"] / totals["steps"],
        "host_waits_per_step_most": max(waits),
        "context_refiner_calls_per_branch": (len(refined) + totals["refined"]) / branches,
        "time_embeddings_per_timestep": totals["times"] / len(timesteps),
        "padded_tokens": totals["padded"],
        "operators_with_complex_results": totals["complex"],
    }


@torch.inference_mode()
def operator_counts(pipeline: Pipeline, reference: Any) -> dict[str, int]:
    """Operators of eight ragged samples in one forward of ours, and in eight of diffusers.

    Ours is what a step runs; contexts and modulation are there already.
    """
    requests = mixed_requests(8, 0)
    states = [pipeline.prepare(request) for request in requests]
    latents = [state.latents[0] for state in states]
    times = torch.linspace(0.1, 0.9, len(states))
    texts = pipeline.text_encoder.encode([request.prompt for request in requests])

    contexts = pipeline.dit.encode_context(texts)

    def ours(some: slice) -> Callable[[], object]:
        given = latents[some], times[some], contexts[some]

        def forward() -> object:
            points = times[some].tolist()
            modulation = pipeline.modulation.of(points, [()] * len(points))
            return pipeline.dit.head(
                pipeline.dit.blocks(pipeline.dit.embed(*given, modulation=modulation))
            )

        return forward

    def theirs(some: slice) -> Callable[[], object]:
        return lambda: [
            reference(x[None], t[None], p[None], torch.ones(1, len(p), dtype=torch.bool))
            for x, t, p in zip(latents[some], times[some], texts[some], strict=True)
        ]

    counts = {}
    for name, call in (
        ("ours, 1 sample", ours(slice(1))),
        ("diffusers, 1 sample", theirs(slice(1))),
        ("ours, 8 samples", ours(slice(8))),
        ("diffusers, 8 samples", theirs(slice(8))),
    ):
        call()
        with _Ops() as ops:
            call()
        counts[name] = ops.count
    return counts


def compile_counts() -> dict[str, int]:
    """Graphs, breaks and recompiles of the modulated blocks over many lengths and sizes."""
    import torch._dynamo as dynamo

    from model.compiled import CompiledStack

    torch.manual_seed(0)
    dit = NextDiT(
        NextDiTConfig(
            hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
            num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 4, 4), cap_feat_dim=32,
            in_channels=16,
        )
    ).eval()  # fmt: skip
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    dynamo.reset()
    dynamo.utils.counters.clear()
    dit.run_stack = CompiledStack(backend=backend)
    table = ModulationTable(dit)
    sizes = [(8, 8), (4, 12), (16, 6)]
    crowds = [[(7, s), (lengths, t)] for lengths in (3, 19, 40, 77) for s in sizes for t in sizes]
    crowds += [[(5, sizes[0])] * 3, [(9, s) for s in sizes], [(11, sizes[2])] * 7]
    crowds += [[(48, sizes[0])], [(2, (2, 2))]]
    warm = 0
    with torch.inference_mode():
        for number, crowd in enumerate(crowds):
            for times in ([0.5] * len(crowd), torch.linspace(0.1, 0.9, len(crowd)).tolist()):
                latents = [torch.randn(16, *size) for _, size in crowd]
                contexts = [torch.randn(length, 48) for length, _ in crowd]
                modulation = table.of(times, [()] * len(times))
                dit.blocks(dit.embed(latents, torch.tensor(times), contexts, modulation=modulation))
            warm = len(graphs) if number == 0 else warm
    assert not dit.run_stack.broken
    breaks = sum(dynamo.utils.counters["graph_break"].values())
    dynamo.reset()
    return {"graphs": warm, "graph_breaks": breaks, "recompiles": len(graphs) - warm}


def main() -> None:
    """Count, print and write."""
    pipeline = load_pipeline(BUNDLED)
    pipeline.cache_config = CacheConfig((0.0, 0.0, 0.0, 1.0, 0.0), {})
    mixed = [{}, {"guidance_scale": 1.0}, {"cfg_trunc_ratio": 0.5}, {"sampler": "midpoint"}]
    report = {
        "engine": engine_counts(pipeline, mixed),
        "engine, thresholds": engine_counts(pipeline, [{"cache": 0.1}, {"cache": 0.2}, *mixed]),
        "operators": operator_counts(pipeline, diffusers_pipeline(BUNDLED).transformer),
        "compiled blocks": compile_counts(),
    }
    for name, counts in report.items():
        for what, count in counts.items():
            print(f"{name:<24}{what:<36}{count:>10g}")
    path = write_result("counters", {**report, **surroundings()})
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
