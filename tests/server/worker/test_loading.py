"""What a worker does for speed when it loads: chosen by settings, said in its log, or refused."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

from model.stack import EagerStack
from server.config import Settings
from server.worker.loading import CACHE_VARIABLES, Speed, keep_compiled, load_model
from server.worker.main import run_worker
from tests.tiny_checkpoint import make_tiny_checkpoint

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a worker without GPU does")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("loading") / "tiny")


@pytest.fixture
def no_cache_variables(monkeypatch):
    for variable in CACHE_VARIABLES:
        monkeypatch.setenv(variable, "")  # noted, and so restored afterwards
        del os.environ[variable]


def test_settings_say_what_is_done_for_speed(tmp_path, monkeypatch):
    settings = Settings(data_dir=tmp_path)
    assert Speed.of(settings) == Speed("auto", "none", 4096, tmp_path / "compiled")
    monkeypatch.setenv("LUMINA_COMPILE", "full")
    monkeypatch.setenv("LUMINA_QUANTIZE", "fp8")
    monkeypatch.setenv("LUMINA_GRAPH_TOKENS", "0")
    assert Speed.of(Settings(data_dir=tmp_path)) == Speed("full", "fp8", 0, tmp_path / "compiled")


@on_a_cpu
@pytest.mark.usefixtures("no_cache_variables")
def test_nothing_is_compiled_on_a_cpu_unless_asked_for(folder, tmp_path):
    model = load_model(folder, speed=Speed("auto", cache_dir=tmp_path / "compiled"))
    assert isinstance(model.pipeline.dit.run_stack, EagerStack)
    assert (model.arithmetic["compile"], model.arithmetic["quantize"]) == ("off", "none")
    assert not (tmp_path / "compiled").exists()
    model = load_model(folder, speed=Speed("blocks", cache_dir=tmp_path / "compiled"))
    assert model.arithmetic["compile"] == "blocks"
    assert not isinstance(model.pipeline.dit.run_stack, EagerStack)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled" / "inductor")


@pytest.mark.usefixtures("no_cache_variables")
def test_a_cache_directory_of_the_environment_wins_and_one_that_cannot_be_made_is_left(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    keep_compiled(tmp_path / "compiled")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "compiled" / "triton")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    (tmp_path / "file").write_text("")
    keep_compiled(tmp_path / "file" / "compiled")
    assert "TRITON_CACHE_DIR" not in os.environ
    assert "compiled code is not kept" in caplog.text


PROCESS = """
import sys
from pathlib import Path
from server.worker.loading import Speed, load_model
load_model(Path(sys.argv[1]), speed=Speed("blocks", cache_dir=Path(sys.argv[2])))
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(cache_dir())
"""


@pytest.mark.very_slow
@pytest.mark.usefixtures("no_cache_variables")
def test_a_process_of_its_own_keeps_what_it_compiles_in_that_directory(folder, tmp_path):
    kept = tmp_path / "compiled"
    argv = [sys.executable, "-c", PROCESS, str(folder), str(kept)]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=True).stdout
    assert said.splitlines()[-1] == str(kept / "inductor")


@on_a_cpu
@pytest.mark.usefixtures("kept_logging")
def test_fp8_without_a_device_that_has_it_is_misuse_in_one_line(folder, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    load = partial(load_model, speed=Speed(quantize="fp8"))
    try:
        code = run_worker(
            Settings(data_dir=tmp_path, precision="bf16", internal_port=0), folder, load=load
        )
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert code == 2
    assert capsys.readouterr().err == (
        "lumina worker: quantize 'fp8' needs a CUDA device of compute capability 8.9 or newer; "
        "this one is a CPU\n"
    )
