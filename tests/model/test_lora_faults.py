"""LoRA files that are wrong: one line each, naming the file, the key and what is expected."""

import struct

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import CheckpointError
from model.config import NextDiTConfig
from model.lora import open_lora

CONFIG = NextDiTConfig(
    in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
    num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 4, 4), cap_feat_dim=20,
)  # fmt: skip

Q = "transformer.layers.0.attn.to_q"
A, B, ALPHA = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"{Q}.alpha"
GOOD = {A: torch.ones(2, 48), B: torch.ones(48, 2)}
FUSED_A = "diffusion_model.layers.0.attention.qkv.lora_A.weight"
FUSED_B = FUSED_A.replace("lora_A", "lora_B")
ONE = torch.ones(())
FAULTS = {
    "unknown layer": (
        {f"{Q}x.lora_A.weight": ONE, "text_encoder.q.lora_B.weight": ONE},
        f"unknown keys 'text_encoder.q.lora_B.weight', '{Q}x.lora_A.weight'; lora_A and lora_B",
    ),
    "a transformer": (
        {A: None, B: None, "model.diffusion_model.t_embedder.mlp.0.weight": ONE, "x": ONE},
        "a transformer, not a LoRA: `lumina convert`",
    ),
    "another kind": ({f"{Q}.hada_w1_a": ONE}, f"unknown key '{Q}.hada_w1_a'; lora_A"),
    "DoRA": ({f"{Q}.lora_magnitude_vector": ONE}, "unknown key"),
    "bias": ({f"{Q}.lora_B.bias": ONE}, "unknown key"),
    "another network": (
        {f"transformer.layers.{i}.attn.to_q.lora_A.weight": ONE for i in range(2, 20)},
        "and 10 more; lora_A",
    ),
    "no B": ({B: None}, f"{A!r} has no lora_B weight beside it"),
    "no A": ({A: None}, f"{B!r} has no lora_A weight beside it"),
    "alpha alone": ({A: None, B: None, ALPHA: ONE}, f"{ALPHA!r} has no lora_A weight beside it"),
    "A's width": (
        {A: torch.ones(2, 47)},
        f"{A!r} has shape [2, 47], this network asks for [rank, 48]",
    ),
    "B's rank": ({B: torch.ones(48, 3)}, f"{B!r} has shape [48, 3], this network asks for [48, 2]"),
    "B's rows": ({B: torch.ones(24, 2)}, "has shape [24, 2], this network asks for [48, 2]"),
    "A's axes": ({A: torch.ones(2)}, "has shape [2], this network asks for [rank, 48]"),
    "a number for A": ({A: ONE}, "has shape [], this network asks for [rank, 48]"),
    "a convolution": ({B: torch.ones(48, 2, 1, 1)}, "has shape [48, 2, 1, 1]"),
    "rank 0": ({A: torch.ones(0, 48), B: torch.ones(48, 0)}, "asks for [rank, 48]"),
    "integers": ({A: torch.ones(2, 48, dtype=torch.int8)}, f"{A!r} is stored as I8"),
    "alpha's shape": ({ALPHA: torch.ones(2)}, f"{ALPHA!r} must be one finite number"),
    "alpha": ({ALPHA: torch.tensor(float("nan"))}, f"{ALPHA!r} must be one finite number"),
    "twice": (
        {f"{Q}.lora_down.weight": torch.ones(2, 48)},
        f"{A!r} and '{Q}.lora_down.weight' say the same thing",
    ),
    "twice, by two names": (
        {FUSED_A: torch.ones(2, 48), FUSED_B: torch.ones(96, 2)}, "change the same weight",
    ),
    "empty": ({A: None, B: None}, "holds no LoRA"),
}  # fmt: skip


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        open_lora(path, CONFIG)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused_in_one_line(fault, tmp_path):
    changes, words = FAULTS[fault]
    path = tmp_path / "style.safetensors"
    changed = {**GOOD, **changes}.items()
    state = {key: value.clone() for key, value in changed if value is not None}
    save_file(state, path)
    told = refusal(path)
    assert told.startswith(f"{tmp_path.name}/style.safetensors: ")
    assert words in told


def test_the_file_without_faults_is_taken(tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(GOOD, path)
    assert list(open_lora(path, CONFIG).pairs) == ["layers.0.attention.qkv"]


METADATA = {
    "no JSON": ("{", "lora_adapter_metadata must be a JSON object"),
    "a list": ("[]", "lora_adapter_metadata must be a JSON object"),
    "DoRA": ('{"transformer.use_dora": true}', "use_dora is not supported"),
    "alpha": ('{"transformer.lora_alpha": "x"}', "lora_alpha 'x' must be a finite number"),
    "patterns": ('{"alpha_pattern": [1]}', "alpha_pattern must map layers to numbers"),
    "a pattern's alpha": ('{"alpha_pattern": {"to_q": NaN}}', "to_q nan must be a finite number"),
    "a pattern": ('{"alpha_pattern": {"(": 1}}', "alpha_pattern '(' must be a pattern"),
}


@pytest.mark.parametrize("fault", METADATA)
def test_wrong_settings_are_refused_in_one_line(fault, tmp_path):
    text, words = METADATA[fault]
    path = tmp_path / "style.safetensors"
    save_file(GOOD, path, metadata={"lora_adapter_metadata": text})
    assert words in refusal(path)


def test_damaged_files_and_pickles_are_refused(tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(GOOD, path)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:20], struct.pack("<Q", 2**40) + whole[8:], b"x" * 99):
        path.write_bytes(content)
        assert "style.safetensors: damaged or not safetensors" in refusal(path)
    pickle = tmp_path / "style.pt"
    torch.save(GOOD, pickle)
    assert "style.pt: a pickle can run code and is never loaded" in refusal(pickle)
    assert "gone.safetensors" in refusal(tmp_path / "gone.safetensors")
