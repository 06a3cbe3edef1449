"""Loads a checkpoint for serving, and says what it offers.

Torch is imported when a checkpoint is loaded, not before: it takes seconds, and a worker that is
told to stop meanwhile should not have to wait for it.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from server.protocol import ModelInfo

if TYPE_CHECKING:
    from model.pipeline import Pipeline
    from server.worker.engine import StepPipeline
    from server.worker.preview import Painter


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline ready to serve, and what the API must know of it.

    Attributes:
        pipeline: the model.
        info: its offer.
        painter: draws unfinished latents, for previews.
        arithmetic: precision and attention backend, for logs and `lumina inspect`.
    """

    pipeline: "StepPipeline"
    info: ModelInfo
    painter: "Painter | None" = None
    arithmetic: dict[str, str] = field(default_factory=dict)


def load_model(folder: Path, precision: str = "auto") -> LoadedModel:
    """Load a checkpoint folder on the GPU or, without one, the CPU.

    Args:
        folder: of the checkpoint.
        precision: `fp32`, `bf16` or `mixed`; `auto` takes what serves best on the device.

    Raises ValueError (`CheckpointError`) with one line that names the file and the fault.
    """
    import torch

    from model import load_pipeline
    from model.precision import default_precision
    from model.preview import LatentPainter

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = default_precision(device)
    pipeline = load_pipeline(folder, device=device, precision=precision)
    dit = pipeline.dit
    arithmetic = {"device": device, "precision": dit.precision, "attention": dit.attention.name}
    painter = LatentPainter(pipeline.vae)
    return LoadedModel(pipeline, describe(pipeline, folder), painter, arithmetic)


def describe(pipeline: "Pipeline", folder: Path) -> ModelInfo:
    """Return the limits and defaults of a loaded checkpoint; its step cost is not yet measured."""
    from model.templates import TEMPLATE_NAMES

    config = pipeline.generation_config
    limits = config.limits
    return ModelInfo(
        name=folder.resolve().name,
        hash=checkpoint_hash(folder),
        min_size=limits.min_size,
        max_size=limits.max_size,
        size_multiple=limits.size_multiple,
        default_width=config.defaults["width"],
        default_height=config.defaults["height"],
        max_steps=limits.max_steps,
        default_steps=config.defaults["num_inference_steps"],
        max_prompt_tokens=pipeline.text_encoder.max_tokens,
        step_cost_ms=0.0,
        defaults=dict(config.defaults),
        presets={name: dict(preset) for name, preset in config.presets.items()},
        templates=TEMPLATE_NAMES,
    )


def checkpoint_hash(folder: Path) -> str:
    """Return the sha256 that identifies a checkpoint: of its manifest, or else of all its files."""
    from model.checkpoint import MANIFEST, sha256_file

    if (folder / MANIFEST).is_file():
        return sha256_file(folder / MANIFEST)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            digest.update(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n".encode())
    return digest.hexdigest()
