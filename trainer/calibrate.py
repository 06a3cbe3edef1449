"""`trainer calibrate`: fits `teacache.json` to a checkpoint and measures what skipping costs.

Prompts are drawn without skipping first, for each of a few solvers and step counts. From those
runs come the polynomial of numeric thresholds and, for each preset, the schedule that strays least
at the speed wanted. Then the presets draw the prompts of the demo suite beside the same pictures
without cache: PSNR, SSIM, the judge's score, and the time, the sides taking turns.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from model import GenerationRequest, load_pipeline
from model.cache_config import FILE_NAME, CacheConfig, SkipSchedule, evaluation_timesteps
from model.checkpoint import MANIFEST, read_json, write_json, write_manifest
from model.pipeline import Pipeline
from model.samplers import OWN_GRID, make_sampler
from model.teacache import RequestCache, SkipPlan
from trainer.demo.judge import judge
from trainer.demo.prompts import TASKS, EvalPrompt, eval_prompts
from trainer.evaluate.similarity import psnr, ssim
from trainer.skipping import best_schedule, fit_polynomial, record

SPEED_WANTED = {"balanced": 1.5, "fast": 2.0}
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
RECORDED_PROMPTS = 6  # for each solver and step count: one of each task
MEASURED_PER_TASK = 8
BATCH = 12
TIMED_STEPS = 12
FIT_SEED, MEASURE_SEED = 7, 0  # of the prompts: those that are fitted are not those measured
HIGHEST_PSNR = 99.0  # what equal pictures count as in a median

Say = Callable[[str], None]


@dataclass(frozen=True)
class Solver:
    """A solver with its schedule, as in a request."""

    sampler: str
    time_grid: str | None
    num_inference_steps: int
    shift: float

    @property
    def settings(self) -> dict[str, Any]:
        """Request fields."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def schedule(self, computed: tuple[bool, ...]) -> SkipSchedule:
        """A skip schedule for it."""
        solver = make_sampler(
            self.sampler,
            time_grid=self.time_grid,
            num_inference_steps=self.num_inference_steps,
            shift=self.shift,
        )
        return SkipSchedule(self.sampler, evaluation_timesteps(solver), computed, self.shift)


@dataclass
class Drawn:
    """Pictures of one setting and how they came about."""

    pictures: list[np.ndarray] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    evaluated: int = 0  # branches whose joint blocks ran
    computed: int = 0  # steps of one picture
    steps: int = 0


def calibrate(
    folder: Path, *, per_task: int = MEASURED_PER_TASK, progress: bool = True
) -> dict[str, Any]:
    """Fit, measure, write `teacache.json` and rewrite `manifest.json`; returns the file's content.

    Args:
        folder: a checkpoint.
        per_task: prompts of each of the suite's tasks that quality is measured on.
        progress: say on stderr how far it is.

    Raises:
        ValueError: the checkpoint cannot be used (CheckpointError), or too few steps to fit.
    """
    pipeline = load_pipeline(folder)
    solvers = solvers_of(pipeline)
    batches = -(-per_task * len(TASKS) // BATCH)
    total = len(solvers) + 1 + 2 * batches + len(THRESHOLDS)
    with _progress(total, progress) as done:
        fit, schedules = _fit(pipeline, solvers, done)
        pipeline.cache_config = CacheConfig(
            tuple(fit["coefficients"]),
            {
                name: tuple(solver.schedule(computed) for solver, computed in entries.items())
                for name, entries in schedules.items()
            },
        )
        prompts = eval_prompts(per_task=per_task, seed=MEASURE_SEED)
        measured = measure_presets(pipeline, prompts, tuple(schedules), done)
        thresholds = measure_thresholds(pipeline, prompts[:BATCH], done)
    content = {
        "coefficients": fit["coefficients"],
        "fit": {**fit, "thresholds": thresholds},
        "presets": {
            name: {
                "schedules": [
                    {**vars(solver), "computed": "".join("01"[each] for each in computed)}
                    for solver, computed in entries.items()
                ],
                "measured": measured[name],
            }
            for name, entries in schedules.items()
        },
    }
    del content["fit"]["coefficients"]
    write_calibration(folder, content)
    return content


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """What to call after each part: on a terminal it moves a bar, elsewhere it writes a line."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("calibrating", total=total)
        started, numbers = time.monotonic(), iter(range(1, total + 1))

        def done() -> None:
            bar.advance(task)
            number, seconds = next(numbers), time.monotonic() - started
            if shown and not console.is_terminal:
                left = f"about {seconds / number * (total - number):.0f} s to go"
                line = f"calibrating: part {number} of {total}, {seconds:.0f} s, {left}"
                print(line, file=sys.stderr, flush=True)

        yield done


def write_calibration(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `teacache.json` and bring the manifest, where there is one, up to date with it."""
    write_json(folder / FILE_NAME, content)
    if (folder / MANIFEST).is_file():
        info = read_json(folder / MANIFEST)
        info.pop("files", None)
        write_manifest(folder, info)


def solvers_of(pipeline: Pipeline) -> list[Solver]:
    """The checkpoint's default solver, and others that requests may ask for, within its limits."""
    config = pipeline.generation_config
    defaults, most = config.defaults, config.limits.max_steps
    shift, steps = float(defaults["shift"]), int(defaults["num_inference_steps"])
    own_grid = defaults["sampler"] == OWN_GRID
    wanted = [
        Solver(defaults["sampler"], None if own_grid else defaults["time_grid"], steps, shift),
        *(Solver("euler", "diffusers", min(count, most), shift) for count in (10, 20, 50)),
        Solver("midpoint", "diffusers", min(10, most), shift),
        Solver("dpm", None, min(20, most), shift),
    ]
    return list(dict.fromkeys(wanted))


def _fit(
    pipeline: Pipeline, solvers: Sequence[Solver], done: Callable[[], None]
) -> tuple[dict[str, Any], dict[str, dict[Solver, tuple[bool, ...]]]]:
    """The polynomial, and for each preset a schedule of each solver."""
    prompts = eval_prompts(per_task=1, seed=FIT_SEED)[:RECORDED_PROMPTS]
    inputs: list[float] = []
    outputs: list[float] = []
    costs = {}
    for solver in solvers:
        recorded = record(pipeline, _requests(prompts, solver.settings))
        inputs += recorded.input_changes
        outputs += recorded.output_changes
        costs[solver] = recorded.costs
        done()
    coefficients, explained = fit_polynomial(inputs, outputs)
    computed_s, skipped_s = time_steps(pipeline, _requests(prompts, solvers[0].settings))
    done()
    schedules = {
        name: {
            solver: best_schedule(table, num_computed(len(table), speed, skipped_s / computed_s))
            for solver, table in costs.items()
        }
        for name, speed in SPEED_WANTED.items()
    }
    fit = {
        "coefficients": coefficients,
        "explained_variance": round(explained, 4),
        "pairs": len(inputs),
        "input_change": [_rounded(min(inputs)), _rounded(max(inputs))],
        "skipped_step_cost": round(skipped_s / computed_s, 3),
    }
    return fit, schedules


def num_computed(num_steps: int, speed: float, skipped_cost: float) -> int:
    """How many of the steps may compute to be `speed` times as fast.

    Args:
        num_steps: evaluations in all.
        speed: wanted, 1 = nothing skipped.
        skipped_cost: time of a skipped step, a computed one being 1.
    """
    share = (1.0 / speed - skipped_cost) / (1.0 - skipped_cost) if skipped_cost < 1.0 else 1.0
    return max(min(2, num_steps), min(num_steps, round(num_steps * share)))


def time_steps(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> tuple[float, float]:
    """Median seconds of a computed and of a skipped step of all requests together."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    while len(seconds[False]) < TIMED_STEPS // 2:
        states = [pipeline.prepare(request) for request in requests]
        plan = tuple(step % 2 == 0 for step in range(states[0].num_steps))
        for state in states:
            state.cache = RequestCache(SkipPlan(plan))
        if len(plan) < 2:
            return 1.0, 1.0  # nothing can ever be skipped
        for step, computes in enumerate(plan[: TIMED_STEPS + 1]):
            started = time.perf_counter()
            pipeline.denoise_step(states)
            if step > 0:  # the first pays for tables
                seconds[computes].append(time.perf_counter() - started)
        if not seconds[True]:
            seconds[True] += [time.perf_counter() - started]
    return float(np.median(seconds[True])), float(np.median(seconds[False]))


def measure_presets(
    pipeline: Pipeline,
    prompts: Sequence[EvalPrompt],
    names: Sequence[str],
    done: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Quality and speed of each preset against no cache, at the checkpoint's defaults."""
    sides = ("off", *names)
    drawn = {side: Drawn() for side in sides}
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        # There and back, so that a machine that gets slower hits all sides alike; the pictures of
        # both passes are the same, so the second only gives its time.
        for side in sides:
            _draw(pipeline, some, {"cache": side}, start, drawn[side])
        done()
        for side in reversed(sides):
            again = Drawn()
            _draw(pipeline, some, {"cache": side}, start, again)
            drawn[side].seconds += again.seconds
        done()
    base = drawn["off"]
    return {
        name: {
            "speed": round(base.seconds / drawn[name].seconds, 3),
            **_likeness(drawn[name], base),
            "judged_right": _rounded(float(np.mean(drawn[name].correct))),
            "judged_right_uncached": _rounded(float(np.mean(base.correct))),
            "pictures": len(base.pictures),
            "size": [*reversed(base.pictures[0].shape[:2])],
            "steps": base.steps,
            "computed_steps": drawn[name].computed,
        }
        for name in names
    }


def measure_thresholds(
    pipeline: Pipeline, prompts: Sequence[EvalPrompt], done: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """What numeric thresholds skip, and how near their pictures stay."""
    base = Drawn()
    _draw(pipeline, prompts, {"cache": "off"}, 0, base)
    rows = []
    for threshold in THRESHOLDS:
        drawn = Drawn()
        _draw(pipeline, prompts, {"cache": threshold}, 0, drawn)
        skipped = 1.0 - drawn.evaluated / base.evaluated
        rows.append(
            {"threshold": threshold, "skipped": _rounded(skipped), **_likeness(drawn, base)}
        )
        done()
    return rows


def _requests(
    prompts: Sequence[EvalPrompt], settings: Mapping[str, Any], seed: int = 0
) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt.text, seed=seed + index, **settings)
        for index, prompt in enumerate(prompts)
    ]


def _draw(
    pipeline: Pipeline,
    prompts: Sequence[EvalPrompt],
    settings: Mapping[str, Any],
    seed: int,
    drawn: Drawn,
) -> None:
    """Draw and judge a batch, adding to `drawn`; only the steps are timed."""
    states = [pipeline.prepare(request) for request in _requests(prompts, settings, seed)]
    started = time.perf_counter()
    while running := [state for state in states if not state.finished]:
        pipeline.denoise_step(running)
    drawn.seconds += time.perf_counter() - started
    drawn.evaluated += sum(state.nfe for state in states)
    drawn.computed, drawn.steps = states[0].steps_computed, states[0].num_steps
    for prompt, (image,) in zip(prompts, pipeline.decode(states), strict=True):
        picture = np.asarray(image)
        drawn.pictures.append(picture)
        drawn.correct.append(judge(picture, prompt.expected).correct)


def _likeness(drawn: Drawn, base: Drawn) -> dict[str, float]:
    """Median and worst PSNR, and median SSIM, against the same pictures without cache."""
    pairs = list(zip(drawn.pictures, base.pictures, strict=True))
    decibel = [min(psnr(picture, other), HIGHEST_PSNR) for picture, other in pairs]
    return {
        "psnr_db": round(float(np.median(decibel)), 2),
        "psnr_db_worst": round(min(decibel), 2),
        "ssim": _rounded(float(np.median([ssim(picture, other) for picture, other in pairs]))),
    }


def _rounded(value: float) -> float:
    return value if not math.isfinite(value) else float(f"{value:.4g}")


def table(content: Mapping[str, Any]) -> Table:
    """What was measured, for the terminal."""
    shown = Table(title="against the same pictures without cache")
    for column in ("cache", "speed", "PSNR", "worst", "SSIM", "judged right", "without", "steps"):
        shown.add_column(column, justify="left" if column == "cache" else "right")
    for name, preset in content["presets"].items():
        m = preset["measured"]
        shown.add_row(
            name,
            f"{m['speed']:.2f}x",
            f"{m['psnr_db']:.1f} dB",
            f"{m['psnr_db_worst']:.1f} dB",
            f"{m['ssim']:.4f}",
            f"{m['judged_right']:.3f}",
            f"{m['judged_right_uncached']:.3f}",
            f"{m['computed_steps']} of {m['steps']}",
        )
    for row in content["fit"]["thresholds"]:
        likeness = (f"{row['psnr_db']:.1f} dB", f"{row['psnr_db_worst']:.1f} dB")
        skipped = f"{row['skipped']:.0%} skipped"
        shown.add_row(f"{row['threshold']:g}", "", *likeness, f"{row['ssim']:.4f}", "", "", skipped)
    return shown
