import math

import pytest

from model.request import MAX_SEED, GenerationRequest, check_settings
from model.templates import Panel


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
        ("prompt", "caf\udce9", "text without lone surrogates"),
        ("negative_template", 1, "true or false"),
        ("panel", {"position": "middle"}, "'lower half', 'upper half', 'left half', 'right half'"),
        ("panel", {"position": []}, "'position'"),
        ("panel", {"content": ""}, "text of 1 to 100 characters"),
        ("panel", {"half": "lower"}, "'position'"),
        ("panel", "depth map", "'content'"),
        ("sampler", "heun", "'euler' or 'midpoint' or 'dpm'"),
        ("sigmas", [], "a list of 1 to 1000 numbers"),
        ("sigmas", [1.1, 0.5], "the first at most 1"),
        ("sigmas", [1.0, 0.5, 0.5], "below the one before"),
        ("sigmas", [0.5, 1.0], "below the one before"),
        ("sigmas", [1.0, 0.0], "the last that much above 0"),
        ("sigmas", [1.0, math.nan], "numbers"),
        ("sigmas", [True], "numbers"),
        ("sigmas", 0.5, "a list"),
        ("sigmas", [0.9999 - k * 0.0009 for k in range(1001)], "1 to 1000"),
        ("shift", 0, "above 0"),
        ("shift", math.inf, "above 0"),
        ("time_grid", "linear", "'diffusers' or 'official'"),
        ("cfg_trunc_ratio", 1.5, "from 0 to 1"),
        ("cfg_trunc_t", -0.1, "from 0 to 100"),
        ("cfg_renorm", ["row"], "'none' or 'global' or 'row'"),
        ("cfg_renorm_scale", -1.0, "from 0 to 100"),
        ("cache", "turbo", "'off', 'balanced', 'fast' or a number from 0 to 10"),
        ("cache", 10.5, "a number from 0 to 10"),
        ("cache", math.nan, "a number from 0 to 10"),
        ("cache", False, "a number from 0 to 10"),
        ("cache", ["fast"], "a number from 0 to 10"),
    ],
)
def test_bad_values_are_named(field, value, allowed):
    with pytest.raises(ValueError, match="is not allowed: give") as error:
        GenerationRequest(**{"prompt": "a", field: value})
    message = str(error.value)
    assert message.startswith(field)
    assert allowed in message
    assert "\n" not in message
    assert len(message) < 260


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 16, "height": 8192},
        {"seed": MAX_SEED},
        {"guidance_scale": 1},
        {"negative_prompt": ""},
        {"cfg_trunc_t": 100.0},
        {"sigmas": [1, 0.99999, 0.00001]},
        {"sigmas": (0.3,), "sampler": "dpm"},
        {"panel": {}, "system_prompt": "panel"},
        {"panel": Panel("right half", "sketch")},
    ],
)
def test_edges_are_allowed(settings):
    GenerationRequest("a", **settings)


def test_only_one_truncation_rule():
    with pytest.raises(ValueError, match="cfg_trunc_ratio and cfg_trunc_t"):
        GenerationRequest("a", cfg_trunc_ratio=0.5, cfg_trunc_t=0.25)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sigmas": [1.0], "num_inference_steps": 3}, "num_inference_steps has no say beside"),
        ({"sigmas": [1.0], "shift": 3.0}, "shift has no say beside sigmas"),
        ({"sigmas": [1.0], "time_grid": "official"}, "time_grid has no say beside sigmas"),
        ({"sampler": "dpm", "time_grid": "diffusers"}, "time_grid 'diffusers' is not allowed with"),
        ({"panel": {}, "system_prompt": "real"}, "panel fills the template 'panel'"),
    ],
)
def test_settings_that_contradict_each_other(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        GenerationRequest("a", **settings)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=sentence):
        check_settings(settings)


def test_unknown_setting_names_the_nearest():
    with pytest.raises(ValueError, match=r"'num_steps'.*'num_inference_steps'"):
        check_settings({"num_steps": 3})
