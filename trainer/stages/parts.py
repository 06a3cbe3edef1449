"""The frozen parts of a run (autoencoder and text encoder), and the data set they encode."""

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from model.checkpoint import sha256_file
from model.vae import VAE
from trainer.config import FlowStageConfig, Recipe
from trainer.data.captions import CaptionEncoder
from trainer.data.encoded import EncodedSet, encode_shards, num_shards
from trainer.data.records import RECORDS_FILE, CaptionChoice, Fault, Record, read_records
from trainer.demo.dataset import build
from trainer.distributed import World, barrier

REPORT_S = 15.0


class FrozenParts:
    """Autoencoder and text encoder, read when first needed.

    Attributes:
        vae_folder: of the autoencoder.
        text_folder: holds ``text_encoder/`` and ``tokenizer/``.
    """

    def __init__(self, vae_folder: Path, text_folder: Path, world: World) -> None:
        self.vae_folder, self.text_folder, self._world = vae_folder, text_folder, world

    @cached_property
    def vae(self) -> VAE:
        """On this process's device."""
        return VAE.from_pretrained(self.vae_folder, device=self._world.device)

    @cached_property
    def captions(self) -> CaptionEncoder:
        """On this process's device."""
        return CaptionEncoder(self.text_folder, self._world.device)

    def files(self) -> list[Path]:
        """Those that decide what the parts make of a picture and a text."""
        return [
            *sorted(self.vae_folder.glob("*.*")),
            *sorted((self.text_folder / "text_encoder").glob("*.*")),
            *sorted((self.text_folder / "tokenizer").glob("*.*")),
        ]


def encoded_data(
    recipe: Recipe, config: FlowStageConfig, out: Path, frozen: FrozenParts, world: World
) -> EncodedSet:
    """The recipe's data set, encoded for a stage; what is encoded already is used as it is.

    Records that cannot be used are counted, and listed in ``skipped.jsonl`` in the cache.

    Raises:
        ValueError: when nothing is left, or something is bad and the recipe says stop.
    """
    source = _data_folder(recipe, out, world)
    records, faults = read_records(source)
    _judge(recipe, faults)
    folder = out / "cache" / f"encoded-{config.resolution}-{_cache_key(source, config, frozen)}"
    mine = range(num_shards(records))[world.rank :: world.size]
    report = _Progress(config.name, len(records) // world.size, world)
    encode_shards(
        folder,
        records,
        mine,
        config.resolution,
        CaptionChoice(config),
        frozen.vae,
        frozen.captions,
        report,
    )
    barrier(world)
    data = EncodedSet(folder, records)
    if world.is_main:
        _list_faults(folder / "skipped.jsonl", [*faults, *data.faults], records)
    _judge(recipe, data.faults)
    if not len(data):
        raise ValueError(f"data.path: none of {len(records)} records can be used, see {folder}")
    return data


def _data_folder(recipe: Recipe, out: Path, world: World) -> Path:
    """The data set's folder; the demo world's is rendered first."""
    if recipe.data.path is not None:
        return Path(recipe.data.path)
    if not recipe.data.demo_scenes:
        raise ValueError(
            f"recipe {recipe.name!r} brings no pictures: name a folder with --set data.path=DIR"
        )
    folder = out / "data"
    if world.is_main and not (folder / RECORDS_FILE).is_file():
        build(folder, recipe.data.demo_scenes, recipe.seed, sizes=((64, 64), (96, 64), (64, 80)))
    barrier(world)
    return folder


def _cache_key(source: Path, config: FlowStageConfig, frozen: FrozenParts) -> str:
    """Names all that a cache depends on, so that one of other parts or data is not taken for it."""
    drawn = [
        sorted(name for name, weight in weights.items() if weight > 0)
        for weights in (config.levels, config.languages)
    ]
    files = [sha256_file(file) for file in (source / RECORDS_FILE, *frozen.files())]
    content = json.dumps([files, drawn, sorted(config.domains.items())])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _judge(recipe: Recipe, faults: list[Fault]) -> None:
    if faults and recipe.data.on_bad == "stop":
        first = faults[0]
        raise ValueError(
            f"data: {len(faults)} bad records, the first is {first.name}: {first.reason} "
            "(data.on_bad: skip goes on without them)"
        )


def _list_faults(path: Path, faults: list[Fault], records: list[Record]) -> None:
    if not faults:
        return
    lines = [json.dumps(asdict(fault), ensure_ascii=False) + "\n" for fault in faults]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
    print(f"data: {len(faults)} records left out, {len(records)} read; see {path}", file=sys.stderr)


class _Progress:
    """Says now and then how far the encoding is."""

    def __init__(self, name: str, total: int, world: World) -> None:
        self._name, self._total, self._enabled = name, total, world.is_main
        self._done, self._started = 0, time.monotonic()
        self._last = self._started

    def __call__(self, num: int) -> None:
        self._done += num
        now = time.monotonic()
        if self._enabled and now - self._last > REPORT_S:
            self._last = now
            rate = self._done / (now - self._started)
            print(
                f"{self._name}: encoded {self._done}/{self._total}  {rate:.0f} img/s  "
                f"ETA {max(0, self._total - self._done) / rate:.0f} s",
                file=sys.stderr,
                flush=True,
            )
