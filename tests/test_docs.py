"""What the documents say is there: links, paths, settings, dependencies and their pins."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from server.config import ENV_PREFIX, FOREIGN_VARIABLES, Settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.11", "3.12")
# CUDA builds of torch bring these; they are pinned by torch itself, and no CPU machine has them.
PINNED_BY_TORCH = ("nvidia-", "cuda-")


def requirements(lines):
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def constraints():
    """Name -> requirement of every line of constraints.txt; a name appears once."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line and not line.startswith("#")]
    found = requirements(kept)
    assert len(found) == len(kept)
    return found


def dependency_closure(pythons=(None,)):
    """Everything that an install with all extras brings to this machine, under any of `pythons`."""

    def applies(requirement, extra=""):
        return requirement.marker is None or any(
            requirement.marker.evaluate(
                {"extra": extra} | ({"python_version": python} if python else {})
            )
            for python in pythons
        )

    wanted = [PROJECT["dependencies"], *EXTRAS.values()]
    todo = [r for lines in wanted for r in requirements(lines).values() if applies(r)]
    seen = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen or name.startswith(PINNED_BY_TORCH):
                continue
            seen.add((name, extra))
            try:
                below = map(Requirement, importlib.metadata.requires(name) or [])
            except importlib.metadata.PackageNotFoundError:  # another Python's dependency
                below = []
            todo += [r for r in below if applies(r, extra)]
    return {name for name, _ in seen}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if "://" not in target]
    missing = [t for t in local if t and not (document.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_named_in_the_text_exist(document):
    pattern = r"`((?:kernels|model|server|trainer|tests|benchmarks|checkpoints|docs)/[\w./-]*)`"
    named = re.findall(pattern, document.read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_readme_has_no_open_slot():
    assert re.findall(r"<!--.*?-->", README.read_text(encoding="utf-8")) == []


def test_every_setting_is_documented_with_its_default():
    rows = dict(re.findall(r"^\| `(LUMINA_\w+)` \| ([^|]*)\|", README.read_text(), re.MULTILINE))
    fields = {ENV_PREFIX + name.upper(): field for name, field in Settings.model_fields.items()}
    assert set(rows) == set(fields) | FOREIGN_VARIABLES
    for name, field in fields.items():
        default = field.default
        if default != "":
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert shown in rows[name].replace("`", ""), name


def test_every_dependency_has_a_reason_in_its_section():
    text = (ROOT / "docs" / "dependencies.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    documented = {}
    for section in sections:
        title = (re.match(r"Extra `(\w+)`", section) or re.match(r"(\w+)", section))[1]
        rows = re.findall(r"^\| (?!distribution|-)([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
        documented[title] = {
            canonicalize_name(name.strip()) for names, _ in rows for name in names.split(",")
        }
    wanted = {"Always": set(requirements(PROJECT["dependencies"])), "Banned": {"kernels"}}
    wanted |= {extra: set(requirements(lines)) for extra, lines in EXTRAS.items()}
    assert documented == wanted


def test_every_direct_dependency_is_pinned():
    wanted = [PROJECT["dependencies"], *EXTRAS.values()]
    assert {name for lines in wanted for name in requirements(lines)} <= set(constraints())


def test_everything_installed_for_the_project_is_pinned_to_what_is_installed():
    pins, wrong = constraints(), []
    for name in sorted(dependency_closure()):
        installed = Version(importlib.metadata.version(name)).public  # of any build: no +cpu
        if name not in pins or str(pins[name].specifier) != f"=={installed}":
            wrong.append(f"{name}=={installed}")
    assert not wrong


@pytest.mark.skipif(sys.platform != "linux", reason="the pins are those of Linux")
def test_the_pins_are_what_the_supported_pythons_need():
    assert set(constraints()) - {"kernels"} == dependency_closure(PYTHONS)


def test_torch_comes_first_and_fits_every_build():
    first = (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", first)


def test_decisions_are_numbered_without_gaps_and_fit_a_page():
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    assert not [page.name for page in pages if len(page.read_text().splitlines()) > 60]
