"""Training state on disk: written whole or not at all, readable by any number of processes.

``<stage>/checkpoints/step-00001200/`` is a `torch.distributed.checkpoint`: tensors by name, of
which each process wrote its shard, and ``progress.json``. It is written beside its place and
renamed, so what carries the name is whole; the newest ones are kept.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from trainer.distributed import World, barrier

FOLDER = "checkpoints"
PROGRESS = "progress.json"
LEGACY_STATE = "state.pt"  # one file, as runs before checkpoints of this kind had it
KEPT = 2
_NAME = re.compile(r"step-(\d{8})")


def save(
    stage: Path, step: int, tensors: dict[str, Tensor], progress: Mapping[str, Any], world: World
) -> None:
    """Write a checkpoint of a stage; all processes call it together.

    Args:
        stage: the stage's folder.
        step: steps done.
        tensors: by name; sharded ones as DTensors, the same plain ones on every process.
        progress: what else to keep, as JSON.
        world: the processes taking part.
    """
    final = stage / FOLDER / f"step-{step:08d}"
    temporary = final.with_suffix(".tmp")
    if world.is_main:
        for leftover in (*final.parent.glob("*.tmp"), *final.parent.glob("*.old")):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    barrier(world)
    with _alone_on_purpose():
        save_distributed(tensors, checkpoint_id=temporary, no_dist=world.size == 1)
    if world.is_main:
        text = json.dumps({"step": step, **progress})
        (temporary / PROGRESS).write_text(text, encoding="utf-8")
        if final.exists():
            _remove(final)
        os.replace(temporary, final)
        for old in sorted(final.parent.glob("step-????????"))[:-KEPT]:
            _remove(old)
    barrier(world)


def newest(stage: Path) -> Path | None:
    """The newest whole checkpoint of a stage, or None."""
    found = sorted(p for p in (stage / FOLDER).glob("step-*") if _NAME.fullmatch(p.name))
    return found[-1] if found else None


def rewind(checkpoint: Path) -> Path:
    """Make a checkpoint the newest of its stage, by removing those after it; the run folder.

    Raises:
        ValueError: when it is none, or its stage is finished.
    """
    stage = checkpoint.parent.parent
    if not (_NAME.fullmatch(checkpoint.name) and (checkpoint / PROGRESS).is_file()):
        raise ValueError(f"--resume {str(checkpoint)!r} is neither a run folder nor a checkpoint")
    if (stage / "final").exists():
        raise ValueError(f"--resume {str(checkpoint)!r}: the stage {stage.name} is finished")
    for other in checkpoint.parent.glob("step-*"):
        if _NAME.fullmatch(other.name) and other.name > checkpoint.name:
            _remove(other)
    return stage.parent


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What was saved beside the tensors; ``step`` among it.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        progress: dict[str, Any] = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint}: not a whole checkpoint ({error}); remove it to use the last"
        ) from None
    return progress


def shapes(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """What tensors a checkpoint holds."""
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {
        key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
    }


def load(checkpoint: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill the tensors from a checkpoint, whatever number of processes wrote it."""
    with _alone_on_purpose():
        load_distributed(tensors, checkpoint_id=checkpoint, no_dist=world.size == 1)


def load_whole(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors whose name starts with ``prefix.``, unsharded, without it; one process alone."""
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in shapes(checkpoint).items()
        if key.startswith(f"{prefix}.")
    }
    with _alone_on_purpose():
        load_distributed(found, checkpoint_id=checkpoint, no_dist=True)
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in found.items()}


def load_average(stage: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Steps done and averaged weights of a stage's newest checkpoint, or None."""
    path = newest(stage)
    if path is not None:
        return int(read_progress(path)["step"]), load_whole(path, "ema")
    state = load_legacy(stage)
    return None if state is None else (int(state["step"]), state["ema"]["average"])


def load_legacy(stage: Path) -> dict[str, Any] | None:
    """The state of a stage that an earlier version began, or None."""
    path = stage / LEGACY_STATE
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Without torch's warning that one process saves or loads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no kill leaves half of it under its name."""
    doomed = checkpoint.with_suffix(".old")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)
