"""Folders of the transformer: what diffusers writes we read, what we write diffusers reads."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import (
    CheckpointError,
    diffusers_keys,
    read_json,
    sha256_file,
    verify_manifest,
    write_manifest,
)
from model.next_dit import NextDiT
from tests.model.references import (
    PLAIN,
    SHAPES,
    make_reference,
    ours_from,
    ragged_batch,
    reference_velocity,
    relative_l2,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture(scope="module")
def reference():
    return make_reference(**PLAIN)


@pytest.fixture
def folder(reference, tmp_path):
    """A sound transformer folder that the test may damage."""
    reference.save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_load_and_save_is_bit_exact_under_the_names_of_diffusers(shape, tmp_path):
    reference = make_reference(**shape)
    ours_from(reference, tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert_same(load_file(tmp_path / "ours" / WEIGHTS), reference.state_dict())
    theirs, ours = (read_json(tmp_path / d / "config.json") for d in ("theirs", "ours"))
    theirs.pop("_diffusers_version")
    assert ours == theirs


def test_diffusers_loads_what_we_save_and_computes_the_same(tmp_path):
    from diffusers import Lumina2Transformer2DModel

    torch.manual_seed(0)
    dit = NextDiT.from_pretrained(_saved(make_reference(**PLAIN, seed=5), tmp_path / "first"))
    dit.save_pretrained(tmp_path / "second")
    reference = Lumina2Transformer2DModel.from_pretrained(tmp_path / "second").eval()
    latents, timesteps, prompts = ragged_batch()
    with torch.inference_mode():
        velocities = dit(latents, timesteps, prompts)
        for velocity, *inputs in zip(velocities, latents, timesteps, prompts, strict=True):
            assert relative_l2(velocity, reference_velocity(reference, *inputs)) <= 2e-5


def _saved(reference, folder):
    reference.save_pretrained(folder)
    return folder


def test_our_own_round_trip_is_bit_exact(folder, tmp_path):
    dit = NextDiT.from_pretrained(folder)
    dit.save_pretrained(tmp_path / "again")
    assert_same(NextDiT.from_pretrained(tmp_path / "again").state_dict(), dit.state_dict())


def test_sharded_weights_are_the_same(reference, folder, tmp_path):
    reference.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    sharded = NextDiT.from_pretrained(tmp_path / "shards")
    assert_same(sharded.state_dict(), NextDiT.from_pretrained(folder).state_dict())


def test_dtype_converts_on_the_way_in_and_out(folder, tmp_path):
    dit = NextDiT.from_pretrained(folder)
    dit.save_pretrained(tmp_path / "low", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "low" / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    rounded = {name: t.bfloat16() for name, t in dit.state_dict().items()}
    low = NextDiT.from_pretrained(tmp_path / "low", dtype=torch.bfloat16)
    assert_same(low.state_dict(), rounded)
    again = NextDiT.from_pretrained(tmp_path / "low")
    assert_same(again.state_dict(), {name: t.float() for name, t in rounded.items()})


def test_loaded_weights_do_not_follow_the_file(folder):
    dit = NextDiT.from_pretrained(folder)
    before = {name: t.clone() for name, t in dit.state_dict().items()}
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(bytes((folder / WEIGHTS).stat().st_size))
    assert_same(dict(dit.state_dict()), before)
    assert not any(p.requires_grad for p in dit.parameters())
    assert not dit.training


def test_the_unused_norm_of_some_exports_is_ignored(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "norm_final.weight": torch.ones(48)}, folder / WEIGHTS)
    NextDiT.from_pretrained(folder)


def test_fused_weights_have_several_names():
    assert diffusers_keys("layers.3.attention.qkv.weight") == (
        "layers.3.attn.to_q.weight",
        "layers.3.attn.to_k.weight",
        "layers.3.attn.to_v.weight",
    )
    assert diffusers_keys("context_refiner.0.attention_norm1.weight") == (
        "context_refiner.0.norm1.weight",
    )
    assert diffusers_keys("x_embedder.bias") == ("x_embedder.bias",)


def edit(path, **changes):
    """Replace tensors of a file; None removes one."""
    tensors = {**load_file(path), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def header_of(path, text):
    """Replace a safetensors header by ``text``."""
    path.write_bytes(struct.pack("<Q", len(text)) + text)


TO_Q, TO_K = "layers.0.attn.to_q.weight", "layers.0.attn.to_k.weight"
NORM, BIAS = "layers.1.norm2.weight", "x_embedder.bias"
UP = "layers.1.feed_forward.linear_1.weight"
DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: the file is missing"),
    "config cut": (lambda d: cut(d / "config.json", 20), "config.json: not readable as JSON"),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[1]"),
        "config.json: must hold a JSON object",
    ),
    "config is no text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json: not readable as JSON",
    ),
    "config is a folder": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        "config.json: not readable as JSON",
    ),
    "unknown key": (lambda d: set_config(d, depth=3), "config.json: unknown key 'depth'"),
    "bad value": (
        lambda d: set_config(d, num_layers=0),
        "config.json: num_layers 0 must be a positive integer",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS}: the file is missing"),
    "empty weights": (lambda d: cut(d / WEIGHTS, 0), f"{WEIGHTS}: damaged"),
    "header cut": (lambda d: cut(d / WEIGHTS, 100), f"{WEIGHTS}: damaged"),
    "tensors cut": (lambda d: cut(d / WEIGHTS, -100), f"{WEIGHTS}: damaged"),
    "header is no JSON": (lambda d: header_of(d / WEIGHTS, b"x" * 64), f"{WEIGHTS}: damaged"),
    "a pickle": (
        lambda d: torch.save({BIAS: torch.zeros(48)}, d / WEIGHTS),
        f"{WEIGHTS}: damaged",
    ),
    "only a pickle": (
        lambda d: (d / WEIGHTS).rename(d / "diffusion_pytorch_model.bin"),
        f"diffusion_pytorch_model.bin: a pickle can run code and is never loaded; {WEIGHTS} is",
    ),
    "integers": (
        lambda d: edit(d / WEIGHTS, **{BIAS: torch.zeros(48, dtype=torch.int8)}),
        f"{BIAS!r} is stored as I8, which is not supported: only F64, F32",
    ),
    "missing key": (
        lambda d: edit(d / WEIGHTS, **{TO_K: None}),
        f"{TO_K!r} is missing; config.json asks for it with shape [24, 48]",
    ),
    "unexpected key": (
        lambda d: edit(d / WEIGHTS, **{"layers.7.extra": torch.zeros(1)}),
        "unexpected weight 'layers.7.extra'",
    ),
    "one layer too many": (lambda d: set_config(d, num_layers=1), "unexpected weight 'layers.1."),
    "one layer too few": (lambda d: set_config(d, num_layers=3), "'layers.2."),
    "wrong columns": (
        lambda d: edit(d / WEIGHTS, **{TO_Q: torch.zeros(48, 47)}),
        f"{TO_Q!r} has shape [48, 47]",
    ),
    "wrong rows": (
        lambda d: edit(d / WEIGHTS, **{TO_K: torch.zeros(12, 48)}),
        f"{TO_K!r} has shape [12, 48]",
    ),
    "rows in the wrong piece": (
        lambda d: edit(d / WEIGHTS, **{TO_Q: torch.zeros(24, 48), TO_K: torch.zeros(48, 48)}),
        f"{TO_Q!r} has shape [24, 48]",
    ),
    "rows of the wrong half": (
        lambda d: edit(
            d / WEIGHTS,
            **{UP: torch.zeros(200, 48), UP.replace("_1", "_3"): torch.zeros(184, 48)},
        ),
        f"{UP!r} has shape [200, 48]",
    ),
    "wrong axes": (
        lambda d: edit(d / WEIGHTS, **{NORM: torch.zeros(48, 1)}),
        f"{NORM!r} has shape [48, 1]",
    ),
    "a number": (lambda d: edit(d / WEIGHTS, **{BIAS: torch.zeros(())}), f"{BIAS!r} has shape []"),
    "other width": (
        lambda d: set_config(d, cap_feat_dim=21),
        "'time_caption_embed.caption_embedder.0.weight' has shape [20], config.json asks for [21]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_one_line(folder, damage):
    harm, expected = DAMAGES[damage]
    harm(folder)
    with pytest.raises(CheckpointError) as error:
        NextDiT.from_pretrained(folder)
    message = str(error.value)
    assert expected in message
    assert "transformer" in message.split(":")[0]
    assert "\n" not in message
    assert len(message) < 400


def replace_index(folder, **content):
    (folder / INDEX).write_text(json.dumps(content))


INDEX_DAMAGES = {
    "no map": (lambda d: replace_index(d), "weight_map is missing or empty"),
    "empty map": (lambda d: replace_index(d, weight_map={}), "weight_map is missing or empty"),
    "map is a list": (lambda d: replace_index(d, weight_map=[1]), "weight_map is missing or empty"),
    "no JSON": (lambda d: (d / INDEX).write_text("{"), "not readable as JSON"),
    "missing shard": (
        lambda d: sorted(d.glob("*.safetensors"))[1].unlink(),
        "its shard 'diffusion_pytorch_model-00002-of-",
    ),
    "escaping shard": (
        lambda d: replace_index(d, weight_map={"x": "../outside.safetensors"}),
        "its shard '../outside.safetensors' is missing",
    ),
    "absolute shard": (
        lambda d: replace_index(d, weight_map={"x": str(d.parent / "outside.safetensors")}),
        "is missing",
    ),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_damaged_index_is_named_in_one_line(reference, tmp_path, damage):
    folder = tmp_path / "transformer"
    reference.save_pretrained(folder, max_shard_size="100KB")
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    harm, expected = INDEX_DAMAGES[damage]
    harm(folder)
    with pytest.raises(CheckpointError) as error:
        NextDiT.from_pretrained(folder)
    message = str(error.value)
    assert message.startswith(f"transformer/{INDEX}: ")
    assert expected in message
    assert "\n" not in message


def test_damaged_shard_is_named(reference, tmp_path):
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    cut(shard, -10)
    with pytest.raises(CheckpointError, match=f"{shard.name}: damaged or not safetensors"):
        NextDiT.from_pretrained(tmp_path)


def test_a_weight_in_two_shards_is_named(reference, tmp_path):
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name = min(load_file(first))
    edit(second, **{name: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"{second.name}: '{name}' is in {first.name} too"):
        NextDiT.from_pretrained(tmp_path)


@pytest.fixture
def listed(tmp_path):
    """A folder with a manifest."""
    root = tmp_path / "checkpoint"
    (root / "part").mkdir(parents=True)
    (root / "a.txt").write_text("a")
    (root / "part" / "b.txt").write_text("b")
    write_manifest(root, {"recipe": "demo"})
    return root


def test_manifest_lists_every_other_file(listed):
    manifest = verify_manifest(listed)
    assert manifest is not None
    assert manifest["recipe"] == "demo"
    assert manifest["files"] == {
        "a.txt": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
        "part/b.txt": sha256_file(listed / "part" / "b.txt"),
    }
    write_manifest(listed, {})
    assert "manifest.json" not in read_json(listed / "manifest.json")["files"]


def test_without_a_manifest_there_is_nothing_to_verify(tmp_path):
    assert verify_manifest(tmp_path) is None


def rewrite(root, **files):
    (root / "manifest.json").write_text(json.dumps({"files": files}))


MANIFEST_DAMAGES = {
    "changed file": (
        lambda d: (d / "part" / "b.txt").write_text("c"),
        "part/b.txt: its sha256 differs from manifest.json",
    ),
    "missing file": (
        lambda d: (d / "a.txt").unlink(),
        "checkpoint/manifest.json: the file 'a.txt' it lists is missing",
    ),
    "no files": (
        lambda d: (d / "manifest.json").write_text("{}"),
        "checkpoint/manifest.json: 'files' must map",
    ),
    "files is a list": (
        lambda d: (d / "manifest.json").write_text('{"files": ["a.txt"]}'),
        "checkpoint/manifest.json: 'files' must map",
    ),
    "no JSON": (
        lambda d: cut(d / "manifest.json", 12),
        "checkpoint/manifest.json: not readable as JSON",
    ),
    "escape": (
        lambda d: rewrite(d, **{"../outside.txt": sha256_file(d.parent / "outside.txt")}),
        "'../outside.txt'",
    ),
    "absolute": (
        lambda d: rewrite(
            d, **{str(d.parent / "outside.txt"): sha256_file(d.parent / "outside.txt")}
        ),
        "outside.txt'",
    ),
    "a folder": (lambda d: rewrite(d, part="0"), "the file 'part' it lists is missing"),
    "digest of another kind": (
        lambda d: rewrite(d, **{"a.txt": None}),
        "a.txt: its sha256 differs from manifest.json",
    ),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGES)
def test_manifest_damage_is_named_in_one_line(listed, damage):
    (listed.parent / "outside.txt").write_text("secret")
    harm, expected = MANIFEST_DAMAGES[damage]
    harm(listed)
    with pytest.raises(CheckpointError) as error:
        verify_manifest(listed)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
