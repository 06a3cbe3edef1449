"""A Next-DiT of a few thousand weights, and a data set in memory, for stages of flow matching."""

from pathlib import Path

import torch

from model.config import NextDiTConfig
from model.next_dit import NextDiT
from trainer.config import FlowStageConfig, OptimizerConfig
from trainer.data.records import Caption, Record
from trainer.distributed import World
from trainer.stages.flow import FlowStage

CONFIG = NextDiTConfig(
    in_channels=4,
    hidden_size=24,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=16,
    axes_dim_rope=(2, 2, 2),
    cap_feat_dim=12,
)
SIZES = [(16, 16), (8, 24), (24, 8), (16, 8)]
ALONE = World()


def stage_config(**changes) -> FlowStageConfig:
    """Two forwards or so a step; everything in fp32."""
    settings = {
        "name": "flow",
        "resolution": 128,
        "steps": 6,
        "batch_images": 8,
        "micro_tokens": 280,
        "timestep_shift": 1.15,
        "auxiliary_weight": 1.0,
        "levels": {"short": 1.0, "detailed": 2.0},
        "languages": {"en": 1.0},
        "domains": {"default": "base"},
        "optimizer": OptimizerConfig(lr=3e-3, clip=2.0, ema_decay=0.9),
        "precision": "fp32",
    }
    return FlowStageConfig.model_validate(settings | changes)


def network(seed: int = 0) -> NextDiT:
    """No weight is zero or one, so that every gradient is there."""
    torch.manual_seed(seed)
    dit = NextDiT(CONFIG)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dit


class MemoryData:
    """Like `EncodedSet`: random latents of several sizes, features of two captions each."""

    def __init__(self, num: int = 11) -> None:
        generator = torch.Generator().manual_seed(5)
        self._latents = [
            torch.randn(CONFIG.in_channels, *SIZES[i % len(SIZES)], generator=generator)
            for i in range(num)
        ]
        lengths = [[1, 2 + i % 5, 6 + i % 3] for i in range(num)]
        self._features = [
            [torch.randn(n, CONFIG.cap_feat_dim, generator=generator) for n in row]
            for row in lengths
        ]

    def __len__(self) -> int:
        return len(self._latents)

    def record(self, item: int) -> Record:
        captions = (Caption("a", "short", "en"), Caption("b", "detailed", "en"))
        return Record(f"images/{item}.png", Path(f"{item}.png"), captions)

    def image_tokens(self, item: int) -> int:
        return self._latents[item][0].numel() // 4

    def tokens(self, item: int, caption: int | None) -> int:
        return self.image_tokens(item) + len(self.features(item, caption))

    def latents(self, item: int) -> torch.Tensor:
        return self._latents[item]

    def features(self, item: int, caption: int | None) -> torch.Tensor:
        return self._features[item][0 if caption is None else 1 + caption]


def make_stage(world: World = ALONE, seed: int = 0, **changes) -> FlowStage:
    """A stage on `MemoryData`."""
    return FlowStage(stage_config(**changes), network(seed), MemoryData(), (7, 0), world)
