"""What every figure of the benchmarks is written down with. Needs torch, but no Redis."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

BUNDLED = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
RESULTS = Path(__file__).resolve().parent / "results"


def surroundings(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and revision: what a figure is worth nothing without."""
    info = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    rows = [line.split(": ", 1) for line in info.splitlines() if ": " in line]
    cpu = dict(reversed([(name.strip(), value) for name, value in rows]))
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in cpu.get("flags", "")]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name()
        if gpu
        else cpu.get("model name", platform.machine()),
        "vectors": vectors,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "python": platform.python_version(),
        "git_revision": git.stdout.strip() or "unknown",
    }


def write_result(name: str, content: Mapping[str, Any]) -> Path:
    """Write a result beside the others; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
