"""What the parts of the project may know of each other, and how large they may get."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "model", "trainer", "server")
TORCH_FREE = ("server.api", "server.queue", "server.scheduler", "server.protocol")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
COMMON_FUNCTION_LINES = 35  # nine functions of ten
FOREIGN_VERSIONS = (
    "0.18.2",
    "0.19",
)  # transformers takes a `kernels` of [first, second) as its own

# Imports every module below the given ones and prints which of the forbidden came along.
_IMPORT_ALL = """
import importlib, pkgutil, sys
def load(name):
    module = importlib.import_module(name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        load(f"{name}.{found.name}")
for name in sys.argv[1:]:
    load(name)
print(*sorted({"torch", "model", "kernels", "transformers", "diffusers"} & set(sys.modules)))
"""


def run_python(*args, cwd=ROOT):
    """Run an interpreter that sees the project and return what it printed; it must succeed."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def lint_imports(root):
    """Check the contracts of pyproject.toml in a tree; returns the exit code and the report."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.fixture
def tree(tmp_path):
    """A copy of the packages and their contracts, to break."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold():
    code, report = lint_imports(ROOT)
    assert code == 0, report


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("kernels/rms_norm.py", "import model.flow", "one-way layers"),
        ("model/flow.py", "import server.protocol", "one-way layers"),
        ("trainer/loss.py", "import server.protocol", "one-way layers"),
        ("server/worker/engine.py", "import trainer.loss", "one-way layers"),
        ("server/scheduler/policy.py", "import torch", "torch-free"),
        ("server/api/address.py", "import model.flow", "torch-free"),
        ("server/api/address.py", "import server.worker.engine", "torch-free"),
        ("server/queue/keys.py", "import server.api.app", "inside server"),
        ("server/api/address.py", "import server.scheduler.policy", "api does not schedule"),
        ("server/unplaced.py", "", "inside server"),
    ],
)
def test_a_violation_breaks_its_contract(tree, file, line, contract):
    with (tree / file).open("a") as source:
        source.write(f"\n{line}\n")
    code, report = lint_imports(tree)
    assert code != 0
    assert f"{contract} BROKEN" in report


@pytest.mark.parametrize("package", TORCH_FREE)
def test_no_torch_comes_along(package):
    # The contracts see our own imports only; this also sees what third parties drag in.
    assert run_python("-c", _IMPORT_ALL, package) == ""


@pytest.mark.slow
def test_the_torch_check_can_fail():
    assert run_python("-c", _IMPORT_ALL, "kernels.silu_mul") == "kernels torch"


def test_the_api_works_where_there_is_no_torch():
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'transformers']))"
    assert run_python("-c", f"{block}; import server.api.app; print('fine')") == "fine"


def test_importing_server_runs_nothing():
    assert (ROOT / "server/__init__.py").read_text() == ""


@pytest.mark.slow
def test_transformers_loads_beside_our_kernels():
    program = "import kernels; from transformers import Gemma2Model; print(kernels.__file__)"
    assert Path(run_python("-c", program)) == ROOT / "kernels/__init__.py"


def test_our_kernels_package_is_light():
    program = (
        "import sys; before = set(sys.modules); import kernels; print(set(sys.modules)-before)"
    )
    assert run_python("-c", program) == "{'kernels'}"


def test_no_distribution_looks_like_the_other_kernels():
    first, end = map(Version, FOREIGN_VERSIONS)
    assert not first <= Version(importlib.metadata.version("lumina-serve")) < end
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("kernels")


def test_the_constraints_ban_the_other_kernels():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (banned,) = [Requirement(line) for line in lines if re.match(r"kernels\b", line)]
    assert not any(banned.specifier.contains(v) for v in ("0.0.1", *FOREIGN_VERSIONS, "1", "2026"))


def test_files_and_functions_stay_small():
    large = []
    for path in sources(*PACKAGES, "benchmarks"):
        text = path.read_text()
        units = [("the file", len(text.splitlines()), MAX_FILE_LINES)]
        units += [(name, n, MAX_FUNCTION_LINES) for name, n in function_lines(text)]
        where = path.relative_to(ROOT)
        large += [f"{where}: {name} has {n} lines" for name, n, most in units if n > most]
    assert not large


def test_nine_functions_of_ten_fit_half_a_screen():
    lengths = sorted(n for path in sources(*PACKAGES) for _, n in function_lines(path.read_text()))
    assert lengths[len(lengths) * 9 // 10] <= COMMON_FUNCTION_LINES


def function_lines(text):
    """(name, number of lines) of every function in a source text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_function_lines_counts_lines():
    assert list(function_lines("def one():\n    a = 1\n    return a\n")) == [("one", 3)]


def test_no_file_knows_the_machine_it_was_written_on():
    """Absolute paths of somebody's workplace, and words that promise work nobody records."""
    folder = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|workspace|mnt)/\w")
    promise = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
    kinds = ("*.py", "*.md", "*.lua", "*.js", "*.html", "*.css", "*.toml", "*.yaml", "Makefile")
    places = [ROOT, *(ROOT / name for name in (*PACKAGES, "tests", "docs", "benchmarks", ".ci"))]
    found = []
    for place in places:
        for kind in (*kinds, "run"):
            for path in place.glob(kind) if place == ROOT else place.rglob(kind):
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    if folder.search(line) or promise.search(line):
                        found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found
