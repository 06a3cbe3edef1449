"""Latents and text features of a data set, encoded once by the frozen parts and kept on disk.

A cache folder holds shards of SHARD records: ``latents-N.safetensors`` with one fp16 tensor
``[C, h, w]`` a record, ``text-N.safetensors`` with one ``[L, D]`` for each of its captions (in
bf16), and last ``index-N.json``, which says that the shard is whole. So an interrupted
encoding goes on where it was; processes share out the shards.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.vae import VAE
from trainer.data.buckets import aspect_buckets, fit, nearest_bucket
from trainer.data.captions import CaptionEncoder
from trainer.data.records import BadRecordError, CaptionChoice, Fault, Record
from trainer.precision import mixed_precision

SHARD = 512
ENCODE_PIXELS = 2**22  # per call of the autoencoder: four pictures of 1024 px
OPEN_SHARDS = 64
NO_CAPTION = "none"  # key of the empty string's features, which every text shard holds


class EncodedSet:
    """What a stage draws from: latents and features by record, and captions' lengths.

    Args:
        folder: a cache folder in which every shard is there.
        records: those the cache was made of.
    """

    def __init__(self, folder: Path, records: Sequence[Record]) -> None:
        self._folder, self._records = folder, records
        self._usable: list[int] = []
        self._tokens: list[list[int]] = []
        self.faults: list[Fault] = []
        for shard in range(num_shards(records)):
            index = json.loads((folder / f"index-{shard:05d}.json").read_text(encoding="utf-8"))
            self._usable += index["usable"]
            self._tokens += index["tokens"]
            self.faults += [Fault(**fault) for fault in index["faults"]]
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        """Records that can be trained on."""
        return len(self._usable)

    def record(self, item: int) -> Record:
        """The record of an item."""
        return self._records[self._usable[item]]

    def tokens(self, item: int, caption: int | None) -> int:
        """Text and image tokens of an item with one of its captions."""
        image, empty, *captions = self._tokens[item]
        return image + (empty if caption is None else captions[caption])

    def image_tokens(self, item: int) -> int:
        """Image tokens of an item."""
        return self._tokens[item][0]

    def latents(self, item: int) -> Tensor:
        """fp32 ``[C, h, w]``, normalised."""
        index = self._usable[item]
        tensor: Tensor = self._open("latents", index // SHARD).get_tensor(str(index))
        return tensor.float()

    def features(self, item: int, caption: int | None) -> Tensor:
        """``[L, D]`` fp32 of one of the item's captions, None: of the empty string."""
        index = self._usable[item]
        key = NO_CAPTION if caption is None else f"{index}.{caption}"
        tensor: Tensor = self._open("text", index // SHARD).get_tensor(key)
        return tensor.float()

    def _open_shard(self, kind: str, shard: int) -> Any:
        return safe_open(str(self._folder / f"{kind}-{shard:05d}.safetensors"), framework="pt")


def num_shards(records: Sequence[Record]) -> int:
    """Shards of a data set."""
    return -(-len(records) // SHARD)


def encode_shards(
    folder: Path,
    records: Sequence[Record],
    shards: Sequence[int],
    resolution: int,
    choice: CaptionChoice,
    vae: VAE,
    captions: CaptionEncoder,
    report: Callable[[int], None],
) -> None:
    """Encode the shards named that are not there yet.

    Args:
        folder: of the cache.
        records: the whole data set.
        shards: which of its shards.
        resolution: of the aspect buckets, pixels.
        choice: composes the prompts.
        vae: frozen.
        captions: frozen.
        report: told how many records each finished shard has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        first = shard * SHARD
        members = range(first, min(first + SHARD, len(records)))
        if not (folder / f"index-{shard:05d}.json").is_file():
            _encode_shard(folder, shard, members, records, resolution, choice, vae, captions)
        report(len(members))


def _encode_shard(
    folder: Path,
    shard: int,
    members: range,
    records: Sequence[Record],
    resolution: int,
    choice: CaptionChoice,
    vae: VAE,
    captions: CaptionEncoder,
) -> None:
    latents, faults = _latents([(i, records[i]) for i in members], resolution, choice, vae)
    usable = sorted(latents)
    texts = [
        (f"{i}.{place}", choice.prompt(records[i], place))
        for i in usable
        for place in range(len(records[i].captions))
    ]
    keys = [NO_CAPTION, *(key for key, _ in texts)]
    encoded = captions.encode(["", *(text for _, text in texts)])
    features = {
        key: value.to("cpu", torch.bfloat16) for key, value in zip(keys, encoded, strict=True)
    }
    empty = len(features[NO_CAPTION])
    tokens = [
        [
            latents[i].shape[1] * latents[i].shape[2] // 4,
            empty,
            *(len(features[f"{i}.{place}"]) for place in range(len(records[i].captions))),
        ]
        for i in usable
    ]
    _publish_tensors(folder / f"latents-{shard:05d}", {str(i): latents[i] for i in usable})
    _publish_tensors(folder / f"text-{shard:05d}", features)
    # The index comes last: its presence means that the shard is whole.
    index = {"usable": usable, "tokens": tokens, "faults": [asdict(fault) for fault in faults]}
    path = folder / f"index-{shard:05d}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(index), encoding="utf-8")
    os.replace(temporary, path)


def _publish_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(temporary))
    os.replace(temporary, path.with_suffix(".safetensors"))


def _latents(
    members: Sequence[tuple[int, Record]], resolution: int, choice: CaptionChoice, vae: VAE
) -> tuple[dict[int, Tensor], list[Fault]]:
    """fp16 latents by record, and the records that have none; equal sizes encoded together."""
    buckets = aspect_buckets(resolution)
    waiting: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
    done: dict[int, Tensor] = {}
    faults = []
    most = max(1, ENCODE_PIXELS // resolution**2)
    for index, record in members:
        try:
            choice.check(record)
            size, pixels = _pixels(record, buckets)
        except BadRecordError as error:
            faults.append(Fault(record.name, str(error)))
            continue
        group = waiting.setdefault(size, [])
        group.append((index, pixels))
        if len(group) == most:
            done |= _encode_group(waiting.pop(size), vae)
    for group in waiting.values():
        done |= _encode_group(group, vae)
    return done, faults


def _pixels(
    record: Record, buckets: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], np.ndarray]:
    """The picture at its bucket's size: uint8 ``[H, W, 3]``."""
    try:
        with Image.open(record.path) as image:
            size = nearest_bucket(image.width, image.height, buckets)
            return size, np.asarray(fit(image, size))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise BadRecordError(f"the picture cannot be read ({error})") from None


def _encode_group(group: Sequence[tuple[int, np.ndarray]], vae: VAE) -> dict[int, Tensor]:
    pixels = torch.from_numpy(np.stack([array for _, array in group]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    with torch.no_grad(), mixed_precision(vae.device.type):
        latents = vae.encode(pixels)
    halves = latents.to("cpu", torch.float16)
    return {index: half for (index, _), half in zip(group, halves, strict=True)}
