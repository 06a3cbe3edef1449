"""`lumina generate --preset official|diffusers` on the bundled checkpoint."""

import json

import numpy as np
import pytest
from PIL import Image

from server import cli
from server.protocol import PNG_TEXT_KEY

COMMAND = ["generate", "a red circle above a blue square", "--seed", "3"]
NEGATIVE = ["--negative-prompt", "a green star"]

# What docs/model.md says of each preset; the bundled checkpoint's own shift is 3.
SETTINGS = {
    "official": {
        "sampler": "midpoint", "time_grid": "official", "num_inference_steps": 18, "shift": 6.0,
        "guidance_scale": 4.0, "cfg_trunc_t": 0.25, "cfg_renorm": "global",
        "cfg_renorm_scale": 1.0, "negative_template": True, "cache": "off",
    },
    "diffusers": {
        "sampler": "euler", "time_grid": "diffusers", "num_inference_steps": 30, "shift": 3.0,
        "guidance_scale": 4.0, "cfg_trunc_ratio": 1.0, "cfg_renorm": "row",
        "cfg_renorm_scale": 1.0, "negative_template": False, "cache": "off",
    },
}  # fmt: skip


def draw(tmp_path, *options):
    """The picture's pixels and what it says made it."""
    file = tmp_path / "a.png"
    assert cli.main([*COMMAND, *NEGATIVE, "-o", str(file), *options]) == 0
    with Image.open(file) as picture:
        return np.asarray(picture).copy(), json.loads(picture.info[PNG_TEXT_KEY])


@pytest.mark.slow
def test_a_preset_draws_what_its_settings_draw_and_the_two_differ(tmp_path, capsys):
    pictures = {}
    for name, settings in SETTINGS.items():
        pictures[name], said = draw(tmp_path, "--preset", name)
        spelt = [f"--set={field}={json.dumps(value)}" for field, value in settings.items()]
        again, _ = draw(tmp_path, *spelt)
        assert np.array_equal(pictures[name], again)
        assert {field: said[field] for field in settings} == settings
        assert said["preset"] == name
    assert (pictures["official"] != pictures["diffusers"]).mean() > 0.2
    told = capsys.readouterr().out
    # 17 intervals at two evaluations, of which 14 are before t = 0.25; 30 steps, all guided.
    assert "34 steps (57 evaluations with guidance)" in told
    assert "30 steps (60 evaluations with guidance)" in told


@pytest.mark.slow
def test_inspect_lists_the_presets_of_the_bundled_checkpoint(capsys):
    assert cli.main(["inspect", str(cli.BUNDLED_MODEL)]) == 0
    told = capsys.readouterr().out.splitlines()
    for name, settings in SETTINGS.items():
        (line,) = (text for text in told if text.startswith(f"preset {name}"))
        for field, value in settings.items():
            assert f"{field} {value}" in line
