from copy import deepcopy

import pytest
import torch
from torch import nn

from trainer.optim import (
    MatrixMuon,
    build_optimizers,
    lr_factor,
    orthogonalised,
    set_lr,
    share_out,
)
from trainer.precision import fast_dtype


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def torch_muon(weights: list[nn.Parameter], lr: float) -> torch.optim.Muon:
    return torch.optim.Muon(weights, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def assert_same_update(weight: torch.Tensor, other: torch.Tensor, start: torch.Tensor) -> None:
    """Equal up to torch orthogonalising in bf16, where ours may compute in fp32."""
    ours, theirs = (weight - start).flatten(), (other - start).flatten()
    assert theirs.norm() > 1e-3
    assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def orthogonalised_float64(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as printed (Jordan 2024), straight from the formula."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
    return x


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_orthogonalised_follows_the_formula(shape):
    matrix = draw(*shape)
    wide = matrix if shape[0] <= shape[1] else matrix.T
    expected = orthogonalised_float64(wide)
    expected = expected if shape[0] <= shape[1] else expected.T
    tolerance = 2e-5 if fast_dtype("cpu") == torch.float32 else 3e-2
    assert (orthogonalised(matrix) - expected).norm() <= tolerance * expected.norm()


def test_processes_share_out_the_matrices_evenly():
    weights = [draw(8, 8), draw(32, 8), draw(8, 3, 2, 2), draw(16, 16), draw(2, 2)]
    owners = share_out(weights, 2)
    assert set(owners) == {0, 1}
    assert owners[1] != owners[3], "the two largest go to different processes"


def test_on_matrices_it_is_the_muon_of_torch():
    shapes = [(4, 6), (6, 4), (5, 5)]
    ours = [nn.Parameter(draw(*shape)) for shape in shapes]
    theirs = [nn.Parameter(draw(*shape)) for shape in shapes]
    optimizers = MatrixMuon(ours, 0.02), torch_muon(theirs, 0.02)
    for step in range(5):
        set_lr(optimizers, lr_factor(step, 5, 2, 0.4))
        for optimizer, weights in zip(optimizers, (ours, theirs), strict=True):
            for i, weight in enumerate(weights):
                weight.grad = draw(*weight.shape, seed=10 * step + i)
            optimizer.step()
            optimizer.zero_grad()
    for weight, other in zip(ours, theirs, strict=True):
        assert_same_update(weight, other, draw(*weight.shape))


def test_a_convolution_is_updated_as_a_matrix():
    convolution = nn.Conv2d(3, 5, 3)
    start = convolution.weight.detach().clone()
    matrix = nn.Parameter(start.flatten(1).clone())
    ours, theirs = MatrixMuon([convolution.weight], 0.02), torch_muon([matrix], 0.02)
    for step in range(3):
        gradient = draw(5, 3, 3, 3, seed=step)
        convolution.weight.grad, matrix.grad = gradient, gradient.flatten(1)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert convolution.weight.grad is None
    assert_same_update(convolution.weight.flatten(1), matrix, start.flatten(1))


def test_a_weight_without_gradient_stays():
    weights = [nn.Parameter(draw(3, 3)), nn.Parameter(draw(3, 3, seed=1))]
    optimizer = MatrixMuon(weights, 0.1)
    weights[0].grad = draw(3, 3, seed=2)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(weights[1], draw(3, 3, seed=1))


def test_continues_bit_equal_from_its_state():
    def run(optimizer, weight, steps):
        for step in steps:
            weight.grad = draw(4, 2, 3, 3, seed=step)
            optimizer.step()
            optimizer.zero_grad()

    weight = nn.Parameter(draw(4, 2, 3, 3))
    optimizer = MatrixMuon([weight], 0.05)
    run(optimizer, weight, range(3))
    other = nn.Parameter(weight.detach().clone())
    resumed = MatrixMuon([other], 0.05)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    run(optimizer, weight, range(3, 6))
    run(resumed, other, range(3, 6))
    assert torch.equal(weight, other)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(4, 4)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3))
        self.norm = nn.LayerNorm(4)
        self.modulation = nn.Linear(4, 4)
        self.final_layer = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    places = {p.data_ptr(): name for name, p in module.named_parameters()}
    return {places[p.data_ptr()] for group in optimizer.param_groups for p in group["params"]}


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    net = Net()
    muon, adamw = build_optimizers(net, "muon", 1e-3, 2e-3, (0.9, 0.95))
    matrices = {"layers.0.weight", "layers.1.weight"}
    assert names_of(net, muon) == matrices
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert names_of(net, adamw) == trainable - matrices
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (2e-3, 1e-3)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    assert {g["weight_decay"] for g in adamw.param_groups} == {0.0}


def test_adamw_alone_takes_all_that_trains():
    net = Net()
    (adamw,) = build_optimizers(net, "adamw", 1e-3, 0.5, (0.9, 0.95))
    assert names_of(net, adamw) == {n for n, p in net.named_parameters() if p.requires_grad}


def test_rate_warms_up_stays_and_falls_to_zero():
    factors = [lr_factor(step, 100, 10, 0.2) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(factors[10:80]) == {1.0}
    assert factors[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    assert factors[-1] == pytest.approx(0.05)


def test_rate_is_constant_without_warmup_and_cooldown():
    assert {lr_factor(step, 7, 0, 0.0) for step in range(7)} == {1.0}


def test_set_lr_scales_the_first_rate_and_not_the_last():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.5)
    for factor in (0.1, 1.0, 0.25):
        set_lr([optimizer], factor)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * factor)
