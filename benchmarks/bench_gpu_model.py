"""The 2.6B network with random weights on one GPU: diffusers, and what each part of ours brings.

    python -m benchmarks.bench_gpu_model [--diffusers-wheels DIR]

Every row is measured against compiled diffusers in turns (A B B A), after a warm-up, with the same
weights, inputs and number of evaluations. Rows are written to benchmarks/results/ as they come; a
run that was cut off goes on where it was, as long as device, versions and revision are the same. No
network is needed. diffusers may be installed, or lie as wheels in a folder with what it imports
(docs/performance.md lists it); they are unpacked for the run.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.interleaved import compared, measure
from benchmarks.model_flops import forward_flops, matmul_peak, synchronize
from benchmarks.report import RESULTS, surroundings
from model.config import NextDiTConfig

if TYPE_CHECKING:
    from benchmarks.gpu_model_sides import Case, Ours, Theirs, World

TRAINING = "training step"
NO_GPU = "bench-gpu-model: there is no CUDA device here (--smoke walks through on a CPU)"
NO_DIFFUSERS = "bench-gpu-model: diffusers is not installed; give --diffusers-wheels DIR"
SMOKE = NextDiTConfig(
    hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2,
    multiple_of=16, axes_dim_rope=(4, 4, 4), cap_feat_dim=32,
)  # fmt: skip
MAX_FP8_ERROR = 0.5  # relative L2 of velocities with random weights: that they are not noise
WHOLE_S = 240  # to compile all blocks as one graph: not begun with less time left


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        config: of the network.
        dtype: of weights and activations.
        cases: (pixels, pictures).
        steps: of whole pictures.
        peak_side: of the matrix product that MFU is counted against.
        compile: what the compiled sides compile; `off` where the walk-through should be short.
        max_error: relative L2 of our velocities against diffusers'.
        side_s: seconds of calls that a row times on each side.
    """

    config: NextDiTConfig
    dtype: torch.dtype
    cases: tuple[tuple[int, int], ...]
    steps: int
    peak_side: int
    compile: str
    max_error: float
    side_s: float


FULL = Plan(
    NextDiTConfig(),
    torch.bfloat16,
    ((1024, 1), (512, 1), (256, 1), (512, 8), (256, 8), (1024, 2)),
    50,
    8192,
    "blocks",
    max_error=0.03,
    side_s=0.5,
)
WALK = Plan(SMOKE, torch.float32, ((64, 1), (32, 2)), 4, 256, "off", max_error=2e-5, side_s=0.0)


class Report:
    """The rows so far, on disk after each; those of another machine or revision do not count."""

    def __init__(self, path: Path, around: dict[str, Any], fresh: bool) -> None:
        self.path, self.around = path, around
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file() and not fresh:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if all(kept.get(key) == value for key, value in around.items()):
                self.rows = kept["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows[key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.around, "rows": self.rows}, indent=2) + "\n"
        part = self.path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(self.path)


def our_sides(plan: Plan, on_gpu: bool) -> list[Ours]:
    """What is tried of ours for a step, the most telling first."""
    from benchmarks.gpu_model_sides import Ours
    from kernels.dispatch import DEFAULTS

    every = tuple(DEFAULTS)
    sides = [
        Ours("ours, lossless", plan.compile),
        Ours("ours, eager, no kernel"),
        Ours("ours, eager, all kernels", kernels=every),
        *(Ours(f"ours, kernel {name}", plan.compile, (name,)) for name in every),
        Ours("ours, all kernels", plan.compile, every),
        Ours("ours, fp32 stream", plan.compile, wide=True),
    ]
    if on_gpu:
        sides[1:1] = [Ours("ours, CUDA graphs", plan.compile, graphs=True)]
        sides += [
            Ours("ours, cuDNN attention", plan.compile, attention="cudnn"),
            Ours("ours, fp8", plan.compile, fp8=True),
        ]
    return sides


def wanted(plan: Plan, device: torch.device) -> Iterator[tuple[Case, Ours | Theirs, str, Any]]:
    """Every row: case, side, and of a whole picture (sampler, steps, cached); by importance."""
    from benchmarks.gpu_model_sides import GRAPH_TOKENS, Case, Ours, Theirs

    cases = [Case(*each) for each in plan.cases]
    on_gpu = device.type == "cuda"
    sides = our_sides(plan, on_gpu)
    theirs = [Theirs("diffusers, eager")]
    if on_gpu:
        theirs.append(Theirs("diffusers, compiled, cuDNN attention", compile=True, cudnn=True))
    for case in cases:
        yield from ((case, side, "step", None) for side in (*theirs, sides[0]))
    lossless = sides[0]
    first = cases[0]
    few = max(2, plan.steps * 2 // 5)
    yield first, lossless, "picture", ("euler", plan.steps, False)
    yield first, lossless, "picture, a third of the blocks skipped", ("euler", plan.steps, True)
    yield first, lossless, f"picture, DPM {few} steps", ("dpm", few, False)
    for case in cases:
        tokens = sum(map(sum, case.sequences))
        for side in sides[1:]:
            if not (isinstance(side, Ours) and side.graphs and tokens > GRAPH_TOKENS):
                yield case, side, "step", None
    if plan.compile != "off":
        for case in cases:
            yield case, Ours("ours, compiled as a whole", "full"), "step", None


def base_side(plan: Plan) -> Theirs:
    """What every row is compared with."""
    from benchmarks.gpu_model_sides import Theirs

    compiled = plan.compile != "off"
    return Theirs("diffusers, compiled" if compiled else "diffusers", compile=compiled)


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Relative L2 between velocities."""
    ours, theirs = (torch.cat([v.float().flatten() for v in side]) for side in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


def in_turns(
    sides: dict[str, Callable[[], Any]], device: torch.device, side_s: float = 0.0
) -> dict[str, Any]:
    """`compared` of calls that each end with the device idle; the first side is the baseline."""

    def waiting(call: Callable[[], Any]) -> Callable[[int], None]:
        def run(_: int) -> None:
            call()
            synchronize(device)

        return run

    timed = {name: waiting(call) for name, call in sides.items()}
    rounds = 1
    if side_s:
        slowest = max(s for each in measure(timed, 1, warm_up=2).values() for s, _ in each)
        rounds = max(3, min(50, round(side_s / slowest / 2)))
    return compared(measure(timed, rounds))


def step_row(world: World, plan: Plan, case: Case, side: Ours | Theirs) -> dict[str, Any]:
    """A step of a case by this side, against the base side."""
    base = base_side(plan)
    calls = {base.name: world.step(base, case), side.name: world.step(side, case)}
    limit = MAX_FP8_ERROR if getattr(side, "fp8", False) else plan.max_error
    error = distance(calls[side.name](), calls[base.name]())
    taken = in_turns(calls, world.device, plan.side_s)
    faults = [world.fault(side)]
    if not error <= limit:  # the time is worth knowing even so
        faults.append(f"the velocities are off by {error:.2g} (relative L2)")
    return with_rates(taken, base.name, side.name, 2 * case.pictures) | {
        "relative_l2": error,
        "flops": forward_flops(plan.config, case.sequences),
        "fault": "; ".join(filter(None, faults)),
    }


def picture_row(
    world: World, plan: Plan, case: Case, side: Ours, how: tuple[str, int, bool]
) -> dict[str, Any]:
    """A whole picture of ours, against diffusers' own pipeline with the steps of the plan."""
    base = base_side(plan)
    drawn: dict[str, Any] = {}

    def ours() -> None:
        drawn["state"] = draw()

    draw = world.our_picture(side, case, *how)
    calls = {base.name: world.their_picture(base, case, plan.steps), side.name: ours}
    for call in calls.values():
        call()
    row = with_rates(in_turns(calls, world.device), base.name, side.name, None)
    return row | {"nfe": drawn["state"].nfe, "fault": world.fault(side)}


def with_rates(
    taken: dict[str, Any], base: str, side: str, evaluations: int | None
) -> dict[str, Any]:
    """The figures of a row."""
    row = {
        "median_ms": 1000 * taken[side]["median_s"],
        "range_ms": [1000 * s for s in taken[side]["range_s"]],
        "base": base,
        "base_ms": 1000 * taken[base]["median_s"],
        "speed_up": taken[side]["speed_up"],
        "calls": taken[side]["calls"],
    }
    if evaluations:
        row["ms_per_evaluation"] = row["median_ms"] / evaluations
    return row


@torch.inference_mode()
def run(plan: Plan, device: torch.device, report: Report, minutes: float) -> bool:
    """Every row that is not there yet, as long as there is time; returns whether there was."""
    from benchmarks.gpu_model_sides import World

    ends = time.monotonic() + 60 * minutes
    todo = [each for each in wanted(plan, device) if key_of(*each[:3]) not in report.rows]
    if "peak" not in report.rows:
        peak = matmul_peak(device, plan.dtype, plan.peak_side)
        report.add("peak", {"tflops": peak / 1e12, "side": plan.peak_side})
    if TRAINING not in report.rows:  # first, as it needs the memory
        report.add(TRAINING, training_row(plan, device))
        print(line_of(report.rows[TRAINING], report.rows["peak"]["tflops"]), flush=True)
    if not todo:
        return True
    with tempfile.TemporaryDirectory() as scratch:
        world = World(plan.config, device, plan.dtype, Path(scratch))
        for case, side, what, how in todo:
            key = key_of(case, side, what)
            needs_s = WHOLE_S if getattr(side, "compile", "") == "full" else 0
            if time.monotonic() + needs_s > ends:
                print(f"out of time before: {key} (run again to go on)", flush=True)
                return False
            row = row_of(world, plan, case, side, how)
            report.add(key, {"case": case.name, "what": what, "side": side.name, **row})
            print(line_of(report.rows[key], report.rows["peak"]["tflops"]), flush=True)
    return True


def row_of(world: World, plan: Plan, case: Case, side: Ours | Theirs, how: Any) -> dict[str, Any]:
    """The figures of a row, or why there are none: that too is a result."""
    from benchmarks.gpu_model_sides import Ours

    try:
        if how is None:
            return step_row(world, plan, case, side)
        assert isinstance(side, Ours)
        return picture_row(world, plan, case, side, how)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        return {"fault": reason[0] if reason else type(error).__name__}


def training_row(plan: Plan, device: torch.device) -> dict[str, Any]:
    """A training step on one picture of the first size, against nothing."""
    from benchmarks.gpu_model_sides import Case, TrainingStep

    case = Case(plan.cases[0][0], 1)
    row: dict[str, Any] = {"case": case.name, "what": "training step", "side": "ours, eager, AdamW"}
    try:
        step = TrainingStep(plan.config, device, case)
        taken = in_turns({"step": step}, device, plan.side_s)["step"]
    except (RuntimeError, ValueError) as error:
        return row | {"fault": str(error).strip().splitlines()[0]}
    sequences = case.sequences[:1]
    return row | {
        "median_ms": 1000 * taken["median_s"],
        "range_ms": [1000 * s for s in taken["range_s"]],
        "calls": taken["calls"],
        "flops": 3 * forward_flops(plan.config, sequences),  # the backward is twice the forward
    }


def key_of(case: Case, side: Ours | Theirs, what: str) -> str:
    """A row's name."""
    return f"{case.name}, {what}: {side.name}"


def line_of(row: dict[str, Any], peak_tflops: float) -> str:
    """A row as the table shows it."""
    head = f"{row['case']:<12}{row['what']:<40}{row['side']:<38}"
    if "median_ms" not in row:
        return f"{head}{row['fault']}"
    mfu = ""
    if "flops" in row:
        mfu = f"{100 * row['flops'] / row['median_ms'] / 1e9 / peak_tflops:5.1f} %"
    each = f"{row['ms_per_evaluation']:9.2f}" if "ms_per_evaluation" in row else " " * 9
    times = f"{row['median_ms']:10.2f}{each}{mfu:>8}"
    if "base" in row:
        times += f"{row['speed_up']:8.2f}x of {row['base']}"
    nfe = f", {row['nfe']} evaluations" if "nfe" in row else ""
    return head + times + nfe + (f" ({row['fault']})" if row.get("fault") else "")


def show(report: Report) -> None:
    """Print all rows as one table."""
    peak = report.rows["peak"]["tflops"]
    print(f"\n{report.around['device']}; matrix product peak {peak:.1f} TFLOP/s")
    print(f"{'':<90}{'ms':>10}{'ms/nfe':>9}{'MFU':>8}{'speed':>9}")
    for key, row in report.rows.items():
        if key != "peak":
            print(line_of(row, peak))


def unpack_wheels(folder: Path, into: Path) -> None:
    """Make the packages of wheel files importable, without pip."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    sys.path.insert(0, str(into))


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny network on the CPU")
    parser.add_argument("--diffusers-wheels", type=Path, help="folder of wheel files")
    parser.add_argument("--minutes", type=float, default=9.0, help="no new row after so long")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier run")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/bench_gpu_model….json"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns 0 when all is done, 2 where it cannot be, 3 out of time."""
    options = options_of(argv)
    if not options.smoke and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as unpacked:
        if options.diffusers_wheels is not None:
            unpack_wheels(options.diffusers_wheels, Path(unpacked))
        if find_spec("diffusers") is None:
            print(NO_DIFFUSERS, file=sys.stderr)
            return 2
        logging.getLogger("xformers").setLevel(logging.ERROR)
        device = torch.device("cpu" if options.smoke else "cuda")
        plan = WALK if options.smoke else FULL
        if plan.compile != "off":  # every way to run the blocks is a graph of the same function
            torch._dynamo.config.recompile_limit = 64
        around = surroundings(device.type) | {"smoke": options.smoke}
        name = "-".join(around["device"].lower().split())
        path = options.out or RESULTS / f"bench_gpu_model-{name}.json"
        report = Report(path, around, options.fresh)
        done = run(plan, device, report, options.minutes)
        show(report)
        print(f"wrote {path}")
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
