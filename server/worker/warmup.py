"""Before a worker says it is ready: every configured size is drawn once, and its cost is measured.

What the first step of a shape pays for (caches, compilation) is paid here. The times and memory of
these steps become the models by which the scheduler fills steps (`server/scheduler/budget.py`).
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import structlog

from model.request import GenerationRequest
from server.protocol import ModelInfo
from server.scheduler.budget import MemoryCost, StepCost
from server.scheduler.request import RunningRequest, StepLoad
from server.worker.engine import StepPipeline
from server.worker.loading import LoadedModel
from server.worker.memory import PeakMemory, Sample, fit_memory, is_out_of_memory, release_memory

log = structlog.get_logger(__name__)

STEPS = 3  # the first pays for caches; the best of the others counts
PACKED = 4  # requests of the default size that are stepped together, to see what sharing saves
NUM_TERMS = 4  # of a StepCost


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """What was measured: the model's offer with its price, and the costs of a step."""

    info: ModelInfo
    cost: StepCost
    memory: MemoryCost


@dataclasses.dataclass(frozen=True)
class _Measured:
    load: StepLoad
    step_ms: float
    step_bytes: int
    decode_bytes: int


def warm_up(
    model: LoadedModel,
    sizes: Sequence[tuple[int, int]] = (),
    beat: Callable[[], None] = lambda: None,
) -> WarmUp:
    """Draw pictures of the default size and of `sizes` (width, height) with few steps.

    LoRAs on offer are read first. `beat` is called after each, to show progress. Raises ValueError
    when the checkpoint cannot draw one of them; a size that memory does not suffice for is skipped
    with a warning.
    """
    peak = PeakMemory(getattr(model.pipeline, "device", None))
    loras = getattr(model.pipeline, "loras", None)
    if loras is not None:  # before ready, for a step must not wait for a file
        loras.load_ahead(beat)
    graphs = compiled_graphs()
    first = _measure(model.pipeline, peak, None, 1)
    beat()
    if compiled_graphs() > graphs:  # the compiler's memory is not the step's
        release_memory()
        first = _measure(model.pipeline, peak, None, 1)
        beat()
    measured = [first]
    wanted = [(None, PACKED), *((size, 1) for size in dict.fromkeys(sizes))]
    for size, count in wanted:
        try:
            measured.append(_measure(model.pipeline, peak, size, count))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_memory()
            log.warning("too large to warm up", size=size or "default", pictures=count)
        beat()
    samples = [Sample(int(m.load.tokens), m.step_bytes) for m in measured]
    decode_bytes = max(m.decode_bytes for m in measured)
    free_bytes = peak.free_bytes()
    if free_bytes and loras is not None:
        free_bytes = max(1, free_bytes - loras.growth_bytes)
    cost = fit_cost([(m.load, m.step_ms) for m in measured])
    fixed_ms = min(cost.fixed_ms, first.step_ms)
    return WarmUp(
        dataclasses.replace(
            model.info,
            step_cost_ms=round(first.step_ms, 3),
            step_fixed_ms=round(fixed_ms, 3),
        ),
        cost,
        fit_memory(samples, decode_bytes, free_bytes),
    )


def fit_cost(measured: Sequence[tuple[StepLoad, float]]) -> StepCost:
    """The cost model of measured steps: least squares of relative errors, no term below 0.

    With less than four different sizes only the fixed term and the one per token are fitted.
    """
    terms = np.array([_terms(load) for load, _ in measured])
    times = np.array([ms for _, ms in measured])
    distinct = len({load for load, _ in measured})
    usable = range(NUM_TERMS) if distinct >= NUM_TERMS else (0, 2)
    best, best_error = np.array([0.0, 0.0, float(np.mean(times / terms[:, 2])), 0.0]), np.inf
    weighted = terms / times[:, None]
    for count in range(1, min(distinct, len(usable)) + 1):
        for some in combinations(usable, count):
            found, *_ = np.linalg.lstsq(weighted[:, some], np.ones(len(times)))
            error = float(np.square(weighted[:, some] @ found - 1).sum())
            if (found >= 0).all() and error < best_error - 1e-12:
                best, best_error = np.zeros(NUM_TERMS), error
                best[list(some)] = found
    fixed, root, token, pair = (float(value) for value in best)
    return StepCost(fixed_ms=fixed, root_ms=root, token_ms=token, pair_ms=pair)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process: more than after warm-up is a fault.

    Nothing is imported for it: where nobody compiles, the answer is 0.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def _terms(load: StepLoad) -> tuple[float, float, float, float]:
    return 1.0, load.tokens**0.5, load.tokens, load.pairs


def _measure(
    pipeline: StepPipeline, peak: PeakMemory, size: tuple[int, int] | None, count: int
) -> _Measured:
    width, height = size or (None, None)
    states: list[Any] = [
        pipeline.prepare(
            GenerationRequest(
                prompt="warm-up", seed=k, width=width, height=height, num_inference_steps=STEPS
            )
        )
        for k in range(count)
    ]
    load = StepLoad()
    for state in states:
        one = RunningRequest("", state.num_tokens, 1, num_sequences=state.num_sequences)
        load = load.plus(one.load)
    times_ms, peaks = [], []
    while states[0].step_index < states[0].num_steps:
        # Only steps of the first one's size count: guidance may end.
        same = count * states[0].num_tokens == load.tokens
        started = time.perf_counter()
        needed = peak.of(lambda: pipeline.denoise_step(states))
        if same:
            times_ms.append(1000 * (time.perf_counter() - started))
            peaks.append(needed)
    decode_bytes = peak.of(lambda: pipeline.decode(states))
    return _Measured(load, min(times_ms), max(peaks), decode_bytes)
