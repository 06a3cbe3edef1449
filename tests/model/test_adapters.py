"""Many requests with different LoRAs in one packed forward."""

import copy

import pytest
import torch

from model.adapters import Adapted, Adapter, Lora, LowRank, Span, spans_of
from model.lora import open_lora
from tests.model.lora_files import adapt, save_as_diffusers
from tests.model.references import (
    PLAIN,
    make_reference,
    ours_from,
    ragged_batch,
    reference_velocity,
    relative_l2,
)
from tests.model.test_next_dit import Audit

RANK = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """diffusers' network without and with two LoRAs of peft; ours; the LoRAs."""
    folder = tmp_path_factory.mktemp("loras")
    reference = make_reference(**PLAIN)
    dit = ours_from(reference, folder / "dit")
    theirs, ours = [reference], [()]
    for i in range(2):
        theirs.append(adapt(reference, seed=i, r=RANK))
        path = save_as_diffusers(theirs[-1], folder / f"{i}.safetensors")
        lora = open_lora(path, dit.config).load(str(i), device="cpu", dtype=torch.float32)
        ours.append((Adapter(lora, 1.0),))
    return dit, theirs, ours


@torch.inference_mode()
def test_each_sequence_has_its_own_lora(world):
    dit, theirs, ours = world
    latents, timesteps, prompts = ragged_batch()
    which = [1, 0, 2, 1, 2, 0]
    velocities = dit(latents, timesteps, prompts, [ours[i] for i in which])
    samples = zip(which, velocities, latents, timesteps, prompts, strict=True)
    for number, velocity, *sample in samples:
        assert relative_l2(velocity, reference_velocity(theirs[number], *sample)) <= 1e-5


@torch.inference_mode()
def test_alone_or_in_a_crowd_and_in_any_order(world):
    dit, _, ours = world
    latents, timesteps, prompts = ragged_batch(seed=1)
    mixed = (ours[1][0], Adapter(ours[2][0].lora, -0.4))
    adapters = [ours[2], mixed, (), ours[1], mixed, ours[2]]
    crowd = dit(latents, timesteps, prompts, adapters)
    backward = dit(latents[::-1], timesteps.flip(0), prompts[::-1], adapters[::-1])
    for i, velocity in enumerate(crowd):
        one = slice(i, i + 1)
        (alone,) = dit(latents[one], timesteps[one], prompts[one], adapters[one])
        assert relative_l2(velocity, alone) <= 1e-5
        assert relative_l2(velocity, backward[len(crowd) - 1 - i]) <= 1e-5


@torch.inference_mode()
def test_a_broken_neighbour_breaks_nobody_else(world):
    dit, _, ours = world
    latents, timesteps, prompts = ragged_batch()
    broken = Lora("broken", {"layers.0.attention.qkv": LowRank(
        torch.full((1, 48), float("inf")), torch.ones(96, 1))})  # fmt: skip
    adapters = [ours[1], (Adapter(broken, 1.0),), (), (), ours[2], ours[1]]
    velocities = dit(latents, timesteps, prompts, adapters)
    assert [bool(v.isfinite().all()) for v in velocities] == [True, False, True, True, True, True]


@torch.inference_mode()
def test_nothing_is_read_back_and_no_token_has_weights_of_its_own(world):
    dit, _, ours = world
    latents, timesteps, prompts = ragged_batch()

    def audit_of(adapters):
        contexts = dit.encode_context(prompts, adapters)
        with Audit() as audit:
            dit.head(dit.blocks(dit.embed(latents, timesteps, contexts, adapters)))
        return audit

    plain, adapted = audit_of(None), audit_of([ours[1], ours[2], (), ours[1], (), ours[2]])
    names = {func.name() for func, *_ in adapted.calls}
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    assert max(t.numel() for t in adapted.tensors) == max(t.numel() for t in plain.tensors)
    # Two small products for each LoRA and layer, whatever the number of sequences.
    added = [args for func, args, *_ in adapted.calls if func.name() == "aten::addmm_"]
    layers = [name for name in ours[1][0].lora.layers if not name.startswith("c")]  # no context
    assert len(added) == 2 * len(layers)
    assert len(adapted.calls) - len(plain.calls) <= 8 * len(added)


def test_the_forward_needs_no_value_of_any_tensor(world):
    """On the meta device tensors hold nothing, so reading one raises."""
    dit, _, ours = world
    lora = Lora("x", {key: LowRank(change.a.to("meta"), change.b.to("meta"))
                      for key, change in ours[1][0].lora.layers.items()})  # fmt: skip
    latents, timesteps, prompts = ragged_batch()
    with torch.device("meta"):
        from model.next_dit import NextDiT

        ghost = NextDiT(dit.config)
    with torch.inference_mode():
        velocities = ghost(
            [x.to("meta") for x in latents],
            timesteps.to("meta"),
            [p.to("meta") for p in prompts],
            [(Adapter(lora, 0.5),) if i % 2 else () for i in range(len(latents))],
        )
    assert [v.shape for v in velocities] == [x.shape for x in latents]


def test_spans_join_neighbours_with_the_same_adapters():
    first, second = (Lora(name, {}) for name in "ab")
    one, two, weak = Adapter(first, 1.0), Adapter(second, 1.0), Adapter(first, 0.5)
    adapters = [(), (one,), (one,), (one, two), (weak,), ()]
    lengths = [5, 3, 4, 2, 1, 9]
    assert spans_of(adapters, lengths) == (
        Span(5, 12, one), Span(12, 14, one), Span(12, 14, two), Span(14, 15, weak),
    )  # fmt: skip
    assert Adapted.of(adapters, lengths).sequences == (
        Span(1, 3, one), Span(3, 4, one), Span(3, 4, two), Span(4, 5, weak),
    )  # fmt: skip
    assert spans_of([(), ()], [3, 4]) == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: waiting untested here")
@torch.inference_mode()
def test_adapters_never_make_the_host_wait_for_the_gpu(world):
    dit, _, ours = world
    there = copy.deepcopy(dit).cuda()
    adapters: list[tuple[Adapter, ...]] = [()]
    for ((lora, scale),) in ours[1:]:
        pairs = {k: LowRank(change.a.cuda(), change.b.cuda()) for k, change in lora.layers.items()}
        adapters.append((Adapter(Lora(lora.name, pairs), scale),))
    latents, timesteps, prompts = ragged_batch()
    latents, prompts = ([x.cuda() for x in part] for part in (latents, prompts))
    which = [adapters[i] for i in (1, 0, 2, 1, 2, 0)]
    there(latents, timesteps, prompts, which)  # the first call fills tables and loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        there(latents, timesteps, prompts, which)
    finally:
        torch.cuda.set_sync_debug_mode("default")
