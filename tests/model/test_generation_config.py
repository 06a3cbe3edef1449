import pytest

from model.checkpoint import CheckpointError
from model.generation_config import load_generation_config
from model.request import MAX_SEED, GenerationRequest
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


def test_limits(tmp_path):
    config = load(tmp_path, limits={"min_size": 64, "max_size": 128, "max_steps": 50})
    limits = config.limits
    assert (limits.min_size, limits.max_size, limits.max_steps) == (64, 128, 50)
    assert limits.size_multiple == 16


def test_unknown_preset_names_the_offer(tmp_path):
    config = load(tmp_path, presets={"quick": {}})
    with pytest.raises(ValueError, match=r"preset 'fast' .* this checkpoint offers 'quick'"):
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
    ],
)
def test_faults_are_one_line(tmp_path, sections, fault):
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, **sections)
    assert str(error.value).startswith("generation_config.json: ")
    assert fault in str(error.value)
    assert "\n" not in str(error.value)
