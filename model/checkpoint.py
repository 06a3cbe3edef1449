"""Reading and writing checkpoint folders: safetensors, key names, manifest.

Only safetensors are read, one tensor at a time: loading needs the memory of the result and of one
stored tensor. Whatever is wrong becomes one line that names the file and the fault.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import NextDiTConfig

WEIGHTS_STEM = "diffusion_pytorch_model"
MANIFEST = "manifest.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# Number formats a weight may be stored in, by their names in safetensors headers.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

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


class Stored(NamedTuple):
    """What a file's header says of a tensor; ``dtype`` is safetensors' word for it."""

    shape: tuple[int, ...]
    dtype: str


class Weights(Protocol):
    """Stored tensors, known by their headers and read one at a time."""

    @property
    def name(self) -> str:
        """The file, as its owner recognises it."""

    @property
    def stored(self) -> Mapping[str, Stored]:
        """What is known of every tensor, by its name in the file."""

    def read(self, key: str) -> Tensor:
        """The tensor as it is stored, on the CPU and perhaps memory-mapped: copy it and drop it."""


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


def piece_shapes(key: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of what `diffusers_keys` names, for our weight ``key`` of this shape."""
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
        raise CheckpointError(f"{short_name(path)}: the file is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{short_name(path)}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{short_name(path)}: must hold a JSON object")
    return data


def load_transformer_config(folder: Path) -> NextDiTConfig:
    """Read ``folder/config.json``."""
    path = folder / "config.json"
    try:
        return NextDiTConfig.from_dict(read_json(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{short_name(path)}: {error}") from None


def weight_files(folder: Path, stem: str = WEIGHTS_STEM) -> list[Path]:
    """The safetensors files of a folder: one, or the shards its index lists."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        for path in sorted(folder.glob("*")):
            if path.suffix in PICKLES:
                raise CheckpointError(
                    f"{short_name(path)}: a pickle can run code and is never loaded; "
                    f"{single.name} is expected"
                )
        raise CheckpointError(f"{short_name(single)}: the file is missing")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{short_name(index)}: weight_map is missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{short_name(index)}: its shard {name!r} is missing")
    return [folder / name for name in names]


class WeightFiles:
    """The tensors of safetensors files; see `Weights`.

    Raises:
        CheckpointError: naming the file that is damaged or repeats a tensor of another.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        self.name = short_name(paths[0]) + more
        self.stored: dict[str, Stored] = {}
        self._home: dict[str, Path] = {}
        for path in paths:
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if key in self._home:
                        raise CheckpointError(
                            f"{short_name(path)}: {key!r} is in {self._home[key].name} too"
                        )
                    piece = file.get_slice(key)
                    self.stored[key] = Stored(tuple(piece.get_shape()), piece.get_dtype())
                    self._home[key] = path
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None

    def read(self, key: str) -> Tensor:
        """The tensor as it is stored, memory-mapped on the CPU: copy it and drop it."""
        path = self._home[key]
        try:
            # Opened anew each time: a mapping kept open keeps all pages read through it in memory.
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        return tensor


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{short_name(path)}: damaged or not safetensors ({reason})")


def check_weight(
    weights: Weights, key: str, shape: Sequence[int], asker: str = "config.json"
) -> None:
    """Refuse a weight that is missing, of another shape, or of no floating-point format."""
    wanted = list(shape)
    if key not in weights.stored:
        raise CheckpointError(
            f"{weights.name}: the weight {key!r} is missing; {asker} asks for it with shape "
            f"{wanted}"
        )
    stored = weights.stored[key]
    if list(stored.shape) != wanted:
        raise CheckpointError(
            f"{weights.name}: {key!r} has shape {list(stored.shape)}, {asker} asks for {wanted}"
        )
    if stored.dtype not in FLOATS:
        raise CheckpointError(
            f"{weights.name}: {key!r} is stored as {stored.dtype}, which is not supported: "
            f"only {', '.join(FLOATS)} are"
        )


def check_nothing_else(
    weights: Weights, keys: Iterable[str], known: Collection[str], asker: str = "config.json"
) -> None:
    """Refuse any of ``keys`` that is not known."""
    unknown = sorted(key for key in keys if key not in known)
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{weights.name}: unexpected weight {unknown[0]!r}{more}; {asker} has no place for it"
        )


def load_weight(
    weights: Weights,
    pieces: Sequence[str],
    shape: Sequence[int],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """A tensor assembled from stored pieces along its first axis, in its final place and dtype.

    Args:
        weights: where the pieces are.
        pieces: their names, checked before (`check_weight`).
        shape: of the result.
        device: of the result.
        dtype: of the result.
    """
    # Memory of our own, aligned alike wherever in the file a tensor lay: a memory-mapped weight
    # may round differently, and would follow the file if it were replaced.
    whole = torch.empty(tuple(shape), dtype=dtype, device=device)
    if len(pieces) == 1:
        return whole.copy_(weights.read(pieces[0]))
    start = 0
    for name in pieces:
        rows = weights.stored[name].shape[0]
        whole[start : start + rows].copy_(weights.read(name))
        start += rows
    assert start == whole.shape[0]
    return whole


def load_transformer(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Read diffusers' weights under our names, fused pieces joined.

    Beside the result, host memory holds one stored tensor at a time.

    Args:
        folder: with ``config.json`` and safetensors.
        expected: our key to its shape.
        device: where the weights go.
        dtype: of the result.

    Raises:
        CheckpointError: naming the first missing, unexpected or misshapen key.
    """
    weights = WeightFiles(weight_files(folder))
    known = {"norm_final.weight"}  # unused by the model, kept by some exports
    for key, shape in expected.items():
        for piece, wanted in zip(diffusers_keys(key), piece_shapes(key, shape), strict=True):
            check_weight(weights, piece, wanted)
            known.add(piece)
    check_nothing_else(weights, weights.stored, known)
    return {
        key: load_weight(weights, diffusers_keys(key), shape, device=device, dtype=dtype)
        for key, shape in expected.items()
    }


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
        rows = [shape[0] for shape in piece_shapes(key, tuple(value.shape))]
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
        raise CheckpointError(f"{short_name(path)}: 'files' must map file names to sha256")
    root = folder.resolve()
    for name, digest in files.items():
        file = (root / str(name)).resolve()
        if not file.is_relative_to(root) or not file.is_file():
            raise CheckpointError(f"{short_name(path)}: the file {name!r} it lists is missing")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{name}: its sha256 differs from manifest.json")
    return manifest


def short_name(path: Path) -> str:
    """The last two parts of a path: what its owner recognises."""
    return "/".join(path.parts[-2:])
