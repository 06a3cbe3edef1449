import json

import pytest

from model.cache_config import CacheConfig, SkipSchedule, evaluation_timesteps, load_cache_config
from model.checkpoint import CheckpointError
from model.samplers import make_sampler

SCHEDULE = {
    "sampler": "euler",
    "time_grid": "diffusers",
    "num_inference_steps": 6,
    "shift": 6.0,
    "computed": "110101",
}
CONTENT = {
    "coefficients": [0, 0, 1.5, 1.0, 0.0],
    "fit": {"pairs": 100},
    "presets": {"balanced": {"schedules": [SCHEDULE], "measured": {"speed": 1.5}}},
}


def write(folder, content):
    (folder / "teacache.json").write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )
    return folder


def with_schedule(**changes):
    schedule = {k: v for k, v in (SCHEDULE | changes).items() if v is not ...}
    return CONTENT | {"presets": {"balanced": {"schedules": [schedule]}}}


def test_a_folder_without_the_file_has_no_cache(tmp_path):
    assert load_cache_config(tmp_path) is None


def test_the_file_is_read(tmp_path):
    config = load_cache_config(write(tmp_path, CONTENT))
    assert config.coefficients == (0.0, 0.0, 1.5, 1.0, 0.0)
    (schedule,) = config.schedules["balanced"]
    assert schedule.computed == (True, True, False, True, False, True)
    assert schedule.timesteps == pytest.approx([i / (36 - 5 * i) for i in range(6)])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "teacache.json: not readable as JSON"),
        ("[]", "teacache.json: must hold a JSON object"),
        ({"coeficients": []}, "unknown key 'coeficients' (did you mean 'coefficients'?)"),
        ({"coefficients": [1, 2]}, "coefficients must be 5 numbers"),
        ({"coefficients": [1, 2, 3, 4, True]}, "coefficients must be 5 numbers"),
        ('{"coefficients": [1, 2, 3, 4, NaN]}', "coefficients must be 5 numbers"),
        ({"presets": []}, "presets must be a JSON object"),
        ({"presets": {"quick": {}}}, "unknown preset 'quick': only balanced and fast are known"),
        ({"presets": {"fast": []}}, "preset 'fast' must be a JSON object"),
        ({"presets": {"fast": {"schedule": []}}}, "preset 'fast': unknown key 'schedule'"),
        ({"presets": {"fast": {"schedules": []}}}, "schedules must be a list of at least one"),
        (with_schedule(sampler="heun"), "schedule 1: sampler 'heun' is not allowed"),
        (with_schedule(shift=...), "schedule 1: shift None is not allowed"),
        (with_schedule(time_grid=...), "schedule 1: time_grid None is not allowed"),
        (with_schedule(steps=4), "schedule 1: unknown key 'steps'"),
        (with_schedule(computed="11010"), "computed '11010' is not allowed: give 6 letters"),
        (with_schedule(computed="010101"), "the first and the last are 1"),
        (with_schedule(computed="11x101"), "computed '11x101' is not allowed"),
        (with_schedule(computed=None), "computed 'None' is not allowed"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path, content, sentence):
    with pytest.raises(CheckpointError) as caught:
        load_cache_config(write(tmp_path, content))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path.name}/teacache.json") or str(
        caught.value
    ).startswith("teacache.json")


def schedule(sampler="euler", steps=12, shift=6.0, letters="110101010101"):
    solver = make_sampler(sampler, time_grid="diffusers", num_inference_steps=steps, shift=shift)
    return SkipSchedule(
        sampler, evaluation_timesteps(solver), tuple(x == "1" for x in letters), shift
    )


def letters(computed):
    return "".join("01"[each] for each in computed)


@pytest.mark.parametrize("pattern", ["110101010101", "111100001001", "100000000001", "1" * 12])
def test_on_its_own_timesteps_a_schedule_is_itself(pattern):
    measured = schedule(letters=pattern)
    assert letters(measured.stretched(measured.timesteps)) == pattern


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 24, 50, 100])
def test_a_stretched_schedule_keeps_its_share(steps, shift):
    solver = make_sampler("euler", time_grid="diffusers", num_inference_steps=steps, shift=shift)
    computed = schedule().stretched(evaluation_timesteps(solver))
    assert len(computed) == steps
    assert computed[0]
    assert computed[-1]
    # 7 of 12 compute; the forced ends and rounding may add two.
    assert sum(computed) <= steps * 7 / 12 + 2
    if shift == 6.0:
        assert sum(computed) >= steps * 7 / 12 - 1


def test_stretching_keeps_the_place_of_the_computed_steps():
    early = schedule(letters="111111000001")
    computed = early.stretched([i / (24 * 6 - 5 * i) for i in range(24)])
    assert letters(computed) == "1" * 12 + "0" * 10 + "11"


def test_midpoint_and_dpm_have_a_letter_for_every_evaluation():
    for name, count in (("midpoint", 16), ("dpm", 8)):
        solver = make_sampler(name, time_grid="diffusers", num_inference_steps=8, shift=6.0)
        config = CacheConfig(None, {"fast": (schedule(),)})
        computed = config.plan("fast", name, solver, 6.0)
        assert len(computed) == count
        assert 0 < computed.count(False) < count


def test_the_nearest_schedule_of_the_same_solver_is_taken():
    offered = {
        "euler": schedule(letters="1" * 12),
        "short": schedule(steps=4, letters="1001"),
        "dpm": schedule("dpm", steps=12, letters="100000000001"),
        "low": schedule(shift=1.0, letters="111111100001"),
    }
    config = CacheConfig(None, {"fast": tuple(offered.values())})

    def plan(name, steps, shift=6.0):
        solver = make_sampler(name, time_grid="diffusers", num_inference_steps=steps, shift=shift)
        return letters(config.plan("fast", name, solver, shift))

    assert plan("euler", 12) == "1" * 12
    assert plan("euler", 4) == "1001"
    assert plan("euler", 12, 1.0) == "111111100001"
    assert plan("dpm", 4) == "1001"
    assert plan("dpm", 12) == "100000000001"
    solver = make_sampler("euler", sigmas=[1.0, 18 / 19, 6 / 7, 2 / 3])
    assert letters(config.plan("fast", "euler", solver, None)) == "1001"
    assert config.plan("balanced", "euler", solver, None) is None
