"""The shape of a Next-DiT, in the names of diffusers' ``transformer/config.json``."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

DIFFUSERS_CLASS = "Lumina2Transformer2DModel"
FREQUENCY_DIM = 256  # width of the timestep sinusoid
ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class NextDiTConfig:
    """Hyper-parameters of one model; defaults are the released 2.6B model.

    Raises:
        ValueError: naming the field and what is allowed, when the numbers do not fit together.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = None
    hidden_size: int = 2304
    num_layers: int = 26
    num_refiner_layers: int = 2
    num_attention_heads: int = 24
    num_kv_heads: int = 8
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    scaling_factor: float = 1.0
    axes_dim_rope: tuple[int, int, int] = (32, 32, 32)
    axes_lens: tuple[int, int, int] = (300, 512, 512)
    cap_feat_dim: int = 2304

    def __post_init__(self) -> None:
        self._check_types()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide "
                f"hidden_size {self.hidden_size}"
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if sum(self.axes_dim_rope) != self.head_dim or any(d % 2 for d in self.axes_dim_rope):
            raise ValueError(
                f"axes_dim_rope {list(self.axes_dim_rope)} must be even numbers that sum to the "
                f"head dimension {self.head_dim}"
            )
        if self.out_channels not in (None, self.in_channels):
            raise ValueError(
                f"out_channels {self.out_channels} must equal in_channels {self.in_channels}"
            )

    def _check_types(self) -> None:
        """Refuse what JSON can hold and a shape cannot: text, fractions, zero, short lists."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or field.type is int:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{field.name} {value!r} must be a positive integer")
            elif field.name in ("axes_dim_rope", "axes_lens"):
                if len(value) != 3 or not all(isinstance(v, int) and v > 0 for v in value):
                    raise ValueError(f"{field.name} {value!r} must be three positive integers")
            elif field.name == "ffn_dim_multiplier" and value is None:
                continue
            elif field.name in ("norm_eps", "ffn_dim_multiplier"):
                number = isinstance(value, int | float) and math.isfinite(value) and value > 0
                if not number:
                    raise ValueError(f"{field.name} {value!r} must be a positive number")

    @property
    def head_dim(self) -> int:
        """Features per attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward: 4d, scaled, rounded up to ``multiple_of``."""
        inner = 4 * self.hidden_size
        if self.ffn_dim_multiplier is not None:
            inner = int(self.ffn_dim_multiplier * inner)
        return math.ceil(inner / self.multiple_of) * self.multiple_of

    @property
    def modulation_dim(self) -> int:
        """Width of the timestep embedding that drives every modulation."""
        return min(self.hidden_size, 1024)

    @property
    def patch_dim(self) -> int:
        """Numbers in one image token before embedding."""
        return self.patch_size**2 * self.in_channels

    @property
    def max_caption_tokens(self) -> int:
        """Longest caption the rotary table has a position for (image tokens sit one after it)."""
        return self.axes_lens[0] - 1

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "NextDiTConfig":
        """Read diffusers' config; keys starting with ``_`` are its own bookkeeping.

        Raises:
            ValueError: for an unknown key or a number that does not fit.
        """
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if not key.startswith("_")}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        for key in ("axes_dim_rope", "axes_lens"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
            elif key in values:
                raise ValueError(f"{key} {values[key]!r} must be a list of three integers")
        # diffusers' own class default differs from the released model's width.
        values.setdefault("cap_feat_dim", 1024)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json`` as diffusers would write it."""
        return {"_class_name": DIFFUSERS_CLASS, **asdict(self)}


# The sizes of the official code by their number of parameters; only 2.6B was released.
NAMED_CONFIGS: Mapping[str, NextDiTConfig] = {
    "2.6B": NextDiTConfig(),
    "3B": NextDiTConfig(hidden_size=2592, num_layers=30, axes_dim_rope=(36, 36, 36)),
    "4B": NextDiTConfig(hidden_size=2880, num_layers=32, axes_dim_rope=(40, 40, 40)),
    "7B": NextDiTConfig(
        hidden_size=3840, num_layers=32, num_attention_heads=32, axes_dim_rope=(40, 40, 40)
    ),
}


def size_name(config: NextDiTConfig) -> str | None:
    """The named size whose weights have the same shapes; None where there is none."""
    for name, named in NAMED_CONFIGS.items():
        if _shape_numbers(named) == _shape_numbers(config):
            return name
    return None


def _shape_numbers(config: NextDiTConfig) -> tuple[int, ...]:
    """Every number that the shape of some weight depends on."""
    return (
        config.hidden_size,
        config.num_layers,
        config.num_refiner_layers,
        config.num_attention_heads,
        config.num_kv_heads,
        config.ffn_dim,
        config.patch_dim,
        config.cap_feat_dim,
    )
