"""`trainer evaluate --suite demo`: samples held-out prompts, judges each picture, reports.

The overall score is the mean of the six tasks' scores, so that each task weighs the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from trainer.demo.judge import judge
from trainer.demo.prompts import EVALUATED_LEVELS, TASKS, EvalPrompt, eval_prompts
from trainer.evaluate.grid import Cell, image_grid

if TYPE_CHECKING:
    from model import GenerationRequest

SUITE = "demo"
GRID_PER_TASK = 8


class Generates(Protocol):
    """What the suite needs of a pipeline."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Image.Image]]:
        """Pictures of every request, in order."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One judged picture."""

    task: str
    level: str
    language: str
    prompt: str
    seed: int
    correct: bool
    reason: str


@dataclass(slots=True)
class DemoReport:
    """All judged pictures of one run and the scores they add up to."""

    width: int
    height: int
    seed: int
    settings: dict[str, Any]
    scored: list[Scored] = field(default_factory=list)
    grid: dict[str, list[Cell]] = field(default_factory=dict)  # by task, a row of the sheet each
    elapsed_s: float = 0.0

    def score(self, task: str, level: str | None = None) -> float:
        """Share of right pictures of a task (at one level); nan where there are none."""
        marks = self._marks(task, level)
        return sum(marks) / len(marks) if marks else math.nan

    def overall(self, level: str | None = None) -> float:
        """Mean of the tasks' scores."""
        return float(np.mean([self.score(task, level) for task in TASKS]))

    @property
    def levels(self) -> list[str]:
        """Levels present, in order of appearance."""
        return list(dict.fromkeys(item.level for item in self.scored))

    def to_json(self) -> dict[str, Any]:
        """Scores first, then every picture."""
        return {
            "suite": SUITE,
            "size": [self.width, self.height],
            "seed": self.seed,
            "settings": self.settings,
            "num_pictures": len(self.scored),
            "elapsed_s": round(self.elapsed_s, 2),
            "overall": _rounded(self.overall()),
            "tasks": {task: _rounded(self.score(task)) for task in TASKS},
            "levels": {
                level: {"overall": _rounded(self.overall(level))}
                | {task: _rounded(self.score(task, level)) for task in TASKS}
                for level in self.levels
            },
            "pictures": [asdict(item) for item in self.scored],
        }

    def table(self) -> Table:
        """Tasks by levels, with the number of pictures and the standard error."""
        table = Table(title=f"demo suite, {self.width}x{self.height}")
        table.add_column("task")
        for level in self.levels:
            table.add_column(level, justify="right")
        for name in ("all", "±", "pictures"):
            table.add_column(name, justify="right")
        for task in TASKS:
            score, number = self.score(task), len(self._marks(task, None))
            error = math.sqrt(score * (1.0 - score) / number) if number else math.nan
            by_level = [f"{self.score(task, level):.3f}" for level in self.levels]
            table.add_row(task, *by_level, f"{score:.3f}", f"{error:.3f}", str(number))
        table.add_section()
        by_level = [f"{self.overall(level):.3f}" for level in self.levels]
        table.add_row("overall", *by_level, f"{self.overall():.3f}", "", str(len(self.scored)))
        return table

    def _marks(self, task: str, level: str | None) -> list[bool]:
        return [
            item.correct
            for item in self.scored
            if item.task == task and level in (None, item.level)
        ]


def evaluate_demo(
    pipe: Generates,
    size: int | tuple[int, int] = 64,
    *,
    limit: int | None = None,
    per_task: int = 50,
    levels: Sequence[str] = EVALUATED_LEVELS,
    language: str = "en",
    num_images: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> DemoReport:
    """Generate and judge the suite's prompts.

    Args:
        pipe: `generate(requests)` as in model.pipeline.Pipeline.
        size: side in pixels, or (width, height).
        limit: at most so many prompts altogether, spread evenly over tasks and levels.
        per_task: prompts per task and level.
        levels: caption levels to ask in.
        language: of the prompts.
        num_images: pictures per prompt, each judged.
        batch_size: requests handed to the pipeline at once.
        seed: first seed; picture k of the run has seed + k.
        settings: further fields of GenerationRequest, such as num_inference_steps.
        progress: show a progress bar.

    Raises:
        ValueError: a limit below one prompt per task, or settings the pipeline refuses.
    """
    from model import GenerationRequest

    width, height = (size, size) if isinstance(size, int) else size
    report = DemoReport(width, height, seed, dict(settings or {}))
    prompts = _suite_prompts(levels, language, per_task, limit)
    started = time.perf_counter()
    batches = list(_batched(prompts, batch_size))
    done = 0
    for batch in track(batches, "evaluating", disable=not progress, console=Console(stderr=True)):
        requests = [
            GenerationRequest(
                prompt.text,
                width=width,
                height=height,
                num_images=num_images,
                seed=seed + (done + i) * num_images,
                **report.settings,
            )
            for i, prompt in enumerate(batch)
        ]
        done += len(batch)
        for prompt, request, pictures in zip(batch, requests, pipe.generate(requests), strict=True):
            _score(report, prompt, request.seed or 0, pictures)
    report.elapsed_s = time.perf_counter() - started
    return report


def run_demo_suite(
    checkpoint: str | Path,
    *,
    size: int | tuple[int, int] = 64,
    limit: int | None = None,
    out_dir: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> DemoReport:
    """Load a checkpoint, run the suite, print its table and write its files to `out_dir`.

    `options` go to evaluate_demo. Raises ValueError (CheckpointError) for a bad checkpoint.
    """
    from model import load_pipeline

    pipe = load_pipeline(checkpoint, device=device)
    report = evaluate_demo(pipe, size, limit=limit, seed=seed, **options)
    Console().print(report.table())
    if out_dir is not None:
        write_report(report, out_dir)
    return report


def write_report(report: DemoReport, out_dir: str | Path) -> None:
    """Write `demo.json` and the picture sheet `demo.png` to a folder, made if needed."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    (folder / f"{SUITE}.json").write_text(text + "\n", encoding="utf-8")
    cells = [cell for task in TASKS for cell in report.grid.get(task, [])]
    if cells:
        image_grid(cells, columns=GRID_PER_TASK).save(folder / f"{SUITE}.png")


def _suite_prompts(
    levels: Sequence[str], language: str, per_task: int, limit: int | None
) -> list[EvalPrompt]:
    """All prompts, levels and tasks taking turns."""
    if limit is not None:
        least = len(TASKS)
        if limit < least:
            raise ValueError(f"limit is {limit}; it must be at least {least}, one per task")
        per_task = min(per_task, -(-limit // (len(TASKS) * len(levels))))
    suites = [eval_prompts(level, language, per_task) for level in levels]
    num_tasks = len(TASKS)
    rows = [
        suite[start : start + num_tasks]
        for start in range(0, num_tasks * per_task, num_tasks)
        for suite in suites
    ]
    return [prompt for row in rows for prompt in row][:limit]


def _batched(items: Sequence[EvalPrompt], size: int) -> Iterator[list[EvalPrompt]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _score(
    report: DemoReport, prompt: EvalPrompt, seed: int, pictures: Sequence[Image.Image]
) -> None:
    for k, picture in enumerate(pictures):
        verdict = judge(np.asarray(picture.convert("RGB")), prompt.expected)
        report.scored.append(
            Scored(
                prompt.task,
                prompt.level,
                prompt.language,
                prompt.text,
                seed + k,
                verdict.correct,
                verdict.reason,
            )
        )
        row = report.grid.setdefault(prompt.task, [])
        if len(row) < GRID_PER_TASK:
            row.append((picture, prompt.text, verdict.correct))


def _rounded(score: float) -> float | None:
    """Four digits; None (null in JSON) where a task has no pictures."""
    return None if math.isnan(score) else round(score, 4)
