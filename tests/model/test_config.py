import inspect
import json
import math

import pytest

from model.checkpoint import CheckpointError, load_transformer_config
from model.config import NextDiTConfig


def test_defaults_are_the_released_model():
    config = NextDiTConfig()
    assert (config.head_dim, config.ffn_dim, config.modulation_dim) == (96, 9216, 1024)
    assert (config.patch_dim, config.max_caption_tokens) == (64, 299)


def test_a_small_model():
    config = NextDiTConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        in_channels=4,
    )
    assert (config.head_dim, config.ffn_dim, config.modulation_dim) == (12, 192, 48)
    assert config.patch_dim == 16


@pytest.mark.parametrize(
    ("multiplier", "multiple_of", "expected"),
    [(None, 256, 9216), (0.7, 256, 6656), (1.0, 10_000, 10_000), (1.3, 1, 11980)],
)
def test_ffn_width_is_rounded_up(multiplier, multiple_of, expected):
    config = NextDiTConfig(ffn_dim_multiplier=multiplier, multiple_of=multiple_of)
    assert config.ffn_dim == expected


@pytest.mark.parametrize("name", ["default", "small"])
def test_dict_and_back(name):
    config = {
        "default": NextDiTConfig(),
        "small": NextDiTConfig(
            hidden_size=64,
            num_attention_heads=2,
            num_kv_heads=1,
            axes_dim_rope=(8, 12, 12),
            ffn_dim_multiplier=0.5,
        ),
    }[name]
    assert NextDiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_names_and_defaults_are_those_of_diffusers():
    from diffusers import Lumina2Transformer2DModel

    parameters = inspect.signature(Lumina2Transformer2DModel.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    ours = NextDiTConfig.from_dict({}).to_dict()
    assert ours.pop("_class_name") == Lumina2Transformer2DModel.__name__
    assert ours == theirs


BAD = {
    "hidden_size": [0, -48, 2304.0, "2304", None, True, [2304]],
    "num_layers": [0, 1.5, None],
    "patch_size": [0],
    "num_attention_heads": [7, 0],
    "num_kv_heads": [5, 0, None],
    "norm_eps": [0, -1e-5, "1e-5", math.nan, math.inf, None],
    "ffn_dim_multiplier": [0, -1.0, math.inf, "half"],
    "axes_dim_rope": [[32, 32], [32, 32, 33], [31, 33, 32], [32, 32, 32.0], "32", 32, None],
    "axes_lens": [[300, 512], [300, 512, 0], 300, None],
    "out_channels": [8, "16"],
}
CASES = [(field, value) for field, values in BAD.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{f}={v!r}" for f, v in CASES])
def test_a_bad_value_is_named_in_one_line(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError) as error:
        load_transformer_config(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path.name}/config.json: ")
    assert field in message
    assert "\n" not in message


def test_the_sentence_says_what_is_allowed():
    with pytest.raises(ValueError, match="num_attention_heads 24 does not divide hidden_size 2300"):
        NextDiTConfig.from_dict({"hidden_size": 2300})
    with pytest.raises(ValueError, match="num_layers 0 must be a positive integer"):
        NextDiTConfig.from_dict({"num_layers": 0})
    with pytest.raises(ValueError, match=r"axes_dim_rope \[32, 32, 34\] must .* dimension 96"):
        NextDiTConfig.from_dict({"axes_dim_rope": [32, 32, 34]})


def test_unknown_keys_are_refused_and_bookkeeping_is_not():
    with pytest.raises(ValueError, match=r"unknown key 'hidden_sise'; known are .*hidden_size"):
        NextDiTConfig.from_dict({"hidden_sise": 48})
    NextDiTConfig.from_dict({"_class_name": "X", "_diffusers_version": "0"})
