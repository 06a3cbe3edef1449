"""An official single file becomes a checkpoint that draws the same picture, by commands alone."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from model.next_dit import NextDiT
from server import cli
from tests.official import official_state
from tests.tiny_checkpoint import make_tiny_checkpoint

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def theirs(original):
    return load_file(original / WEIGHTS)


@pytest.fixture
def single(theirs, tmp_path):
    path = tmp_path / "consolidated.00-of-01.safetensors"
    save_file(official_state(theirs), path)
    return path


@pytest.fixture
def comfy(theirs, tmp_path):
    """All in one file, as ComfyUI keeps it."""
    path = tmp_path / "lumina_2.safetensors"
    other = {"vae.decoder.conv_in.weight": torch.zeros(3)}
    save_file(official_state(theirs, "model.diffusion_model.") | other, path)
    return path


def part_options(folder):
    return [
        "--vae", str(folder / "vae"), "--text-encoder", str(folder / "text_encoder"),
        "--tokenizer", str(folder / "tokenizer"),
    ]  # fmt: skip


def draw(folder, output):
    argv = ["generate", "a red circle", "-o", str(output), "--model", str(folder), "--seed", "3",
            "--width", "64", "--height", "48", "--steps", "3"]  # fmt: skip
    assert cli.main(argv) == 0
    with Image.open(output) as picture:
        return picture.convert("RGB").tobytes()


@torch.inference_mode()
def velocity(folder):
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, 8, 6, generator=generator)]
    prompts = [torch.randn(5, 32, generator=generator)]
    dit = NextDiT.from_pretrained(folder / "transformer")
    return dit(latents, torch.tensor([0.4]), prompts)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "comfy"])
def test_convert_inspect_generate(original, kind, request, tmp_path, capsys):
    single = request.getfixturevalue(kind)
    out = tmp_path / "converted"
    assert cli.main(["inspect", str(single)]) == 0
    told = capsys.readouterr().out
    assert "official" in told
    assert "F32" in told
    assert "ASSUMED" in told
    assert "axes_dim_rope [4, 4, 4]" in told

    assert cli.main(["convert", str(single), str(out), *part_options(original)]) == 0
    told = capsys.readouterr()
    assert "ASSUMED" in told.out
    assert "still missing" not in told.out
    assert told.err == ""  # no progress bar where there is no terminal

    assert cli.main(["inspect", str(out)]) == 0
    told = capsys.readouterr().out
    assert "F32, diffusers names" in told
    assert "no named size" in told
    assert "verified" in told

    assert torch.equal(velocity(out), velocity(original))
    assert draw(out, tmp_path / "a.png") == draw(original, tmp_path / "b.png")


@pytest.mark.slow
def test_there_and_back_is_the_same_file(original, theirs, tmp_path, capsys):
    back = tmp_path / "official.safetensors"
    argv = ["convert", str(original / "transformer"), str(back), "--to", "official"]
    assert cli.main(argv) == 0
    expected, found = official_state(theirs), load_file(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert cli.main(["inspect", str(original / "transformer")]) == 0
    assert "diffusers" in capsys.readouterr().out


def test_incomplete_results_say_what_is_missing(single, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["convert", str(single), str(out), "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "still missing: vae/, text_encoder/, tokenizer/" in told
    assert {t.dtype for t in load_file(out / WEIGHTS).values()} == {torch.bfloat16}
    assert cli.main(["inspect", str(out)]) == 1
    assert "vae/: the folder is missing" in capsys.readouterr().err


def one_line(capsys):
    text = capsys.readouterr().err
    assert text.startswith("lumina: ")
    assert text.count("\n") == 1
    return text


def test_misuse_is_exit_code_2(single, original, tmp_path, capsys):
    file = str(single)
    cases = [
        ([], "source"),
        ([file], "target"),
        (["/no/such/file", "out"], "/no/such/file"),
        ([file, "out", "--dtype", "int8"], "--dtype"),
        ([file, "out", "--like", "/no/where"], "--like /no/where"),
        ([file, "out", "--to", "official"], ".safetensors"),
        ([file, "a.safetensors", "--to", "official", "--vae", "x"], "--to official"),
    ]
    for argv, words in cases:
        assert cli.main(["convert", *argv]) == 2
        assert words.lower() in one_line(capsys).lower()
    assert cli.main(["generate", "x", "-o", str(tmp_path / "a.png"), "--model", file]) == 2
    assert "lumina convert" in one_line(capsys)


def test_faults_are_one_line_and_exit_code_1(single, original, tmp_path, capsys):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:-1])
    pickle = tmp_path / "x.pth"
    torch.save({"x": torch.zeros(1)}, pickle)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(pickle, bare / "consolidated.00-of-01.pth")
    png = str(tmp_path / "a.png")
    cases = [
        (["convert", str(cut), str(tmp_path / "out")], "cut.safetensors: damaged"),
        (["convert", str(single), str(original)], "is not an empty folder"),
        (["convert", str(pickle), str(tmp_path / "out")], "x.pth: holds no transformer"),
        (["convert", str(original), str(tmp_path / "out")], "no config.json"),
        (["inspect", str(cut)], "cut.safetensors: damaged"),
        (["inspect", str(pickle)], "x.pth: a pickle can run code"),
        (["inspect", str(bare)], "bare/consolidated.00-of-01.pth: weights without the folders"),
        (["generate", "x", "-o", png, "--model", str(bare)], "consolidated.00-of-01.pth"),
    ]
    for argv, words in cases:
        assert cli.main(argv) == 1, argv
        assert words in one_line(capsys)
    assert not (tmp_path / "out").exists()
    assert not Path(png).exists()
