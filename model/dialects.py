"""The names under which others keep the transformer's weights, and what their shapes tell.

A dialect is a map from our names (`NextDiT.state_dict`) to pieces that, stacked along the first
axis, give our weight. Converting between two dialects therefore only cuts and joins rows: no number
changes. Official names are those of the released training code; ComfyUI puts a prefix before them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from model.checkpoint import CheckpointError, Weights, diffusers_keys, piece_shapes
from model.config import NAMED_CONFIGS, NextDiTConfig, size_name
from model.next_dit import NextDiT

# Our names on the left, the official ones on the right; what is missing is called the same.
_OFFICIAL_TOP = {
    "time_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_embedder.linear_2.": "t_embedder.mlp.2.",
    "caption_embedder.norm.": "cap_embedder.0.",
    "caption_embedder.linear.": "cap_embedder.1.",
    "final_layer.modulation.": "final_layer.adaLN_modulation.1.",
}
_OFFICIAL_BLOCK = {
    "feed_forward.gate_up.": ("feed_forward.w1.", "feed_forward.w3."),
    "feed_forward.down.": ("feed_forward.w2.",),
    "modulation.": ("adaLN_modulation.1.",),
}
_BLOCK = re.compile(r"(context_refiner|noise_refiner|layers)\.(\d+)\.")
UNUSED = "norm_final.weight"  # the official network has this norm and never applies it


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of one of our weights, under another dialect's name."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Dialect:
    """A way of naming weights.

    Attributes:
        name: for people.
        marker: a name that only this dialect has.
        names: our name to that of its pieces.
    """

    name: str
    marker: str
    names: Callable[[str], tuple[str, ...]]

    def pieces(self, key: str, shape: tuple[int, ...]) -> list[Piece]:
        """The pieces of our weight ``key`` of this shape, in the order of its rows."""
        names = self.names(key)
        rows = [shape[0]] if len(names) == 1 else [s[0] for s in piece_shapes(key, shape)]
        stops = [sum(rows[: i + 1]) for i in range(len(rows))]
        return [
            Piece(name, stop - count, stop)
            for name, count, stop in zip(names, rows, stops, strict=True)
        ]


def official_keys(key: str) -> tuple[str, ...]:
    """The official names of the weight we call ``key``; concatenated they give ours.

    Queries, keys and values are one weight in both, in this order.
    """
    for ours, theirs in _OFFICIAL_TOP.items():
        if key.startswith(ours):
            return (theirs + key.removeprefix(ours),)
    block = _BLOCK.match(key)
    if block is not None:
        name = key[block.end() :]
        for ours, pieces in _OFFICIAL_BLOCK.items():
            if name.startswith(ours):
                return tuple(block[0] + piece + name.removeprefix(ours) for piece in pieces)
    return (key,)


OFFICIAL = Dialect("official", "t_embedder.mlp.0.weight", official_keys)
DIFFUSERS = Dialect(
    "diffusers", "time_caption_embed.timestep_embedder.linear_1.weight", diffusers_keys
)
DIALECTS = {dialect.name: dialect for dialect in (OFFICIAL, DIFFUSERS)}


def weight_shapes(config: NextDiTConfig) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of every weight of a network, without making it."""
    with torch.device("meta"):
        dit = NextDiT(config)
    return {key: tuple(value.shape) for key, value in dit.state_dict().items()}


def find_dialect(weights: Weights) -> tuple[Dialect, str]:
    """The dialect of a file and what stands before its transformer's names.

    Raises:
        CheckpointError: when the file holds no transformer of this family, or several.
    """
    found = [
        (dialect, key.removesuffix(dialect.marker))
        for key in weights.stored
        for dialect in DIALECTS.values()
        if key == dialect.marker or key.endswith("." + dialect.marker)
    ]
    if not found and any(".lora_" in key or ".lora." in key for key in weights.stored):
        raise CheckpointError(
            f"{weights.name}: a LoRA, not a transformer: it goes beside a checkpoint, as --lora or "
            "in --lora-dir"
        )
    if not found:
        wanted = " nor ".join(f"{d.marker!r} ({name} names)" for name, d in DIALECTS.items())
        raise CheckpointError(
            f"{weights.name}: holds no transformer of this family: neither {wanted} is in it"
        )
    if len(found) > 1:
        first, second = (prefix + dialect.marker for dialect, prefix in found[:2])
        raise CheckpointError(
            f"{weights.name}: holds several transformers ({first!r} and {second!r}), not one"
        )
    return found[0]


@dataclass(frozen=True)
class Inferred:
    """A config read off shapes.

    Attributes:
        config: reproduces every shape.
        size: the named size it belongs to, such as "2.6B"; None for a network of another size.
        assumed: fields that no shape shows, with the value taken for them.
    """

    config: NextDiTConfig
    size: str | None
    assumed: Mapping[str, Any]


# No weight's shape depends on these, or not on them alone.
_UNSEEN = ("patch_size", "axes_dim_rope", "axes_lens", "norm_eps", "sample_size")


def infer_config(weights: Weights, dialect: Dialect, prefix: str) -> Inferred:
    """Read the network's numbers off its weights' shapes.

    The number of heads follows from the length of the query norm. A named size with the same shapes
    supplies what no shape shows; otherwise the family's rule does: a third of the head for each
    rotary axis, and the released model's numbers for the rest.

    Raises:
        CheckpointError: naming the weight whose shape fits no network of the family.
    """
    reader = _Shapes(weights, dialect, prefix)
    try:
        config = _read_config(reader)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{weights.name}: no config fits its shapes: {error}") from None
    size = size_name(config)
    if size is not None:
        config = NAMED_CONFIGS[size]
    values = {name: getattr(config, name) for name in _UNSEEN}
    return Inferred(config, size, values)


class _Shapes:
    """Shapes of a file's transformer under our names."""

    def __init__(self, weights: Weights, dialect: Dialect, prefix: str) -> None:
        self._weights, self._dialect, self._prefix = weights, dialect, prefix

    def __call__(self, key: str, axes: int = 2) -> tuple[int, ...]:
        """The shape of our weight ``key``; raises CheckpointError where it is not there."""
        rows, columns = 0, 0
        for name in self._dialect.names(key):
            stored = self._weights.stored.get(self._prefix + name)
            if stored is None:
                raise CheckpointError(
                    f"{self._weights.name}: the weight {self._prefix + name!r} is missing; without "
                    "it the config cannot be inferred"
                )
            if len(stored.shape) != axes or 0 in stored.shape:
                raise CheckpointError(
                    f"{self._weights.name}: {self._prefix + name!r} has shape "
                    f"{list(stored.shape)}; {axes} axes are expected"
                )
            rows, columns = rows + stored.shape[0], stored.shape[-1]
        return (rows, columns) if axes == 2 else (rows,)

    def count(self, stem: str) -> int:
        """How many blocks of a kind there are."""
        start = f"{self._prefix}{stem}."
        names = (key.removeprefix(start) for key in self._weights.stored if key.startswith(start))
        return len({name.partition(".")[0] for name in names})


def _read_config(shape: _Shapes) -> NextDiTConfig:
    default = NextDiTConfig()
    hidden, patch_dim = shape("x_embedder.weight")
    head_dim = shape("layers.0.attention.q_norm.weight", axes=1)[0]
    kv_rows = shape("layers.0.attention.qkv.weight")[0] - hidden
    if hidden % head_dim or kv_rows <= 0 or kv_rows % (2 * head_dim):
        raise ValueError(
            f"width {hidden} and {kv_rows} rows of keys and values are no whole heads of {head_dim}"
        )
    if head_dim % 6 or patch_dim % default.patch_size**2:
        raise ValueError(
            f"heads of {head_dim} and patches of {patch_dim} numbers do not follow the family's "
            "rules (three equal rotary axes, patches of 2 x 2); give --like"
        )
    config = replace(
        default,
        hidden_size=hidden,
        in_channels=patch_dim // default.patch_size**2,
        num_layers=shape.count("layers"),
        num_refiner_layers=shape.count("context_refiner"),
        num_attention_heads=hidden // head_dim,
        num_kv_heads=kv_rows // (2 * head_dim),
        axes_dim_rope=(head_dim // 3,) * 3,
        cap_feat_dim=shape("caption_embedder.linear.weight")[1],
    )
    return _with_ffn(config, shape("layers.0.feed_forward.down.weight")[1])


def _with_ffn(config: NextDiTConfig, width: int) -> NextDiTConfig:
    """The config with a feed-forward of this width; several settings give it, any will do."""
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        plain = replace(config, multiple_of=multiple_of, ffn_dim_multiplier=None)
        if plain.ffn_dim == width:
            return plain
    return replace(
        config,
        multiple_of=math.gcd(width, 256),
        # Half a row more than the quotient, because the product is rounded down.
        ffn_dim_multiplier=(width + 0.5) / (4 * config.hidden_size),
    )
