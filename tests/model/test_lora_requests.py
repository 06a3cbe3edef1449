"""LoRAs by name in requests: pictures, company, the registry."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from model import GenerationRequest, load_pipeline
from model.checkpoint import CheckpointError
from model.lora_registry import LoraRegistry
from model.request import LoraChoice
from tests.model.conftest import max_difference, psnr
from tests.model.lora_files import adapt, save_as_diffusers

STEPS = 4


@pytest.fixture(scope="module")
def lora_dir(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("ink", "wool")):
        adapted = adapt(reference.transformer, seed=seed, gain=0.3)
        save_as_diffusers(adapted, folder / f"{name}.safetensors")
    (folder / "notes.txt").write_text("not a LoRA")
    (folder / ".hidden.safetensors").write_text("half a download")
    return folder


@pytest.fixture(scope="module")
def styled(tiny_folder, lora_dir):
    return load_pipeline(tiny_folder, lora_dir=lora_dir)


def lora(name, scale=1.0):
    return {"name": name, "scale": scale}


def request(*loras, seed=1, **settings):
    settings = {"num_inference_steps": STEPS} | settings
    return GenerationRequest("a red circle", seed=seed, loras=loras, **settings)


def draw(pipeline, *loras, **settings):
    return pipeline.generate([request(*loras, **settings)])[0][0]


def test_same_picture_as_diffusers(styled, reference, lora_dir):
    """Both branches, both refiners and the caption embedder, as diffusers' own loader has them."""
    ours = draw(styled, lora("ink", 0.8), negative_prompt="grey")
    reference.load_lora_weights(lora_dir, weight_name="ink.safetensors", adapter_name="ink")
    try:
        reference.set_adapters("ink", 0.8)
        expected = reference(
            "a red circle", negative_prompt="grey", num_inference_steps=STEPS, width=64, height=64,
            generator=torch.Generator("cpu").manual_seed(1),
        ).images[0]  # fmt: skip
    finally:
        reference.unload_lora_weights()
    assert psnr(ours, expected) >= 45
    for other in ((), (lora("ink", 0.4),), (lora("wool", 0.8),)):
        assert psnr(draw(styled, *other, negative_prompt="grey"), expected) < 40


def test_merged_at_load_is_the_same_picture(styled, tiny_folder, lora_dir):
    merged = load_pipeline(
        tiny_folder,
        merged_loras=[(lora_dir / "ink.safetensors", 0.8), (lora_dir / "wool.safetensors", -0.5)],
    )
    assert max_difference(draw(merged), draw(styled, lora("ink", 0.8), lora("wool", -0.5))) <= 1


CROWD = [
    request(lora("ink"), seed=3),
    request(seed=4, width=96, height=48),
    request(lora("wool", -0.7), lora("ink", 0.5), seed=5, num_images=2),
    request(lora("wool"), seed=6, guidance_scale=1.0, num_inference_steps=6),
    request(lora("ink"), seed=7, sampler="midpoint", cfg_trunc_t=0.25, width=32),
    request(lora("ink", 0.25), seed=3, negative_prompt="blue"),
]


def test_alone_or_in_a_crowd(styled):
    """A picture moves by at most 1 of 255 for its neighbours' LoRAs."""
    for wanted, images in zip(CROWD, styled.generate(CROWD), strict=True):
        (alone,) = styled.generate([wanted])
        for image, other in zip(images, alone, strict=True):
            assert max_difference(image, other) <= 1


def test_joining_late_changes_nothing(styled):
    first, second = CROWD[0], CROWD[2]
    (alone,) = styled.generate([second])
    states = [styled.prepare(first)]
    styled.denoise_step(states)
    states.append(styled.prepare(second))
    while running := [state for state in states if not state.finished]:
        styled.denoise_step(running)
    for image, other in zip(styled.decode(states)[1], alone, strict=True):
        assert max_difference(image, other) <= 1


@pytest.mark.parametrize("precision", ["bf16", "mixed"])
def test_every_precision_gives_about_the_same_picture(styled, tiny_folder, lora_dir, precision):
    low = load_pipeline(tiny_folder, precision=precision, lora_dir=lora_dir)
    wanted = (lora("ink", 0.5), lora("wool", -0.5))
    expected = draw(styled, *wanted)
    assert psnr(draw(low, *wanted), expected) > 30 > psnr(draw(low), expected) + 10
    state = low.prepare(request(*wanted))
    assert state.adapters[0].lora.layers["x_embedder"].a.dtype == torch.bfloat16


def test_requests_without_loras_are_as_if_there_were_none(styled, pipeline):
    plain = draw(pipeline)
    assert draw(styled).tobytes() == plain.tobytes()
    assert draw(styled, lora("ink", 0.0)).tobytes() == plain.tobytes()
    assert styled.prepare(request()).request.loras is None


def test_the_resolved_request_says_what_was_applied(styled):
    state = styled.prepare(request({"name": "wool"}, LoraChoice("ink", -2)))
    assert state.request.loras == (LoraChoice("wool", 1.0), LoraChoice("ink", -2))
    assert [adapter.lora.name for adapter in state.adapters] == ["wool", "ink"]


@pytest.mark.parametrize(
    "name", ["nope", "../ink", "/etc/passwd", "ink.safetensors", "", "x" * 101]
)
def test_names_that_are_not_on_offer(styled, pipeline, name):
    allowed = "on offer are 'ink', 'wool'|text of 1 to 100"
    with pytest.raises(ValueError, match=allowed):
        styled.prepare(request(lora(name)))
    with pytest.raises(ValueError, match=r"none is on offer \(see --lora-dir\)|text of 1 to 100"):
        pipeline.prepare(request(lora(name)))


@pytest.mark.parametrize(
    "loras",
    [
        "ink",
        ["ink"],
        [{}],
        [{"scale": 1}],
        [{"name": "ink", "weight": 1}],
        [{"name": 3}],
        [{"name": "ink", "scale": "1"}],
        [{"name": "ink", "scale": float("nan")}],
        [{"name": "ink", "scale": 10.5}],
        [{"name": "ink"}, {"name": "ink", "scale": 0.5}],
        [{"name": str(i)} for i in range(9)],
    ],
    ids=str,
)
def test_malformed_fields(loras):
    with pytest.raises(ValueError, match=r"loras .* is not allowed: give a list of at most 8"):
        GenerationRequest("a", loras=loras)


# --- the registry --------------------------------------------------------------------------------


def registry(pipeline, folder, **options):
    return LoraRegistry(folder, pipeline.dit, **options)


def test_files_are_loaded_once_and_the_oldest_leaves(pipeline, lora_dir, tmp_path):
    for name in "abc":
        shutil.copy(lora_dir / "ink.safetensors", tmp_path / f"{name}.safetensors")
    shelf = registry(pipeline, tmp_path)
    assert (shelf.names, shelf.num_bytes) == (("a", "b", "c"), 0)
    first = shelf.get("a")
    assert shelf.get("a") is first
    assert shelf.num_bytes == first.num_bytes > 0
    small = registry(pipeline, tmp_path, cache_bytes=2 * first.num_bytes)
    kept, dropped = small.get("a"), small.get("b")
    assert small.get("a") is kept
    small.get("c")
    assert small.num_bytes == 2 * first.num_bytes
    assert small.get("a") is kept
    assert small.get("b") is not dropped
    tiny = registry(pipeline, tmp_path, cache_bytes=1)
    assert tiny.get("a") is tiny.get("a")


def test_a_folder_is_checked_when_it_is_opened(pipeline, lora_dir, tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder of LoRAs"):
        registry(pipeline, tmp_path / "nowhere")
    shutil.copy(lora_dir / "ink.safetensors", tmp_path / "ink.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: damaged"):
        registry(pipeline, tmp_path)
    (tmp_path / "cut.safetensors").rename(tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"old\.pt: a pickle can run code"):
        registry(pipeline, tmp_path)
    (tmp_path / "old.pt").rename(tmp_path / f"{'x' * 101}.safetensors")
    with pytest.raises(CheckpointError, match="name must have 1 to 100"):
        registry(pipeline, tmp_path)


def test_a_file_that_changes_under_us_is_an_error_not_a_wrong_picture(pipeline, lora_dir, tmp_path):
    path = tmp_path / "ink.safetensors"
    key = "transformer.layers.0.attn.to_q.lora_{}.weight"
    save_file({key.format("A"): torch.ones(2, 48), key.format("B"): torch.ones(48, 2)}, path)
    shelf = registry(pipeline, tmp_path)
    save_file({key.format("A"): torch.ones(3, 48), key.format("B"): torch.ones(48, 3)}, path)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        shelf.get("ink")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"ink.safetensors: damaged"):
        shelf.get("ink")


# --- with the rest of the network's shortcuts ----------------------------------------------------


def test_modulations_are_kept_apart_by_lora(styled):
    """Equal timesteps, different LoRAs on the modulation: each has its own looked-up weights."""
    wanted = [request(lora("ink")), request(), request(lora("ink", 0.5)), request(lora("ink"))]
    adapters = [styled.prepare(each).adapters for each in wanted]
    modulation = styled.modulation.of([0.25] * 4, adapters)
    assert modulation.rows == (0, 1, 2, 0)
    first, plain, weak = modulation.final
    assert not torch.equal(first, plain)
    assert not torch.equal(first, weak)
    assert not torch.equal(plain, weak)
    again = styled.modulation.of([0.25], [adapters[3]])
    assert torch.equal(again.final[0], first)


def test_skipped_steps_keep_to_their_own_lora(styled):
    """A cached branch beside a computing one: the selection takes its adapters along."""
    replay = {f"0/{kind}": "1010" for kind in ("cond", "uncond")}
    wanted = [request(lora("ink"), cache=0.1), request(lora("wool"), seed=2)]
    states = [styled.prepare(wanted[0], replay=replay), styled.prepare(wanted[1])]
    while running := [state for state in states if not state.finished]:
        styled.denoise_step(running)
    assert states[0].nfe == 4
    (second,) = styled.generate(wanted[1:])
    assert max_difference(styled.decode(states)[1][0], second[0]) <= 1
    alone = styled.prepare(wanted[0], replay=replay)
    while not alone.finished:
        styled.denoise_step([alone])
    assert max_difference(styled.decode(states)[0][0], styled.decode([alone])[0][0]) <= 1


def test_files_are_read_ahead_as_far_as_the_cache_goes(pipeline, lora_dir, tmp_path):
    for name in "abc":
        shutil.copy(lora_dir / "ink.safetensors", tmp_path / f"{name}.safetensors")
    shelf, beats = registry(pipeline, tmp_path), []
    assert shelf.growth_bytes > 0
    shelf.load_ahead(lambda: beats.append(1))
    assert (len(beats), shelf.growth_bytes) == (3, 0)
    each = shelf.num_bytes // 3
    small = registry(pipeline, tmp_path, cache_bytes=2 * each)
    small.load_ahead()
    assert 0 < small.num_bytes <= 2 * each
