"""The same pictures in fp32, bf16 and mixed precision: how far apart, and judged how.

    python -m benchmarks.bench_numerics

Prompts are those of the demo suite, so the exact judge can say what each precision gets right.
`--device cuda` compares on a GPU; the pictures it is measured against are drawn in fp32 there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import BUNDLED, surroundings, write_result
from model import GenerationRequest, load_pipeline
from model.pipeline import Pipeline
from trainer.demo.judge import judge
from trainer.demo.prompts import TASKS, EvalPrompt, eval_prompts

# Network in one precision, text encoder and autoencoder in another: whose rounding it is.
SIDES = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "mixed": ("mixed", "mixed"),
    "bf16 network, fp32 around it": ("bf16", "fp32"),
    "mixed network, fp32 around it": ("mixed", "fp32"),
}


def load_side(folder: Path, device: str, network: str, others: str) -> Pipeline:
    """A pipeline whose network is of one precision and all else of another."""
    pipeline = load_pipeline(folder, device=device, precision=network)
    if others != network:
        around = load_pipeline(folder, device=device, precision=others)
        pipeline.text_encoder, pipeline.vae = around.text_encoder, around.vae
    return pipeline


def draw(pipeline: Pipeline, prompts: list[EvalPrompt], steps: int | None) -> dict[str, Any]:
    """Final latents and pictures of every prompt, seed i for prompt i."""
    started = time.perf_counter()
    states = [
        pipeline.prepare(GenerationRequest(prompt.text, seed=i, num_inference_steps=steps))
        for i, prompt in enumerate(prompts)
    ]
    while running := [state for state in states if not state.finished]:
        pipeline.denoise_step(running)
    pictures = [np.asarray(images[0]) for images in pipeline.decode(states)]
    return {
        "latents": [s.latents[0].float().cpu() for s in states],
        "pictures": pictures,
        "steps": states[0].num_steps,
        "seconds": time.perf_counter() - started,
    }


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Decibel between two uint8 pictures; infinite when equal."""
    error = float(np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def spread(values: list[float]) -> dict[str, float]:
    """Lowest, median and highest, rounded; an infinite PSNR counts as 99 dB."""
    finite = [min(value, 99.0) for value in values]
    named = zip(("min", "median", "max"), np.percentile(finite, (0, 50, 100)), strict=True)
    return {name: round(float(value), 4) for name, value in named}


def compare(
    drawn: dict[str, Any], base: dict[str, Any], prompts: list[EvalPrompt]
) -> dict[str, Any]:
    """One precision against the baseline."""
    verdicts, expected = (
        [judge(p, prompt.expected).correct for p, prompt in zip(pictures, prompts, strict=True)]
        for pictures in (drawn["pictures"], base["pictures"])
    )
    latents = [
        float((x - y).norm() / y.norm())
        for x, y in zip(drawn["latents"], base["latents"], strict=True)
    ]
    decibel = [psnr(x, y) for x, y in zip(drawn["pictures"], base["pictures"], strict=True)]
    return {
        "psnr_db": spread(decibel),
        "latents_relative_l2": spread(latents),
        "judged_right": sum(verdicts),
        "verdicts_as_baseline": sum(a == b for a, b in zip(verdicts, expected, strict=True)),
        "seconds": round(drawn["seconds"], 1),
    }


def main() -> None:
    """Draw, compare, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=None, help="default: the checkpoint's")
    options = parser.parse_args()
    prompts = eval_prompts(per_task=-(-options.prompts // len(TASKS)))[: options.prompts]
    base: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for name, (network, others) in SIDES.items():
        pipeline = load_side(options.model, options.device, network, others)
        drawn = draw(pipeline, prompts, options.steps)
        base = base or drawn
        rows[name] = compare(drawn, base, prompts) | {"attention": pipeline.dit.attention.name}
        print(f"{name:<30} {json.dumps(rows[name])}", flush=True)
    kind = torch.device(options.device).type
    in_hardware = kind == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    report = {
        "model": options.model.name,
        "pictures": len(prompts),
        "steps": base["steps"],
        "baseline": next(iter(SIDES)),
        "rows": rows,
        **surroundings(options.device),
        "bf16_in_hardware": in_hardware,
    }
    path = write_result(f"bench_numerics-{kind}", report)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
