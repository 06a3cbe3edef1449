import pytest
import torch
from torch import nn

from trainer.ema import Ema


def walk(module: nn.Module, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Random walk of a module's weight; yields what it was after every step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            module.weight.add_(torch.randn(module.weight.shape, generator=generator))
        yield module.weight.detach().double().clone()


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_equals_the_recursion_in_float64(decay):
    module = nn.Linear(3, 4, bias=False)
    ema = Ema(module, decay)
    expected = module.weight.detach().double().clone()
    for step, weight in enumerate(walk(module, 60), start=1):
        ema.update()
        rate = min(decay, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * weight
    torch.testing.assert_close(ema.weights()["weight"].double(), expected, atol=1e-5, rtol=1e-5)


def test_starts_as_a_copy_and_does_not_touch_the_module():
    module = nn.Linear(3, 4)
    ema = Ema(module, 0.9)
    before = module.weight.detach().clone()
    assert torch.equal(ema.weights()["weight"], before)
    with torch.no_grad():
        module.weight.add_(1.0)
    assert torch.equal(ema.weights()["weight"], before)
    ema.update()
    assert torch.equal(module.weight, before + 1.0)
    assert torch.all(ema.weights()["weight"] > before)


def test_averages_in_fp32_whatever_the_weights_are():
    """A bf16 average would not move: one step is below its resolution."""
    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, 0.999)
    ema.load_state_dict({"steps": 10**6, "average": ema.average})
    nn.init.constant_(module.weight, 1.0 + 2**-7)
    for _ in range(700):
        ema.update()
    expected = 1.0 + 2**-7 * (1 - 0.999**700)
    assert ema.average["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.average["weight"], torch.full((2, 2), expected))
    assert ema.weights()["weight"].dtype == torch.bfloat16


def test_continues_bit_equal_from_its_state(tmp_path):
    module = nn.Linear(3, 4, bias=False)
    whole = Ema(module, 0.99)
    for step, _ in enumerate(walk(module, 20)):
        whole.update()
        if step == 9:
            torch.save(whole.state_dict(), tmp_path / "ema.pt")
            resumed = Ema(module, 0.99)
            resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
        elif step > 9:
            resumed.update()
    assert torch.equal(resumed.weights()["weight"], whole.weights()["weight"])
