"""One tiny checkpoint folder per session, loaded by us and by diffusers."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The folder as diffusers saved it; read only, copy it to damage it."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def pipeline(tiny_folder):
    from model import load_pipeline  # brings diffusers, which tests of the network alone need not

    return load_pipeline(tiny_folder)


@pytest.fixture(scope="session")
def reference(tiny_folder):
    """diffusers' own pipeline on the same folder."""
    from diffusers import Lumina2Pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = Lumina2Pipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folder_copy(tiny_folder, tmp_path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def pixels(image) -> np.ndarray:
    """A PIL image as float64 0..255, so that differences do not wrap."""
    return np.asarray(image).astype(np.float64)


def psnr(image, other) -> float:
    """Peak signal-to-noise ratio of two PIL images, dB; infinite when equal."""
    error = float(np.mean((pixels(image) - pixels(other)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def max_difference(image, other) -> float:
    """Largest difference of any channel of any pixel, of 255."""
    return float(np.abs(pixels(image) - pixels(other)).max())
