import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import NextDiTConfig
from model.next_dit import NextDiT
from tests.model.references import (
    CHANNELS,
    PLAIN,
    SHAPES,
    TEXT_WIDTH,
    make_reference,
    ours_from,
    ragged_batch,
    reference_velocity,
    relative_l2,
)

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' network and ours with the same weights."""
    reference = make_reference(**PLAIN)
    return reference, ours_from(reference, tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def dit(pair) -> NextDiT:
    return pair[1]


def untrained(**options) -> NextDiT:
    torch.manual_seed(0)
    config = NextDiTConfig(
        **{
            "in_channels": CHANNELS,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 4, 4),
            "cap_feat_dim": TEXT_WIDTH,
            **options,
        }
    )
    return NextDiT(config)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_diffusers(shape, tmp_path):
    reference = make_reference(**shape)
    dit = ours_from(reference, tmp_path)
    latents, timesteps, prompts = ragged_batch()
    with torch.inference_mode():
        velocities = dit(latents, timesteps, prompts)
        for sample in zip(velocities, latents, timesteps, prompts, strict=True):
            velocity, *inputs = sample
            expected = reference_velocity(reference, *inputs)
            assert velocity.shape == expected.shape
            assert expected.std() > 0.1
            assert relative_l2(velocity, expected) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 64, 256, 299])
def test_every_caption_length_equals_diffusers(pair, length):
    reference, dit = pair
    latents = torch.randn(CHANNELS, 4, 6, generator=torch.Generator().manual_seed(length))
    prompt = torch.randn(length, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        (velocity,) = dit([latents], torch.tensor([0.4]), [prompt])
        expected = reference_velocity(reference, latents, torch.tensor(0.4), prompt)
    assert relative_l2(velocity, expected) <= TOLERANCE


def test_gradients_equal_those_of_diffusers(pair, tmp_path):
    """Training takes another attention path than inference."""
    reference, _ = pair
    dit = ours_from(reference, tmp_path).requires_grad_(True)
    latents, timesteps, prompts = ragged_batch(seed=3)
    velocities = dit(latents, timesteps, prompts)
    torch.cat([v.flatten() for v in velocities]).square().sum().backward()
    inputs = zip(latents, timesteps, prompts, strict=True)
    expected = [reference_velocity(reference, *sample) for sample in inputs]
    torch.cat([v.flatten() for v in expected]).square().sum().backward()
    for velocity, other in zip(velocities, expected, strict=True):
        assert relative_l2(velocity.detach(), other.detach()) <= TOLERANCE
    theirs = dict(reference.named_parameters())
    block, other = dit.layers[0], "layers.0."
    fused = torch.cat([theirs[f"{other}attn.to_{x}.weight"].grad for x in "qkv"])
    for ours, expected in (
        (dit.x_embedder.weight.grad, theirs["x_embedder.weight"].grad),
        (block.attention.qkv.weight.grad, fused),
        (block.attention.k_norm.weight.grad, theirs[f"{other}attn.norm_k.weight"].grad),
        (block.modulation.weight.grad, theirs[f"{other}norm1.linear.weight"].grad),
        (block.ffn_norm2.weight.grad, theirs[f"{other}ffn_norm2.weight"].grad),
        (dit.final_layer.linear.weight.grad, theirs["norm_out.linear_2.weight"].grad),
    ):
        assert relative_l2(ours, expected) <= 1e-4
    reference.zero_grad(set_to_none=True)


@torch.inference_mode()
def test_alone_or_in_a_crowd(dit):
    latents, timesteps, prompts = ragged_batch()
    crowd = dit(latents, timesteps, prompts)
    for i, velocity in enumerate(crowd):
        (alone,) = dit(latents[i : i + 1], timesteps[i : i + 1], prompts[i : i + 1])
        assert relative_l2(velocity, alone) <= 1e-5


@torch.inference_mode()
def test_order_of_the_batch_does_not_matter(dit):
    latents, timesteps, prompts = ragged_batch()
    forward = dit(latents, timesteps, prompts)
    backward = dit(latents[::-1], timesteps.flip(0), prompts[::-1])
    for velocity, other in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(velocity, other, atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_four_stages_are_the_forward_and_a_context_serves_every_step(dit):
    latents, timesteps, prompts = ragged_batch()
    contexts = dit.encode_context(prompts)
    assert [tuple(c.shape) for c in contexts] == [(len(p), 48) for p in prompts]
    for shifted in (timesteps, timesteps.flip(0)):
        staged = dit.head(dit.blocks(dit.embed(latents, shifted, contexts)))
        for velocity, whole in zip(staged, dit(latents, shifted, prompts), strict=True):
            assert torch.equal(velocity, whole)


@torch.inference_mode()
def test_the_timestep_and_every_token_matter(dit):
    """Otherwise equality with a crowd would mean little."""
    latents, timesteps, prompts = (part[3:4] for part in ragged_batch())
    (velocity,) = dit(latents, timesteps, prompts)
    (later,) = dit(latents, timesteps - 0.1, prompts)
    assert relative_l2(later, velocity) > 1e-3
    for place in (0, -1):
        changed = prompts[0].clone()
        changed[place] += 10
        assert relative_l2(dit(latents, timesteps, [changed])[0], velocity) > 1e-3


def test_untrained_network_predicts_zero_and_blocks_are_identities():
    dit = untrained()
    latents, timesteps, prompts = ragged_batch()
    with torch.no_grad():
        packed = dit.embed(latents, timesteps, dit.encode_context(prompts))
        assert packed.hidden.std() > 0.1
        assert torch.equal(dit.blocks(packed).hidden, packed.hidden)
        embedded = [dit.x_embedder(dit._patchify([latents[i]])) for i in packed.order]
        for sequence, image in zip(
            packed.hidden.split(packed.layout.lengths), embedded, strict=True
        ):
            torch.testing.assert_close(sequence[-len(image) :], image, atol=1e-6, rtol=1e-6)
        for velocity, x in zip(dit(latents, timesteps, prompts), latents, strict=True):
            assert torch.equal(velocity, torch.zeros_like(x))


def test_untrained_weights_are_the_official_initialisation():
    dit = untrained(hidden_size=96, num_attention_heads=8).requires_grad_(False)
    zero = [name for name, p in dit.named_parameters() if not p.any() and "bias" not in name]
    blocks = ["noise_refiner.0", "layers.0", "layers.1"]
    assert sorted(zero) == sorted(
        [f"{b}.modulation.weight" for b in blocks]
        + ["final_layer.modulation.weight", "final_layer.linear.weight"]
    )
    assert not any(p.any() for name, p in dit.named_parameters() if name.endswith("bias"))
    assert all((p == 1).all() for name, p in dit.named_parameters() if "norm" in name)
    assert dit.time_embedder.linear_1.weight.std() == pytest.approx(0.02, rel=0.05)
    assert dit.caption_embedder.linear.weight.std() == pytest.approx(0.02, rel=0.1)
    # Xavier: uniform with variance 2 / (fan in + fan out).
    down = dit.layers[0].feed_forward.down.weight
    assert down.std() == pytest.approx((2 / sum(down.shape)) ** 0.5, rel=0.05)
    assert down.abs().max() <= (6 / sum(down.shape)) ** 0.5


class Audit(TorchDispatchMode):
    """Writes down every operator, and every tensor it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @property
    def tensors(self):
        results = (leaf for *_, result in self.calls for leaf in tree_leaves(result))
        return [leaf for leaf in results if isinstance(leaf, torch.Tensor)]


@pytest.fixture(scope="module")
def audited(dit):
    """A forward of the four stages with everything it called, and its lengths."""
    latents, timesteps, prompts = ragged_batch()
    seen = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
        for block in (*dit.context_refiner, *dit.noise_refiner, *dit.layers)
    ]
    with torch.inference_mode(), Audit() as audit:
        dit(latents, timesteps, prompts)
    for hook in hooks:
        hook.remove()
    text = sum(len(p) for p in prompts)
    image = sum(x.shape[1] * x.shape[2] // 4 for x in latents)
    return audit, seen, text, image


def test_nothing_is_padded(audited):
    audit, seen, text, image = audited
    assert seen == [text, image, text + image, text + image]
    attended = 0
    for _, args, _, _ in attention_calls(audit):
        query, key, _ = args[:3]
        groups = query.shape[2] // key.shape[2]
        assert groups == 2
        attended += key.shape[0] * key.shape[2]
    assert attended == text + image + 2 * (text + image)


def test_no_mask_and_keys_and_values_are_not_repeated(audited):
    audit, _, text, image = audited
    calls = attention_calls(audit)
    assert calls
    for _, args, kwargs, _ in calls:
        query, key, value = args[:3]
        assert key.shape[1] == value.shape[1] == PLAIN["kv_heads"]
        assert all(0 not in x.stride() for x in (key, value))
        assert query.shape[1] == PLAIN["kv_heads"]
        assert not any(isinstance(a, torch.Tensor) for a in (*args[3:], *kwargs.values()))
    tokens = text + image
    assert max(x.numel() for x in audit.tensors) < tokens * tokens
    assert not any(x.dtype == torch.bool for x in audit.tensors)


def test_nothing_is_read_back(audited):
    audit, *_ = audited
    assert len(audit.calls) > 100
    names = {func.name() for func, *_ in audit.calls}
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


def test_the_forward_needs_no_value_of_any_tensor():
    """On the meta device tensors hold nothing, so reading one raises. Nor is any complex there."""
    latents, timesteps, prompts = ragged_batch()
    with Audit() as audit:
        velocities = untrained().to("meta")(
            [x.to("meta") for x in latents], timesteps.to("meta"), [p.to("meta") for p in prompts]
        )
    assert not any(x.is_complex() for x in audit.tensors)  # no compiler takes them
    assert [v.shape for v in velocities] == [x.shape for x in latents]


def attention_calls(audit):
    return [call for call in audit.calls if "scaled_dot_product" in call[0].name()]


def latent(*shape):
    return torch.zeros(shape)


GOOD = (latent(CHANNELS, 4, 4), torch.zeros(1), torch.zeros(3, TEXT_WIDTH))
WRONG = {
    "channels": ([latent(5, 4, 4)], GOOD[1], [GOOD[2]], r"latents of shape \[5, 4, 4\]"),
    "odd height": ([latent(CHANNELS, 3, 4)], GOOD[1], [GOOD[2]], r"positive multiples of 2"),
    "odd width": ([latent(CHANNELS, 4, 5)], GOOD[1], [GOOD[2]], r"positive multiples of 2"),
    "no height": ([latent(CHANNELS, 0, 4)], GOOD[1], [GOOD[2]], r"latents of shape \[4, 0, 4\]"),
    "stacked": ([latent(1, CHANNELS, 4, 4)], GOOD[1], [GOOD[2]], r"latents of shape"),
    "too tall": ([latent(CHANNELS, 1026, 2)], GOOD[1], [GOOD[2]], r"513 x 1 tokens exceeds"),
    "text width": ([GOOD[0]], GOOD[1], [torch.zeros(3, 7)], r"prompt_embeds of shape \[3, 7\]"),
    "text axes": ([GOOD[0]], GOOD[1], [torch.zeros(1, 3, TEXT_WIDTH)], r"prompt_embeds of shape"),
    "no text": ([GOOD[0]], GOOD[1], [torch.zeros(0, TEXT_WIDTH)], r"caption of 0 tokens"),
    "long text": ([GOOD[0]], GOOD[1], [torch.zeros(300, TEXT_WIDTH)], r"outside 1\.\.299"),
    "nothing": ([], torch.zeros(0), [], r"at least one"),
    "more captions": ([GOOD[0]], GOOD[1], [GOOD[2]] * 2, r"got 1, 1 and 2"),
    "more timesteps": ([GOOD[0]], torch.zeros(2), [GOOD[2]], r"got 1, 2 and 1"),
    "scalar timestep": ([GOOD[0]], torch.tensor(0.5), [GOOD[2]], r"timesteps of shape \[\]"),
    "timestep axes": ([GOOD[0]], torch.zeros(1, 1), [GOOD[2]], r"timesteps of shape \[1, 1\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes_are_refused_in_one_sentence(dit, case):
    *inputs, expected = WRONG[case]
    with pytest.raises(ValueError, match=expected) as error:
        dit(*inputs)
    assert re.fullmatch(r"[^\n]{20,200}", str(error.value))


def test_contexts_of_another_model_are_refused(dit):
    with pytest.raises(ValueError, match=r"contexts of shape \[3, 7\] must be \[tokens, 48\]"):
        dit.embed([GOOD[0]], GOOD[1], [torch.zeros(3, 7)])


def test_bf16_stays_near_fp32(pair, tmp_path):
    _, dit = pair
    dit.save_pretrained(tmp_path)
    low = NextDiT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    latents, timesteps, prompts = ragged_batch()
    with torch.inference_mode():
        for velocity, expected in zip(
            low(latents, timesteps, prompts), dit(latents, timesteps, prompts), strict=True
        ):
            assert velocity.dtype == torch.bfloat16
            assert relative_l2(velocity, expected) < 0.05
