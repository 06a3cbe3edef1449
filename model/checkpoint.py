"""Reading and writing checkpoint folders: safetensors, key names, manifest.

Only safetensors are read. Whatever is wrong becomes one line that names the file and the fault.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import NextDiTConfig

WEIGHTS_STEM = "diffusion_pytorch_model"
MANIFEST = "manifest.json"

# Our names on the left, diffusers' on the right; several on the right are its unfused pieces.
_TOP_KEYS = {
    "time_embedder.": "time_caption_embed.timestep_embedder.",
    "caption_embedder.norm.": "time_caption_embed.caption_embedder.0.",
    "caption_embedder.linear.": "time_caption_embed.caption_embedder.1.",
    "final_layer.modulation.": "norm_out.linear_1.",
    "final_layer.linear.": "norm_out.linear_2.",
}
_BLOCK_KEYS = {
    "attention.qkv.": ("attn.to_q.", "attn.to_k.", "attn.to_v."),
    "attention.out.": ("attn.to_out.0.",),
    "attention.q_norm.": ("attn.norm_q.",),
    "attention.k_norm.": ("attn.norm_k.",),
    "feed_forward.gate_up.": ("feed_forward.linear_1.", "feed_forward.linear_3."),
    "feed_forward.down.": ("feed_forward.linear_2.",),
    "attention_norm1.": ("norm1.norm.",),
    "attention_norm2.": ("norm2.",),
    "modulation.": ("norm1.linear.",),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line for its owner."""


def diffusers_keys(key: str) -> tuple[str, ...]:
    """The names under which diffusers keeps the weight we call ``key``.

    A fused weight has several; concatenated along the first axis they give ours.
    """
    for ours, theirs in _TOP_KEYS.items():
        if key.startswith(ours):
            return (theirs + key.removeprefix(ours),)
    stem, _, name = key.partition(".")
    if stem not in ("context_refiner", "noise_refiner", "layers"):
        return (key,)
    index, _, name = name.partition(".")
    if stem == "context_refiner" and name == "attention_norm1.weight":
        return (f"{stem}.{index}.norm1.weight",)  # unmodulated blocks hold the norm itself
    for ours, pieces in _BLOCK_KEYS.items():
        if name.startswith(ours):
            return tuple(f"{stem}.{index}.{p}{name.removeprefix(ours)}" for p in pieces)
    return (key,)


def _piece_shapes(key: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the diffusers pieces of our weight ``key`` of this shape."""
    rows, *others = shape
    if "attention.qkv" in key:
        query = others[0]  # queries are as wide as the model
        pieces = [query, (rows - query) // 2, (rows - query) // 2]
    else:
        pieces = [rows // 2] * 2 if "gate_up" in key else [rows]
    return [(piece, *others) for piece in pieces]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: when the file is missing, is no JSON, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{_short(path)}: the file is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{_short(path)}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{_short(path)}: must hold a JSON object")
    return data


def load_transformer_config(folder: Path) -> NextDiTConfig:
    """Read ``folder/config.json``."""
    path = folder / "config.json"
    try:
        return NextDiTConfig.from_dict(read_json(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{_short(path)}: {error}") from None


def weight_files(folder: Path, stem: str = WEIGHTS_STEM) -> list[Path]:
    """The safetensors files of a folder: one, or the shards its index lists."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{_short(single)}: the file is missing")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{_short(index)}: weight_map is missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{_short(index)}: its shard {name!r} is missing")
    return [folder / name for name in names]


def load_state(folder: Path, stem: str = WEIGHTS_STEM) -> dict[str, Tensor]:
    """All tensors of a folder as they are stored, memory-mapped on the CPU."""
    state: dict[str, Tensor] = {}
    for path in weight_files(folder, stem):
        try:
            with safe_open(path, framework="pt") as file:
                state.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{_short(path)}: damaged or not safetensors ({error})") from None
    return state


def load_transformer(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Read diffusers' weights under our names, fused pieces joined.

    Args:
        folder: with ``config.json`` and safetensors.
        expected: our key to its shape.
        device: where the weights go.
        dtype: of the result.

    Raises:
        CheckpointError: naming the first missing, unexpected or misshapen key.
    """
    state, name = load_state(folder), _short(folder)
    weights: dict[str, Tensor] = {}
    for key, shape in expected.items():
        pieces = []
        for piece, wanted in zip(diffusers_keys(key), _piece_shapes(key, shape), strict=True):
            if piece not in state:
                raise CheckpointError(f"{name}: the weight {piece!r} is missing")
            pieces.append(state.pop(piece))
            if pieces[-1].shape != wanted:
                raise CheckpointError(
                    f"{name}: {piece!r} has shape {list(pieces[-1].shape)}, config.json asks for "
                    f"{list(wanted)}"
                )
        # Memory of our own, aligned alike wherever in the file a tensor lay: a memory-mapped
        # weight may round differently, and would follow the file if it were replaced.
        joined = pieces[0].clone() if len(pieces) == 1 else torch.cat(pieces)
        weights[key] = joined.to(device=device, dtype=dtype)
    state.pop("norm_final.weight", None)  # unused by the model, kept by some exports
    if state:
        raise CheckpointError(f"{name}: unexpected weight {min(state)!r}")
    return weights


def save_transformer(
    folder: Path,
    config: NextDiTConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write our weights as diffusers names them."""
    folder.mkdir(parents=True, exist_ok=True)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        rows = [shape[0] for shape in _piece_shapes(key, tuple(value.shape))]
        for name, piece in zip(diffusers_keys(key), value.split(rows), strict=True):
            out[name] = piece.detach().to("cpu", dtype or piece.dtype).contiguous().clone()
    save_file(out, folder / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config.to_dict())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, UTF-8, with a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, info: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: the sha256 of every other file, and ``info`` about the making."""
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {**info, "files": files})


def verify_manifest(folder: Path) -> dict[str, Any] | None:
    """Check every file against ``manifest.json``; None where there is no manifest.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{_short(path)}: 'files' must map file names to sha256")
    root = folder.resolve()
    for name, digest in files.items():
        file = (root / str(name)).resolve()
        if not file.is_relative_to(root) or not file.is_file():
            raise CheckpointError(f"{_short(path)}: the file {name!r} it lists is missing")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{name}: its sha256 differs from manifest.json")
    return manifest


def _short(path: Path) -> str:
    """The last two parts of a path: what its owner recognises."""
    return "/".join(path.parts[-2:])
