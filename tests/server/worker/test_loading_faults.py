"""A worker that cannot load its checkpoint: one line, and an exit code that says what next."""

import os
import signal

import pytest

from server.config import Settings
from server.worker.main import LOAD_FAULT, run_worker


@pytest.mark.usefixtures("kept_logging")
def test_a_worker_that_cannot_load_says_so_in_one_line(tmp_path, capsys):
    def load(_, precision):
        assert precision == "auto"
        raise ValueError("vae/config.json: is missing")

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        code = run_worker(Settings(data_dir=tmp_path, internal_port=0), tmp_path, load=load)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert code == 2
    assert capsys.readouterr().err == "lumina worker: vae/config.json: is missing\n"


@pytest.mark.usefixtures("kept_logging")
def test_of_workers_that_share_a_token_one_says_what_is_wrong(tmp_path, capsys):
    def load(_, precision):
        raise ValueError("vae/config.json: is missing")

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    token, giver = os.pipe2(os.O_NONBLOCK)
    os.write(giver, b"1")
    try:
        for _ in range(2):
            code = run_worker(
                Settings(data_dir=tmp_path, internal_port=0), tmp_path, load=load, token_fd=token
            )
            assert code == 2
    finally:
        os.close(token)
        os.close(giver)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert capsys.readouterr().err == "lumina worker: vae/config.json: is missing\n"


@pytest.mark.usefixtures("kept_logging")
def test_any_other_load_fault_is_one_line_and_may_be_tried_again(tmp_path, capsys):
    def load(_, precision):
        raise RuntimeError("CUDA error:\nout of memory")

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        code = run_worker(Settings(data_dir=tmp_path, internal_port=0), tmp_path, load=load)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert code == LOAD_FAULT
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lumina")]
    assert told == ["lumina worker: loading failed: RuntimeError: CUDA error: out of memory"]


@pytest.mark.usefixtures("kept_logging")
def test_a_certificate_that_cannot_sign_is_one_line_before_anything_is_loaded(tmp_path, capsys):
    def load(_, precision):
        raise AssertionError("loaded before the certificate was tried")

    settings = Settings(
        data_dir=tmp_path, internal_port=0, c2pa_cert=tmp_path / "a.pem", c2pa_key=tmp_path / "b"
    )
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        assert run_worker(settings, tmp_path, load=load) == 2
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    told = f"lumina worker: LUMINA_C2PA_CERT {tmp_path}/a.pem: No such file or directory\n"
    assert capsys.readouterr().err == told
