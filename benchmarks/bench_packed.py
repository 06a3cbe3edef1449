"""One packed forward of eight ragged samples against eight calls of diffusers, same weights.

`python -m benchmarks.bench_packed` prints a table and writes JSON with hardware and versions to
`benchmarks/results/`. The two sides take turns (A B B A) in one process; figures are medians.
"""

import json
import logging
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from model.next_dit import NextDiT

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE, MAX_ERROR = (torch.bfloat16, 5e-2) if DEVICE.type == "cuda" else (torch.float32, 2e-5)
HEADS, AXES, TEXT_DIM = 4, (16, 16, 16), 192  # about the demo checkpoint's transformer
PIXELS = [(64, 64), (128, 128), (96, 64), (64, 64), (128, 96), (64, 128), (128, 128), (96, 96)]
CAPTION_TOKENS = [12, 40, 7, 25, 60, 12, 31, 18]
WARM_UP_ROUNDS, ROUNDS = 3, 20

Call = Callable[[], list[Tensor]]


def sides() -> dict[str, Call]:
    """Diffusers' network with random weights and ours with the same, as calls on one batch."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # greets CPU builds with a warning
    from diffusers import Lumina2Transformer2DModel as Reference

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Reference(
            hidden_size=HEADS * sum(AXES), num_layers=6, num_refiner_layers=1, in_channels=16,
            num_attention_heads=HEADS, num_kv_heads=2, multiple_of=64, axes_dim_rope=AXES,
            cap_feat_dim=TEXT_DIM,
        ).save_pretrained(folder)  # fmt: skip
        reference = Reference.from_pretrained(folder, torch_dtype=DTYPE).to(DEVICE).eval()
        ours = NextDiT.from_pretrained(folder, device=DEVICE, dtype=DTYPE)
    latents = [torch.randn(16, h // 8, w // 8).to(DEVICE, DTYPE) for h, w in PIXELS]
    prompts = [torch.randn(n, TEXT_DIM).to(DEVICE, DTYPE) for n in CAPTION_TOKENS]
    times = torch.linspace(0.1, 0.9, len(PIXELS), device=DEVICE)
    masks = [torch.ones(1, n, dtype=torch.bool, device=DEVICE) for n in CAPTION_TOKENS]
    batch = list(zip(latents, times.to(DTYPE).split(1), prompts, masks, strict=True))
    return {
        "diffusers, 8 calls": lambda: [
            reference(x[None], t, p[None], m)[0] for x, t, p, m in batch
        ],
        "packed, 1 call": lambda: ours(latents, times, prompts),
    }


def measure(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Milliseconds of every call, warmed up, the sides taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(WARM_UP_ROUNDS + ROUNDS):
        for name in [*calls, *reversed(calls)]:
            started = time.perf_counter()
            float(sum(v.sum() for v in calls[name]()))  # waits for a GPU to finish
            if index >= WARM_UP_ROUNDS:
                taken[name].append(1000 * (time.perf_counter() - started))
    return taken


def surroundings() -> dict[str, object]:
    """Hardware, versions and revision: what a figure is worth nothing without."""
    info = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    models = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    cpu = (models or [platform.machine()])[0]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "dtype": str(DTYPE),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "git_revision": git.stdout.strip() or "unknown",
    }


@torch.inference_mode()
def main() -> None:
    """Check that both sides agree, measure, print and write."""
    calls = sides()
    theirs, ours = (torch.cat([v.flatten() for v in call()]).float() for call in calls.values())
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < MAX_ERROR, f"the sides differ: relative L2 {error:.1e}"
    medians = {name: statistics.median(values) for name, values in measure(calls).items()}
    base = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:<20}{median:>9.2f} ms{base / median:>7.2f}x")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"bench_packed-{DEVICE.type}.json"
    row = {"median_ms": medians, "rounds": ROUNDS, "relative_l2": error, **surroundings()}
    path.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path.name}; the sides agree to {error:.1e}")


if __name__ == "__main__":
    main()
