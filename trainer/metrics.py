"""Progress bar, JSONL and TensorBoard of a training run.

``metrics.jsonl`` has one line for every step. A resumed run forgets the lines of steps that it
takes again.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

METRICS = "metrics.jsonl"
PLAIN_LOG_S = 15.0
BOARD_EVERY = 20  # steps between two points of TensorBoard; the JSONL has every step


class Metrics:
    """Shows and records the metrics of one stage; a context manager.

    On a terminal a bar with rate and ETA, elsewhere a plain line every fifteen seconds.
    """

    def __init__(self, folder: Path, stage: str, total: int, first: int, *, enabled: bool) -> None:
        self._stage, self._total, self._first, self._enabled = stage, total, first, enabled
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        forget_after(folder / METRICS, first)
        self._jsonl = (folder / METRICS).open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it writes

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(stage, total=total, completed=first, note="")
            self._bar.start()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.stop()
        self._jsonl.close()
        self._board.close()

    def log(self, step: int, values: Mapping[str, float], images_per_step: int) -> None:
        """Record the metrics after ``step`` (counted from 1)."""
        if not self._enabled:
            return
        elapsed = time.monotonic() - self._started
        rate = (step - self._first) * images_per_step / max(elapsed, 1e-9)
        row = {"step": step, "elapsed_s": round(elapsed, 2), "images_per_s": round(rate, 1)}
        row |= {key: float(f"{value:.8g}") for key, value in values.items()}
        self._jsonl.write(json.dumps(row) + "\n")
        self._jsonl.flush()
        if step % BOARD_EVERY == 0 or step == self._total:
            for key, value in values.items():
                self._board.add_scalar(f"{self._stage}/{key}", value, step)
        shown = {key: values[key] for key in values if not key.startswith("loss_t")}
        note = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=f"{note}  {rate:.0f} img/s")
        elif time.monotonic() - self._last_line > PLAIN_LOG_S or step == self._total:
            self._last_line = time.monotonic()
            eta = (self._total - step) * images_per_step / max(rate, 1e-9)
            print(
                f"{self._stage} {step}/{self._total}  {note}  {rate:.0f} img/s  ETA {eta:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def picture(self, step: int, name: str, image: Any) -> None:
        """Show a picture, uint8 ``[H, W, 3]``, beside the curves."""
        if self._enabled:
            self._board.add_image(f"{self._stage}/{name}", image, step, dataformats="HWC")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; none where there is no file."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # a killed process was writing it
                continue
    return rows


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and half a line that a killed process left."""
    if path.is_file():
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
