import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GenerationRequest, load_pipeline
from model.checkpoint import CheckpointError, write_manifest
from tests.model.conftest import max_difference
from tests.tiny_checkpoint import write_generation_config


def edit_json(path, **changes) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop_one(tensors) -> None:
    tensors.pop(sorted(tensors)[0])


def reshape_one(tensors) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(3)


DAMAGES = {
    "no index": (lambda d: (d / "model_index.json").unlink(), "model_index.json"),
    "index is no JSON": (lambda d: (d / "model_index.json").write_text("{"), "model_index.json"),
    "other pipeline": (
        lambda d: edit_json(d / "model_index.json", _class_name="FluxPipeline"),
        "_class_name 'FluxPipeline'",
    ),
    "other encoder": (
        lambda d: edit_json(d / "model_index.json", text_encoder=["transformers", "T5Model"]),
        "text_encoder 'T5Model'",
    ),
    "no vae entry": (lambda d: edit_json(d / "model_index.json", vae=None), "vae None"),
    "no vae folder": (lambda d: (d / "vae").rename(d / "vea"), "vae/: the folder is missing"),
    "odd heads": (
        lambda d: edit_json(d / "transformer/config.json", num_attention_heads=7),
        "transformer/config.json",
    ),
    "no transformer weights": (
        lambda d: (d / "transformer/diffusion_pytorch_model.safetensors").unlink(),
        "diffusion_pytorch_model",
    ),
    "cut transformer weights": (
        lambda d: (d / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"12345678"),
        "diffusion_pytorch_model.safetensors",
    ),
    "vae factor": (
        lambda d: edit_json(d / "vae/config.json", scaling_factor=0),
        "vae/config.json: scaling_factor 0",
    ),
    "vae shift": (
        lambda d: edit_json(d / "vae/config.json", shift_factor="much"),
        "vae/config.json: shift_factor 'much'",
    ),
    "vae blocks": (
        lambda d: edit_json(d / "vae/config.json", down_block_types=["NoSuchBlock"] * 4),
        "vae/config.json",
    ),
    "vae tensor missing": (
        lambda d: edit_tensors(d / "vae/diffusion_pytorch_model.safetensors", drop_one),
        "is missing",
    ),
    "vae tensor misshapen": (
        lambda d: edit_tensors(d / "vae/diffusion_pytorch_model.safetensors", reshape_one),
        "has shape [3]",
    ),
    "vae channels": (
        lambda d: edit_json(d / "vae/config.json", latent_channels=8),
        "vae/",
    ),
    "encoder kind": (
        lambda d: edit_json(d / "text_encoder/config.json", model_type="gemma"),
        "text_encoder/config.json: model_type 'gemma'",
    ),
    "encoder heads": (
        lambda d: edit_json(d / "text_encoder/config.json", num_attention_heads=3),
        "text_encoder/",
    ),
    "encoder depth": (
        lambda d: edit_json(d / "text_encoder/config.json", num_hidden_layers=1),
        "text_encoder/config.json",
    ),
    "encoder layers disagree": (
        lambda d: edit_json(d / "text_encoder/config.json", num_hidden_layers=9),
        "`num_hidden_layers` (9) must be equal to the number of `layer_types` (4)",
    ),
    "encoder tensor missing": (
        lambda d: edit_tensors(d / "text_encoder/model.safetensors", drop_one),
        "text_encoder/model.safetensors: the weight 'embed_tokens.weight' is missing",
    ),
    "encoder tensor misshapen": (
        lambda d: edit_tensors(d / "text_encoder/model.safetensors", reshape_one),
        "has shape [3]",
    ),
    "encoder is a pickle": (
        lambda d: (d / "text_encoder/model.safetensors").rename(
            d / "text_encoder/pytorch_model.bin"
        ),
        "text_encoder/pytorch_model.bin: a pickle can run code and is never loaded",
    ),
    "encoder cut": (
        lambda d: (d / "text_encoder/model.safetensors").write_bytes(b"12345678"),
        "text_encoder/model.safetensors: damaged",
    ),
    "vae is a pickle": (
        lambda d: (d / "vae/diffusion_pytorch_model.safetensors").rename(d / "vae/x.ckpt"),
        "vae/x.ckpt: a pickle can run code and is never loaded",
    ),
    "vae tensor too many": (
        lambda d: edit_tensors(
            d / "vae/diffusion_pytorch_model.safetensors",
            lambda tensors: tensors.update(extra=torch.zeros(1)),
        ),
        "vae/diffusion_pytorch_model.safetensors: unexpected weight 'extra'",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer/tokenizer.json").unlink(), "tokenizer/"),
    "empty tokenizer": (
        lambda d: (d / "tokenizer/tokenizer.json").write_text("{}"),
        "tokenizer/tokenizer.json",
    ),
    "scheduler shift": (
        lambda d: edit_json(d / "scheduler/scheduler_config.json", shift=-1),
        "scheduler/scheduler_config.json: shift -1",
    ),
    "dynamic shift": (
        lambda d: edit_json(d / "scheduler/scheduler_config.json", use_dynamic_shifting=True),
        "use_dynamic_shifting True",
    ),
    "generation config": (
        lambda d: write_generation_config(d, defaults={"width": 100}),
        "generation_config.json: defaults: width 100",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_is_named_in_one_line(folder_copy, damage):
    harm, expected = DAMAGES[damage]
    harm(folder_copy)
    with pytest.raises(CheckpointError) as error:
        load_pipeline(folder_copy)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such checkpoint folder"):
        load_pipeline(tmp_path / "nowhere")


def test_bare_weights_are_sent_to_convert(tmp_path):
    for name in ("consolidated.00-of-01.pth", "lumina_2.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=f"{name}: weights without .*`lumina convert`"):
            load_pipeline(folder)


def test_a_text_encoder_with_a_language_head_gives_the_same_picture(folder_copy, pipeline):
    def as_language_model(tensors):
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)
        tensors["lm_head.weight"] = torch.zeros(4, 4)

    edit_tensors(folder_copy / "text_encoder/model.safetensors", as_language_model)
    request = GenerationRequest("a red circle", num_inference_steps=2, seed=1)
    (image,) = load_pipeline(folder_copy).generate([request])[0]
    assert max_difference(image, pipeline.generate([request])[0][0]) == 0


def test_manifest_is_verified(folder_copy):
    write_manifest(folder_copy, {})
    load_pipeline(folder_copy)
    edit_json(folder_copy / "scheduler/scheduler_config.json", shift=3.0)
    with pytest.raises(CheckpointError, match=r"scheduler/scheduler_config\.json"):
        load_pipeline(folder_copy)


def test_defaults_come_from_the_folder(folder_copy):
    write_generation_config(folder_copy, defaults={"width": 96, "num_inference_steps": 3})
    (folder_copy / "model_index.json").write_text(
        (folder_copy / "model_index.json")
        .read_text()
        .replace("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
    )
    pipeline = load_pipeline(folder_copy)
    state = pipeline.prepare(GenerationRequest("a"))
    assert (state.request.width, state.request.height) == (96, 64)
    assert (state.num_steps, state.request.shift) == (3, 6.0)
    assert state.latents[0].shape == (16, 8, 12)


def test_sharded_text_encoder_gives_the_same_picture(folder_copy, pipeline):
    part = folder_copy / "text_encoder"
    tensors = load_file(part / "model.safetensors")
    (part / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, part / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))
    request = GenerationRequest("a red circle", num_inference_steps=2, seed=1)
    (image,) = load_pipeline(folder_copy).generate([request])[0]
    assert max_difference(image, pipeline.generate([request])[0][0]) == 0


def test_importing_model_is_cheap():
    code = "import sys, model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys, model; model.GenerationRequest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
