"""What a file or folder with a transformer holds, found without reading a single weight.

A source is an official or ComfyUI single file (safetensors, or the official pickle, whose tensors
alone are read) or a diffusers transformer folder. Every weight is checked against a config.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import (
    FLOATS,
    PICKLES,
    CheckpointError,
    Stored,
    WeightFiles,
    Weights,
    check_nothing_else,
    check_weight,
    load_transformer_config,
    short_name,
    weight_files,
)
from model.config import NextDiTConfig, size_name
from model.dialects import (
    UNUSED,
    Dialect,
    find_dialect,
    infer_config,
    weight_shapes,
)

_SHARD = re.compile(r"\.(\d+)-of-(\d+)\.")
_DTYPE_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class PickledWeights:
    """The tensors of a `.pth` file: nothing but tensors is unpickled, and they stay on disk.

    Raises:
        CheckpointError: for anything else in the file.
    """

    def __init__(self, path: Path) -> None:
        self.name = short_name(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{self.name}: refused: it holds other Python objects than tensors"
            ) from None
        except Exception as error:  # whatever torch stumbles over, the file is at fault
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.name}: damaged or no torch file ({reason})") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.name}: a dictionary of tensors is expected")
        for key, value in content.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{self.name}: the entry {key!r} is a {type(value).__name__}; a dictionary of "
                    "tensors is expected"
                )
        self._tensors: dict[str, Tensor] = content
        self.stored = {
            key: Stored(tuple(value.shape), _DTYPE_NAMES.get(value.dtype, str(value.dtype)))
            for key, value in content.items()
        }

    def read(self, key: str) -> Tensor:
        """The tensor as it is stored, memory-mapped."""
        return self._tensors[key]


@dataclass(frozen=True)
class Source:
    """A transformer in some file or folder, every weight checked against `config`.

    Attributes:
        weights: the stored tensors.
        dialect: how they are named.
        prefix: what stands before every name.
        config: of the network.
        size: its named size, such as "2.6B"; None for another.
        assumed: fields of the config that nothing in the source says, with the value taken.
        ignored: groups of tensors beside the transformer, and how many are in each.
    """

    weights: Weights
    dialect: Dialect
    prefix: str
    config: NextDiTConfig
    size: str | None
    assumed: Mapping[str, Any]
    ignored: Mapping[str, int]

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights of the network."""
        return sum(torch.Size(shape).numel() for shape in weight_shapes(self.config).values())

    @property
    def dtypes(self) -> list[str]:
        """Number formats of the weights, the most frequent first."""
        names = [
            piece.name
            for key, shape in weight_shapes(self.config).items()
            for piece in self.dialect.pieces(key, shape)
        ]
        counts = Counter(self.weights.stored[self.prefix + name].dtype for name in names)
        return [dtype for dtype, _ in counts.most_common()]


def open_source(path: Path, *, like: Path | None = None, pickles: bool = False) -> Source:
    """Find out what a file or folder holds, and check every weight.

    Args:
        path: a `.safetensors` or `.pth` file, or a diffusers transformer folder.
        like: a transformer folder whose config is taken instead of one inferred from the shapes.
        pickles: whether a pickle may be read.

    Raises:
        CheckpointError: one line naming the file, the weight and what is expected.
    """
    weights = _open_weights(path, pickles)
    dialect, prefix = find_dialect(weights)
    assumed: Mapping[str, Any] = {}
    folder = like or (path if path.is_dir() else None)
    if folder is not None:
        config = load_transformer_config(folder)
        asker = short_name(folder / "config.json")
    else:
        inferred = infer_config(weights, dialect, prefix)
        config, assumed = inferred.config, inferred.assumed
        asker = "the config inferred from the other shapes"
    _check_weights(weights, dialect, prefix, config, asker)
    others = Counter(_group(key) for key in weights.stored if not key.startswith(prefix))
    if prefix + UNUSED in weights.stored:
        others[prefix + UNUSED] = 1
    return Source(weights, dialect, prefix, config, size_name(config), assumed, others)


def _open_weights(path: Path, pickles: bool) -> Weights:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: no transformer folder: it has no config.json; give the weights' file "
                "or the folder transformer/ of a checkpoint"
            )
        return WeightFiles(weight_files(path))
    shard = _SHARD.search(path.name)
    if shard is not None and int(shard[2]) != 1:
        raise CheckpointError(
            f"{path.name}: one of {int(shard[2])} shards; a single file (00-of-01) or a diffusers "
            "transformer folder is expected"
        )
    if path.suffix in PICKLES:
        if not pickles:
            raise CheckpointError(
                f"{path.name}: a pickle can run code: only `lumina convert` reads it, and from it "
                "nothing but tensors"
            )
        return PickledWeights(path)
    return WeightFiles([path])


def _group(key: str) -> str:
    """The beginning of a name that tells one component of a single file from another."""
    stem, dot, _ = key.partition(".")
    return f"{stem}.*" if dot else stem


def _check_weights(
    weights: Weights, dialect: Dialect, prefix: str, config: NextDiTConfig, asker: str
) -> None:
    known = {prefix + UNUSED}
    scaled = sorted(key for key in weights.stored if "scale_weight" in key or "scaled_fp8" in key)
    if scaled:
        raise CheckpointError(
            f"{weights.name}: {scaled[0]!r} belongs to weights with scales of their own, which are "
            "not supported; a file with plain weights is expected"
        )
    for key, shape in weight_shapes(config).items():
        for piece in dialect.pieces(key, shape):
            name = prefix + piece.name
            check_weight(weights, name, (piece.stop - piece.start, *shape[1:]), asker)
            known.add(name)
    own = (key for key in weights.stored if key.startswith(prefix))
    check_nothing_else(weights, own, known, asker)
