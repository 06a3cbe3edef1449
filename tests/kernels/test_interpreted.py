"""The kernels without a GPU: Triton's interpreter runs them on a CPU, in a process of its own.

`TRITON_INTERPRET` counts when a kernel is defined, so it cannot be set in this one, where others
may have imported Triton.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("test_triton.py", "test_custom_ops.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
        + [f"tests/kernels/{name}" for name in FILES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 100
    assert "skipped" not in done.stdout
