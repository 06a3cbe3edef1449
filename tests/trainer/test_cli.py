"""Misuse of the command line: one line on stderr, the right exit code, never a traceback."""

import subprocess
import sys

import pytest
import torch

from trainer import checkpoint
from trainer.cli import main
from trainer.distributed import World


@pytest.fixture
def run(capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


MISUSE = {
    "unknown command": (["trian"], "trian"),
    "unknown option": (["train", "demo", "--smokey"], "--smokey"),
    "no recipe": (["train"], "recipe"),
    "unknown recipe": (["train", "dem"], "recipe 'dem' is neither a file nor one of:"),
    "unknown key": (["train", "demo", "--set", "vae.stepz=3"], "did you mean 'steps'?"),
    "no value": (["train", "demo", "--set", "seed"], "must look like key.path=value"),
    "bad value": (["train", "demo", "--set", "seed=x"], "seed: Input should be a valid integer"),
    "resume": (["train", "demo", "--resume", "maybe"], "--resume 'maybe' is not allowed"),
    "export without --out": (["export", "run"], "--out"),
    "suite": (["evaluate", "x", "--suite", "demos"], "--suite 'demos' is unknown"),
    "limit": (["evaluate", "x", "--limit", "0"], "--limit"),
    "no number": (["data", "build", "demo", "--out", "x"], "--num"),
    "a word for a number": (["data", "build", "demo", "--out", "x", "--num", "many"], "--num"),
    "unknown world": (["data", "build", "demon", "--out", "x", "--num", "1"], "'demon' is unknown"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_exit_code_2_and_one_line(run, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    words, expected = MISUSE[case]
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("trainer: ")
    assert expected in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_recipe_is_refused(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: other\n")
    code, _, err = run("train", "demo", "--out", tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert "holds a run of another recipe or other settings" in err
    assert (tmp_path / "recipe.yaml").read_text() == "name: other\n"
    code, _, err = run("train", "demo", "--out", tmp_path, "--resume", "never")
    assert code == 2
    assert "already holds a run" in err


def test_failures_are_exit_code_1_and_one_line(run, tmp_path):
    for words in (
        ("export", tmp_path / "nowhere", "--out", tmp_path / "out"),
        ("evaluate", tmp_path / "nowhere"),
        ("train", "demo", "--init", tmp_path / "nowhere", "--out", tmp_path / "run"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (1, "")
        assert err.startswith("trainer: ")
        assert err.count("\n") == 1
        assert "unexpected" not in err


def test_debug_shows_where(run, tmp_path):
    with pytest.raises(ValueError, match="is no training run"):
        run("export", tmp_path, "--out", tmp_path / "out", "--debug")


def test_help_without_words(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    for command in ("data", "train", "export", "evaluate"):
        assert command in out


@pytest.mark.slow
def test_exit_codes_reach_the_shell():
    command = [sys.executable, "-m", "trainer", "train", "dem"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("trainer: recipe 'dem'")
    assert "Traceback" not in answer.stderr


def test_data_build(run, tmp_path):
    code, _, _ = run("data", "build", "demo", "--out", tmp_path / "set", "--num", "3")
    assert code == 0
    assert (tmp_path / "set" / "records.jsonl").read_text().count("\n") == 3


def test_a_recipe_without_parts_or_pictures_says_what_to_name(run, tmp_path):
    command = ["train", "lumina2-stage1-256", "--out", tmp_path / "run"]
    code, _, err = run(*command)
    assert (code, err.count("\n")) == (1, 1)
    assert "--set parts=DIR, or a checkpoint with --init DIR" in err
    assert not (tmp_path / "run").exists()


def test_resume_names_a_run_or_one_of_its_checkpoints(run, tmp_path):
    stage = tmp_path / "run" / "text"
    for step in (1, 2):
        checkpoint.save(stage, step, {"module.x": torch.ones(1)}, {}, World())
    older, newer = sorted((stage / "checkpoints").iterdir())
    (tmp_path / "run" / "recipe.yaml").write_text("name: other\n")
    for words, expected, left in (
        ((tmp_path / "run",), "holds a run of another recipe", 2),
        ((stage,), "is neither a run folder nor a checkpoint", 2),
        ((older, "--out", tmp_path / "else"), "is of another run than --out", 2),
        ((newer,), "holds a run of another recipe", 2),
        ((older,), "holds a run of another recipe", 1),
    ):
        code, _, err = run("train", "demo", "--resume", *words)
        assert code in (1, 2)
        assert expected in err
        assert len(list((stage / "checkpoints").iterdir())) == left
    (stage / "final").mkdir()
    code, _, err = run("train", "demo", "--resume", older)
    assert (code, "the stage text is finished" in err) == (1, True)
