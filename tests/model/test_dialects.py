"""Official names, and configs read off shapes; compared with diffusers' own converter."""

import json
import math

import pytest
import torch

from model.checkpoint import CheckpointError, Stored, load_transformer_config
from model.config import NAMED_CONFIGS, NextDiTConfig
from model.convert import outgoing
from model.dialects import DIFFUSERS, OFFICIAL, find_dialect, infer_config, weight_shapes
from model.weight_source import Source
from tests.model.references import SHAPES, make_reference
from tests.official import official_state


class Numbered:
    """Weights of any size in no memory: row i of weight n is filled with 10000 n + i."""

    name = "numbered.safetensors"

    def __init__(self, shapes):
        self.stored = {key: Stored(tuple(shape), "F32") for key, shape in shapes.items()}
        self._offsets = {key: 20_000 * n for n, key in enumerate(shapes)}

    def read(self, key):
        shape = self.stored[key].shape
        rows = torch.arange(shape[0], dtype=torch.float32) + self._offsets[key]
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def official_shapes(config, prefix=""):
    """Names and shapes of diffusers' class on the meta device, under official names."""
    from diffusers import Lumina2Transformer2DModel

    options = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    with torch.device("meta"):
        reference = Lumina2Transformer2DModel(**options)
        state = official_state(reference.state_dict(), prefix)
    return {key: value.shape for key, value in state.items()}


def source_of(weights, config, dialect=OFFICIAL, prefix=""):
    return Source(weights, dialect, prefix, config, None, {}, {})


@pytest.mark.slow
def test_the_released_size_converts_as_diffusers_does():
    from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

    config = NAMED_CONFIGS["2.6B"]
    weights = Numbered(official_shapes(config))
    assert len(weights.stored) == 400
    theirs = convert_lumina2_to_diffusers({key: weights.read(key) for key in weights.stored})
    ours = {t.name: t for t in outgoing(source_of(weights, config), DIFFUSERS, None)}
    assert len(ours) == 459
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        tensor = ours[name].make()
        assert tensor.shape == expected.shape == ours[name].shape
        # Rows are constant, so their first numbers say all.
        ours_first, theirs_first = (t.reshape(len(t), -1)[:, 0] for t in (tensor, expected))
        assert torch.equal(ours_first, theirs_first)


@pytest.mark.slow
@pytest.mark.parametrize("size", NAMED_CONFIGS)
def test_named_sizes_have_the_published_number_of_parameters(size):
    from diffusers import Lumina2Transformer2DModel

    billions = {"2.6B": 2.610, "3B": 3.735, "4B": 4.793, "7B": 8.248}[size]
    config = NAMED_CONFIGS[size]
    ours = sum(math.prod(shape) for shape in weight_shapes(config).values())
    assert round(ours / 1e9, 3) == billions
    if size == "2.6B":
        assert ours == 2_609_769_152
    with torch.device("meta"):
        options = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        reference = Lumina2Transformer2DModel(**options)
    assert sum(p.numel() for p in reference.parameters()) == ours


@pytest.mark.slow
@pytest.mark.parametrize("size", NAMED_CONFIGS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_named_sizes_are_recognised(size, prefix):
    weights = Numbered(official_shapes(NAMED_CONFIGS[size], prefix))
    assert find_dialect(weights) == (OFFICIAL, prefix)
    found = infer_config(weights, OFFICIAL, prefix)
    assert (found.config, found.size) == (NAMED_CONFIGS[size], size)
    assert found.assumed["axes_dim_rope"] == found.config.axes_dim_rope


@pytest.mark.parametrize("multiplier", [None, 0.37, 1.3, 2.0])
@pytest.mark.parametrize("multiple_of", [1, 16, 96, 256])
def test_any_feed_forward_width_is_reproduced(multiplier, multiple_of):
    config = NextDiTConfig(
        hidden_size=72,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=6,
        num_kv_heads=2,
        axes_dim_rope=(4, 4, 4),
        cap_feat_dim=20,
        ffn_dim_multiplier=multiplier,
        multiple_of=multiple_of,
    )
    found = infer_config(Numbered(official_shapes(config)), OFFICIAL, "")
    assert weight_shapes(found.config) == weight_shapes(config)
    assert found.size is None
    assert (found.config.num_attention_heads, found.config.num_kv_heads) == (6, 2)
    assert found.config.axes_dim_rope == (4, 4, 4)


def test_diffusers_names_are_inferred_from_too():
    config = NAMED_CONFIGS["2.6B"]
    shapes = {t.name: t.shape for t in outgoing(
        source_of(Numbered(official_shapes(config)), config), DIFFUSERS, None)}  # fmt: skip
    weights = Numbered(shapes)
    assert find_dialect(weights) == (DIFFUSERS, "")
    assert infer_config(weights, DIFFUSERS, "").config == config


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_official_to_diffusers_and_back_is_bit_exact(shape, tmp_path):
    reference = make_reference(**shape)
    reference.save_pretrained(tmp_path)
    config = load_transformer_config(tmp_path)
    theirs = dict(reference.state_dict())
    official = official_state(theirs)

    class Held:
        def __init__(self, state):
            self.name = "held"
            self.state = state
            self.stored = {k: Stored(tuple(v.shape), "F32") for k, v in state.items()}

        def read(self, key):
            return self.state[key]

    there = outgoing(source_of(Held(official), config), DIFFUSERS, None)
    converted = {t.name: t.make() for t in there}
    assert converted.keys() == theirs.keys()
    assert all(torch.equal(converted[key], theirs[key]) for key in theirs)
    back = outgoing(source_of(Held(converted), config, DIFFUSERS), OFFICIAL, None)
    restored = {t.name: t.make() for t in back}
    assert restored.keys() == official.keys()
    assert all(torch.equal(restored[key], official[key]) for key in official)


def shapes_of(**changes):
    config = NextDiTConfig(
        hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2,
        axes_dim_rope=(4, 4, 4), cap_feat_dim=20, multiple_of=16,
    )  # fmt: skip
    shapes = {**official_shapes(config), **changes}
    return {key: shape for key, shape in shapes.items() if shape is not None}


QKV, Q_NORM = "layers.0.attention.qkv.weight", "layers.0.attention.q_norm.weight"
FAULTS = {
    "no query norm": ({Q_NORM: None}, f"{Q_NORM!r} is missing"),
    "odd heads": ({Q_NORM: (11,)}, "width 48 and 48 rows of keys and values are no whole heads"),
    "no keys": ({QKV: (48, 48)}, "width 48 and 0 rows"),
    "head without three even axes": ({Q_NORM: (8,)}, "give --like"),
    "wrong axes": ({QKV: (96,)}, f"{QKV!r} has shape [96]; 2 axes are expected"),
    "empty": ({Q_NORM: (0,)}, "has shape [0]"),
    "no embedder": ({"x_embedder.weight": None}, "'x_embedder.weight' is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_shapes_that_fit_nothing_are_named(fault):
    changes, words = FAULTS[fault]
    weights = Numbered(shapes_of(**changes))
    with pytest.raises(CheckpointError) as error:
        infer_config(weights, OFFICIAL, "")
    assert words in str(error.value)
    assert str(error.value).startswith("numbered.safetensors: ")
    assert "\n" not in str(error.value)


def test_other_models_and_twins_are_refused():
    with pytest.raises(CheckpointError, match="holds no transformer of this family"):
        find_dialect(Numbered({"double_blocks.0.img_attn.qkv.weight": (3, 3)}))
    for key in ("transformer.layers.0.attn.to_q.lora_A.weight", "x.lora.down.weight"):
        with pytest.raises(CheckpointError, match=r"a LoRA, not a transformer.*--lora-dir"):
            find_dialect(Numbered({key: (3, 3)}))
    twins = shapes_of() | {f"ema.{key}": shape for key, shape in shapes_of().items()}
    with pytest.raises(CheckpointError, match="holds several transformers"):
        find_dialect(Numbered(twins))


def test_the_config_reproduces_what_diffusers_was_given(tmp_path):
    config = NAMED_CONFIGS["7B"]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert load_transformer_config(tmp_path) == config
