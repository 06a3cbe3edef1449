"""This project against diffusers on the same weights: one packed forward, and a crowd of requests.

    python -m benchmarks.bench_vs_diffusers

(a) one packed forward of eight ragged samples, against eight calls of diffusers' transformer;
(b) sixteen mixed requests through the engine, lossless and with the cache preset `balanced`,
    against diffusers' pipeline one request after the other.

The sides take turns (A B B A) in one process; figures are medians. Both start from prompts they
have not seen and end with pictures in memory. JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import diffusers_pipeline, mixed_requests, through_engine
from benchmarks.interleaved import compared, measure
from benchmarks.report import BUNDLED, surroundings, write_result
from model import GenerationRequest, load_pipeline
from model.pipeline import Pipeline
from trainer.evaluate.similarity import psnr

PIXELS = [(64, 64), (128, 128), (96, 64), (64, 64), (128, 96), (64, 128), (128, 128), (96, 96)]
CAPTION_TOKENS = [12, 40, 7, 25, 60, 12, 31, 18]
CROWD = 16
MAX_ERROR = 2e-5  # relative L2 of the velocities, fp32
MIN_PSNR_DB = 40.0  # of the pictures
PROFILED = 12  # operators listed


def packed_sides(pipeline: Pipeline, reference: Any) -> dict[str, Callable[[int], list[Tensor]]]:
    """(a): the same eight samples as calls on either side."""
    torch.manual_seed(0)
    width = pipeline.dit.config.cap_feat_dim
    latents = [torch.randn(16, h // 8, w // 8) for h, w in PIXELS]
    prompts = [torch.randn(n, width) for n in CAPTION_TOKENS]
    times = torch.linspace(0.1, 0.9, len(PIXELS))
    masks = [torch.ones(1, n, dtype=torch.bool) for n in CAPTION_TOKENS]
    batch = list(zip(latents, times.split(1), prompts, masks, strict=True))
    return {
        "diffusers, 8 calls": lambda _: [
            reference.transformer(x[None], t, p[None], m)[0][0] for x, t, p, m in batch
        ],
        "packed, 1 call": lambda _: pipeline.dit(latents, times, prompts),
    }


def crowd_sides(
    pipeline: Pipeline, reference: Any
) -> dict[str, Callable[[int], list[Image.Image]]]:
    """(b): sixteen requests on either side; the argument is the first seed."""
    renorm = pipeline.generation_config.defaults["cfg_renorm"]
    assert renorm in ("row", "none"), "diffusers has no other renormalisation"

    def theirs(first_seed: int) -> list[Image.Image]:
        return [draw_theirs(reference, r, renorm == "row") for r in asked(first_seed)]

    def asked(first_seed: int, **settings: Any) -> list[GenerationRequest]:
        return mixed_requests(CROWD, first_seed, guidance_scale=4.0, **settings)

    def ours(first_seed: int, **settings: Any) -> list[Image.Image]:
        return [some[0] for some in through_engine(pipeline, asked(first_seed, **settings))]

    sides = {"diffusers, one by one": theirs, "engine, lossless": ours}
    config = pipeline.cache_config
    if config is not None and "balanced" in config.schedules:
        sides["engine, balanced"] = lambda first_seed: ours(first_seed, cache="balanced")
    return sides


def draw_theirs(reference: Any, request: GenerationRequest, renorm: bool) -> Image.Image:
    """The picture diffusers makes of a request."""
    assert request.seed is not None
    picture: Image.Image = reference(
        request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        cfg_normalization=renorm,
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).images[0]
    return picture


def check_velocities(sides: dict[str, Callable[[int], list[Tensor]]]) -> float:
    """Relative L2 between the sides of (a); raises where they differ."""
    theirs, ours = (torch.cat([v.flatten() for v in call(0)]) for call in sides.values())
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < MAX_ERROR, f"the sides differ: relative L2 {error:.1e}"
    return error


def check_pictures(sides: dict[str, Callable[[int], list[Image.Image]]]) -> dict[str, float]:
    """Worst and median PSNR of each side of (b) against the first; lossless ones must be alike."""
    base, *others = ([np.asarray(p) for p in call(0)] for call in sides.values())
    found = {}
    for name, pictures in zip(list(sides)[1:], others, strict=True):
        decibel = [min(99.0, psnr(x, y)) for x, y in zip(pictures, base, strict=True)]
        found[f"{name}, worst"] = round(min(decibel), 2)
        found[f"{name}, median"] = round(statistics.median(decibel), 2)
        assert "lossless" not in name or min(decibel) >= MIN_PSNR_DB, found
    return found


def profile_of(call: Callable[[int], object]) -> list[dict[str, Any]]:
    """Where the time of one call goes: the operators with the most of their own."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call(0)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    rows = sorted(events, key=lambda event: -event.self_cpu_time_total)[:PROFILED]
    return [
        {
            "operator": event.key,
            "share": round(event.self_cpu_time_total / total, 4),
            "calls": event.count,
        }
        for event in rows
    ]


def show(title: str, rows: dict[str, Any]) -> None:
    """Print one table."""
    print(title)
    for name, row in rows.items():
        times = f"{1000 * row['median_s']:>10.1f} ms{row['speed_up']:>8.2f}x"
        print(f"  {name:<24}{times}{row['processor_ratio']:>8.2f}x by processor time", flush=True)


@torch.inference_mode()
def run(folder: Path, rounds: Sequence[int]) -> dict[str, Any]:
    """Both comparisons, checked, measured and profiled; rounds of (a) and of (b)."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # greets CPU builds with a warning
    pipeline, reference = load_pipeline(folder), diffusers_pipeline(folder)
    packed, crowd = packed_sides(pipeline, reference), crowd_sides(pipeline, reference)
    report: dict[str, Any] = {
        "model": folder.name,
        "relative_l2": check_velocities(packed),
        "psnr_db": check_pictures(crowd),
        "forward": compared(measure(packed, rounds[0], warm_up=2)),
    }
    show("(a) eight ragged samples, one evaluation of the network", report["forward"])
    report["requests"] = compared(measure(crowd, rounds[1]))  # warm from the check
    show(f"(b) {CROWD} mixed requests", report["requests"])
    report["profile"] = {name: profile_of(call) for name, call in packed.items()}
    return {**report, "dtype": "float32", **surroundings()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--rounds", type=int, default=4, help="of (b); (a) has ten times as many")
    options = parser.parse_args()
    report = run(options.model, (10 * options.rounds, options.rounds))
    print(f"wrote {write_result('bench_vs_diffusers-cpu', report).name}")


if __name__ == "__main__":
    main()
