"""One step of the paper's objective against plain PyTorch, and what a step may not depend on."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.model.references import relative_l2
from tests.trainer.flow_world import CONFIG, MemoryData, make_stage
from trainer.distributed import World
from trainer.metrics import read_metrics
from trainer.objective import Noised
from trainer.trainer import train_stage


def reference_network(dit, folder):
    """diffusers' transformer with our weights: padded batches and masks, none of our code."""
    from diffusers import Lumina2Transformer2DModel

    dit.save_pretrained(folder)
    return Lumina2Transformer2DModel.from_pretrained(folder)


def reference_loss(reference, stage, step: int):
    """The step's loss from the formulas, sample by sample, with the stage's own random draws."""
    items, captions = stage.examples(step)
    data, total = MemoryData(), 0.0
    for place, (item, caption) in enumerate(zip(items, captions, strict=True)):
        prompt = data.features(item, caption)[None]
        mask = torch.ones(prompt.shape[:2], dtype=torch.bool)
        clean = data.latents(item)
        for stream, x in ((2, clean), (3, F.avg_pool2d(clean, 4))):
            words = np.random.SeedSequence((7, 0, step, place, stream))
            seed = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
            generator = torch.Generator().manual_seed(seed)
            t = 1 / (1 + (1.15 - torch.randn(1, generator=generator)).exp())
            noise = torch.randn(x.shape, generator=generator)
            noisy = t * x + (1 - t) * noise
            velocity = reference(noisy[None], t, prompt, mask).sample[0]
            total = total + ((velocity - (x - noise)) ** 2).mean()
    return total / len(items)


def gradients(stage, step: int):
    total = 0.0
    for loss, _ in stage.losses(step):
        loss.backward()
        total += float(loss.detach())
    grads = {name: p.grad.clone() for name, p in stage.module.named_parameters()}
    stage.module.zero_grad()
    return total, grads


@pytest.mark.slow
def test_one_step_equals_plain_pytorch(tmp_path):
    """Loss and every gradient; the step is packed in several forwards, blocks recomputed."""
    stage = make_stage()
    reference = reference_network(stage.module, tmp_path / "dit").train()
    stage.spread(World())
    assert sum(1 for _ in stage.losses(1)) > 1
    loss, grads = gradients(stage, 1)
    expected = reference_loss(reference, stage, 1)
    expected.backward()
    expected = expected.detach()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert relative_l2(grads["x_embedder.weight"], theirs["x_embedder.weight"]) < 1e-5
    block = "layers.1."
    qkv = torch.cat([theirs[f"{block}attn.to_{letter}.weight"] for letter in "qkv"])
    assert relative_l2(grads[f"{block}attention.qkv.weight"], qkv) < 1e-5
    fused = torch.cat([theirs[f"{block}feed_forward.linear_{i}.weight"] for i in (1, 3)])
    assert relative_l2(grads[f"{block}feed_forward.gate_up.weight"], fused) < 1e-5
    # All weights at once: the norms of everything, whatever the names are.
    ours = torch.stack([g.double().square().sum() for g in grads.values()]).sum()
    other = torch.stack([g.double().square().sum() for g in theirs.values()]).sum()
    assert float(ours) == pytest.approx(float(other), rel=1e-5)


def test_packed_equals_one_by_one():
    """The budget moves nothing but rounding, and neither does recomputing the blocks."""
    whole_loss, whole = gradients(make_stage(micro_tokens=10_000), 2)
    for changes in ({"micro_tokens": 96}, {"micro_tokens": 280}):
        stage = make_stage(**changes)
        stage.spread(World())
        loss, grads = gradients(stage, 2)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name, value in whole.items():
            assert relative_l2(grads[name], value) < 1e-5, name


def test_every_forward_is_within_the_budget():
    stage = make_stage(micro_tokens=150)
    items, captions = stage.examples(0)
    sizes, data = [], MemoryData()
    forward = stage.module.forward

    def counted(latents, timesteps, prompts):
        sizes.append(sum(x[0].numel() // 4 + len(p) for x, p in zip(latents, prompts, strict=True)))
        return forward(latents, timesteps, prompts)

    stage.module.forward = counted
    list(stage.losses(0))
    images = sum(data.image_tokens(item) for item in items)
    texts = sum(len(data.features(*pair)) for pair in zip(items, captions, strict=True))
    assert len(sizes) > 2
    assert max(sizes) <= 150
    assert sum(sizes) == images + images // 16 + 2 * texts


def test_examples_come_once_an_epoch_and_captions_by_weight():
    stage = make_stage(batch_images=11, caption_dropout=0.1)
    drawn = [stage.examples(step) for step in range(400)]
    for items, _ in drawn[:5]:
        assert sorted(items) == list(range(11))
    assert drawn[0][0] != drawn[1][0]
    captions = [caption for _, row in drawn for caption in row]
    assert captions.count(None) / len(captions) == pytest.approx(0.1, abs=0.02)
    assert captions.count(1) / captions.count(0) == pytest.approx(2.0, rel=0.15)


def test_the_reported_parts_are_the_loss():
    stage = make_stage(auxiliary_weight=0.5)
    parts = list(stage.losses(0))
    loss = sum(float(part.detach()) for part, _ in parts)
    report = parts[-1][1]
    assert all(not rest for _, rest in parts[:-1])
    assert loss == pytest.approx(report["loss_velocity"] + 0.5 * report["loss_auxiliary"])
    assert {key for key in report if key.startswith("loss_t")} <= {f"loss_t{i}" for i in range(10)}
    assert any(key.startswith("loss_t") for key in report)


def test_noise_and_timesteps_are_each_samples_own():
    clean = [torch.zeros(4, 8, 8), torch.zeros(4, 4, 8)]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = Noised.draw(clean, 0.5, generators)
    alone = Noised.draw(clean[1:], 0.5, [torch.Generator().manual_seed(2)])
    assert torch.equal(both.noise[1], alone.noise[0])
    assert both.timesteps[1] == alone.timesteps[0]
    assert torch.equal(both.noisy[0], (1 - both.timesteps[0]) * both.noise[0])
    assert torch.equal(both.targets[0], -both.noise[0])


def test_a_sample_that_is_no_number_is_named(tmp_path):
    stage = make_stage()
    stage._data._latents[4][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"stage flow, step \d: loss nan.*examples: images/4\.png"):
        train_stage(stage, tmp_path, World())


STEPS = 20
KILLED_RUN = f"""
import sys, time
from pathlib import Path
from tests.trainer.flow_world import make_stage
from trainer.distributed import World
from trainer.trainer import train_stage
stage, folder = make_stage(steps={STEPS}), Path(sys.argv[1])
train_stage(stage, folder, World(), save_every_s=0.5, observe=lambda *_: time.sleep(0.3))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_at_any_moment_gives_the_same_losses(tmp_path):
    """Killed from outside at a moment nobody chose, then run to the end."""
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path / "killed")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 400
        while len(rows_of(tmp_path / "killed")) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it was still running"
    train_stage(make_stage(steps=STEPS), tmp_path / "killed", World())
    train_stage(make_stage(steps=STEPS), tmp_path / "whole", World())
    assert len(rows_of(tmp_path / "whole")) == STEPS
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def rows_of(folder) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every line of a stage's metrics."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def test_the_budget_and_the_batch_are_checked():
    with pytest.raises(ValueError, match="micro_tokens 40 cannot hold an example of"):
        list(make_stage(micro_tokens=40).losses(0))
    with pytest.raises(ValueError, match="batch_images 8 must be a multiple"):
        list(make_stage(World(rank=0, size=3), sharded=False).losses(0))
    assert CONFIG.in_channels == 4
