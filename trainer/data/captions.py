"""Text features of captions for training, from the frozen text encoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.templates import compose_prompt
from model.text_encoder import MAX_TOKENS, load_gemma, load_tokenizer
from trainer.demo.grammar import caption
from trainer.demo.scenes import Scene
from trainer.precision import mixed_precision

CHUNK = 32  # captions of like length encoded together


class CaptionEncoder:
    """Turns texts into features ``[L_i, D]`` in batches, without gradient."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._tokenizer = load_tokenizer(folder / "tokenizer")
        self._gemma = load_gemma(folder / "text_encoder", device=device)
        self._device = torch.device(device)

    @property
    def feature_dim(self) -> int:
        """Width of a feature."""
        return int(self._gemma.config.hidden_size)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        return [len(row) for row in self._tokenize(texts)]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self._tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)
        ids: list[list[int]] = batch["input_ids"]
        return ids

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Features of the valid tokens of each text.

        Texts are sorted by length and padded on the right within a chunk; the encoder is causal,
        so padding cannot change a valid token.
        """
        rows = self._tokenize(texts)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        features: list[Tensor] = [torch.empty(0)] * len(rows)
        for start in range(0, len(order), CHUNK):
            places = order[start : start + CHUNK]
            width = len(rows[places[-1]])
            ids = torch.tensor(
                [rows[i] + [0] * (width - len(rows[i])) for i in places], device=self._device
            )
            with mixed_precision(self._device.type):
                hidden = self._gemma(input_ids=ids, use_cache=False).last_hidden_state.float()
            for place, states in zip(places, hidden, strict=True):
                features[place] = states[: len(rows[place])]
        return features


class CaptionSampler:
    """Writes a prompt for a scene: level and template by weight, sometimes nothing at all."""

    def __init__(
        self, levels: Mapping[str, float], templates: Mapping[str, float], dropout: float
    ) -> None:
        self._levels, self._level_weights = _normalised(levels)
        self._templates, self._template_weights = _normalised(templates)
        self._dropout = dropout

    def __call__(self, scene: Scene, rng: np.random.Generator) -> str:
        """A whole prompt; the empty string (template dropped too) with the dropout's chance."""
        if rng.random() < self._dropout:
            return ""
        level = self._levels[int(np.searchsorted(self._level_weights, rng.random()))]
        template = self._templates[int(np.searchsorted(self._template_weights, rng.random()))]
        return compose_prompt(caption(scene, level, "en", rng), template)


def _normalised(weights: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """Names and cumulative shares."""
    shares = np.cumsum(list(weights.values())) / sum(weights.values())
    shares[-1] = 1.0
    return list(weights), shares
