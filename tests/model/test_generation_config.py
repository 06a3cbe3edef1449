import pytest

from model.checkpoint import CheckpointError
from model.generation_config import load_generation_config
from model.request import MAX_SEED, GenerationRequest
from model.templates import Panel
from tests.tiny_checkpoint import write_generation_config


def load(folder, **sections):
    if sections:
        write_generation_config(folder, **sections)
    return load_generation_config(folder, shift=6.0, trained_size=64)


def test_without_a_file_diffusers_defaults_hold(tmp_path):
    resolved = load(tmp_path).resolve(GenerationRequest("a"))
    assert (resolved.width, resolved.height) == (64, 64)
    assert (resolved.num_inference_steps, resolved.guidance_scale) == (30, 4.0)
    assert (resolved.sampler, resolved.time_grid, resolved.shift) == ("euler", "diffusers", 6.0)
    assert (resolved.system_prompt, resolved.negative_prompt) == ("real", "")
    assert (resolved.cfg_trunc_ratio, resolved.cfg_trunc_t) == (None, None)
    assert (resolved.cfg_renorm, resolved.cfg_renorm_scale) == ("row", 1.0)


def test_request_beats_preset_beats_file(tmp_path):
    config = load(
        tmp_path,
        defaults={"num_inference_steps": 20, "guidance_scale": 3.0, "shift": 2.0},
        presets={"quick": {"num_inference_steps": 8, "guidance_scale": 2.0}},
    )
    resolved = config.resolve(GenerationRequest("a", preset="quick", guidance_scale=5.0))
    assert resolved.guidance_scale == 5.0
    assert resolved.num_inference_steps == 8
    assert resolved.shift == 2.0
    assert resolved.preset == "quick"


def test_one_truncation_rule_replaces_the_other(tmp_path):
    config = load(tmp_path, defaults={"cfg_trunc_t": 0.25})
    assert config.resolve(GenerationRequest("a")).cfg_trunc_t == 0.25
    resolved = config.resolve(GenerationRequest("a", cfg_trunc_ratio=0.5))
    assert (resolved.cfg_trunc_ratio, resolved.cfg_trunc_t) == (0.5, None)


def test_a_seed_is_drawn_when_absent(tmp_path):
    config = load(tmp_path)
    seeds = {config.resolve(GenerationRequest("a")).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert config.resolve(GenerationRequest("a", seed=0)).seed == 0


def test_the_built_in_presets_are_there_for_every_checkpoint(tmp_path):
    config = load(tmp_path, defaults={"shift": 2.0}, presets={"fast": {"num_inference_steps": 8}})
    assert list(config.presets) == ["official", "diffusers", "fast"]
    assert config.presets["official"] == {
        "sampler": "midpoint", "time_grid": "official", "num_inference_steps": 18, "shift": 6.0,
        "guidance_scale": 4.0, "cfg_trunc_t": 0.25, "cfg_renorm": "global",
        "cfg_renorm_scale": 1.0, "negative_template": True, "cache": "off",
    }  # fmt: skip
    assert config.presets["diffusers"] == {
        "sampler": "euler", "time_grid": "diffusers", "num_inference_steps": 30, "shift": 6.0,
        "guidance_scale": 4.0, "cfg_trunc_ratio": 1.0, "cfg_renorm": "row",
        "cfg_renorm_scale": 1.0, "negative_template": False, "cache": "off",
    }  # fmt: skip


def test_presets_leave_the_checkpoint_its_own(tmp_path):
    """Sizes and texts are the checkpoint's; every other default gives way."""
    config = load(
        tmp_path,
        defaults={
            "width": 96, "height": 48, "system_prompt": "base", "negative_prompt": "grey",
            "sampler": "dpm", "num_inference_steps": 9, "shift": 3.0, "cfg_trunc_ratio": 0.5,
            "cfg_renorm": "none", "guidance_scale": 2.0,
        },
    )  # fmt: skip
    for name in ("official", "diffusers"):
        resolved = config.resolve(GenerationRequest("a", preset=name))
        assert (resolved.width, resolved.height) == (96, 48)
        assert (resolved.system_prompt, resolved.negative_prompt) == ("base", "grey")
        assert (resolved.shift, resolved.guidance_scale) == (6.0, 4.0)
    assert config.resolve(GenerationRequest("a", preset="official")).cfg_trunc_ratio is None


def test_built_in_presets_keep_to_the_limits(tmp_path):
    config = load(tmp_path, limits={"max_steps": 8})
    for name in ("official", "diffusers"):
        assert config.resolve(GenerationRequest("a", preset=name)).num_inference_steps == 8
    assert config.resolve(GenerationRequest("a")).num_inference_steps == 8


def test_sigmas_and_the_named_schedule_replace_each_other(tmp_path):
    config = load(tmp_path, presets={"own": {"sigmas": [1, 0.6, 0.2]}})
    for request in (
        GenerationRequest("a", preset="own"),
        GenerationRequest("a", preset="official", sigmas=[1, 0.6, 0.2]),
    ):
        resolved = config.resolve(request)
        assert resolved.sigmas == (1.0, 0.6, 0.2)
        assert (resolved.num_inference_steps, resolved.shift, resolved.time_grid) == (None,) * 3
    resolved = config.resolve(GenerationRequest("a", preset="own", num_inference_steps=5))
    assert (resolved.sigmas, resolved.num_inference_steps) == (None, 5)


def test_dpm_takes_an_inherited_time_grid_for_nothing_and_refuses_a_given_one(tmp_path):
    config = load(tmp_path)
    resolved = config.resolve(GenerationRequest("a", preset="official", sampler="dpm"))
    assert (resolved.sampler, resolved.time_grid, resolved.shift) == ("dpm", None, 6.0)
    own = load(tmp_path, defaults={"sampler": "dpm"})
    with pytest.raises(ValueError, match="time_grid 'official' is not allowed with sampler 'dpm'"):
        own.resolve(GenerationRequest("a", time_grid="official"))


def test_panel_selects_its_template_and_another_template_drops_it(tmp_path):
    config = load(tmp_path, presets={"edges": {"panel": {"content": "edge map"}}})
    resolved = config.resolve(GenerationRequest("a", panel={"position": "left half"}))
    assert (resolved.system_prompt, resolved.panel) == ("panel", Panel("left half", "depth map"))
    resolved = config.resolve(GenerationRequest("a", preset="edges"))
    assert resolved.panel == Panel("lower half", "edge map")
    assert config.resolve(GenerationRequest("a", system_prompt="panel")).panel == Panel()
    resolved = config.resolve(GenerationRequest("a", preset="edges", system_prompt="base"))
    assert (resolved.system_prompt, resolved.panel) == ("base", None)


def test_limits(tmp_path):
    config = load(tmp_path, limits={"min_size": 64, "max_size": 128, "max_steps": 50})
    limits = config.limits
    assert (limits.min_size, limits.max_size, limits.max_steps) == (64, 128, 50)
    assert limits.size_multiple == 16


def test_unknown_preset_names_the_offer(tmp_path):
    config = load(tmp_path, presets={"quick": {}})
    with pytest.raises(ValueError, match=r"preset 'fast' .*'official', 'diffusers', 'quick'$"):
        config.resolve(GenerationRequest("a", preset="fast"))


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"default": {}}, "unknown key 'default' (did you mean 'defaults'?)"),
        ({"defaults": []}, "defaults must be a JSON object"),
        ({"defaults": {"steps": 3}}, "unknown setting 'steps'"),
        ({"defaults": {"seed": 3}}, "unknown setting 'seed'"),
        ({"defaults": {"width": 100}}, "width 100 is not allowed"),
        ({"presets": {"a": {"shift": -1}}}, "preset 'a': shift -1 is not allowed"),
        ({"presets": {"a": 3}}, "preset 'a' must be a JSON object"),
        ({"limits": {"max": 3}}, "limits: unknown key 'max'"),
        ({"limits": {"max_steps": 0}}, "max_steps 0 is not allowed"),
        ({"limits": {"size_multiple": 24}}, "give a multiple of 16"),
        ({"limits": {"min_size": 512, "max_size": 256}}, "min_size 512 is above max_size 256"),
        ({"limits": {"min_size": 128}}, "default width 64 is outside the limits 128 to 128"),
        (
            {"defaults": {"num_inference_steps": 60}, "limits": {"max_steps": 50}},
            "the default num_inference_steps 60 is above the limit max_steps 50",
        ),
        (
            {"presets": {"a": {"num_inference_steps": 60}}, "limits": {"max_steps": 50}},
            "preset 'a': num_inference_steps 60 is above the limit max_steps 50",
        ),
        (
            {"presets": {"a": {"sigmas": [1, 0.5, 0.2]}}, "limits": {"max_steps": 2}},
            "preset 'a': number of sigmas 3 is above the limit max_steps 2",
        ),
        ({"presets": {"a": {"width": 256}}}, "preset 'a': width 256 is outside the limits 16 to"),
        (
            {"presets": {"a": {"height": 80}}, "limits": {"size_multiple": 32}},
            "preset 'a': height 80 is no multiple of 32",
        ),
        ({"presets": {"official": {}}}, "preset 'official' is built in: give yours another name"),
        ({"presets": {"diffusers": {}}}, "preset 'diffusers' is built in"),
        ({"presets": {"a": {"sampler": "dpm", "time_grid": "official"}}}, "preset 'a': time_grid"),
        ({"presets": {"a": {"sigmas": [1], "shift": 2}}}, "preset 'a': shift has no say beside"),
        ({"defaults": {"sigmas": [0.5, 1]}}, "defaults: sigmas [0.5, 1] is not allowed"),
        ({"defaults": {"panel": {"half": "left"}}}, "defaults: panel {'half': 'left'} is not"),
    ],
)
def test_faults_are_one_line(tmp_path, sections, fault):
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, **sections)
    assert str(error.value).startswith("generation_config.json: ")
    assert fault in str(error.value)
    assert "\n" not in str(error.value)
