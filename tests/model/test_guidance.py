import pytest
import torch

from model.guidance import Guidance
from model.samplers import make_sigmas

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


def test_off_at_scale_one_and_below():
    for scale in (0.0, 1.0):
        assert not Guidance(guidance_scale=scale).is_guided(0, 10, 0.0)
