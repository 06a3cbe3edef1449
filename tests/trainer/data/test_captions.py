import numpy as np
import pytest
import torch

from model.templates import compose_prompt
from model.text_encoder import MAX_TOKENS, TextEncoder
from tests.tiny_checkpoint import make_tiny_checkpoint
from trainer.data.captions import CHUNK, CaptionEncoder, CaptionSampler
from trainer.demo.grammar import LEVELS, caption
from trainer.demo.scenes import sample_scene

TEXTS = ["a red circle", "", "x", compose_prompt("a green star and a cross", "real")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("captions") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder) -> CaptionEncoder:
    return CaptionEncoder(folder)


@pytest.fixture(scope="module")
def served(folder) -> TextEncoder:
    return TextEncoder.from_pretrained(folder)


def relative_l2(result, expected) -> float:
    return float((result - expected).norm() / expected.norm())


def test_features_are_those_the_server_computes(encoder, served):
    """Within bf16: training must not see other features than serving."""
    texts = TEXTS + [f"{i} squares" * (1 + i % 7) for i in range(CHUNK + 3)]
    for text, ours, expected in zip(
        texts, encoder.encode(texts), served.encode(texts), strict=True
    ):
        assert ours.shape == expected.shape, text
        assert ours.dtype == torch.float32
        assert relative_l2(ours, expected) < 0.03
    assert encoder.feature_dim == served.feature_dim


def test_neighbours_do_not_matter(encoder):
    """Shorter texts are padded to their chunk's longest."""
    together = encoder.encode(TEXTS)
    for text, features in zip(TEXTS, together, strict=True):
        assert relative_l2(encoder.encode([text])[0], features) < 0.02


def test_lengths_are_those_of_the_features(encoder):
    long = "a red circle " * 60
    texts = [*TEXTS, long]
    assert encoder.lengths(texts) == [len(f) for f in encoder.encode(texts)]
    assert encoder.lengths([long, ""]) == [MAX_TOKENS, 1]


def test_no_gradient_reaches_the_encoder(encoder):
    features = encoder.encode(["a red circle"])[0]
    assert not features.requires_grad
    weight = torch.ones_like(features, requires_grad=True)
    (weight * features).sum().backward()
    assert torch.equal(weight.grad, features)


def prompts(sampler, num=400, seed=0) -> list[str]:
    rng = np.random.default_rng(seed)
    scene = sample_scene(np.random.default_rng(5))
    return [sampler(scene, rng) for _ in range(num)]


def test_dropout_drops_the_template_too():
    found = prompts(CaptionSampler({"short": 1.0}, {"real": 1.0}, dropout=0.25))
    assert found.count("") == pytest.approx(100, abs=30)
    start = compose_prompt("", "real")
    assert all(text.startswith(start) for text in found if text)
    assert set(prompts(CaptionSampler({"short": 1.0}, {"real": 1.0}, dropout=1.0))) == {""}
    assert "" not in prompts(CaptionSampler({"short": 1.0}, {"real": 1.0}, dropout=0.0))


def test_templates_are_drawn_by_weight():
    weights = {"real": 3.0, "empty": 1.0, "base": 0.0}
    found = prompts(CaptionSampler({"tags": 1.0}, weights, dropout=0.0))
    real = sum(text.startswith(compose_prompt("", "real")) for text in found)
    assert real == pytest.approx(300, abs=35)
    assert not any(text.startswith(compose_prompt("", "base")) for text in found)
    assert sum("<Prompt Start>" not in text for text in found) == 400 - real


@pytest.mark.parametrize("level", LEVELS)
def test_levels_are_drawn_by_weight(level):
    scene = sample_scene(np.random.default_rng(5))
    rng = np.random.default_rng(0)
    possible = {caption(scene, level, "en", rng) for _ in range(3000)}
    weights = {name: float(name == level) for name in LEVELS}
    found = set(prompts(CaptionSampler(weights, {"empty": 1.0}, dropout=0.0), num=50))
    assert len(found & possible) > 0.8 * len(found)


def test_the_same_generator_writes_the_same():
    sampler = CaptionSampler({"short": 1.0, "detailed": 1.0}, {"real": 1.0, "empty": 1.0}, 0.1)
    assert prompts(sampler, 20, seed=1) == prompts(sampler, 20, seed=1)
    assert prompts(sampler, 20, seed=1) != prompts(sampler, 20, seed=2)
