"""LoRAs that peft makes on diffusers' transformer give the same output here; what files may say."""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from model.adapters import Adapter
from model.config import NextDiTConfig
from model.dialects import weight_shapes
from model.lora import merge_loras, open_lora
from tests.model.lora_files import (
    adapt,
    pairs_of,
    save_as_diffusers,
    save_as_peft,
    save_with_alphas,
)
from tests.model.references import (
    CHANNELS,
    PLAIN,
    SHAPES,
    TEXT_WIDTH,
    make_reference,
    ours_from,
    reference_velocity,
    relative_l2,
)

TOLERANCE = 1e-5
CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def reference():
    return make_reference(**PLAIN)


@pytest.fixture
def dit(reference, tmp_path):
    return ours_from(reference, tmp_path / "dit")


@pytest.fixture(scope="module")
def adapted(reference):
    return adapt(reference)


def small_batch():
    """Latents, timesteps and prompt embeds of two samples of different sizes."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(CHANNELS, *size, generator=generator) for size in ((4, 6), (2, 4))]
    prompts = [torch.randn(n, TEXT_WIDTH, generator=generator) * 10 for n in (7, 3)]
    return latents, torch.tensor([0.3, 0.8]), prompts


@torch.inference_mode()
def expected_of(adapted):
    return [reference_velocity(adapted, *sample) for sample in zip(*small_batch(), strict=True)]


@torch.inference_mode()
def velocities(dit, adapters=()):
    latents, timesteps, prompts = small_batch()
    return dit(latents, timesteps, prompts, [adapters] * len(latents) if adapters else None)


def assert_both_ways(dit, files, expected):
    """`files` with their factors give `expected`: applied to a request, and merged."""
    plain = velocities(dit)
    own = tuple(Adapter(f.load(f"lora {i}", **CPU), scale) for i, (f, scale) in enumerate(files))
    per_request = velocities(dit, own)
    merge_loras(dit, files)
    merged = velocities(dit)
    for bare, one, other, wanted in zip(plain, per_request, merged, expected, strict=True):
        assert relative_l2(bare, wanted) > 0.05  # the LoRA is loud
        assert relative_l2(one, wanted) <= TOLERANCE
        assert relative_l2(other, wanted) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_lora_on_every_layer_equals_peft(shape, tmp_path):
    reference = make_reference(**shape)
    dit = ours_from(reference, tmp_path / "dit")
    adapted = adapt(reference)
    file = open_lora(save_as_diffusers(adapted, tmp_path / "style.safetensors"), dit.config)
    linear = [key for key, shape in weight_shapes(dit.config).items() if len(shape) == 2]
    assert sorted(f"{layer}.weight" for layer in file.pairs) == sorted(linear)
    assert_both_ways(dit, [(file, 1.0)], expected_of(adapted))


SETTINGS = {
    "alpha of its own": {"lora_alpha": 2},
    "rank-stabilised": {"use_rslora": True, "r": 4},
    "alphas by pattern": {
        "alpha_pattern": {"to_q": 1, r"layers\.1\.attn\.to_v": 9, "x_embedder": 2},
        "rank_pattern": {"to_k": 5},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("save", [save_as_diffusers, save_as_peft])
def test_what_peft_was_told_counts(reference, dit, tmp_path, settings, save):
    adapted = adapt(reference, seed=3, **settings)
    path = tmp_path / ("folder" if save is save_as_peft else "x.safetensors")
    assert_both_ways(dit, [(open_lora(save(adapted, path), dit.config), 1.0)], expected_of(adapted))


def test_alphas_may_be_tensors(adapted, dit, tmp_path):
    file = open_lora(save_with_alphas(adapted, tmp_path / "x.safetensors"), dit.config)
    assert_both_ways(dit, [(file, 1.0)], expected_of(adapted))


def test_without_any_alpha_the_scale_is_one(reference, dit, tmp_path):
    adapted = adapt(reference, lora_alpha=3)  # the rank
    path = save_as_diffusers(adapted, tmp_path / "x.safetensors", metadata=False)
    assert_both_ways(dit, [(open_lora(path, dit.config), 1.0)], expected_of(adapted))


def test_some_layers_only(reference, dit, tmp_path):
    """Queries and values without keys, one half of the gated product: parts of fused weights."""
    adapted = adapt(reference, layers=("to_q", "to_v", "feed_forward.linear_3"))
    path = save_as_diffusers(adapted, tmp_path / "x.safetensors")
    assert_both_ways(dit, [(open_lora(path, dit.config), 1.0)], expected_of(adapted))


def test_two_loras_with_factors_equal_peft(reference, dit, tmp_path):
    both = adapt(reference, gain=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft wonders whether we mean it
        both = adapt(both, ("to_q", "x_embedder"), seed=5, name="second", r=2, lora_alpha=3)
    files = []
    for name, factor in (("default", 0.8), ("second", -0.6)):
        path = tmp_path / f"{name}.safetensors"
        files.append((open_lora(save_as_diffusers(both, path, name=name), dit.config), factor))
    both.set_adapters(["default", "second"], [0.8, -0.6])
    assert_both_ways(dit, files, expected_of(both))


# --- official names ---------------------------------------------------------------------------

FUSED = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2}
OFFICIAL = {
    "x_embedder": "x_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
OFFICIAL_BLOCK = {
    "attn.to_out.0": "attention.out",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
}


def shared_pairs(adapted):
    """peft's pairs with one A for queries, keys and values, as a split fused LoRA has."""
    pairs = pairs_of(adapted)
    for key in list(pairs):
        for name in ("to_k", "to_v"):
            if f".{name}.lora_A" in key:
                pairs[key] = pairs[key.replace(name, "to_q")].clone()
    return pairs


def official_pairs(pairs):
    """The same LoRA under the official names, written down here a second time."""
    official = {}
    for key, value in pairs.items():
        layer, lora, rest = key.partition(".lora_")
        if layer in OFFICIAL:
            official[OFFICIAL[layer] + lora + rest] = value
            continue
        stem, index, layer = layer.split(".", 2)
        block = f"{stem}.{index}."
        if layer in OFFICIAL_BLOCK:
            official[block + OFFICIAL_BLOCK[layer] + lora + rest] = value
        elif layer == "attn.to_q":
            parts = [pairs[key.replace("to_q", f"to_{x}")] for x in "qkv"]
            fused = value if rest.startswith("A") else torch.cat(parts)
            official[f"{block}attention.qkv{lora}{rest}"] = fused
    return official


SPELLINGS = {
    "bare": lambda key: key,
    "diffusion_model": lambda key: f"diffusion_model.{key}",
    "model.diffusion_model": lambda key: f"model.diffusion_model.{key}",
    "down and up": lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "dotted": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "underscores": lambda key: "lora_unet_" + key.replace(".", "_").replace(
        "_lora_A_weight", ".lora_down.weight").replace("_lora_B_weight", ".lora_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fused_official_keys_equal_split_ones_bit_for_bit(adapted, dit, tmp_path, spelling):
    pairs = shared_pairs(adapted)
    save_file({f"transformer.{k}": v for k, v in pairs.items()}, tmp_path / "split.safetensors")
    spelt = {SPELLINGS[spelling](k): v.clone() for k, v in official_pairs(pairs).items()}
    save_file(spelt, tmp_path / "fused.safetensors")
    split, fused = (
        open_lora(tmp_path / f"{name}.safetensors", dit.config).load("x", **CPU)
        for name in ("split", "fused")
    )
    assert split.layers.keys() == fused.layers.keys()
    assert len(split.layers) == len(pairs) / 2 - 3 * 4  # 4 blocks; q, k, v are one, w1 and w3 too
    for layer, change in split.layers.items():
        assert torch.equal(change.a, fused.layers[layer].a), layer
        assert torch.equal(change.b, fused.layers[layer].b), layer
    assert fused.layers["layers.0.attention.qkv"].a.shape[0] == 3  # not three times the rank


def test_official_keys_of_the_released_width_are_read_as_diffusers_reads_them(tmp_path):
    """diffusers' own converter, which knows 2304 rows of queries only."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lumina2_lora_to_diffusers as convert,
    )

    config = NextDiTConfig(num_layers=1, num_refiner_layers=1)
    generator = torch.Generator().manual_seed(0)
    official = {}
    for stem in ("layers", "noise_refiner", "context_refiner"):
        layers = {"attention.qkv": (2304, 3840), "attention.out": (2304, 2304),
                  "feed_forward.w1": (2304, 9216), "feed_forward.w2": (9216, 2304),
                  "feed_forward.w3": (2304, 9216), "adaLN_modulation.1": (1024, 9216)}  # fmt: skip
        if stem == "context_refiner":
            del layers["adaLN_modulation.1"]
        for layer, (columns, rows) in layers.items():
            for letter, shape in (("A", (2, columns)), ("B", (rows, 2))):
                key = f"diffusion_model.{stem}.0.{layer}.lora_{letter}.weight"
                official[key] = torch.randn(shape, generator=generator)
    save_file(official, tmp_path / "ours.safetensors")
    converted = {k: v.clone().contiguous() for k, v in convert(dict(official)).items()}
    save_file(converted, tmp_path / "theirs.safetensors")
    ours, theirs = (
        open_lora(tmp_path / f"{name}.safetensors", config).load("x", **CPU).layers
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) == 14
    for layer, change in ours.items():
        for own, other in zip(change, theirs[layer], strict=True):
            assert torch.equal(own, other)


# --- low precision ----------------------------------------------------------------------------


def test_a_merge_in_bfloat16_is_rounded_once(reference, dit, tmp_path):
    paths = [
        save_as_diffusers(adapt(reference, ("to_q",), seed=i), tmp_path / f"{i}.safetensors")
        for i in range(2)
    ]
    files = [(open_lora(path, dit.config), 0.3) for path in paths]
    low = dit.to(torch.bfloat16)
    before = low.layers[0].attention.qkv.weight.double()
    for file, factor in files:
        change = file.read("layers.0.attention.qkv", **CPU)
        before += factor * change.b.double() @ change.a.double()
    merge_loras(low, files)
    torch.testing.assert_close(
        low.layers[0].attention.qkv.weight.double(), before, rtol=2**-8, atol=1e-7
    )


def test_per_request_in_bfloat16_stays_near_fp32(reference, adapted, dit, tmp_path):
    file = open_lora(save_as_diffusers(adapted, tmp_path / "x.safetensors"), dit.config)
    low = dit.to(torch.bfloat16)
    lora = file.load("x", device="cpu", dtype=torch.bfloat16)
    assert lora.num_bytes == 2 * sum(c.a.numel() + c.b.numel() for c in lora.layers.values())
    for velocity, expected in zip(
        velocities(low, (Adapter(lora, 1.0),)), expected_of(adapted), strict=True
    ):
        assert velocity.dtype == torch.bfloat16
        assert relative_l2(velocity, expected) < 0.08
