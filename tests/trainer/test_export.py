import pytest
import torch
import yaml

from trainer import checkpoint
from trainer.config import load_recipe
from trainer.distributed import World
from trainer.export import export_run


@pytest.fixture
def run(tmp_path):
    """A run that has only just begun."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = load_recipe("demo").model_dump(mode="json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "revision.txt").write_text("unknown\n")
    return folder


def refuse(expected, run, out) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        export_run(run, out)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_empty_is_refused_and_kept(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    refuse(r"--out '.*out' is not empty; choose a new folder or empty it", run, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_what_is_no_run_is_refused(tmp_path):
    refuse("is no training run: it has no recipe.yaml", tmp_path / "nowhere", tmp_path / "out")
    refuse("is no training run: it has no recipe.yaml", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_transformer_checkpoint_is_refused(run, tmp_path):
    checkpoint.save(run / "vae", 3, {"ema.x": torch.zeros(1)}, {}, World())
    refuse("has no transformer stage with a checkpoint yet", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_recipe_is_refused(run, tmp_path):
    recipe = load_recipe("demo").model_dump(mode="json")
    del recipe["vae"]["steps"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refuse(r"recipe\.yaml: vae\.steps: Field required", run, tmp_path / "out")


def test_a_run_that_began_elsewhere_needs_init(run, tmp_path):
    """It has no autoencoder of its own."""
    name = load_recipe("demo").diffusion[0].name
    checkpoint.save(run / name, 3, {"ema.x": torch.zeros(1)}, {}, World())
    refuse("config.json: the file is missing", run, tmp_path / "out")
