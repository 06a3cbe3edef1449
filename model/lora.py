"""LoRA files: what they may call things, what they hold, and merging them into a network.

A file holds pairs of matrices for linear layers: ``A`` (down) to a few numbers and ``B`` (up) from
them. Layers go by diffusers' names or the official ones, which fuse queries, keys and values and
call the feed-forward ``w1`` to ``w3``; before them may stand what trainers and pipelines put there.
A pair is scaled by alpha / rank. alpha comes from a tensor ``LAYER.alpha``, or from peft's settings
(in the file's metadata as diffusers writes them, or in peft's ``adapter_config.json``), else it is
the rank.

Only safetensors are read. Whatever is wrong becomes one line that names file, key and expectation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from model.adapters import Lora, LowRank
from model.checkpoint import FLOATS, PICKLES, CheckpointError, WeightFiles, read_json, short_name
from model.config import NextDiTConfig
from model.dialects import DIALECTS, weight_shapes
from model.next_dit import NextDiT

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps peft's settings
SHOWN_KEYS = 8  # unknown keys that a refusal spells out
MERGE_ROWS = 1024  # of a weight that are merged at once, in float32

_PREFIX = re.compile(
    r"\A(?:lora_unet_|(?:base_model\.model\.)?(?:transformer\.|(?:model\.)?diffusion_model\.)?)"
)
# peft may put an adapter's name before "weight".
_KEY = re.compile(r"(.+?)\.(?:lora[_.](A|B|down|up)(?:\.[A-Za-z_]\w*)?\.weight|(alpha))")
_WHOLE = tuple(dialect.marker for dialect in DIALECTS.values())  # what no LoRA has
_ROLES = {"A": "A", "down": "A", "B": "B", "up": "B"}


class Place(NamedTuple):
    """Rows ``start`` to ``stop`` of the ``rows`` by ``columns`` weight of our linear layer.

    ``dialect`` is empty where both have the same name for it.
    """

    layer: str
    start: int
    stop: int
    rows: int
    columns: int
    dialect: str


class Pair(NamedTuple):
    """One pair of a file, by its keys there; its product is to be multiplied by ``scale``."""

    place: Place
    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in its file, every pair checked against a network by the file's header.

    Attributes:
        path: of the file.
        weights: the stored tensors.
        pairs: of every layer that it adapts, by our name.
    """

    path: Path
    weights: WeightFiles
    pairs: Mapping[str, Sequence[Pair]]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What it is, as lines for people."""
        pairs = [pair for some in self.pairs.values() for pair in some]
        dtypes = {self.weights.stored[key].dtype for pair in pairs for key in (pair.a, pair.b)}
        names = {pair.place.dialect for pair in pairs} - {""} or {"both"}
        return [
            ("stored", f"{' and '.join(sorted(dtypes))}, {' and '.join(sorted(names))} names"),
            ("rank", _span([pair.rank for pair in pairs])),
            ("alpha / rank", _span([pair.scale for pair in pairs])),
            ("layers", f"{len(self.pairs)} adapted"),
        ]

    def read(self, layer: str, *, device: str | torch.device, dtype: torch.dtype) -> LowRank:
        """The change of one layer.

        Pairs with the same ``A``, as those of a fused layer that was split, share it here too;
        others are put side by side. Either way the layer's change is one pair of products.
        """
        pairs = self.pairs[layer]
        downs: list[Tensor] = []
        ups: list[tuple[Pair, int]] = []  # and the first of its numbers among all
        for pair in pairs:
            down = self._read(pair.a).to(device, torch.float32, copy=True)
            known = [i for i, other in enumerate(downs) if torch.equal(down, other)]
            before = downs[: known[0]] if known else downs
            ups.append((pair, sum(len(other) for other in before)))
            if not known:
                downs.append(down)
        a = torch.cat(downs)
        b = torch.zeros(pairs[0].place.rows, len(a), device=device)
        for pair, first in ups:
            up = self._read(pair.b).to(device, torch.float32)
            b[pair.place.start : pair.place.stop, first : first + pair.rank] = up * pair.scale
        return LowRank(a.to(dtype), b.to(dtype))

    def _read(self, key: str) -> Tensor:
        tensor = self.weights.read(key)
        if tuple(tensor.shape) != self.weights.stored[key].shape:
            raise CheckpointError(f"{self.weights.name}: has changed since it was opened")
        return tensor

    def load(self, name: str, *, device: str | torch.device, dtype: torch.dtype) -> Lora:
        """All of it, for use under this name."""
        return Lora(name, {k: self.read(k, device=device, dtype=dtype) for k in self.pairs})


def _span(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def open_lora(path: Path, config: NextDiTConfig) -> LoraFile:
    """Find out what a LoRA file changes in a network of this config, reading no weights.

    Raises:
        CheckpointError: one line naming the file, the key and what is expected.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{short_name(path)}: a pickle can run code and is never loaded; a .safetensors file "
            "is expected"
        )
    weights = WeightFiles([path])
    places = _places(config)
    found: dict[str, dict[str, str]] = {}  # layer's name in the file -> role -> key
    unknown = []
    for key in sorted(weights.stored):
        match = _KEY.fullmatch(key)
        layer = "" if match is None else match[1]
        if match is None or _bare(layer) not in places:
            unknown.append(key)
            continue
        role = "alpha" if match[3] else _ROLES[match[2]]
        other = found.setdefault(layer, {}).setdefault(role, key)
        if other != key:
            raise CheckpointError(f"{weights.name}: {other!r} and {key!r} say the same thing")
    if unknown and not found and any(key.endswith(m) for key in unknown for m in _WHOLE):
        raise CheckpointError(
            f"{weights.name}: a transformer, not a LoRA: `lumina convert` makes a checkpoint of it"
        )
    if unknown:
        raise CheckpointError(f"{weights.name}: {_unknown_keys(unknown)}")
    if not found:
        raise CheckpointError(f"{weights.name}: holds no LoRA: there is no tensor in it")
    settings = _Settings.read(path, weights.name)
    pairs: dict[str, list[Pair]] = {}
    for layer, keys in found.items():
        pair = _pair(weights, places[_bare(layer)], layer, keys, settings)
        pairs.setdefault(pair.place.layer, []).append(pair)
    for some in pairs.values():
        some.sort(key=lambda pair: pair.place.start)
        for pair, following in pairwise(some):
            if pair.place.stop > following.place.start:
                raise CheckpointError(
                    f"{weights.name}: {pair.a!r} and {following.a!r} change the same weight"
                )
    return LoraFile(path, weights, pairs)


def _bare(layer: str) -> str:
    """A layer's name without what stands before it."""
    return _PREFIX.sub("", layer)


def _unknown_keys(keys: Sequence[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:SHOWN_KEYS])
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    noun = "key" if len(keys) == 1 else "keys"
    return (
        f"unknown {noun} {shown}{more}; lora_A and lora_B (or lora_down and lora_up) weights and "
        "alphas of this transformer's linear layers are expected"
    )


@lru_cache(maxsize=4)
def _places(config: NextDiTConfig) -> dict[str, Place]:
    """What each name of a linear layer means, in every dialect and spelling."""
    places: dict[str, Place] = {}
    for key, shape in weight_shapes(config).items():
        if len(shape) != 2:
            continue
        layer = key.removesuffix(".weight")
        for dialect in DIALECTS.values():
            for piece in dialect.pieces(key, shape):
                name = piece.name.removesuffix(".weight")
                place = Place(layer, piece.start, piece.stop, *shape, dialect.name)
                if name in places:
                    place = place._replace(dialect="")
                # Some trainers write underscores for dots.
                places[name] = places[name.replace(".", "_")] = place
    return places


def _pair(
    weights: WeightFiles, place: Place, layer: str, keys: Mapping[str, str], settings: _Settings
) -> Pair:
    for role in ("A", "B"):
        if role not in keys:
            key = next(iter(keys.values()))
            raise CheckpointError(f"{weights.name}: {key!r} has no lora_{role} weight beside it")
    rank = (*weights.stored[keys["A"]].shape, 0)[0]
    size = place.stop - place.start
    for role, shape in (("A", (rank, place.columns)), ("B", (size, rank))):
        stored = weights.stored[keys[role]]
        if stored.shape != shape or rank == 0:
            wanted = f"[rank, {place.columns}]" if role == "A" else str(list(shape))
            raise CheckpointError(
                f"{weights.name}: {keys[role]!r} has shape {list(stored.shape)}, this network asks "
                f"for {wanted}"
            )
        if stored.dtype not in FLOATS:
            raise CheckpointError(
                f"{weights.name}: {keys[role]!r} is stored as {stored.dtype}, which is not "
                f"supported: only {', '.join(FLOATS)} are"
            )
    if "alpha" in keys:
        scale = _alpha(weights, keys["alpha"]) / rank
    else:
        scale = settings.scale(_bare(layer), rank)
    return Pair(place, keys["A"], keys["B"], rank, scale)


def _alpha(weights: WeightFiles, key: str) -> float:
    stored = weights.stored[key]
    if math.prod(stored.shape) == 1:
        alpha = float(weights.read(key).float().reshape(()))
        if math.isfinite(alpha):
            return alpha
    raise CheckpointError(f"{weights.name}: {key!r} must be one finite number")


@dataclass(frozen=True)
class _Settings:
    """What peft was told, as far as it scales.

    Attributes:
        alpha: of all layers; None: each layer's rank.
        patterns: alphas of the layers whose name ends in a pattern.
        rank_stabilized: whether the root of the rank divides.
    """

    alpha: float | None = None
    patterns: Sequence[tuple[re.Pattern[str], float]] = ()
    rank_stabilized: bool = False

    @classmethod
    def read(cls, path: Path, name: str) -> _Settings:
        """Of a file's metadata, or of the folder that peft wrote.

        Raises:
            CheckpointError: naming what is not readable or not supported.
        """
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        if text is not None:
            name = f"{name}: {METADATA_KEY}"
            settings = _parsed(text, name)
        elif path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():
            name = short_name(path.parent / PEFT_CONFIG)
            settings = read_json(path.parent / PEFT_CONFIG)
        else:
            return cls()
        settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
        if settings.get("use_dora"):
            raise CheckpointError(f"{name}: use_dora is not supported: a plain LoRA is expected")
        alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{name}: alpha_pattern must map layers to numbers")
        return cls(
            None if alpha is None else _number(name, "lora_alpha", alpha),
            [(_pattern(name, key), _number(name, key, value)) for key, value in patterns.items()],
            bool(settings.get("use_rslora")),
        )

    def scale(self, layer: str, rank: int) -> float:
        """What multiplies the product of a layer's pair, by the layer's name in the file."""
        fitting = (alpha for pattern, alpha in self.patterns if pattern.fullmatch(layer))
        alpha = next(fitting, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where} must be a JSON object")
    return settings


def _number(where: str, key: str, value: object) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise CheckpointError(f"{where}: {key} {value!r} must be a finite number")


def _pattern(where: str, key: str) -> re.Pattern[str]:
    """How peft reads a key of its patterns: the end of a layer's name, from a dot on."""
    try:
        return re.compile(rf"(?:.*\.)?(?:{key})")
    except re.error:
        raise CheckpointError(f"{where}: alpha_pattern {key!r} must be a pattern") from None


@torch.no_grad()
def merge_loras(dit: NextDiT, loras: Sequence[tuple[LoraFile, float]]) -> None:
    """Add LoRAs, each times its factor, to the weights of a network, in place.

    Sums are formed in float32 and rounded once. Beside the network, memory holds the pairs of one
    layer and some rows of its weight.
    """
    for layer in sorted({layer for file, _ in loras for layer in file.pairs}):
        weight = dit.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        changes = [
            (file.read(layer, device=weight.device, dtype=torch.float32), factor)
            for file, factor in loras
            if layer in file.pairs
        ]
        for start in range(0, len(weight), MERGE_ROWS):
            rows = slice(start, start + MERGE_ROWS)
            merged = weight[rows].to(torch.float32, copy=True)
            for change, factor in changes:
                merged.addmm_(change.b[rows], change.a, alpha=factor)
            weight[rows] = merged.to(weight.dtype)
