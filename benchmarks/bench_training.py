"""Training steps of packed batches against padded ones, on the same ragged mix of examples.

    python -m benchmarks.bench_training

Padded means what a rectangular batch has to be: every caption as long as the longest, every picture
as large as the largest of the batch; the network and everything else is the same, and the padded
side is spared the masks it would need. Both take turns in one process, after a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import surroundings, write_result
from model.config import NextDiTConfig
from model.next_dit import NextDiT
from trainer.data.buckets import aspect_buckets
from trainer.data.packing import plan_packs
from trainer.objective import Noised, velocity_errors
from trainer.precision import mixed_precision

CONFIG = NextDiTConfig(
    hidden_size=192,
    num_layers=6,
    num_refiner_layers=1,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=64,
    axes_dim_rope=(16, 16, 16),
    cap_feat_dim=192,
)
RESOLUTIONS = (64, 128, 128, 192)  # of every four pictures
Example = tuple[Tensor, Tensor]  # latents [C, h, w], features [L, D]


def ragged_mix(count: int, device: str = "cpu", seed: int = 0) -> list[Example]:
    """Pictures of all aspect buckets at three resolutions, captions of 1 to 200 tokens."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        buckets = aspect_buckets(RESOLUTIONS[index % len(RESOLUTIONS)])
        width, height = buckets[int(torch.randint(len(buckets), (), generator=generator))]
        length = 1 + int(200 * torch.rand((), generator=generator) ** 2)  # short ones are frequent
        latents = torch.randn(CONFIG.in_channels, height // 8, width // 8, device=device)
        features = torch.randn(length, CONFIG.cap_feat_dim, device=device)
        examples.append((latents, features))
    return examples


def tokens(example: Example) -> int:
    """Of a sequence."""
    latents, features = example
    return latents.shape[1] * latents.shape[2] // 4 + len(features)


def padded(examples: Sequence[Example]) -> list[Example]:
    """The same, as a rectangular batch holds them."""
    height = max(latents.shape[1] for latents, _ in examples)
    width = max(latents.shape[2] for latents, _ in examples)
    length = max(len(features) for _, features in examples)
    return [
        (
            F.pad(latents, (0, width - latents.shape[2], 0, height - latents.shape[1])),
            F.pad(features, (0, 0, 0, length - len(features))),
        )
        for latents, features in examples
    ]


def batches(examples: Sequence[Example], budget: int) -> dict[str, list[list[Example]]]:
    """The packed micro-batches of the trainer, and padded ones that hold equally many tokens."""
    packs = plan_packs([tokens(example) for example in examples], budget, 1)[0]
    packed = [[examples[i] for i in pack] for pack in packs]
    # Sorted by size first, as a padded loader would: neighbours waste the least on each other.
    order = sorted(examples, key=tokens)
    rectangles: list[list[Example]] = [[]]
    for example in order:
        candidate = padded([*rectangles[-1], example])
        if rectangles[-1] and sum(tokens(each) for each in candidate) > budget:
            rectangles.append([])
        rectangles[-1].append(example)
    return {"packed": packed, "padded": [padded(group) for group in rectangles]}


def step(dit: NextDiT, groups: Sequence[Sequence[Example]], device_type: str) -> None:
    """Forward and backward of all groups."""
    for group in groups:
        clean = [latents for latents, _ in group]
        noise = [torch.randn_like(x) for x in clean]
        timesteps = torch.full((len(clean),), 0.5, device=clean[0].device)
        with mixed_precision(device_type):
            errors, _ = velocity_errors(dit, Noised(clean, noise, timesteps), [f for _, f in group])
        errors.sum().backward()
    for parameter in dit.parameters():
        parameter.grad = None


def computed_tokens(sides: Mapping[str, Sequence[Sequence[Example]]]) -> dict[str, int]:
    """Tokens that each side sends through the network: what its matrix products cost."""
    return {side: sum(tokens(e) for g in groups for e in g) for side, groups in sides.items()}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=48, help="of a step [48]")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a forward [2048]")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side [7]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    dit = NextDiT(CONFIG).to(options.device)
    device_type = torch.device(options.device).type
    sides = batches(ragged_mix(options.images, options.device), options.budget)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(options.rounds + 1):
        for side, groups in sides.items():
            started = time.perf_counter()
            step(dit, groups, device_type)
            if device_type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[side].append(time.perf_counter() - started)
    rates = {side: options.images / statistics.median(times) for side, times in seconds.items()}
    counted = computed_tokens(sides)
    result = {
        "images": options.images,
        "budget": options.budget,
        "images_per_s": {side: round(rate, 1) for side, rate in rates.items()},
        "speedup": round(rates["packed"] / rates["padded"], 2),
        "tokens": counted,
        "forwards": {side: len(groups) for side, groups in sides.items()},
    }
    print(result)
    name = f"bench_training-{device_type}"
    print(write_result(name, {**surroundings(options.device), **result}))


if __name__ == "__main__":
    main()
