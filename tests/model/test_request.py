import math

import pytest

from model.request import MAX_SEED, GenerationRequest, check_settings


def test_everything_but_the_prompt_is_open():
    request = GenerationRequest("a red circle")
    assert request.num_images == 1
    assert request.width is None
    assert request.seed is None


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("prompt", "", "text of 1 to 4096 characters"),
        ("prompt", "x" * 4097, "of 4097 characters"),
        ("prompt", None, "text of 1 to 4096"),
        ("negative_prompt", 3, "text of 0 to 4096"),
        ("width", 100, "a multiple of 16 from 16 to 8192"),
        ("width", 0, "a multiple of 16"),
        ("height", 64.0, "a multiple of 16"),
        ("height", "64", "a multiple of 16"),
        ("num_images", 9, "an integer from 1 to 8"),
        ("num_images", None, "an integer from 1 to 8"),
        ("num_inference_steps", 0, "an integer from 1 to 1000"),
        ("num_inference_steps", True, "an integer"),
        ("guidance_scale", math.nan, "a number from 0 to 100"),
        ("guidance_scale", "4", "a number from 0 to 100"),
        ("seed", -1, "an integer from 0"),
        ("seed", MAX_SEED + 1, "an integer from 0"),
        ("sampler", "heun", "'euler'"),
        ("shift", 0, "above 0"),
        ("shift", math.inf, "above 0"),
        ("time_grid", "linear", "'diffusers' or 'official'"),
        ("cfg_trunc_ratio", 1.5, "from 0 to 1"),
        ("cfg_trunc_t", -0.1, "from 0 to 100"),
        ("cfg_renorm", ["row"], "'none' or 'global' or 'row'"),
        ("cfg_renorm_scale", -1.0, "from 0 to 100"),
    ],
)
def test_bad_values_are_named(field, value, allowed):
    with pytest.raises(ValueError, match="is not allowed: give") as error:
        GenerationRequest(**{"prompt": "a", field: value})
    message = str(error.value)
    assert message.startswith(field)
    assert allowed in message
    assert "\n" not in message
    assert len(message) < 200


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 16, "height": 8192},
        {"seed": MAX_SEED},
        {"guidance_scale": 1},
        {"negative_prompt": ""},
        {"cfg_trunc_t": 100.0},
    ],
)
def test_edges_are_allowed(settings):
    GenerationRequest("a", **settings)


def test_only_one_truncation_rule():
    with pytest.raises(ValueError, match="cfg_trunc_ratio and cfg_trunc_t"):
        GenerationRequest("a", cfg_trunc_ratio=0.5, cfg_trunc_t=0.25)


def test_unknown_setting_names_the_nearest():
    with pytest.raises(ValueError, match=r"'num_steps'.*'num_inference_steps'"):
        check_settings({"num_steps": 3})
