"""Complete texts to text features: the tokenizer, and Gemma-2 without its last layer.

The feature of Lumina-Image 2.0 is Gemma-2's `hidden_states[-2]`: what leaves the layer before the
last, without the final norm. So the last layer is never loaded. Every text is encoded by itself
and without padding, hence its features cannot depend on what else is encoded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model
from transformers.utils import logging as transformers_logging

from model.checkpoint import (
    CheckpointError,
    WeightFiles,
    check_weight,
    load_weight,
    read_json,
    weight_files,
)

MAX_TOKENS = 256  # beginning-of-sequence token and system prompt included
CACHE_BYTES = 64 * 2**20


class TextEncoder:
    """Tokenizer and truncated Gemma-2 with a cache by text.

    Args:
        tokenizer: a transformers tokenizer with its own BOS rule.
        model: a `Gemma2Model` with its last layer and final norm removed.
        max_tokens: longest text in tokens; what is beyond is dropped at the end.
        cache_bytes: bound of the features kept, on the model's device.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        *,
        max_tokens: int = MAX_TOKENS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.max_tokens = max_tokens
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return int(self.model.config.hidden_size)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = MAX_TOKENS,
    ) -> TextEncoder:
        """Load `text_encoder/` and `tokenizer/` of a checkpoint folder.

        Raises:
            CheckpointError: one line naming the file and the fault.
        """
        tokenizer = load_tokenizer(folder / "tokenizer")
        model = load_gemma(folder / "text_encoder", device=device, dtype=dtype)
        rows = model.config.vocab_size
        if len(tokenizer) > rows:
            raise CheckpointError(
                f"tokenizer/tokenizer.json: {len(tokenizer)} tokens, but "
                f"text_encoder/config.json has vocab_size {rows}"
            )
        return cls(tokenizer, model, max_tokens=max_tokens)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Features of complete texts (templates already applied, see `model.templates`).

        Returns:
            One tensor [L_i, D] per text, valid tokens only, in the model's dtype. They are shared
            with the cache: read only.
        """
        return [self._encode_cached(text) for text in texts]

    def count_tokens(self, text: str) -> int:
        """How many tokens a complete text makes, those beyond the limit included."""
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def dropped(self, text: str) -> str:
        """The end of `text` that is beyond the limit and not encoded; "" where all of it fits."""
        spans = self.tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"]
        return text[spans[self.max_tokens][0] :] if len(spans) > self.max_tokens else ""

    def _encode_cached(self, text: str) -> Tensor:
        if text in self._cache:
            self._cache.move_to_end(text)
            return self._cache[text]
        features = self._encode(text)
        self._cache[text] = features
        self._cached_bytes += features.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return features

    def _encode(self, text: str) -> Tensor:
        ids = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        if not ids:
            raise ValueError("prompt '' is not allowed: the tokenizer makes no token of it")
        device = next(self.model.parameters()).device
        # Features are cached, and a trainer may use them: never tensors of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            output = self.model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            features: Tensor = output.last_hidden_state[0].clone()
        return features


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer folder; padding and truncation on the right.

    Raises:
        CheckpointError: one line naming the file and the fault.
    """
    for name in ("tokenizer_config.json", "tokenizer.json"):
        read_json(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever the library stumbles over, the file is at fault
        raise CheckpointError(f"tokenizer/tokenizer.json: {_first_line(error)}") from error
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    return tokenizer


def load_gemma(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Load Gemma-2 up to the layer whose output is the feature; no last layer, no final norm.

    Attention runs eagerly, the implementation that honours the logit soft cap.

    Raises:
        CheckpointError: one line naming the file and the fault.
    """
    config = _truncated_config(folder / "config.json")
    stored = WeightFiles(weight_files(folder, stem="model"))
    model = _without_weights(config, dtype)
    model.norm = nn.Identity()  # the feature is taken before any final norm
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    # Language models with a head, Gemma's own release among them, keep the base under `model.`
    keys = {n: f"model.{n}" if f"model.{n}" in stored.stored else n for n in shapes}
    for name, shape in shapes.items():
        check_weight(stored, keys[name], shape)
    weights = {
        name: load_weight(stored, [keys[name]], shape, device=device, dtype=dtype)
        for name, shape in shapes.items()
    }
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    """The model with real buffers, which are in no file, and weights that take no memory."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Gemma2Model(config).state_dict().items()}
    nothing = torch.zeros((), dtype=dtype)
    with _quiet_transformers():
        return Gemma2Model.from_pretrained(
            None,
            config=config,
            state_dict={name: nothing.expand(shape) for name, shape in shapes.items()},
            dtype=dtype,
            attn_implementation="eager",
        )


def _truncated_config(path: Path) -> Any:
    """Gemma-2's config with one layer less."""
    content = read_json(path)
    if content.get("model_type") != "gemma2":
        raise CheckpointError(
            f"text_encoder/config.json: model_type {content.get('model_type')!r} is not supported: "
            "only 'gemma2' is"
        )
    try:
        config = Gemma2Config.from_dict(content)
        config.num_hidden_layers -= 1
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    except Exception as error:  # the library's own validation, in its own words
        raise CheckpointError(f"text_encoder/config.json: {_first_line(error)}") from error
    if config.num_hidden_layers < 1:
        raise CheckpointError("text_encoder/config.json: num_hidden_layers must be 2 or more")
    config._attn_implementation = "eager"
    return config


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no key report of transformers; our own checks say what is wrong."""
    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    """The first line of a library's message, and the next one where it only announces that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:shown]) or type(error).__name__
