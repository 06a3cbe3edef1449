"""`make bench-gpu-model` without a GPU: refused, or walked through on a tiny network."""

import json
import sys
import zipfile

import pytest
import torch

from benchmarks import bench_gpu_model
from benchmarks.model_flops import block_flops, forward_flops
from model.config import NextDiTConfig
from model.layers import Block


@pytest.mark.slow  # brings the compiler
def test_arithmetic_is_counted_as_torch_counts_it():
    from torch.utils.flop_counter import FlopCounterMode

    from model.attention.dense import plan_sdpa
    from model.packing import Layout

    config = NextDiTConfig(
        hidden_size=48, num_layers=3, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2,
        multiple_of=16, axes_dim_rope=(4, 4, 4), cap_feat_dim=32,
    )  # fmt: skip
    block, tokens = Block(config, modulated=False).requires_grad_(False), 30
    angles = torch.zeros(tokens, config.head_dim // 2)
    attend = plan_sdpa(Layout.of([tokens]))
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(tokens, 48), attend, angles.cos(), angles.sin())
    attention = sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(op)
    )
    # torch knows the fused kernel of a CPU by no formula in some versions.
    expected = block_flops(config, tokens) - (0 if attention else 4 * tokens**2 * 48)
    assert counter.get_total_flops() == expected
    joint, refined = 3 * block_flops(config, 25), block_flops(config, 16)
    assert forward_flops(config, [(9, 16), (9, 16)]) == 2 * (joint + refined)
    # The released model at 1024 x 1024 with 100 caption tokens: 18.3 + 4.5 TFLOP.
    assert 22.5e12 < forward_flops(NextDiTConfig(), [(100, 4096)]) < 23.1e12


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert bench_gpu_model.main([]) == 2
    assert capsys.readouterr().err == bench_gpu_model.NO_GPU + "\n"


@pytest.mark.slow
def test_the_walk_through_measures_every_row_and_goes_on_where_it_was(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert bench_gpu_model.main(["--smoke", "--out", str(path), "--minutes", "0"]) == 3
    assert "out of time before: 64 px x 1, step: diffusers, eager" in capsys.readouterr().out
    some = json.loads(path.read_text())["rows"]
    assert some.keys() == {"peak", bench_gpu_model.TRAINING}
    assert bench_gpu_model.main(["--smoke", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = report["rows"]
    assert rows["peak"] == some["peak"]
    assert len(rows) == 2 + 2 * 10 + 3
    assert not [key for key, row in rows.items() if row.get("fault")]
    for key, row in rows.items():
        if key != "peak":
            assert row["median_ms"] > 0, key
    pictures = [row for row in rows.values() if row.get("what", "").startswith("picture")]
    assert [row["nfe"] for row in pictures] == [5, 4, 2]  # 4 steps, a quarter of them guided
    assert {"device", "versions", "git_revision"} <= report.keys()
    written = path.stat().st_mtime_ns
    capsys.readouterr()
    assert bench_gpu_model.main(["--smoke", "--out", str(path)]) == 0
    assert path.stat().st_mtime_ns == written  # nothing is measured twice
    assert capsys.readouterr().out.count("ours, lossless") == 2 + 3


def test_wheels_are_importable_without_installing_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with zipfile.ZipFile(tmp_path / "lumina_wheel_probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lumina_wheel_probe/__init__.py", "number = 7\n")
    bench_gpu_model.unpack_wheels(tmp_path, tmp_path / "unpacked")
    import lumina_wheel_probe

    assert lumina_wheel_probe.number == 7
