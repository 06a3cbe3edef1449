import math
from statistics import NormalDist

import pytest
import torch

from trainer.loss import kl_loss, reconstruction_loss, sample_timesteps, velocity_loss


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_loss_is_the_mean_square_of_each_sample(dtype):
    shapes = [(4, 8, 8), (4, 2, 6), (4, 1, 1)]
    predicted = [draw(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    target = [draw(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
    losses = velocity_loss(predicted, target)
    expected = [
        float((p.double() - t.double()).square().mean())
        for p, t in zip(predicted, target, strict=True)
    ]
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_velocity_loss_reaches_every_prediction():
    predicted = [draw(2, 3).requires_grad_(), draw(4, 1).requires_grad_()]
    velocity_loss(predicted, [torch.zeros(2, 3), torch.zeros(4, 1)]).mean().backward()
    for p in predicted:
        torch.testing.assert_close(p.grad, p.detach() / p.numel())


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def test_timesteps_at_1024_px_have_the_published_quantiles():
    t = sample_timesteps(400_000, 1.15, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert 0 < t.min() < t.max() < 1
    found = torch.quantile(t.double(), torch.tensor(QUANTILES, dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.057, 0.139, 0.240, 0.383, 0.622], abs=2e-3)


def test_timesteps_are_log_normal_around_the_shift():
    t = sample_timesteps(400_000, 0.5, torch.Generator().manual_seed(1))
    found = torch.quantile(t.double(), torch.tensor(QUANTILES, dtype=torch.float64))
    expected = [1 / (1 + math.exp(0.5 - NormalDist().inv_cdf(q))) for q in QUANTILES]
    assert found.tolist() == pytest.approx(expected, abs=3e-3)


def test_timesteps_come_from_the_generator():
    draws = [sample_timesteps(5, 0.5, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_kl_is_that_of_torch():
    mean, logvar = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean.double(), (0.5 * logvar.double()).exp()), normal(0.0, 1.0)
    ).mean()
    assert float(kl_loss(mean, logvar)) == pytest.approx(float(expected), rel=1e-5)
    assert float(kl_loss(torch.zeros(3), torch.zeros(3))) == 0.0


@pytest.mark.parametrize("gradient_weight", [0.0, 0.5])
def test_reconstruction_loss_in_float64(gradient_weight):
    images, decoded = draw(3, 3, 6, 5).clamp(-1, 1), draw(3, 3, 6, 5, seed=1)
    loss, mse = reconstruction_loss(images, decoded, gradient_weight)
    expected = 0.0
    for image, other in zip(images.double(), decoded.double(), strict=True):
        e = other - image
        edges = (e[..., 1:] - e[..., :-1]).abs().mean() + (e[:, 1:] - e[:, :-1]).abs().mean()
        weight = min(max(0.5 / float(image.std()), 0.5), 3.0)
        expected += weight * float(e.abs().mean() + e.square().mean() + gradient_weight * edges)
    assert float(loss) == pytest.approx(expected / 3, rel=1e-5)
    assert float(mse) == pytest.approx(float((decoded - images).square().mean()), rel=1e-5)
    assert float(reconstruction_loss(images, images, gradient_weight)[0]) == 0.0


def test_faint_pictures_weigh_more_up_to_a_bound():
    pattern, error = draw(1, 3, 8, 8).sign(), 0.1
    losses = {
        contrast: float(reconstruction_loss(contrast * pattern, contrast * pattern + error, 1.0)[0])
        for contrast in (1.0, 0.25, 0.1, 0.0)
    }
    assert losses[0.25] == pytest.approx(4 * losses[1.0], rel=0.02)
    assert losses[0.1] == pytest.approx(losses[0.0])
    assert losses[0.0] == pytest.approx(3 * (error + error**2), rel=1e-4)
