import re

import pytest
import torch
import yaml

from model.config import NextDiTConfig
from model.next_dit import NextDiT
from trainer.config import RECIPES, Recipe, load_recipe
from trainer.stages.smoke import shrink

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture
def recipe_file(tmp_path):
    """Writes the demo recipe with changes, and returns the file."""

    def write(change):
        data = yaml.safe_load((RECIPES / "demo.yaml").read_text(encoding="utf-8"))
        change(data)
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        return str(path)

    return write


def test_the_demo_recipe_is_shipped():
    assert "demo" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid_and_survive_being_written(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    written = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert Recipe.model_validate(yaml.safe_load(written)) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_smoke_version_is_valid_and_small(name):
    recipe = load_recipe(name)
    small = shrink(recipe)
    assert Recipe.model_validate(small.model_dump(mode="json")) == small
    stages = [small.vae, small.text, *small.diffusion, *small.flow]
    assert max(stage.steps for stage in stages) <= 10
    assert small.transformer_stages == recipe.transformer_stages
    assert load_recipe(name) == recipe


def test_overrides_are_read_as_yaml():
    recipe = load_recipe(
        "demo",
        [
            "seed=7",
            "vae.optimizer.lr=0.5",
            "vae.sizes.0.width=32",
            "diffusion.-1.name=last",
            "diffusion.0.levels={short: 1.0}",
        ],
    )
    assert (recipe.seed, recipe.vae.optimizer.lr) == (7, 0.5)
    assert (recipe.vae.sizes[0].width, recipe.diffusion[-1].name) == (32, "last")
    assert recipe.diffusion[0].levels == {"short": 1.0}
    assert load_recipe("demo").seed != 7


BAD_OVERRIDES = {
    "seed": "--set 'seed' must look like key.path=value",
    "vae.stepz=3": "demo.yaml: unknown key 'vae.stepz'; did you mean 'steps'?",
    "vae.optimizer.learning=1": "unknown key 'vae.optimizer.learning'",
    "vae.optimizer.emadecay=1": "did you mean 'ema_decay'?",
    "diffusion.0.batch_token=64": "did you mean 'batch_tokens'?",
    "diffusion.0.sizes.0.widht=64": "did you mean 'width'?",
    "sede=1": "unknown key 'sede'; did you mean 'seed'?",
    "vea.steps=3": "--set 'vea.steps' names nothing in the recipe",
    "diffusion.99.steps=3": "--set 'diffusion.99.steps' names nothing in the recipe",
    "diffusion.first.steps=3": "--set 'diffusion.first.steps' names nothing in the recipe",
    "seed.x=3": "--set 'seed.x' names nothing in the recipe",
    "name.x.y=3": "--set 'name.x.y' names nothing in the recipe",
    "seed=[": "--set 'seed=[': the value is not valid YAML",
    "seed=abc": "seed: Input should be a valid integer (got 'abc')",
    "vae.steps=0": "vae.steps: Input should be greater than or equal to 1 (got '0')",
    "vae.steps=1.5": "vae.steps: Input should be a valid integer",
    "vae.steps=true": "vae.steps: Input should be a valid integer",
    "vae.optimizer.ema_decay=1.5": "vae.optimizer.ema_decay: Input should be less than",
    "vae.optimizer.name=sgd": "vae.optimizer.name: Input should be 'adamw' or 'muon' (got 'sgd')",
    "vae.sizes=64": "vae.sizes: Input should be a valid list",
    "diffusion.0.levels={long: 1}": "diffusion.0.levels: level 'long' is unknown; known are",
    "diffusion.0.levels={}": "diffusion.0.levels: the weights must not be negative",
    "diffusion.0.templates={real: -1}": "diffusion.0.templates: the weights must not be negative",
    "transformer.num_layer=2": "transformer: unknown key 'num_layer'",
    "transformer.num_kv_heads=5": "transformer: num_kv_heads 5 does not divide",
    "generation.defaults={}": "generation: defaults.width must be a number of pixels",
    "generation=3": "generation: Input should be a valid dictionary",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_is_explained_in_one_line(override):
    with pytest.raises(ValueError, match=re.escape(BAD_OVERRIDES[override])) as error:
        load_recipe("demo", [override])
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)


def test_a_missing_key_is_named(recipe_file):
    path = recipe_file(lambda data: data["vae"].pop("steps"))
    with pytest.raises(ValueError, match=r"mine\.yaml: vae\.steps: Field required"):
        load_recipe(path)


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(ValueError, match=r"recipe 'dem' is neither a file nor one of: .*demo"):
        load_recipe("dem")


def test_files_that_are_no_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    for content, expected in (
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "must hold a mapping"),
        ("", "must hold a mapping"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"^mine\.yaml: {expected}") as error:
            load_recipe(str(path))
        assert "\n" not in str(error.value)


def test_the_paper_recipes_have_the_papers_numbers():
    """arXiv 2503.21758, table 3, and the released training code."""
    for name, resolution, steps, images, shift, auxiliary in (
        ("lumina2-stage1-256", 256, 144_000, 1024, 0.5, 0.0),
        ("lumina2-stage2-1024", 1024, 40_000, 512, 1.15, 1.0),
        ("lumina2-stage3-hq", 1024, 15_000, 512, 1.15, 1.0),
    ):
        recipe = load_recipe(name)
        (stage,) = recipe.flow
        assert (stage.resolution, stage.steps, stage.batch_images) == (resolution, steps, images)
        assert (stage.timestep_shift, stage.auxiliary_weight) == (shift, auxiliary)
        assert (stage.caption_dropout, stage.recompute, stage.precision) == (0.1, True, "bf16")
        optimizer = stage.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.betas) == ("adamw", 2e-4, (0.9, 0.95))
        assert (optimizer.eps, optimizer.clip, optimizer.ema_decay) == (1e-15, 2.0, 0.95)
        assert (optimizer.warmup, optimizer.cooldown) == (0, 0.0)
        assert (recipe.seed, recipe.shift) == (20241207, 6.0)
        with torch.device("meta"):
            dit = NextDiT(NextDiTConfig.from_dict({**recipe.transformer, "cap_feat_dim": 2304}))
        assert sum(p.numel() for p in dit.parameters()) == 2_609_769_152


def test_stages_of_a_recipe_are_checked_together():
    for override, expected in (
        ("flow=[]", "diffusion or flow must have a stage"),
        ("flow.0.domains={real: real}", "the domain 'default' needs a template"),
        ("flow.0.domains={default: reel}", "template 'reel' is unknown; known are"),
        ("flow.0.languages={}", "the weights must not be negative"),
        ("flow.0.micro_token=4", "did you mean 'micro_tokens'?"),
        ("data.paht=x", "did you mean 'path'?"),
        ("previews.evry=1", "did you mean 'every'?"),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)) as error:
            load_recipe("lumina2-stage1-256", [override])
        assert "\n" not in str(error.value)
