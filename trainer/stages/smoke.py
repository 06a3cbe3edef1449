"""The smallest version of a recipe that still goes the whole way."""

from typing import Any

from trainer.config import (
    DatasetConfig,
    DiffusionConfig,
    FlowStageConfig,
    Recipe,
    SizeShare,
    TextConfig,
    VaeConfig,
    load_recipe,
)
from trainer.demo.grammar import LANGUAGES

LARGEST = 256  # pixels of a default size that is left as it is


def shrink(recipe: Recipe) -> Recipe:
    """A few steps of every stage on a tiny model: about a minute on a CPU, exportable."""
    world = load_recipe("demo")  # a recipe that trains no parts of its own borrows these
    vae, text = recipe.vae or world.vae, recipe.text or world.text
    assert vae is not None
    assert text is not None
    transformer: dict[str, Any] = {
        **recipe.transformer,
        "hidden_size": 48,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "axes_dim_rope": [4, 4, 4],
    }
    return recipe.model_copy(
        update={
            "vae": _shrink_vae(vae),
            "text": _shrink_text(text),
            "parts": None,
            "data": DatasetConfig(demo_scenes=24 if recipe.flow else 0),
            "transformer": transformer,
            "diffusion": [_shrink_stage(stage) for stage in recipe.diffusion],
            "flow": [_shrink_flow(stage) for stage in recipe.flow],
            "previews": recipe.previews.model_copy(
                update={"every": 3, "prompts": recipe.previews.prompts[:2]}
            ),
            "generation": _small_generation(recipe.generation),
        }
    )


def _shrink_vae(vae: VaeConfig) -> VaeConfig:
    return vae.model_copy(
        update={
            "block_out_channels": [8, 8, 16, 16],
            "steps": 3,
            "batch_pixels": 8192,
            "sizes": [_small(vae.sizes[0])],
            "compact": vae.compact.model_copy(update={"steps": 3}),
        }
    )


def _shrink_text(text: TextConfig) -> TextConfig:
    return text.model_copy(
        update={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 2,
            "steps": 3,
            "batch": 8,
            "tokenizer_captions": 500,
        }
    )


def _shrink_flow(stage: FlowStageConfig) -> FlowStageConfig:
    return stage.model_copy(
        update={
            "resolution": 64,
            "steps": 3,
            "batch_images": 8,
            "micro_tokens": 600,
            "languages": dict.fromkeys(LANGUAGES, 1.0),
            "precision": "fp32",
        }
    )


def _small_generation(generation: dict[str, Any]) -> dict[str, Any]:
    """Pictures of a size that a tiny autoencoder draws in no time."""
    defaults, limits = dict(generation["defaults"]), dict(generation.get("limits", {}))
    if defaults["width"] <= LARGEST:
        return generation
    defaults |= {"width": 64} | ({"height": 64} if "height" in defaults else {})
    return {**generation, "defaults": defaults, "limits": limits | {"min_size": 64}}


def _shrink_stage(stage: DiffusionConfig) -> DiffusionConfig:
    return stage.model_copy(
        update={
            "sizes": [_small(size) for size in stage.sizes],
            "scenes": 16,
            "steps": 3,
            "batch_tokens": 64,
        }
    )


def _small(size: SizeShare) -> SizeShare:
    return SizeShare(width=32, height=32, weight=size.weight)
