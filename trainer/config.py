"""Typed training recipes, read from YAML."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from model.config import NextDiTConfig
from model.templates import TEMPLATE_NAMES
from trainer.demo.grammar import LEVELS
from trainer.optim import OptimizerName

RECIPES = Path(__file__).parent / "recipes"
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OptimizerConfig(_Strict):
    """How weights are updated."""

    name: OptimizerName = "adamw"
    lr: float = 2e-4
    matrix_lr: float = 3e-3
    """Of Muon; unused by AdamW."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    warmup: int = 0
    """Steps of linear warm-up."""
    cooldown: Share = 0.0
    """Share of the steps, at the end, over which the rate falls to zero."""
    clip: float = 2.0
    """Largest gradient norm."""
    eps: float = 1e-8
    """Of AdamW."""
    ema_decay: Share = 0.999


class SizeShare(_Strict):
    """One image size of a stage and how often it is drawn."""

    width: Positive
    height: Positive
    weight: float = 1.0


class VaeConfig(_Strict):
    """The autoencoder stage: architecture and training."""

    block_out_channels: list[Positive]
    layers_per_block: Positive = 1
    norm_num_groups: Positive = 8
    latent_channels: Positive = 16
    steps: Positive
    batch_pixels: Positive
    """Pixels per process and step; larger images come in smaller batches."""
    sizes: list[SizeShare]
    dense_share: Share = 0.6
    """Share of crowded scenes, which have more edges and colours to learn from."""
    kl_weight: float = 1e-4
    gradient_weight: float = 1.0
    optimizer: OptimizerConfig
    compact: "CompactConfig"


class CompactConfig(_Strict):
    """The autoencoder's second stage: latents that say no more than the picture needs."""

    steps: Positive
    kl_weight: float = 1.5e-3
    latent_std: float = 2.0
    """Standard deviation the latents are rescaled to at the start."""
    noise_std: float = 0.3
    """Standard deviation of the posterior at the start."""
    optimizer: OptimizerConfig


class TextConfig(_Strict):
    """The tokenizer and text encoder stage."""

    vocab_size: Positive = 1024
    hidden_size: Positive = 192
    intermediate_size: Positive = 512
    num_layers: Positive = 4
    num_heads: Positive = 4
    num_kv_heads: Positive = 2
    tokenizer_captions: Positive = 20_000
    """Captions the tokenizer is trained on."""
    steps: Positive
    batch: Positive
    optimizer: OptimizerConfig


class DiffusionConfig(_Strict):
    """One stage of flow matching."""

    name: str
    sizes: list[SizeShare]
    scenes: Positive
    """Scenes rendered and encoded once; drawn from again and again."""
    steps: Positive
    batch_tokens: Positive
    """Image tokens per process and step."""
    timestep_shift: float = 0.5
    """mu of the shifted log-normal timesteps: t = sigmoid(u - mu)."""
    caption_dropout: Share = 0.1
    levels: dict[str, float]
    """Caption level to its sampling weight."""
    templates: dict[str, float]
    """Prompt template to its sampling weight."""
    optimizer: OptimizerConfig

    @field_validator("levels")
    @classmethod
    def _check_levels(cls, levels: dict[str, float]) -> dict[str, float]:
        for level in levels:
            if level not in LEVELS:
                raise ValueError(f"level {level!r} is unknown; known are {', '.join(LEVELS)}")
        return levels

    @field_validator("levels", "templates")
    @classmethod
    def _check_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        return checked_weights(weights)


class DatasetConfig(_Strict):
    """Where the stages of ``flow`` take their pictures and captions from."""

    path: str | None = None
    """A folder with ``records.jsonl``; None: ``demo_scenes`` are rendered instead."""
    demo_scenes: Annotated[int, Field(ge=0)] = 0
    on_bad: Literal["skip", "stop"] = "skip"
    """What a picture that cannot be read, or a record without a caption, does to the run."""


class FlowStageConfig(_Strict):
    """One stage of flow matching on a data set of pictures."""

    name: str
    resolution: Positive
    """Side in pixels of the square that every aspect bucket has about the area of."""
    steps: Positive
    batch_images: Positive
    """Pictures per step, over all processes: the step does not depend on how many there are."""
    micro_tokens: Positive
    """Most caption and image tokens of one packed forward; a step takes as many as it needs."""
    timestep_shift: float
    """mu of the shifted log-normal timesteps: t = sigmoid(u - mu)."""
    auxiliary_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Of the loss on the clean latents pooled 4x, with noise and timesteps of their own."""
    caption_dropout: Share = 0.1
    levels: dict[str, float]
    """Caption level to its sampling weight; a caption that names none weighs 1."""
    languages: dict[str, float]
    """Caption language to its sampling weight; likewise."""
    domains: dict[str, str]
    """Domain of a record to its system prompt; ``default`` for those that name none."""
    optimizer: OptimizerConfig
    sharded: bool = True
    """FSDP2 where there are several processes; otherwise every process holds all weights."""
    reshard: bool = False
    """Give up gathered weights between forward and backward: less memory, more traffic."""
    recompute: bool = True
    """Activations of the joint blocks are computed again in the backward, not kept."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the matrix products; weights, gradients and optimiser are fp32. bf16 becomes fp32 on a
    CPU that would only emulate it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is no number does to the run."""

    @field_validator("levels", "languages")
    @classmethod
    def _check_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        return checked_weights(weights)

    @field_validator("domains")
    @classmethod
    def _check_domains(cls, domains: dict[str, str]) -> dict[str, str]:
        if "default" not in domains:
            raise ValueError("the domain 'default' needs a template")
        for template in domains.values():
            if template not in TEMPLATE_NAMES:
                known = ", ".join(TEMPLATE_NAMES)
                raise ValueError(f"template {template!r} is unknown; known are {known}")
        return domains


def checked_weights(weights: dict[str, float]) -> dict[str, float]:
    """Sampling weights; a ValueError where nothing could be drawn by them."""
    if min(weights.values(), default=0.0) < 0.0 or sum(weights.values()) <= 0.0:
        raise ValueError("the weights must not be negative, and one at least above 0")
    return weights


class PreviewConfig(_Strict):
    """Pictures of the same prompts, drawn again and again while a transformer learns."""

    every: Annotated[int, Field(ge=0)] = 1000
    """Steps between two grids; 0: none."""
    prompts: list[str] = [
        "a red circle on a white background",
        "two green squares",
        "a blue star to the left of a yellow triangle",
        "a photo of a mountain lake at dawn",
    ]
    num_inference_steps: Positive = 20
    guidance_scale: float = 4.0


class Recipe(_Strict):
    """Everything a training run does, in order: autoencoder, text encoder, transformer stages."""

    name: str
    seed: int = 0
    description: str = ""
    vae: VaeConfig | None = None
    """None: the autoencoder of ``parts`` or of ``--init`` is used as it is."""
    text: TextConfig | None = None
    """None: likewise the text encoder."""
    parts: str | None = None
    """A pipeline folder whose autoencoder, text encoder and tokenizer are used as they are."""
    transformer: dict[str, Any]
    """Fields of the Next-DiT configuration; text and latent widths come from the other parts."""
    shift: float = 3.0
    """Sampling shift written to the exported scheduler."""
    diffusion: list[DiffusionConfig] = []
    """Stages on the demo world, whose scenes are rendered as they are needed."""
    data: DatasetConfig = DatasetConfig()
    flow: list[FlowStageConfig] = []
    """Stages on a data set of pictures, after those of ``diffusion``."""
    previews: PreviewConfig = PreviewConfig()
    generation: dict[str, Any]
    """Content of ``generation_config.json``."""

    @model_validator(mode="after")
    def _check_stages(self) -> "Recipe":
        names = self.transformer_stages
        if not names:
            raise ValueError("diffusion or flow must have a stage")
        if len(set(names)) < len(names):
            raise ValueError(f"every stage needs a name of its own; got {', '.join(names)}")
        return self

    @field_validator("transformer")
    @classmethod
    def _check_transformer(cls, transformer: dict[str, Any]) -> dict[str, Any]:
        """Refuse at once what the first diffusion stage would refuse hours later."""
        NextDiTConfig.from_dict(transformer)
        return transformer

    @field_validator("generation")
    @classmethod
    def _check_generation(cls, generation: dict[str, Any]) -> dict[str, Any]:
        defaults = generation.get("defaults")
        if not isinstance(defaults, dict) or not isinstance(defaults.get("width"), int):
            raise ValueError("defaults.width must be a number of pixels")
        return generation

    @property
    def transformer_stages(self) -> list[str]:
        """Names of the stages that train the transformer, in order."""
        return [stage.name for stage in self.diffusion] + [stage.name for stage in self.flow]

    @property
    def default_width(self) -> int:
        """Width in pixels that the exported checkpoint draws when nothing is asked."""
        return int(self.generation["defaults"]["width"])


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name or a YAML file, with ``key.path=value`` overrides.

    Raises:
        ValueError: one line naming the recipe, the key and what is allowed.
    """
    shipped = RECIPES / f"{name_or_path}.yaml"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ValueError(f"recipe {name_or_path!r} is neither a file nor one of: {known}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: not valid YAML ({error})".replace("\n", " ")) from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name}: must hold a mapping")
    for override in overrides or []:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{path.name}: {_explain(error)}") from None


def _override(data: dict[str, Any], text: str) -> None:
    """Apply ``a.b.0.c=value``; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} must look like key.path=value")
    *parents, last = key.split(".")
    node: Any = data
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[int(last) if isinstance(node, list) else last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {text!r}: the value is not valid YAML") from None
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"--set {key!r} names nothing in the recipe") from None


def _explain(error: ValidationError) -> str:
    """The first fault in one sentence; an unknown key names the nearest known one."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "value_error":
        return f"{where}: {fault['ctx']['error']}" if where else str(fault["ctx"]["error"])
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg']} (got {str(fault['input'])[:60]!r})"
    model: Any = Recipe
    for part in fault["loc"][:-1]:
        model = _field_model(model, part)
    near = difflib.get_close_matches(str(fault["loc"][-1]), list(model.model_fields), 1, 0.0)
    return f"unknown key {where!r}; did you mean {near[0]!r}?"


def _field_model(model: Any, part: int | str) -> Any:
    """The model class behind one step of a validation path."""
    if isinstance(part, int):
        return model
    annotation = model.model_fields[part].annotation
    return annotation.__args__[0] if hasattr(annotation, "__args__") else annotation
