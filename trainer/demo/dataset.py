"""Demo data: arrays rendered on the fly for training, and the on-disk dataset of `data build demo`.

Scene `i` of a seed depends on nothing but (seed, i): slices, processes and restarts all agree.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.demo.grammar import LANGUAGES, LEVELS, caption
from trainer.demo.render import render
from trainer.demo.scenes import Scene, sample_dense_scene, sample_scene

RECORDS_FILE = "records.jsonl"
INFO_FILE = "dataset.json"
FORMAT_VERSION = 1
SHARD = 1000
# Below this many images the start of worker processes costs more than it saves.
_SERIAL_LIMIT = 2000

# Separate streams of random numbers for one (seed, index).
_SCENE_STREAM, _CAPTION_STREAM = 0, 1


def scene_at(seed: int, index: int, dense_share: float = 0.0) -> Scene:
    """The `index`-th training scene of a seed; never held out. `dense_share` are dense scenes."""
    rng = np.random.default_rng((seed, index, _SCENE_STREAM))
    if dense_share > 0.0 and rng.random() < dense_share:
        return sample_dense_scene(rng)
    return sample_scene(rng)


def make_arrays(
    num: int, seed: int, width: int, height: int, first: int = 0, dense_share: float = 0.0
) -> tuple[NDArray[np.uint8], list[Scene]]:
    """Render scenes first .. first + num - 1 of a seed.

    Returns uint8 RGB [num, height, width, 3] and the scenes. The same scene appears at every
    size for the same seed and index.
    """
    scenes = [scene_at(seed, first + i, dense_share) for i in range(num)]
    images = np.empty((num, height, width, 3), dtype=np.uint8)
    for i, scene in enumerate(scenes):
        images[i] = render(scene, width, height)
    return images, scenes


def captions_of(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """One caption per language and level: {"language", "level", "text"} each."""
    return [
        {"language": language, "level": level, "text": caption(scene, level, language, rng)}
        for language in LANGUAGES
        for level in LEVELS
    ]


def build(
    out_dir: str | Path,
    num: int,
    seed: int = 0,
    sizes: Sequence[tuple[int, int]] = ((64, 64),),
    processes: int | None = None,
) -> Path:
    """Write a dataset folder: PNG images, `records.jsonl` and `dataset.json`; return its path.

    `sizes` are (width, height) and taken in turn. A record is {"image", "width", "height",
    "captions": [{"language", "level", "text"}]}, its image path relative to the folder.
    The records appear last and at once, so a folder that has them is whole.
    Raises ValueError for a bad argument or a folder that already holds something.
    """
    folder = Path(out_dir)
    _check_arguments(folder, num, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (folder, seed, start, min(start + SHARD, num), tuple(sizes))
        for start in range(0, num, SHARD)
    ]
    partial = folder / f"{RECORDS_FILE}.partial"
    with _progress() as progress, partial.open("w", encoding="utf-8") as file:
        bar = progress.add_task("rendering", total=num)
        for records in _run(jobs, num, processes):
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            progress.advance(bar, len(records))
    info = {"format": FORMAT_VERSION, "name": "demo", "num": num, "seed": seed}
    info |= {"sizes": [list(size) for size in sizes], "languages": LANGUAGES, "levels": LEVELS}
    (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / RECORDS_FILE)
    return folder


_Job = tuple[Path, int, int, int, tuple[tuple[int, int], ...]]
_Record = dict[str, Any]


def _check_arguments(folder: Path, num: int, sizes: Sequence[tuple[int, int]]) -> None:
    if num < 1:
        raise ValueError(f"num is {num}; it must be at least 1")
    if not sizes:
        raise ValueError("sizes is empty; at least one (width, height) is needed")
    for width, height in sizes:
        if min(width, height) < 32 or width % 16 or height % 16:
            raise ValueError(f"size is {width}x{height}; sides are multiples of 16 from 32 up")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out is {folder}; it must be a new or an empty folder")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )


def _run(jobs: list[_Job], num: int, processes: int | None) -> Iterator[list[_Record]]:
    """Render shard by shard, in order, in worker processes where that pays."""
    count = processes if processes is not None else (os.cpu_count() or 1)
    if count <= 1 or num <= _SERIAL_LIMIT:
        yield from map(_build_shard, jobs)
        return
    # Spawned, not forked: the caller may hold threads (torch, progress display).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        yield from pool.map(_build_shard, jobs)


def _build_shard(job: _Job) -> list[_Record]:
    folder, seed, start, end, sizes = job
    shard = Path("images") / f"{start // SHARD:05d}"
    (folder / shard).mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(start, end):
        width, height = sizes[index % len(sizes)]
        scene = scene_at(seed, index)
        path = shard / f"{index:08d}.png"
        Image.fromarray(render(scene, width, height)).save(folder / path, compress_level=1)
        rng = np.random.default_rng((seed, index, _CAPTION_STREAM))
        records.append(
            {
                "image": path.as_posix(),
                "width": width,
                "height": height,
                "captions": captions_of(scene, rng),
            }
        )
    return records
