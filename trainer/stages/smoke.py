"""The smallest version of a recipe that still goes the whole way."""

from typing import Any

from trainer.config import DiffusionConfig, Recipe, SizeShare


def shrink(recipe: Recipe) -> Recipe:
    """A few steps of every stage on a tiny model: about a minute on a CPU, exportable."""
    vae = recipe.vae.model_copy(
        update={
            "block_out_channels": [8, 8, 16, 16],
            "steps": 3,
            "batch_pixels": 8192,
            "sizes": [_small(recipe.vae.sizes[0])],
            "compact": recipe.vae.compact.model_copy(update={"steps": 3}),
        }
    )
    text = recipe.text.model_copy(
        update={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 2,
            "steps": 3,
            "batch": 8,
            "tokenizer_captions": 500,
        }
    )
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
            "vae": vae,
            "text": text,
            "transformer": transformer,
            "diffusion": [_shrink_stage(stage) for stage in recipe.diffusion],
        }
    )


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
