import numpy as np
import pytest
import torch

from model.vae import VAE
from tests.tiny_checkpoint import make_tiny_checkpoint
from trainer.config import SizeShare
from trainer.data import latents
from trainer.data.latents import LatentPool
from trainer.demo.render import render
from trainer.demo.scenes import sample_scene
from trainer.stages.vae import to_tensor

WIDE = SizeShare(width=48, height=32)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> VAE:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("latents") / "tiny")
    return VAE.from_pretrained(folder / "vae")


def stored(folder) -> np.ndarray:
    (path,) = folder.glob("*.npy")
    return np.load(path)


def test_latents_are_those_of_the_rendered_scenes(vae, tmp_path):
    pool = LatentPool(tmp_path, vae, WIDE, num=3, seed=7, first=100)
    assert len(pool) == 3
    array = stored(tmp_path)
    assert (array.dtype, array.shape) == (np.float16, (3, 16, 4, 6))
    scenes = [sample_scene(np.random.default_rng((7, 100 + i))) for i in range(3)]
    images = to_tensor(np.stack([render(scene, 48, 32) for scene in scenes]))
    expected = vae.encode(images)
    error = (torch.from_numpy(array).float() - expected).norm() / expected.norm()
    assert error < 0.03  # bf16


def test_the_same_scene_index_has_the_same_latent(vae, tmp_path):
    LatentPool(tmp_path / "a", vae, WIDE, num=6, seed=7, first=100)
    LatentPool(tmp_path / "b", vae, WIDE, num=3, seed=7, first=102)
    np.testing.assert_allclose(
        stored(tmp_path / "a")[2:5], stored(tmp_path / "b"), atol=0.02, rtol=0.02
    )
    LatentPool(tmp_path / "c", vae, WIDE, num=3, seed=8, first=102)
    assert np.abs(stored(tmp_path / "c") - stored(tmp_path / "b")).max() > 0.1


def test_what_is_drawn_belongs_together(vae, tmp_path):
    pool = LatentPool(tmp_path, vae, WIDE, num=5, seed=7, first=0)
    drawn, scenes = pool.draw(np.random.default_rng(1), 8)
    again, same = pool.draw(np.random.default_rng(1), 8)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, again)
    assert scenes == same
    known = [sample_scene(np.random.default_rng((7, i))) for i in range(5)]
    array = stored(tmp_path)
    for latent, scene in zip(drawn, scenes, strict=True):
        np.testing.assert_array_equal(latent.half().numpy(), array[known.index(scene)])


def test_encoded_once(vae, tmp_path):
    LatentPool(tmp_path, vae, WIDE, num=3, seed=7, first=0)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    pool = LatentPool(tmp_path, None, WIDE, num=3, seed=7, first=0)  # needs no autoencoder
    assert len(pool) == 3
    assert path.stat().st_mtime_ns == before


def test_a_killed_encoding_is_not_taken_for_a_whole_one(vae, tmp_path, monkeypatch):
    class Killed:
        latent_channels, device = vae.latent_channels, vae.device
        calls = 0

        def encode(self, images):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return vae.encode(images)

    monkeypatch.setattr(latents, "ENCODE_PIXELS", 48 * 32)
    with pytest.raises(KeyboardInterrupt):
        LatentPool(tmp_path, Killed(), WIDE, num=3, seed=7, first=0)
    assert all(".tmp." in path.name for path in tmp_path.iterdir())
    LatentPool(tmp_path, vae, WIDE, num=3, seed=7, first=0)
    (path,) = tmp_path.iterdir()
    assert ".tmp" not in path.name
    assert all(np.abs(latent).max() > 0 for latent in np.load(path))
