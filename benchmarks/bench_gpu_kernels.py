"""The tests that need a GPU, then every Triton kernel against eager PyTorch and against Inductor.

    make bench-gpu-kernels            at most ten minutes; run again, it goes on where it was
    python -m benchmarks.bench_gpu_kernels --smoke    the same path in miniature, on any CPU

Shapes are those of a block of the 2.6B network. The sides take turns (A B C C B A), each call with
a cold cache; figures are percentiles of single calls. Needs torch, triton and pytest, no network.
JSON goes to benchmarks/results/ after every row. Exit codes: 0 done, 1 a test failed, 2 there is
no GPU, 3 the time was over before the last row.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, surroundings, write_result

if TYPE_CHECKING:
    from benchmarks.kernel_shapes import Case

NAME = "bench_gpu_kernels"
# Of a guided picture of 256, 512 and 1024 px with its captions, and of four such of 1024 px.
TOKENS = {712: 2, 2248: 2, 8392: 2, 33568: 8}  # and of how many sequences
SMOKE_TOKENS = {3: 2}
ROUNDS, WARM_UP = 25, 3
COLD_BYTES = 2**30  # more than any GPU's cache, and longer to clear than a call is to launch
TESTS_S = 300
# Strictness is for where the plugins are, and where every version is pinned.
PYTEST_OPTIONS = (
    *("-q", "-m", "gpu", "-p", "no:cacheprovider"),
    *("-o", "addopts=", "-o", "filterwarnings=default"),
)
ROOT = Path(__file__).resolve().parent.parent


def gpu_tests() -> list[Path]:
    """Of the kernels all, of the model the files that have some: others need more installed."""
    tests = ROOT / "tests"
    found = sorted((tests / "model").glob("test_*.py"))
    return [tests / "kernels", *(file for file in found if "mark.gpu" in file.read_text("utf-8"))]


def run_tests() -> dict[str, Any]:
    """`pytest -m gpu`, without the plugins of the development environment."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *PYTEST_OPTIONS, *gpu_tests()],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TESTS_S,
        )
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = str(error), 1
    if code:
        print(said[-6000:])
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", (said.splitlines() or [""])[-1])
    return {
        "passed": code == 0,
        "counts": {what: int(count) for count, what in counts},
        "seconds": round(time.perf_counter() - started, 1),
    }


def sides_of(
    case: Case, compiled: dict[str, Callable[..., object]], smoke: bool
) -> dict[str, Callable[[], object]]:
    """The case as calls: eager, Inductor and kernel. What compiles is kept for other sizes."""
    from kernels import dispatch

    if case.name not in compiled:
        backend = "eager" if smoke else "inductor"  # a CPU's C++ compiler takes its time
        compiled[case.name] = torch.compile(
            case.reference, backend=backend, dynamic=True, fullgraph=True
        )

    def kernel() -> object:
        with dispatch.forced(**{case.operator: True}):
            return case.call(*case.arguments)

    return {
        "eager": lambda: case.reference(*case.arguments),
        "inductor": lambda: compiled[case.name](*case.arguments),
        "kernel": kernel,
    }


def measure(
    sides: Mapping[str, Callable[[], object]], device: str, rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Milliseconds of every single call, the sides taking turns.

    Clearing the cache keeps a GPU busy while the host prepares the call, so launching is not
    counted where it is faster than that.
    """
    clock = _gpu_clock if device == "cuda" else _cpu_clock
    cold = torch.empty(COLD_BYTES if device == "cuda" else 1, dtype=torch.int8, device=device)
    for side in sides.values():
        for _ in range(warm_up):
            side()
    pending: list[tuple[str, Callable[[], float]]] = []
    for _ in range(rounds):
        for name in [*sides, *reversed(sides)]:
            cold.zero_()
            pending.append((name, clock(sides[name])))
    if device == "cuda":
        torch.cuda.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for name, elapsed_ms in pending:
        taken[name].append(elapsed_ms())
    return taken


def _gpu_clock(call: Callable[[], object]) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return lambda: start.elapsed_time(end)


def _cpu_clock(call: Callable[[], object]) -> Callable[[], float]:
    started = time.perf_counter()
    call()
    elapsed = 1000 * (time.perf_counter() - started)
    return lambda: elapsed


def row_of(case: Case, sides: Mapping[str, Callable[[], object]], taken: Any) -> dict[str, Any]:
    """Percentiles, bytes a second and how far the kernel is from the reference."""
    row: dict[str, Any] = {"case": case.name, "operator": case.operator}
    medians = {}
    for name, times in taken.items():
        percentiles = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row[name] = {
            f"p{p}_ms": round(ms, 5) for p, ms in zip((20, 50, 80), percentiles, strict=True)
        }
        medians[name] = percentiles[1]
    results, expected = (tensors_of(sides[name]()) for name in ("kernel", "eager"))
    moved = sum(x.nbytes for x in (*tensors_of(case.arguments), *results))
    row["bytes"] = moved
    row["kernel_gb_per_s"] = round(moved / medians["kernel"] / 1e6, 1)
    row["against_eager"] = round(medians["eager"] / medians["kernel"], 3)
    row["against_inductor"] = round(medians["inductor"] / medians["kernel"], 3)
    row["relative_l2_to_eager"] = max(
        float((x.double() - y.double()).norm() / y.double().norm())
        for x, y in zip(results, expected, strict=True)
    )
    return row


def tensors_of(value: object) -> list[Tensor]:
    """A tensor, or those of a tuple."""
    values = value if isinstance(value, tuple) else (value,)
    return [x for x in values if isinstance(x, Tensor)]


def missing_rows(report: Mapping[str, Any], smoke: bool) -> Iterator[tuple[Case, int]]:
    """Cases that the report lacks, with their number of tokens."""
    from benchmarks.kernel_shapes import RELEASED, TINY, cases

    there = {(row["case"], row["tokens"]) for row in report["rows"]}
    for tokens, sequences in (SMOKE_TOKENS if smoke else TOKENS).items():
        device, config = ("cpu", TINY) if smoke else ("cuda", RELEASED)
        for case in cases(device, tokens, sequences, config):
            if (case.name, tokens) not in there:
                yield case, tokens


def begun(name: str, folder: Path, around: Mapping[str, Any]) -> dict[str, Any]:
    """The report to go on with: rows count if hardware, versions and revision are the same."""
    path = folder / f"{name}.json"
    if path.exists():
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(report.get(key) == value for key, value in around.items()):
            return report
    return {**around, "complete": False, "tests": None, "rows": []}


def show(row: Mapping[str, Any]) -> None:
    """One line of the table."""
    medians = "".join(
        f"{row[side]['p50_ms'] * 1000:>12.1f}" for side in ("eager", "inductor", "kernel")
    )
    print(
        f"{row['case']:<30}{row['tokens']:>7}{medians}{row['kernel_gb_per_s']:>9.0f}"
        f"{row['against_eager']:>9.2f}{row['against_inductor']:>9.2f}",
        flush=True,
    )


@torch.inference_mode()
def run(folder: Path, smoke: bool, deadline: float) -> int:
    """Tests and rows until all is there or the time is over; the exit code."""
    device = "cpu" if smoke else "cuda"
    name = f"{NAME}-smoke" if smoke else NAME
    report = begun(name, folder, surroundings(device))
    if not (report["tests"] and report["tests"]["passed"]):
        report["tests"] = run_tests()
        write_result(name, report, folder)
    print(f"tests: {report['tests']['counts'] or 'none'} in {report['tests']['seconds']} s")
    print(
        f"{'median, µs':<30}{'tokens':>7}{'eager':>12}{'inductor':>12}{'kernel':>12}{'GB/s':>9}"
        f"{'x eager':>9}{'x induct.':>9}"
    )
    for row in report["rows"]:
        show(row)
    compiled: dict[str, Callable[..., object]] = {}
    for case, tokens in missing_rows(report, smoke):
        if time.monotonic() > deadline:
            print("the time is over: run it again, it goes on from here")
            return 3
        sides = sides_of(case, compiled, smoke)
        taken = measure(sides, device, *((1, 1) if smoke else (ROUNDS, WARM_UP)))
        report["rows"].append({**row_of(case, sides, taken), "tokens": tokens})
        write_result(name, report, folder)
        show(report["rows"][-1])
    report["complete"] = True
    path = write_result(name, report, folder)
    print(f"wrote {path.name}")
    return 0 if report["tests"]["passed"] else 1


def main() -> None:
    """Test, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, interpreted, on the CPU")
    parser.add_argument("--budget-s", type=float, default=540.0, help="begin no row after it")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget_s
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print(f"{NAME}: there is no CUDA device here (--smoke runs on a CPU)", file=sys.stderr)
        sys.exit(2)
    folder = options.out or (Path(tempfile.mkdtemp()) if options.smoke else RESULTS)
    sys.exit(run(folder, options.smoke, deadline))


if __name__ == "__main__":
    main()
