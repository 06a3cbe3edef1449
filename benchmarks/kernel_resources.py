"""Compile every Triton kernel for GPUs that need not be there, and print what it takes of them.

    python -m benchmarks.kernel_resources [--config 7B]

A register that spills costs memory traffic, which is all these kernels are made of: tests allow
none. Shapes, dtypes and strides are those of a block of the network; JSON goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_shapes import Case, cases
from benchmarks.report import surroundings, write_result
from kernels.gpu.gate_residual_norm import launch_gate_residual_norm
from kernels.gpu.launch import Launch
from kernels.gpu.qk_norm_rope import launch_qk_norm_rope
from kernels.gpu.rms_norm import launch_rms_norm
from kernels.gpu.silu_mul import launch_silu_mul
from model.config import NAMED_CONFIGS, NextDiTConfig

CAPABILITIES = (80, 90)  # A100; H100 and H200
TOKENS = 4196  # of a picture of 1024 px
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
_ALIGNED = [["tt.divisibility", 16]]  # what Triton finds at a launch, for pointers as for strides


def launches(config: NextDiTConfig) -> Iterator[tuple[str, Launch]]:
    """Every kernel by the name of its case, on tensors that have shapes only."""
    for case in cases("meta", TOKENS, config=config):
        yield case.name, _LAUNCHES[case.operator](case, *case.arguments)


def _rms_norm(case: Case, x: Tensor, weight: Tensor, eps: float, index: Tensor) -> Launch:
    out = torch.empty_like(x, dtype=weight.dtype)
    return launch_rms_norm(out, x, weight, eps, index)


def _gate_residual_norm(case: Case, branch: Tensor, residual: Tensor, *rest: Any) -> Launch:
    *weights, eps, index = rest
    gate, scale = weights if len(weights) == 2 else (weights[0], None)
    normed = None if scale is None else torch.empty_like(branch)
    stream = torch.empty_like(residual)
    return launch_gate_residual_norm(
        stream, normed, branch, residual, gate, scale, eps, index
    )  # fmt: skip


def _qk_norm_rope(case: Case, q: Tensor, k: Tensor, *rest: Any) -> Launch:
    return launch_qk_norm_rope(q.new_empty(q.shape), k.new_empty(k.shape), q, k, *rest)


def _silu_mul(case: Case, gate_up: Tensor) -> Launch:
    return launch_silu_mul(gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2), gate_up)


_LAUNCHES: dict[str, Callable[..., Launch]] = {
    "rms_norm": _rms_norm,
    "gate_residual_norm": _gate_residual_norm,
    "qk_norm_rope": _qk_norm_rope,
    "silu_mul": _silu_mul,
}


def compile_for(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel for this launch, specialised as the launch itself would be.

    Args:
        launch: its tensors count as aligned; they may be on `meta`.
        capability: 90 for sm_90.
    """
    signature: dict[str, str] = {}
    constants: dict[str, object] = dict(launch.constants)
    attributes = {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(place,)] = _ALIGNED
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = _ALIGNED
        else:
            signature[name] = "fp32"
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )  # fmt: skip
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": launch.num_warps})


def resources(launch: Launch, capability: int) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, shared memory and warps of a program."""
    compiled = compile_for(launch, capability)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        done = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        )
    used = {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", done.stdout)}
    return {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "warps": launch.num_warps,
    }


def main() -> None:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=list(NAMED_CONFIGS), default="2.6B")
    options = parser.parse_args()
    rows: dict[str, dict[str, dict[str, int]]] = {}
    print(f"{'kernel':<32}{'for':>7}{'registers':>11}{'spilled B':>11}{'shared B':>10}{'warps':>7}")
    for name, launch in launches(NAMED_CONFIGS[options.config]):
        rows[name] = {}
        for capability in CAPABILITIES:
            row = rows[name][f"sm_{capability}"] = resources(launch, capability)
            registers, spilled, shared, warps = row.values()
            print(
                f"{name:<32}{f'sm_{capability}':>7}{registers:>11}{spilled:>11}{shared:>10}{warps:>7}",
                flush=True,
            )
    report = {
        "config": options.config,
        "rows": rows,
        **surroundings(),
    }
    path = write_result(f"kernel_resources-{options.config}", report)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
