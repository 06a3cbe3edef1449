"""Who computes a call: devices, dtypes, gradients, the switch and its faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import dispatch

ROOT = Path(__file__).parents[2]


def run(program, **environment):
    """A fresh interpreter: the variable is read once, at import."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_values_of_the_variable():
    names = list(dispatch.DEFAULTS)
    assert dispatch.parse("") == dispatch.parse("auto") == dict.fromkeys(names)
    assert dispatch.parse("all") == dict.fromkeys(names, True)
    assert dispatch.parse("none") == dict.fromkeys(names, False)
    some = dispatch.parse("silu_mul, rms_norm")
    assert {name for name, on in some.items() if on} == {"silu_mul", "rms_norm"}
    assert None not in some.values()


@pytest.mark.parametrize("value", ["fast", "rms_norm,", "all,silu_mul", "RMS_NORM"])
def test_other_values_are_refused_in_one_sentence(value):
    with pytest.raises(ValueError, match=r"LUMINA_KERNELS '.*' is not allowed: give auto, all, no"):
        dispatch.parse(value)


def test_a_cpu_has_no_kernels_and_no_interest_in_triton():
    assert dispatch.INTERPRETED or not dispatch.uses_kernel("rms_norm", torch.ones(2, 2))
    assert not dispatch.works(torch.device("meta"))


def test_forced_ends_with_its_block():
    before = dict(dispatch._switches)
    with dispatch.forced(rms_norm=True, silu_mul=False):
        assert dispatch._switches == before | {"rms_norm": True, "silu_mul": False}
        with dispatch.forced(rms_norm=None):
            assert dispatch._switches["rms_norm"] is None
    assert dispatch._switches == before


@pytest.mark.slow
def test_a_bad_value_is_said_at_load_and_not_at_import():
    program = (
        "import sys, torch, model.layers; from kernels import dispatch\n"
        "print('triton' in sys.modules)\n"
        "try: dispatch.settle(torch.device('cpu'))\n"
        "except ValueError as error: print(error)"
    )
    done = run(program, LUMINA_KERNELS="fast")
    assert done.returncode == 0, done.stderr
    imported, said = done.stdout.splitlines()
    assert imported == "False"
    assert said.startswith("LUMINA_KERNELS 'fast' is not allowed: give auto, all, none or some of")


BROKEN = """
import logging, torch
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
import kernels.gpu.rms_norm
def broken(*_): raise OSError("no C compiler\\nsecond line")
kernels.gpu.rms_norm.launch_rms_norm = broken
from kernels import dispatch
from kernels.rms_norm import rms_norm
x = torch.tensor([[3.0, 3.0]])
with dispatch.forced(rms_norm=True):
    print(rms_norm(x, torch.ones(2), 0.0).tolist(), rms_norm(x, torch.ones(2), 0.0).tolist())
"""


@pytest.mark.slow
def test_where_triton_does_not_work_the_reference_serves_and_the_log_says_why_once():
    done = run(BROKEN, TRITON_INTERPRET="1")
    assert done.stdout == "[[1.0, 1.0]] [[1.0, 1.0]]\n"
    assert done.stderr.strip() == (
        "WARNING kernels: eager operators on cpu, as Triton does not work: OSError: no C compiler"
    )
