"""Writing safetensors as a stream: one tensor in memory at a time, whatever the model's size.

safetensors' own writer wants all tensors of a file at once. The format is simple: eight bytes with
the length of a JSON header, the header (name, dtype, shape and place of each tensor), the numbers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import FLOATS, WEIGHTS_STEM, write_json

_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written.

    Attributes:
        name: in the file.
        shape: of what `make` returns.
        dtype: of what `make` returns; one of `FLOATS`.
        make: called once, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of its numbers."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, tensors: Sequence[Outgoing], on_bytes: Callable[[int], None]
) -> None:
    """Write one file; ``on_bytes`` hears of the bytes of each tensor once they are written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.num_bytes],
        }
        place += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            value = tensor.make()
            assert value.shape == tensor.shape
            assert value.dtype == tensor.dtype
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            on_bytes(tensor.num_bytes)


def write_shards(
    folder: Path, tensors: Sequence[Outgoing], max_bytes: int, on_bytes: Callable[[int], None]
) -> None:
    """Write a transformer's weights as diffusers does: one file, or shards and their index.

    Args:
        folder: must exist.
        tensors: in the order of writing.
        max_bytes: of the numbers in one file; a single tensor above it has a file of its own.
        on_bytes: see `write_safetensors`.
    """
    shards: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    if len(shards) == 1:
        write_safetensors(folder / f"{WEIGHTS_STEM}.safetensors", shards[0], on_bytes)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{WEIGHTS_STEM}-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, on_bytes)
        weight_map.update((tensor.name, name) for tensor in shard)
    total = sum(tensor.num_bytes for tensor in tensors)
    write_json(
        folder / f"{WEIGHTS_STEM}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
