import numpy as np
import pytest
import torch

from model.guidance import Guidance
from model.samplers import make_sampler, make_sigmas

COND, UNCOND = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))


def combined(**settings) -> torch.Tensor:
    return Guidance(guidance_scale=4.0, **settings).combine(COND, UNCOND)


def test_plain_guidance():
    expected = UNCOND + 4.0 * (COND - UNCOND)
    torch.testing.assert_close(combined(cfg_renorm="none"), expected)


def test_row_renorm_is_diffusers_formula():
    guided = UNCOND + 4.0 * (COND - UNCOND)
    cond_norm = torch.norm(COND, dim=-1, keepdim=True)
    noise_norm = torch.norm(guided, dim=-1, keepdim=True)
    torch.testing.assert_close(combined(cfg_renorm="row"), guided * (cond_norm / noise_norm))


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0, 50.0])
def test_global_renorm_is_the_official_rule(rho):
    expected = UNCOND + 4.0 * (COND - UNCOND)
    ceiling = rho * COND.norm()
    if rho > 0 and expected.norm() >= ceiling:
        expected = expected * (ceiling / expected.norm())
    result = combined(cfg_renorm="global", cfg_renorm_scale=rho)
    torch.testing.assert_close(result, expected)


def official_batch(cond, uncond, w, rho):
    """The official rule in float64 numpy, for one sample after another."""
    guided = []
    for c, u in zip(cond.double().numpy(), uncond.double().numpy(), strict=True):
        g = u + w * (c - u)
        limit, size = rho * np.sqrt((c**2).sum()), np.sqrt((g**2).sum())
        guided.append(g * limit / size if rho > 0 and size >= limit else g)
    return torch.from_numpy(np.stack(guided)).float()


def diffusers_batch(cond, uncond, w, normalise):
    """diffusers' lines on a whole batch [n, C, H, W]."""
    guided = uncond + w * (cond - uncond)
    if normalise:
        cond_norm = torch.norm(cond, dim=-1, keepdim=True)
        guided = guided * (cond_norm / torch.norm(guided, dim=-1, keepdim=True))
    return guided


@pytest.mark.parametrize("w", [1.5, 4.0, 8.0])
@pytest.mark.parametrize("rho", [0.7, 1.0, 2.0])
def test_every_member_of_a_batch_gets_its_own_norms(w, rho):
    generator = torch.Generator().manual_seed(1)
    loudness = torch.tensor([0.01, 1.0, 30.0, 1.0]).view(4, 1, 1, 1)
    cond, uncond = torch.randn(2, 4, 4, 6, 8, generator=generator) * loudness
    uncond[3] = cond[3]  # nothing to guide: the official rule leaves it, or shrinks it by rho
    expected = {
        "global": official_batch(cond, uncond, w, rho),
        "row": diffusers_batch(cond, uncond, w, True),
        "none": diffusers_batch(cond, uncond, w, False),
    }
    for cfg_renorm, reference in expected.items():
        guidance = Guidance(guidance_scale=w, cfg_renorm=cfg_renorm, cfg_renorm_scale=rho)
        for k in range(4):
            result = guidance.combine(cond[k], uncond[k])
            torch.testing.assert_close(
                result, reference[k], rtol=1e-4, atol=1e-5 * loudness[k, 0, 0, 0].item()
            )


def test_the_dialects_differ():
    row, whole = combined(cfg_renorm="row"), combined(cfg_renorm="global")
    torch.testing.assert_close(row.norm(), whole.norm())
    assert torch.cosine_similarity(row.flatten(), whole.flatten(), dim=0) < 0.999


@pytest.mark.parametrize("cfg_renorm", ["none", "row", "global"])
def test_zero_velocities_stay_zero(cfg_renorm):
    zeros = torch.zeros(4, 6, 8)
    result = Guidance(guidance_scale=4.0, cfg_renorm=cfg_renorm).combine(zeros, zeros)
    assert torch.equal(result, zeros)


def test_low_precision_branches_are_combined_in_float32():
    guidance = Guidance(guidance_scale=4.0)
    result = guidance.combine(COND.bfloat16(), UNCOND.bfloat16())
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result, guidance.combine(COND.bfloat16().float(), UNCOND.bfloat16().float())
    )


def guided_steps(guidance: Guidance, sigmas: tuple[float, ...]) -> list[bool]:
    num_steps = len(sigmas) - 1
    return [guidance.is_guided(i, num_steps, 1 - sigmas[i]) for i in range(num_steps)]


@pytest.mark.parametrize(
    ("ratio", "steps", "guided"), [(0.25, 50, 12), (0.6667, 50, 33), (0.2, 4, 0), (1.0, 30, 30)]
)
def test_ratio_counts_steps(ratio, steps, guided):
    guidance = Guidance(guidance_scale=4.0, cfg_trunc_ratio=ratio)
    flags = guided_steps(guidance, make_sigmas("diffusers", steps, 6.0))
    assert flags == [True] * guided + [False] * (steps - guided)


def test_t_looks_at_the_timestep():
    guidance = Guidance(guidance_scale=4.0, cfg_trunc_t=0.25)
    flags = guided_steps(guidance, make_sigmas("official", 50, 6.0))
    assert flags == [True] * 33 + [False] * 16


def test_both_rules_at_midpoint():
    """The official rule looks at every evaluation, half points too; diffusers' counts intervals."""
    sampler = make_sampler("midpoint", time_grid="official", num_inference_steps=18, shift=6.0)
    count = sampler.num_evaluations

    def flags(**rule):
        guidance = Guidance(guidance_scale=4.0, **rule)
        return [
            guidance.is_guided(
                sampler.interval_of(k), sampler.num_intervals, 1 - sampler.sigma_at(k)
            )
            for k in range(count)
        ]

    assert flags(cfg_trunc_t=0.25) == [True] * 23 + [False] * 11
    assert flags(cfg_trunc_ratio=0.5) == [True] * 16 + [False] * 18


def test_off_at_scale_one_and_below():
    for scale in (0.0, 0.5, 1.0):
        assert not Guidance(guidance_scale=scale).is_guided(0, 10, 0.0)
    assert Guidance(guidance_scale=1.01).is_guided(0, 10, 0.0)
