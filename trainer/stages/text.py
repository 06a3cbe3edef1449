"""The text stage: tokenizer, then a small Gemma-2 that learns to read captions.

The feature the image model will see (output of the layer before the last) must tell what the
caption says, so the stage predicts the scene from the feature of the caption's last token; beside
it the ordinary next-token loss trains every layer. Afterwards the encoder is frozen.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from model.templates import PROMPT_MARKER, TEMPLATES, compose_prompt
from model.text_encoder import MAX_TOKENS
from trainer.config import TextConfig
from trainer.demo.grammar import LEVELS, caption
from trainer.demo.scenes import (
    BACKGROUND_COLORS,
    BACKGROUND_KINDS,
    OBJECT_COLORS,
    SHAPES,
    SIZES,
    Scene,
    sample_scene,
)
from trainer.distributed import World
from trainer.ema import Ema
from trainer.precision import mixed_precision
from trainer.stages.base import WholeStage
from trainer.tokenizer import train_tokenizer

LOOKS = {
    (shape, color): index
    for index, (shape, color) in enumerate((s, c) for s in SHAPES for c in OBJECT_COLORS)
}
GROUND_COLORS = list(BACKGROUND_COLORS)
MAX_COUNT = 4
LANGUAGE_MODEL_WEIGHT = 0.3
TEMPLATE_CHOICES = ("real", "real", "base", "align", "aesthetics", "empty")


class SceneReader(nn.Module):
    """Text encoder plus the throw-away heads that predict the scene from its feature."""

    def __init__(self, encoder: Gemma2Model) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        looks = len(LOOKS)
        self._sizes = {
            "counts": looks * (MAX_COUNT + 1),
            "positions": looks * 2,
            "sizes": looks * len(SIZES),
            "ground": len(BACKGROUND_KINDS),
            "ground_colors": len(GROUND_COLORS) * 2,
        }
        self.heads = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, sum(self._sizes.values())),
        )

    def forward(self, ids: Tensor, last: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Predictions from the token ``last`` ``[B]`` of ``ids`` ``[B, L]``, and LM logits."""
        states = self.encoder(input_ids=ids, output_hidden_states=True, use_cache=False)
        feature = states.hidden_states[-2][torch.arange(len(ids), device=ids.device), last]
        parts = self.heads(feature).split(list(self._sizes.values()), dim=-1)
        logits = states.last_hidden_state @ self.encoder.embed_tokens.weight.T
        return dict(zip(self._sizes, parts, strict=True)), logits


class TextStage(WholeStage):
    """Trains the tokenizer at construction and the encoder in the loop."""

    name = "text"
    module: SceneReader

    def __init__(self, config: TextConfig, seed: int, world: World) -> None:
        self.optimizer = config.optimizer
        self.total_steps = config.steps
        self.images_per_step = config.batch * world.size
        self._config, self._seed, self._world = config, seed, world
        rng = np.random.default_rng((seed, 2**30))
        captions = [
            caption(sample_scene(rng), LEVELS[i % len(LEVELS)], "en", rng)
            for i in range(config.tokenizer_captions)
        ]
        templates = [text + PROMPT_MARKER for text in TEMPLATES.values()]
        self.tokenizer = train_tokenizer(captions, templates, config.vocab_size)
        torch.manual_seed(seed)
        self.module = SceneReader(build_encoder(config, self.tokenizer))

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Scene prediction plus next-token loss on a batch of captions."""
        rng = np.random.default_rng((self._seed, step, self._world.rank))
        scenes = [sample_scene(rng) for _ in range(self._config.batch)]
        level = LEVELS[step % len(LEVELS)]  # one per batch: like lengths waste little padding
        texts = [
            compose_prompt(
                caption(scene, level, "en", rng),
                TEMPLATE_CHOICES[int(rng.integers(len(TEMPLATE_CHOICES)))],
            )
            for scene in scenes
        ]
        rows = self.tokenizer(texts)["input_ids"]
        last = torch.tensor([len(row) - 1 for row in rows])
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        ids, last = ids.to(self._world.device), last.to(self._world.device)
        with mixed_precision(ids.device.type):
            predictions, logits = self.module(ids, last)
        predictions = {key: value.float() for key, value in predictions.items()}
        losses = scene_losses(predictions, scenes)
        targets = ids[:, 1:].masked_fill(
            torch.arange(1, width, device=ids.device) > last[:, None], -100
        )
        losses["next_token"] = LANGUAGE_MODEL_WEIGHT * F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100
        )
        report = {key: value.item() for key, value in losses.items()}
        report["count_accuracy"] = count_accuracy(predictions["counts"], scenes)
        return torch.stack(list(losses.values())).sum(), report

    def finish(self, ema: Ema, folder: Path) -> None:
        """Save tokenizer and averaged encoder as transformers does."""
        self.module.load_state_dict(ema.weights())
        self.module.encoder.to("cpu").eval().save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


def build_encoder(config: TextConfig, tokenizer: GemmaTokenizer) -> Gemma2Model:
    """A small Gemma-2 with eager attention, which honours the logit soft cap."""
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        query_pre_attn_scalar=config.hidden_size // config.num_heads,
        max_position_embeddings=2 * MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
    )
    return Gemma2Model(gemma)


def scene_losses(predictions: Mapping[str, Tensor], scenes: list[Scene]) -> dict[str, Tensor]:
    """Losses of counts, positions, sizes and background."""
    batch, looks = len(scenes), len(LOOKS)
    device = predictions["counts"].device
    counts = _counts(scenes)
    centers, sizes = torch.zeros(batch, looks, 2), torch.zeros(batch, looks, dtype=torch.long)
    for row, scene in enumerate(scenes):
        for thing in scene.objects:
            look = LOOKS[thing.shape, thing.color]
            centers[row, look] += torch.tensor((thing.x, thing.y)) / counts[row, look]
            sizes[row, look] = SIZES.index(thing.size)
    counts, centers, sizes = counts.to(device), centers.to(device), sizes.to(device)
    present = counts > 0
    count_logits = predictions["counts"].view(batch, looks, -1)
    positions = predictions["positions"].view(batch, looks, 2)
    kinds = torch.tensor([BACKGROUND_KINDS.index(s.background.kind) for s in scenes]).to(device)
    colors = torch.tensor(
        [
            [GROUND_COLORS.index(c) for c in (s.background.colors[0], s.background.colors[-1])]
            for s in scenes
        ]
    ).to(device)
    color_logits = predictions["ground_colors"].view(batch, 2, -1)
    return {
        "counts": F.cross_entropy(count_logits.flatten(0, 1), counts.flatten()) * looks * 0.5,
        "positions": 4.0 * (positions[present] - centers[present]).abs().mean(),
        "sizes": 0.5
        * F.cross_entropy(predictions["sizes"].view(batch, looks, -1)[present], sizes[present]),
        "ground": 0.5 * F.cross_entropy(predictions["ground"], kinds),
        "ground_colors": 0.5 * F.cross_entropy(color_logits.flatten(0, 1), colors.flatten()),
    }


def count_accuracy(logits: Tensor, scenes: list[Scene]) -> float:
    """Share of scenes whose objects (shape, colour and number) are all predicted right."""
    counts = _counts(scenes).to(logits.device)
    guess = logits.view(*counts.shape, -1).argmax(-1)
    return float((guess == counts).all(-1).float().mean())


def _counts(scenes: list[Scene]) -> Tensor:
    """``[B, looks]`` how often each (shape, colour) occurs."""
    counts = torch.zeros(len(scenes), len(LOOKS), dtype=torch.long)
    for row, scene in enumerate(scenes):
        for thing in scene.objects:
            counts[row, LOOKS[thing.shape, thing.color]] += 1
    return counts
