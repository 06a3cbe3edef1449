"""LoRAs by commands and over HTTP: merged into the weights, and by name."""

import http.client
import io
import json
import threading

import pytest
from PIL import Image

from server import cli
from tests.model.conftest import max_difference
from tests.model.lora_files import adapt, save_as_diffusers
from tests.server.embedded.test_service import Service
from tests.tiny_checkpoint import make_tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SETTINGS = {"seed": 3, "width": 64, "height": 48, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def lora_dir(checkpoint, tmp_path_factory):
    from diffusers import Lumina2Transformer2DModel

    folder = tmp_path_factory.mktemp("loras")
    transformer = Lumina2Transformer2DModel.from_pretrained(checkpoint / "transformer")
    for seed, name in enumerate(("ink", "wool")):
        save_as_diffusers(adapt(transformer, seed=seed, gain=0.3), folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def draw(checkpoint, tmp_path):
    """`lumina generate` with more options; returns the picture, or the exit code of a failure."""

    def run(*options):
        output = tmp_path / "a.png"
        argv = ["generate", "a red circle", "-o", str(output), "--model", str(checkpoint)]
        argv += ["--seed", "3", "--width", "64", "--height", "48", "--steps", "3", *options]
        code = cli.main(argv)
        if code:
            return code
        with Image.open(output) as picture:
            picture.load()
            return picture

    return run


def named(*loras):
    return f"loras={json.dumps([{'name': name, 'scale': scale} for name, scale in loras])}"


def test_generate_merged_and_by_name(draw, lora_dir):
    plain = draw()
    merged = draw(
        "--lora", f"{lora_dir}/ink.safetensors:0.8", "--lora", f"{lora_dir}/wool.safetensors"
    )
    by_name = draw("--lora-dir", str(lora_dir), "--set", named(("ink", 0.8), ("wool", 1)))
    assert max_difference(merged, by_name) <= 1
    assert max_difference(merged, plain) > 20
    made = [json.loads(picture.info["parameters"]) for picture in (plain, merged, by_name)]
    assert [each.get("loras") for each in made] == [
        None, None, [{"name": "ink", "scale": 0.8}, {"name": "wool", "scale": 1}],
    ]  # fmt: skip
    # Merging makes another model; naming does not.
    assert made[0]["model_hash"] == made[2]["model_hash"] != made[1]["model_hash"]


def test_misuse_and_faults_are_one_line(draw, lora_dir, tmp_path, capsys):
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    cases = [
        (
            ["--set", named(("ink", 1))],
            2,
            "'ink' is not allowed: none is on offer (see --lora-dir)",
        ),
        (["--lora-dir", str(lora_dir), "--set", named(("x", 1))], 2, "on offer are 'ink', 'wool'"),
        (["--set", 'loras="ink"'], 2, "give a list of at most 8"),
        (["--lora", "gone"], 2, "gone: there is no such file"),
        (["--lora-dir", "gone"], 1, "gone: there is no such folder of LoRAs"),
        (["--lora", str(tmp_path / "cut.safetensors")], 1, "cut.safetensors: damaged"),
        (["--lora-dir", str(tmp_path)], 1, "cut.safetensors: damaged"),
    ]
    for options, code, words in cases:
        assert draw(*options) == code, options
        told = capsys.readouterr().err
        assert told.startswith("lumina: ")
        assert told.count("\n") == 1
        assert words in told


def test_inspect_lists_what_is_on_offer(checkpoint, lora_dir, capsys, monkeypatch):
    assert cli.main(["inspect", str(checkpoint), "--lora-dir", str(lora_dir)]) == 0
    told = capsys.readouterr().out
    monkeypatch.setenv("LUMINA_LORA_DIR", str(lora_dir))
    assert cli.main(["inspect", str(checkpoint)]) == 0
    assert capsys.readouterr().out == told
    lines = {line.split("  ")[0]: line for line in told.splitlines()}
    assert {"lora ink", "lora wool"} <= lines.keys()
    for words in ("F32, diffusers names", "rank 3", "alpha / rank 1.66667", "25 adapted"):
        assert words in lines["lora ink"]


def post(service, **body):
    """Status and the picture, or the problem, of a synchronous call."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=100)
    headers = {"content-type": "application/json", "accept": "image/png"}
    body = {"prompt": "a red circle", **SETTINGS, **body}
    connection.request("POST", "/generate", json.dumps(body), headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return (
        Image.open(io.BytesIO(data)) if answer.status == 200 else (answer.status, json.loads(data))
    )


def test_over_http_with_different_loras_at_once(checkpoint, lora_dir, draw, tmp_path):
    options = ["--lora", f"{lora_dir}/wool.safetensors:0.3"]
    service = Service(checkpoint, tmp_path / "data", options=options, lora_dir=lora_dir)
    try:
        service.wait_ready()
        offer = service.call("GET", "/presets")
        assert offer["loras"] == ["ink", "wool"]
        status, problem = post(service, loras=[{"name": "oil"}])
        assert (status, problem["errors"][0]["field"]) == (422, "loras")
        assert "(ink, wool)" in problem["detail"]

        crowd = [[], [("ink", 1.0)], [("wool", -0.5), ("ink", 0.5)], [("ink", -1.0)]]
        pictures = {}

        def ask(place):
            loras = [{"name": name, "scale": scale} for name, scale in crowd[place]]
            pictures[place] = post(service, loras=loras)

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(crowd))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        for place, loras in enumerate(crowd):
            alone = draw(*options, "--lora-dir", str(lora_dir), "--set", named(*loras))
            assert max_difference(pictures[place], alone) <= 1, loras
            made = json.loads(pictures[place].info["parameters"])
            assert made["model_hash"] == offer["hash"]
    finally:
        service.process.terminate()
        service.process.wait(40)
        service.end()
