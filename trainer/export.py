"""From a training run to the checkpoint folder that servers load (diffusers' pipeline layout)."""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from model.checkpoint import MANIFEST, read_json, sha256_file, write_json, write_manifest
from model.next_dit import NextDiT
from trainer import checkpoint
from trainer.config import Recipe, load_recipe
from trainer.previews import plain_network
from trainer.stages.diffusion import transformer_config
from trainer.stages.run import parts_of

MODEL_INDEX = {
    "_class_name": "Lumina2Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", "Lumina2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export_run(run: Path, out: Path, init: Path | None = None) -> dict[str, Any]:
    """Write the newest averaged weights of ``run`` as a checkpoint folder.

    The transformer and the autoencoder are stored in bf16; the text encoder stays fp32, because
    transformers computes in the stored dtype and rounding there would move every picture.

    Args:
        run: a run folder of ``trainer train``.
        out: a folder to create; must be absent or empty.
        init: the checkpoint the run started from, when it trained no autoencoder of its own.

    Returns:
        What the manifest says about the making.

    Raises:
        ValueError: naming what is missing.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {str(out)!r} is not empty; choose a new folder or empty it")
    recipe_file = run / "recipe.yaml"
    if not recipe_file.is_file():
        raise ValueError(f"{str(run)!r} is no training run: it has no recipe.yaml")
    recipe = load_recipe(str(recipe_file))
    vae_folder, text_folder = parts_of(recipe, run, init)
    dit, progress = _newest_transformer(recipe, run, vae_folder, text_folder)
    dit.save_pretrained(out / "transformer", dtype=torch.bfloat16)
    AutoencoderKL.from_pretrained(vae_folder).to(torch.bfloat16).save_pretrained(out / "vae")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(text_folder / name, out / name)
    FlowMatchEulerDiscreteScheduler(shift=recipe.shift).save_pretrained(out / "scheduler")
    write_json(
        out / "model_index.json", {**MODEL_INDEX, "_diffusers_version": version("diffusers")}
    )
    write_json(out / "generation_config.json", recipe.generation)
    info = {
        "recipe": recipe.name,
        "recipe_sha256": sha256_file(recipe_file),
        "seed": recipe.seed,
        "git_revision": (run / "revision.txt").read_text(encoding="utf-8").strip(),
        "stages": progress,
        "weights": "exponential moving average",
        "parameters": sum(p.numel() for p in dit.parameters()),
    }
    if init and (init / MANIFEST).is_file():
        before = read_json(init / MANIFEST)
        info["started_from"] = {key: value for key, value in before.items() if key != "files"}
    write_manifest(out, info)
    return info


def _newest_transformer(
    recipe: Recipe, run: Path, vae_folder: Path, text_folder: Path
) -> tuple[NextDiT, dict[str, int]]:
    """Averaged weights of the last stage that has any, and the steps of every stage."""
    progress: dict[str, int] = {}
    newest: dict[str, Tensor] | None = None
    for name in recipe.transformer_stages:
        state = checkpoint.load_average(run / name)
        if state is not None:
            progress[name], newest = state
    if newest is None:
        raise ValueError(f"{str(run)!r} has no transformer stage with a checkpoint yet")
    vae_config = read_json(vae_folder / "config.json")
    text_config = read_json(text_folder / "text_encoder" / "config.json")
    config = transformer_config(recipe, vae_config["latent_channels"], text_config["hidden_size"])
    return plain_network(config, newest), progress
