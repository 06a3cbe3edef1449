"""Conversion of files: what is taken, what is refused, and that a failure leaves nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_pipeline
from model.checkpoint import CheckpointError, load_transformer_config, read_json, verify_manifest
from model.convert import to_folder, to_official
from model.next_dit import NextDiT
from model.weight_source import open_source
from tests.official import official_state

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMFY = "model.diffusion_model."
QKV = "layers.0.attention.qkv.weight"


@pytest.fixture(scope="module")
def theirs(tiny_folder):
    return load_file(tiny_folder / "transformer" / WEIGHTS)


@pytest.fixture
def single(theirs, tmp_path):
    """An official safetensors file."""
    path = tmp_path / "consolidated.00-of-01.safetensors"
    save_file(official_state(theirs), path)
    return path


def parts_of(folder):
    return {name: folder / name for name in ("vae", "text_encoder", "tokenizer")}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def test_a_single_file_becomes_a_whole_checkpoint(single, theirs, tiny_folder, tmp_path):
    out = tmp_path / "out"
    told = []
    report = to_folder(single, out, parts=parts_of(tiny_folder), on_bytes=told.append)
    assert report.missing == ()
    assert report.source.ignored == {"norm_final.weight": 1}
    assert_same(load_file(out / "transformer" / WEIGHTS), theirs)
    assert sum(told) == sum(tensor.nbytes for tensor in theirs.values())
    original = load_transformer_config(tiny_folder / "transformer")
    config = load_transformer_config(out / "transformer")
    unseen = {"sample_size", "multiple_of"}
    assert {k: v for k, v in config.to_dict().items() if k not in unseen} == {
        k: v for k, v in original.to_dict().items() if k not in unseen
    }
    assert config.ffn_dim == original.ffn_dim
    manifest = verify_manifest(out)
    assert manifest["converted_from"] == single.name
    assert manifest["assumed"]["axes_dim_rope"] == [4, 4, 4]
    pipeline = load_pipeline(out)
    assert pipeline.generation_config.defaults["shift"] == 6.0
    assert {p.name for p in tmp_path.iterdir()} == {single.name, "out"}


def test_diffusers_loads_what_was_converted(single, tiny_folder, tmp_path):
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    to_folder(single, tmp_path / "out", parts=parts_of(tiny_folder))
    pipeline = Lumina2Pipeline.from_pretrained(tmp_path / "out")
    pipeline_before = Lumina2Transformer2DModel.from_pretrained(tiny_folder / "transformer")
    assert_same(dict(pipeline.transformer.state_dict()), dict(pipeline_before.state_dict()))
    assert pipeline.scheduler.config.shift == 6.0


def test_a_comfy_file_gives_its_transformer_and_names_the_rest(theirs, tmp_path):
    state = official_state(theirs, COMFY)
    state["vae.decoder.conv_in.weight"] = torch.zeros(3)
    state["vae.encoder.conv_in.weight"] = torch.zeros(3)
    state["text_encoders.gemma2_2b.transformer.model.norm.weight"] = torch.zeros(3)
    state["text_encoders.gemma2_2b.spiece_model"] = torch.zeros(9, dtype=torch.uint8)
    save_file(state, tmp_path / "comfy.safetensors")
    report = to_folder(tmp_path / "comfy.safetensors", tmp_path / "out", parts={})
    assert report.source.prefix == COMFY
    assert report.source.ignored == {
        "vae.*": 2,
        "text_encoders.*": 2,
        f"{COMFY}norm_final.weight": 1,
    }
    assert report.missing == ("vae", "text_encoder", "tokenizer")
    assert_same(load_file(tmp_path / "out" / "transformer" / WEIGHTS), theirs)
    with pytest.raises(CheckpointError, match="vae/: the folder is missing"):
        load_pipeline(tmp_path / "out")


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_the_official_pickle_gives_its_tensors(theirs, tmp_path, suffix):
    path = tmp_path / f"consolidated_ema.00-of-01{suffix}"
    torch.save(official_state(theirs), path)
    to_folder(path, tmp_path / "out", parts={})
    assert_same(load_file(tmp_path / "out" / "transformer" / WEIGHTS), theirs)
    with pytest.raises(CheckpointError, match="only `lumina convert` reads it"):
        open_source(path)


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a pickle ran')",))


PICKLES = {
    "code": (lambda p: torch.save({"x": Payload()}, p), "other Python objects than tensors"),
    "nested": (lambda p: torch.save({"model": {"x": torch.zeros(1)}}, p), "'model' is a dict"),
    "a list": (lambda p: torch.save([torch.zeros(1)], p), "a dictionary of tensors is expected"),
    "a number": (lambda p: torch.save({"step": 3}, p), "the entry 'step' is a int"),
    "garbage": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(60)), "damaged or no torch file"),
    "nothing": (lambda p: p.write_bytes(b""), "damaged or no torch file"),
    "other tensors": (lambda p: torch.save({"x": torch.zeros(1)}, p), "holds no transformer"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_other_pickles_are_refused_in_one_line(kind, tmp_path):
    write, words = PICKLES[kind]
    path = tmp_path / "consolidated.00-of-01.pth"
    write(path)
    with pytest.raises(CheckpointError) as error:
        to_folder(path, tmp_path / "out", parts={})
    assert words in str(error.value)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16], ids=str
)
def test_the_stored_dtype_is_kept_and_loads(theirs, tmp_path, dtype):
    low = {name: tensor.to(dtype) for name, tensor in official_state(theirs).items()}
    save_file(low, tmp_path / "low.safetensors")
    to_folder(tmp_path / "low.safetensors", tmp_path / "out", parts={})
    stored = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    for name, tensor in theirs.items():
        assert stored[name].dtype == dtype
        assert torch.equal(stored[name].float(), tensor.to(dtype).float())
    loaded = NextDiT.from_pretrained(tmp_path / "out" / "transformer", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    to_official(tmp_path / "out" / "transformer", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == low.keys()
    assert all(torch.equal(back[k].float(), low[k].float()) for k in low)


def test_dtype_converts_on_the_way(single, theirs, tmp_path):
    to_folder(single, tmp_path / "out", parts={}, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    assert_same(stored, {name: tensor.bfloat16() for name, tensor in theirs.items()})


def test_what_half_precision_cannot_hold_is_named(theirs, tmp_path):
    state = official_state(theirs)
    state[QKV][3, 5] = 1e6
    save_file(state, tmp_path / "loud.safetensors")
    with pytest.raises(CheckpointError, match=f"{QKV}' has values that float16 cannot hold"):
        to_folder(tmp_path / "loud.safetensors", tmp_path / "out", parts={}, dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["loud.safetensors"]


def test_large_results_are_sharded_and_read_by_both(single, theirs, tmp_path):
    from diffusers import Lumina2Transformer2DModel

    to_folder(single, tmp_path / "out", parts={}, max_file_bytes=100_000)
    folder = tmp_path / "out" / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        content = load_file(shard)
        assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= 100_000
    index = read_json(folder / f"{WEIGHTS}.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in theirs.values())
    assert_same(dict(Lumina2Transformer2DModel.from_pretrained(folder).state_dict()), theirs)
    to_official(folder, tmp_path / "back.safetensors")
    assert_same(load_file(tmp_path / "back.safetensors"), official_state(theirs))


def test_like_supplies_what_is_not_given(single, tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "generation_config.json").write_text('{"defaults": {"num_inference_steps": 7}}')
    report = to_folder(single, tmp_path / "out", parts={}, like=model)
    assert (report.missing, report.source.assumed) == ((), {})
    out, original = (load_transformer_config(d / "transformer") for d in (tmp_path / "out", model))
    assert out == original
    assert load_pipeline(tmp_path / "out").generation_config.defaults["num_inference_steps"] == 7


def edited(**changes):
    def edit(state):
        state.update(changes)
        for name in [name for name, value in state.items() if value is None]:
            del state[name]

    return edit


FAULTS = {
    "missing": (
        edited(**{"layers.1.ffn_norm2.weight": None}),
        "'layers.1.ffn_norm2.weight' is mis",
    ),
    "unexpected": (
        edited(**{"layers.1.attention.bias": torch.zeros(48)}),
        "unexpected weight 'layers.1.attention.bias'",
    ),
    "another model of the same blocks": (
        edited(cap_pad_token=torch.zeros(1, 48), x_pad_token=torch.zeros(1, 48)),
        "unexpected weight 'cap_pad_token' (and 1 more)",
    ),
    "a block is missing": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("noise_refiner.")],
        "'noise_refiner.0.attention.qkv.weight' is missing",
    ),
    "misshapen": (
        edited(**{"layers.1.attention.out.weight": torch.zeros(48, 47)}),
        "'layers.1.attention.out.weight' has shape [48, 47], the config inferred from the other "
        "shapes asks for [48, 48]",
    ),
    "quantised": (
        edited(**{"layers.1.attention.out.weight": torch.zeros(48, 48, dtype=torch.int8)}),
        "stored as I8, which is not supported",
    ),
    "scaled fp8": (
        edited(**{"layers.0.attention.out.scale_weight": torch.ones(1)}),
        "'layers.0.attention.out.scale_weight' belongs to weights with scales of their own",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_weight_and_expectation(fault, theirs, tmp_path):
    harm, words = FAULTS[fault]
    state = official_state(theirs)
    harm(state)
    path = tmp_path / "damaged.safetensors"
    save_file(state, path)
    for run in (open_source, lambda p: to_folder(p, tmp_path / "out", parts={})):
        with pytest.raises(CheckpointError) as error:
            run(path)
        assert words in str(error.value)
        assert "damaged.safetensors: " in str(error.value)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_config_that_disagrees_is_named(single, tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cap_feat_dim": 40}))
    with pytest.raises(CheckpointError) as error:
        to_folder(single, tmp_path / "out", parts={}, like=model)
    assert "'cap_embedder.0.weight' has shape [32], transformer/config.json asks for [40]" in str(
        error.value
    )
    assert not (tmp_path / "out").exists()


def test_a_cut_file_is_named(single, tmp_path):
    single.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{single.name}: damaged or not safetensors"):
        to_folder(single, tmp_path / "out", parts={})


def test_model_parallel_shards_are_refused(theirs, tmp_path):
    path = tmp_path / "consolidated.00-of-02.safetensors"
    save_file(official_state(theirs), path)
    with pytest.raises(CheckpointError, match=r"one of 2 shards; a single file \(00-of-01\)"):
        to_folder(path, tmp_path / "out", parts={})


PARTS = {
    "no such folder": ("vae", lambda d: shutil.rmtree(d), "there is no such folder (vae)"),
    "other channels": (
        "vae",
        lambda d: (d / "config.json").write_text('{"_class_name": "AutoencoderKL"}'),
        "latent_channels None does not fit this transformer, which needs 16",
    ),
    "other class": (
        "vae",
        lambda d: (d / "config.json").write_text('{"_class_name": "AutoencoderDC"}'),
        "_class_name 'AutoencoderDC' does not fit",
    ),
    "other width": (
        "text_encoder",
        lambda d: (d / "config.json").write_text('{"model_type": "gemma2", "hidden_size": 8}'),
        "hidden_size 8 does not fit this transformer, which needs 32",
    ),
    "a pickle": (
        "vae",
        lambda d: (d / WEIGHTS).rename(d / "diffusion_pytorch_model.bin"),
        "vae/diffusion_pytorch_model.bin: a pickle can run code and is never loaded",
    ),
    "damaged": (
        "text_encoder",
        lambda d: (d / "model.safetensors").write_bytes(b"12345678"),
        "text_encoder/model.safetensors: damaged",
    ),
    "no tokenizer": (
        "tokenizer",
        lambda d: (d / "tokenizer.json").unlink(),
        "tokenizer/tokenizer.json: the file is missing",
    ),
}


@pytest.mark.parametrize("fault", PARTS)
def test_parts_that_do_not_fit_are_refused(fault, single, folder_copy, tmp_path):
    name, harm, words = PARTS[fault]
    harm(folder_copy / name)
    with pytest.raises(CheckpointError) as error:
        to_folder(single, tmp_path / "out", parts=parts_of(folder_copy))
    assert words in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {single.name, folder_copy.name}


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(single, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        to_folder(single, taken, parts={})
    with pytest.raises(ValueError, match="is not an empty folder"):
        to_official(single, single)
    with pytest.raises(ValueError, match="there is no folder"):
        to_folder(single, tmp_path / "no" / "where", parts={})

    def interrupted(count):
        raise KeyboardInterrupt

    for convert in (to_official, lambda *a, **k: to_folder(*a, parts={}, **k)):
        with pytest.raises(KeyboardInterrupt):
            convert(single, tmp_path / "out.safetensors", on_bytes=interrupted)
    assert {p.name for p in tmp_path.iterdir()} == {single.name, "taken"}
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]

    (tmp_path / "empty").mkdir()
    to_folder(single, tmp_path / "empty", parts={})
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_only_configs_and_weights_of_a_part_are_copied(single, folder_copy, tmp_path):
    for name in ("pytorch_model.bin", "run.py", "old.safetensors"):
        (folder_copy / "vae" / name).write_bytes(b"x")
    to_folder(single, tmp_path / "out", parts=parts_of(folder_copy))
    copied = {p.name for p in (tmp_path / "out" / "vae").iterdir()}
    assert copied == {"config.json", WEIGHTS}
