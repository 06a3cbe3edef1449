import torch

from model.flow import interpolate, sigma_from_timestep, timestep_from_sigma, velocity_target


def test_ends_of_the_path():
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mixed = interpolate(data, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], noise[0]), "timestep 0 is noise"
    assert torch.equal(mixed[1], data[1]), "timestep 1 is data"


def test_velocity_is_the_slope_of_the_path():
    data, noise = torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    early, late = torch.tensor(0.25), torch.tensor(0.75)
    slope = (interpolate(data, noise, late) - interpolate(data, noise, early)) / (late - early)
    torch.testing.assert_close(slope, velocity_target(data, noise), atol=1e-5, rtol=1e-5)


def test_sigma_and_timestep_are_opposite_ends():
    assert timestep_from_sigma(1.0) == 0.0
    assert sigma_from_timestep(0.25) == 0.75
    sigmas = torch.linspace(0, 1, 11)
    torch.testing.assert_close(sigma_from_timestep(timestep_from_sigma(sigmas)), sigmas)
