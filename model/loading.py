"""From a checkpoint folder to a `Pipeline`: which parts, that they are whole and fit together.

The folder is diffusers' pipeline layout. Every fault becomes a `CheckpointError` of one line that
names the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kernels.dispatch
from model.acceleration import accelerate
from model.cache_config import load_cache_config
from model.checkpoint import (
    PICKLES,
    CheckpointError,
    read_json,
    short_name,
    verify_manifest,
)
from model.generation_config import load_generation_config
from model.lora import merge_loras, open_lora
from model.lora_registry import LoraRegistry
from model.next_dit import NextDiT
from model.pipeline import Pipeline
from model.precision import Precision, precision_named
from model.quantize import check_quantize, quantize_fp8
from model.request import SIZE_MULTIPLE
from model.text_encoder import MAX_TOKENS, TextEncoder
from model.vae import VAE

# Early uploads of the released model carry the older class name.
_PIPELINE_CLASSES = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
_PART_CLASSES = {
    "transformer": ("Lumina2Transformer2DModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("Gemma2Model",),
    "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast"),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
# Settings of diffusers' scheduler that would bend the schedule in ways not supported here.
_SCHEDULE_SWITCHES = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


def load_pipeline(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
    merged_loras: Sequence[tuple[Path, float]] = (),
    lora_dir: Path | None = None,
    compile: str = "off",
    quantize: str = "none",
    graph_tokens: int = 0,
) -> Pipeline:
    """Load a checkpoint folder; its `manifest.json`, where present, is verified first.

    Args:
        folder: holds `model_index.json`.
        device: where everything runs.
        dtype: of all weights; latents between steps stay float32.
        precision: a name of `model.precision.PRECISIONS`; where given, `dtype` does not count.
        merged_loras: LoRA files and factors, added to the transformer's weights for good.
        lora_dir: a folder of LoRA files that requests may name (`GenerationRequest.loras`).
        compile: `off`, `blocks` or `full`, see `model.acceleration.accelerate`.
        quantize: `none` or `fp8`, see `model.quantize`.
        graph_tokens: largest step that is replayed as a CUDA graph; 0: none.

    Raises:
        CheckpointError: one line naming the file and the fault.
        ValueError: one sentence on the precision, on what the device cannot do, or on a forced
            attention backend or kernels.
    """
    chosen = Precision(dtype, dtype) if precision is None else precision_named(precision)
    dtype, folder = chosen.weights, Path(folder)
    check_quantize(quantize, device, dtype)
    shift = _check_folder(folder)
    dit = _load_network(folder / "transformer", device, chosen, merged_loras, quantize)
    vae = VAE.from_pretrained(folder / "vae", device=device, dtype=dtype)
    text_encoder = TextEncoder.from_pretrained(
        folder,
        device=device,
        dtype=dtype,
        max_tokens=min(MAX_TOKENS, dit.config.max_caption_tokens),
    )
    _check_fit(dit, vae, text_encoder)
    _ = dit.attention  # chosen, and refused, now rather than at the first picture
    kernels.dispatch.settle(dit.device)
    accelerate(dit, compile=compile, graph_tokens=graph_tokens)
    generation_config = load_generation_config(
        folder,
        shift=shift,
        trained_size=dit.config.sample_size * vae.downscale,
        size_multiple=math.lcm(SIZE_MULTIPLE, vae.downscale * dit.config.patch_size),
    )
    return Pipeline(
        dit=dit,
        vae=vae,
        text_encoder=text_encoder,
        generation_config=generation_config,
        loras=None if lora_dir is None else LoraRegistry(lora_dir, dit),
        cache_config=load_cache_config(folder),
    )


def _check_folder(folder: Path) -> float:
    """Refuse what is no checkpoint, or a damaged one, before its weights are read.

    Returns the resolution shift of its schedule.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder")
    _check_index(folder)
    verify_manifest(folder)
    return _read_shift(folder / "scheduler" / "scheduler_config.json")


def _load_network(
    folder: Path,
    device: str | torch.device,
    precision: Precision,
    merged_loras: Sequence[tuple[Path, float]],
    quantize: str,
) -> NextDiT:
    dit = NextDiT.from_pretrained(
        folder, device=device, dtype=precision.weights, residual_dtype=precision.residual
    )
    merge_loras(dit, [(open_lora(path, dit.config), factor) for path, factor in merged_loras])
    if quantize == "fp8":
        quantize_fp8(dit)
    return dit


def _check_index(folder: Path) -> None:
    """Refuse a folder that is some other kind of pipeline, or that lacks a part."""
    if not (folder / "model_index.json").exists():
        for path in sorted(folder.glob("*")):
            if path.suffix in (".safetensors", *PICKLES):
                raise CheckpointError(
                    f"{short_name(path)}: weights without the folders around them (there is no "
                    "model_index.json); `lumina convert` makes a checkpoint folder of them"
                )
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in _PIPELINE_CLASSES:
        raise CheckpointError(
            f"model_index.json: _class_name {index.get('_class_name')!r} is not supported: "
            f"only {' or '.join(_PIPELINE_CLASSES)} is"
        )
    for part, classes in _PART_CLASSES.items():
        entry = index.get(part)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if name not in classes:
            raise CheckpointError(
                f"model_index.json: {part} {name!r} is not supported: "
                f"only {' or '.join(classes)} is"
            )
        if not (folder / part).is_dir():
            raise CheckpointError(f"{part}/: the folder is missing")


def _read_shift(path: Path) -> float:
    """The resolution shift of the schedule."""
    config: dict[str, Any] = read_json(path)
    for name in _SCHEDULE_SWITCHES:
        if config.get(name):
            raise CheckpointError(
                f"scheduler/scheduler_config.json: {name} {config[name]!r} is not supported"
            )
    shift = config.get("shift", 1.0)  # diffusers' own default
    number = isinstance(shift, int | float) and not isinstance(shift, bool)
    if not number or not 0.0 < shift <= 100.0:
        raise CheckpointError(
            f"scheduler/scheduler_config.json: shift {shift!r} is not allowed: "
            "give a number above 0 and up to 100"
        )
    return float(shift)


def _check_fit(dit: NextDiT, vae: VAE, text_encoder: TextEncoder) -> None:
    """Refuse parts that are whole but belong to different models."""
    if vae.latent_channels != dit.config.in_channels:
        raise CheckpointError(
            f"vae/config.json: latent_channels {vae.latent_channels} differs from in_channels "
            f"{dit.config.in_channels} of transformer/config.json"
        )
    if text_encoder.feature_dim != dit.config.cap_feat_dim:
        raise CheckpointError(
            f"text_encoder/config.json: hidden_size {text_encoder.feature_dim} differs from "
            f"cap_feat_dim {dit.config.cap_feat_dim} of transformer/config.json"
        )
