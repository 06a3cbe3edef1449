"""What every figure of the benchmarks is written down with. Needs torch, but no Redis."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

BUNDLED = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
RESULTS = Path(__file__).resolve().parent / "results"

_PACKAGES = ("torch", "triton", "diffusers", "transformers")


def surroundings(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and revision: what a figure is worth nothing without."""
    info = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    rows = [line.split(": ", 1) for line in info.splitlines() if ": " in line]
    cpu = dict(reversed([(name.strip(), value) for name, value in rows]))
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in cpu.get("flags", "")]
    gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name()
        if gpu
        else cpu.get("model name", platform.machine()),
        "vectors": vectors,
        "threads": torch.get_num_threads(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "git_revision": _revision(),
    }


def _version(package: str) -> str | None:
    """Of an installed package; None where there is none, as on a bare GPU machine."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str:
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return git.stdout.strip() or "unknown"


def write_result(name: str, content: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result, beside the others unless told otherwise; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
