"""Loads a checkpoint for serving, and says what it offers.

Torch is imported when a checkpoint is loaded, not before: it takes seconds, and a worker that is
told to stop meanwhile should not have to wait for it.
"""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from server.config import Settings
from server.protocol import ModelInfo

if TYPE_CHECKING:
    from model.pipeline import Pipeline
    from server.worker.engine import StepPipeline
    from server.worker.preview import Painter

log = logging.getLogger(__name__)

CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline ready to serve, and what the API must know of it.

    Attributes:
        pipeline: the model.
        info: its offer.
        painter: draws unfinished latents, for previews.
        arithmetic: precision, attention backend and merged LoRAs, for logs and `lumina inspect`.
    """

    pipeline: "StepPipeline"
    info: ModelInfo
    painter: "Painter | None" = None
    arithmetic: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """How the model is made faster; by default not at all.

    Attributes:
        compile: `auto`, `off`, `blocks` or `full`.
        quantize: `none` or `fp8`.
        graph_tokens: of the largest step that is replayed as a CUDA graph.
        cache_dir: keeps what was compiled for the next start; None: where torch puts it.
    """

    compile: str = "off"
    quantize: str = "none"
    graph_tokens: int = 0
    cache_dir: Path | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Speed":
        """As the settings of a worker want it."""
        return cls(
            settings.compile,
            settings.quantize,
            settings.graph_tokens,
            settings.data_dir / "compiled",
        )


def load_model(
    folder: Path,
    precision: str = "auto",
    *,
    merged_loras: Sequence[tuple[Path, float]] = (),
    lora_dir: Path | None = None,
    speed: Speed = Speed(),
) -> LoadedModel:
    """Load a checkpoint folder on the GPU or, without one, the CPU.

    Args:
        folder: of the checkpoint.
        precision: `fp32`, `bf16` or `mixed`; `auto` takes what serves best on the device.
        merged_loras: LoRA files and factors, merged into the weights.
        lora_dir: a folder of LoRA files that requests may name.
        speed: what is done for speed.

    Raises ValueError (`CheckpointError`) with one line that names the file and the fault.
    """
    if speed.compile != "off" and speed.cache_dir is not None:
        keep_compiled(speed.cache_dir)
    import torch

    from model import load_pipeline
    from model.acceleration import default_compile
    from model.precision import default_precision
    from model.preview import LatentPainter

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = default_precision(device)
    compile_mode = default_compile(device) if speed.compile == "auto" else speed.compile
    pipeline = load_pipeline(
        folder,
        device=device,
        precision=precision,
        merged_loras=merged_loras,
        lora_dir=lora_dir,
        compile=compile_mode,
        quantize=speed.quantize,
        graph_tokens=speed.graph_tokens,
    )
    dit = pipeline.dit
    arithmetic = {"device": device, "precision": dit.precision, "attention": dit.attention.name}
    arithmetic |= {"compile": compile_mode, "quantize": speed.quantize}
    info = describe(pipeline, folder)
    if merged_loras:
        merged = " and ".join(f"{path.name} x {scale:g}" for path, scale in merged_loras)
        arithmetic["merged"] = merged
        info = dataclasses.replace(info, hash=merged_hash(info.hash, merged_loras))
    return LoadedModel(pipeline, info, LatentPainter(pipeline.vae), arithmetic)


def keep_compiled(cache_dir: Path) -> None:
    """Let what is compiled from now on be found again by the next process with this directory.

    To be called before torch is imported: parts of it settle on a directory as they are loaded.
    Nothing is made before there is something to keep. Directories that the environment names are
    left alone, and so are torch's own where this one cannot be made.
    """
    there = next(path for path in (cache_dir, *cache_dir.resolve().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        log.warning("compiled code is not kept: %s is no folder to write to", there)
        return
    for variable, folder in CACHE_VARIABLES.items():
        os.environ.setdefault(variable, str((cache_dir / folder).resolve()))


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
        loras=pipeline.loras.names if pipeline.loras is not None else (),
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


def merged_hash(checkpoint: str, merged_loras: Sequence[tuple[Path, float]]) -> str:
    """Return the sha256 that identifies a checkpoint with LoRAs merged into it."""
    from model.checkpoint import sha256_file

    parts = [f"{sha256_file(path)} {scale!r}" for path, scale in merged_loras]
    return hashlib.sha256("\n".join([checkpoint, *parts]).encode()).hexdigest()
