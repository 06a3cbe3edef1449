"""The plan of the 2.6B recipes, and their step on tensors that have shapes and no memory."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import NextDiTConfig
from model.layers import Block
from model.next_dit import NextDiT
from trainer import plan
from trainer.cli import main
from trainer.config import load_recipe
from trainer.objective import Noised, pooled, velocity_errors
from trainer.optim import build_optimizers
from trainer.parallel import recompute_blocks

WEIGHTS = 2_609_769_152
CAPTIONS = (256, 40)
SMALL = NextDiTConfig(
    hidden_size=96,
    num_layers=1,
    num_refiner_layers=1,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=16,
    axes_dim_rope=(8, 8, 8),
    cap_feat_dim=32,
)


def meta_batch(sizes):
    """Latents on meta, and noise and timesteps of their own."""
    clean = [torch.empty(16, *size, device="meta") for size in sizes]
    return Noised(
        clean, [torch.empty_like(x) for x in clean], torch.empty(len(clean), device="meta")
    )


@pytest.mark.slow
def test_a_step_of_the_released_size_runs_on_meta_tensors():
    """Forward, auxiliary loss, backward through recomputed blocks, clipping and AdamW, in bf16."""
    recipe = load_recipe("lumina2-stage2-1024")
    config = plan.shape_of(recipe)
    with torch.device("meta"):
        dit = NextDiT(config).to(torch.bfloat16)
    recompute_blocks(dit)
    settings = recipe.flow[0].optimizer
    optimizers = build_optimizers(dit, settings.name, settings.lr, 0.0, settings.betas)
    noised = meta_batch([(128, 128), (256, 64)])
    pool = pooled(noised.clean)
    auxiliary = Noised(pool, [torch.empty_like(x) for x in pool], torch.empty(2, device="meta"))
    prompts = [torch.empty(n, 2304, device="meta") for n in CAPTIONS]
    errors, extra = velocity_errors(dit, noised, prompts, auxiliary)
    assert errors.shape == extra.shape == (2,)
    (errors.mean() + extra.mean()).backward()
    grads = [p.grad for p in dit.parameters()]
    assert sum(g.numel() for g in grads) == WEIGHTS
    torch.nn.utils.clip_grad_norm_(dit.parameters(), settings.clip)
    for optimizer in optimizers:
        optimizer.step()


def test_flops_are_those_torch_counts():
    load = plan.load_of(load_recipe("lumina2-stage1-256").flow[0], 8)
    with torch.device("meta"):
        dit = NextDiT(SMALL)
    latents = torch.empty(16, 32, 32, device="meta")
    prompt = torch.empty(256, 32, device="meta")
    with FlopCounterMode(display=False) as counter:
        dit([latents], torch.rand(1), [prompt])[0].sum().backward()
    # Modulations work on one row a picture, and the inputs need no gradient.
    assert counter.get_total_flops() == pytest.approx(plan.flops_per_image(SMALL, load), rel=0.03)


def test_kept_activations_are_those_of_a_real_block():
    """The same count on real tensors, whose attention is torch's own fused kernel."""
    tokens = 64
    block = Block(SMALL, modulated=True).to(torch.bfloat16)
    x = torch.randn(tokens, 96, dtype=torch.bfloat16, requires_grad=True)
    rotary = torch.randn(tokens, 12)
    index = torch.zeros(tokens, dtype=torch.int64)
    time = torch.randn(2, 96, dtype=torch.bfloat16)
    known = [x, rotary, index, *block.parameters()]
    real = plan._kept(lambda: block(x, plan._Fused.apply, rotary, rotary, time, index), known)
    assert plan.saved_bytes(SMALL, tokens, modulated=True) == real
    assert plan.saved_bytes(SMALL, 2 * tokens, modulated=True) > 1.9 * real
    # At least the inputs of the six matrix products, at most sixty rows of the residual stream.
    row = 2 * tokens * 96
    assert 12 * row < real < 90 * row


def test_memory_per_gpu_follows_from_the_number_of_weights():
    recipe = load_recipe("lumina2-stage2-1024")
    alone, eight, more = (plan.plan(recipe, recipe.flow[0], n) for n in (1, 8, 32))
    for part, width in (("weights, fp32", 4), ("gradients, fp32", 4), ("optimiser", 8)):
        assert alone[part] == width * WEIGHTS
        assert eight[part] == pytest.approx(width * WEIGHTS / 8, rel=1e-6)
    assert eight["gathered weights and gradients"] > 2 * WEIGHTS
    activations = "joint blocks' activations"
    assert alone[activations] == eight[activations]
    kept = recipe.flow[0].model_copy(update={"recompute": False})
    assert plan.plan(recipe, kept, 8)[activations] > 8 * eight[activations]
    given_up = recipe.flow[0].model_copy(update={"reshard": True})
    assert plan.plan(recipe, given_up, 8)["total"] < eight["total"]
    for parts in (alone, eight, more):
        assert parts["total"] == sum(value for key, value in parts.items() if key != "total")
    assert eight["total"] < 80 * 2**30 < alone["total"] + 40 * 2**30


@pytest.mark.parametrize("name", ["lumina2-stage1-256", "lumina2-stage3-hq", "demo"])
def test_the_plan_is_printed_and_nothing_trained(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", name, "--plan"]) == 0
    out = capsys.readouterr().out
    for word in ("GPUs", "optimiser", "activations", "total", "days", "weights"):
        assert word in out
    assert list(tmp_path.iterdir()) == []
