"""From any format of the transformer to a checkpoint folder, or to an official single file.

Weights stream from file to file, one at a time. What is written appears under its name when it is
whole, and not at all when anything fails.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import (
    FLOATS,
    WEIGHTS_STEM,
    CheckpointError,
    WeightFiles,
    Weights,
    read_json,
    short_name,
    weight_files,
    write_json,
    write_manifest,
)
from model.dialects import DIFFUSERS, OFFICIAL, UNUSED, Dialect, weight_shapes
from model.generation_config import FILE_NAME as GENERATION_CONFIG
from model.weight_source import Source, open_source
from model.weight_writer import Outgoing, write_safetensors, write_shards

MAX_FILE_BYTES = 5 * 10**9
SHIFT = 6.0  # of the released model
_PIPELINE = {
    "_class_name": "Lumina2Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", "Lumina2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": SHIFT,
    "use_dynamic_shifting": False,
}
_STEMS = {"vae": WEIGHTS_STEM, "text_encoder": "model", "tokenizer": None}
PARTS = tuple(_STEMS)


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source: what was found.
        missing: parts of a checkpoint that nobody gave; it can be loaded once they are there.
    """

    source: Source
    missing: tuple[str, ...]


def to_folder(
    path: Path,
    out: Path,
    *,
    parts: Mapping[str, Path],
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_start: Callable[[int], None] = lambda total: None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Report:
    """Write a checkpoint folder in diffusers' layout around a transformer.

    Args:
        path: the transformer: see `open_source`.
        out: the folder to make; absent or empty.
        parts: folders to copy, by name (`PARTS`).
        like: a checkpoint folder that supplies what else is missing: the transformer's config,
            the scheduler, the generation config, and parts.
        dtype: of the transformer's weights; None keeps the stored ones.
        max_file_bytes: of weights in one file.
        on_start: hears how many bytes of transformer weights there are to write.
        on_bytes: hears of bytes written.

    Raises:
        CheckpointError: one line naming the file and the fault; nothing is written then.
        ValueError: when ``out`` is taken.
    """
    _check_free(out)
    source = open_source(path, like=like / "transformer" if like else None, pickles=True)
    parts = {**({n: like / n for n in PARTS if (like / n).is_dir()} if like else {}), **parts}
    copies = {name: _part_files(name, folder, source) for name, folder in parts.items()}
    tensors = outgoing(source, DIFFUSERS, dtype)
    with _appearing(out) as folder:
        _write_configs(folder, source, like)
        on_start(sum(tensor.num_bytes for tensor in tensors))
        write_shards(folder / "transformer", tensors, max_file_bytes, on_bytes)
        for name, files in copies.items():
            (folder / name).mkdir()
            for file in files:
                shutil.copyfile(file, folder / name / file.name)
        write_manifest(folder, _making(path, source))
    return Report(source, tuple(name for name in PARTS if name not in copies))


def to_official(
    path: Path,
    out: Path,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Report:
    """Write the transformer alone as one safetensors file with official names.

    Args:
        path: the transformer: see `open_source`.
        out: the file to make; must not exist.
        like: a checkpoint folder whose transformer config is taken instead of one inferred.
        dtype: of the weights; None keeps the stored ones.
        on_start: hears how many bytes there are to write.
        on_bytes: hears of bytes written.

    Raises:
        CheckpointError: one line naming the file and the fault; nothing is written then.
        ValueError: when ``out`` is taken.
    """
    _check_free(out)
    source = open_source(path, like=like / "transformer" if like else None, pickles=True)
    tensors = outgoing(source, OFFICIAL, dtype)
    with _appearing(out, file=True) as temporary:
        on_start(sum(tensor.num_bytes for tensor in tensors))
        write_safetensors(temporary, tensors, on_bytes)
    return Report(source, ())


def outgoing(source: Source, target: Dialect, dtype: torch.dtype | None) -> list[Outgoing]:
    """Every weight as ``target`` names it; the numbers are read when they are written.

    Args:
        source: what to convert.
        target: names of the result.
        dtype: of the result; None keeps each weight's own.

    Raises:
        CheckpointError: when pieces of one weight are stored in different formats.
    """
    tensors = []
    for key, shape in weight_shapes(source.config).items():
        stored = source.dialect.pieces(key, shape)
        for piece in target.pieces(key, shape):
            rows = [
                (source.prefix + s.name, max(s.start, piece.start) - s.start,
                 min(s.stop, piece.stop) - s.start)
                for s in stored
                if s.start < piece.stop and piece.start < s.stop
            ]  # fmt: skip
            tensors.append(_outgoing(source.weights, piece.name, rows, shape, dtype))
    if target is OFFICIAL:
        # The official code loads strictly, hence asks for the norm that it never applies.
        width, kept = source.config.hidden_size, tensors[0].dtype
        tensors.append(Outgoing(UNUSED, (width,), kept, lambda: torch.ones(width, dtype=kept)))
    return tensors


def _outgoing(
    weights: Weights,
    name: str,
    rows: Sequence[tuple[str, int, int]],
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
) -> Outgoing:
    """One tensor of the result: the named rows of stored ones."""
    formats = {FLOATS[weights.stored[key].dtype] for key, _, _ in rows}
    if dtype is None and len(formats) > 1:
        raise CheckpointError(
            f"{weights.name}: {rows[0][0]!r} and {rows[1][0]!r} become one weight but are stored "
            "in different formats; give --dtype"
        )
    final = dtype or next(iter(formats))

    def make() -> Tensor:
        parts = [weights.read(key)[start:stop].to(final) for key, start, stop in rows]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        # Half precision ends at 65504: what is larger would silently become infinite.
        if final == torch.float16 and formats != {final} and not whole.isfinite().all():
            raise CheckpointError(
                f"{weights.name}: {rows[0][0]!r} has values that float16 cannot hold; bfloat16 can"
            )
        return whole

    count = sum(stop - start for _, start, stop in rows)
    return Outgoing(name, (count, *shape[1:]), final, make)


def _check_free(out: Path) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out}: exists already and is not an empty folder; choose another place")


@contextmanager
def _appearing(out: Path, *, file: bool = False) -> Iterator[Path]:
    """A hidden place beside ``out`` that takes its name when all went well, or is removed."""
    workshop = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    made = workshop / out.name
    try:
        if not file:
            made.mkdir()
        yield made
        os.replace(made, out)
    finally:
        shutil.rmtree(workshop)


def _part_files(name: str, folder: Path, source: Source) -> list[Path]:
    """The files of a part that are copied: configs, tokenizer model and safetensors, no more."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder ({name})")
    stem = _STEMS[name]
    files = sorted(folder.glob("*.json"))
    if stem is None:
        read_json(folder / "tokenizer.json")
        read_json(folder / "tokenizer_config.json")
        return [*files, *sorted(folder.glob("tokenizer.model"))]
    config = read_json(folder / "config.json")
    kind, wanted, field, number = {
        "vae": ("_class_name", "AutoencoderKL", "latent_channels", source.config.in_channels),
        "text_encoder": ("model_type", "gemma2", "hidden_size", source.config.cap_feat_dim),
    }[name]
    for key, value in ((kind, wanted), (field, number)):
        if config.get(key) != value:
            raise CheckpointError(
                f"{short_name(folder / 'config.json')}: {key} {config.get(key)!r} does not fit "
                f"this transformer, which needs {value!r}"
            )
    weights = weight_files(folder, stem)
    WeightFiles(weights)  # headers that can be read
    return [*files, *weights]


def _write_configs(folder: Path, source: Source, like: Path | None) -> None:
    """Everything but weights; the network's config says what was read off the weights."""
    index = {**_PIPELINE, "_diffusers_version": version("diffusers")}
    generation: Mapping[str, Any] = {"defaults": {}, "limits": {}, "presets": {}}
    scheduler: Mapping[str, Any] = _SCHEDULER
    if like is not None:
        scheduler = read_json(like / "scheduler" / "scheduler_config.json")
        if (like / GENERATION_CONFIG).is_file():
            generation = read_json(like / GENERATION_CONFIG)
    for name in ("transformer", "scheduler"):
        (folder / name).mkdir()
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "transformer" / "config.json", source.config.to_dict())
    write_json(folder / GENERATION_CONFIG, generation)


def _making(path: Path, source: Source) -> dict[str, Any]:
    """What the manifest says of the conversion."""
    return {
        "converted_from": path.name,
        "dialect": source.dialect.name,
        "prefix": source.prefix,
        "size": source.size,
        "assumed": dict(source.assumed),
        "ignored": dict(source.ignored),
        "parameters": source.num_parameters,
    }
