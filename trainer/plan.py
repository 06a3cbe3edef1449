"""What a recipe needs of each GPU, and how long it takes: computed, without training.

Memory of weights, gradients, optimiser and averages follows from their number and from how they are
sharded. Activations are counted by running the network's own blocks on meta tensors, which have
shapes and no memory, and adding up what autograd keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from model.config import NextDiTConfig
from model.layers import Block
from model.next_dit import NextDiT
from model.text_encoder import MAX_TOKENS
from trainer.config import DiffusionConfig, FlowStageConfig, Recipe
from trainer.objective import POOL

GIB = 2**30
DAY_S = 86_400
FP32, BF16 = 4, 2
OPTIMIZER_BYTES = {"adamw": 2 * FP32, "muon": FP32}  # a weight: moments, or one momentum
PROCESSES = (1, 8, 32)
StageConfig = FlowStageConfig | DiffusionConfig
PEAK_TFLOPS = {"A100": 312, "H100": 989}  # bf16, dense, as the vendor prints them
ASSUMED_MFU = 0.4
RELEASED_FEATURES, RELEASED_CHANNELS = 2304, 16  # of Gemma-2-2B and FLUX.1's autoencoder


@dataclass(frozen=True, slots=True)
class Load:
    """One packed forward and what surrounds it.

    Attributes:
        images: in one forward of one process.
        image_tokens: of one image; 1 / 16 more with the auxiliary loss.
        text_tokens: of one image, the longest.
        images_per_step: over all processes.
    """

    name: str
    images: int
    image_tokens: int
    text_tokens: int
    images_per_step: int
    steps: int
    sharded: bool
    reshard: bool
    recompute: bool
    optimizer: str
    auxiliary: bool

    @property
    def image_share(self) -> int:
        """Image tokens of the forward, pooled versions included."""
        pooled = self.image_tokens // POOL**2 if self.auxiliary else 0
        return self.images * (self.image_tokens + pooled)

    @property
    def text_share(self) -> int:
        """Caption tokens of the forward."""
        return self.images * self.text_tokens * (2 if self.auxiliary else 1)


def plan(recipe: Recipe, stage: StageConfig, processes: int) -> dict[str, int]:
    """Bytes on each GPU by what they are for."""
    config, load = shape_of(recipe), load_of(stage, processes)
    return memory(config, load, processes)


def shape_of(recipe: Recipe) -> NextDiTConfig:
    """The network; the widths that the frozen parts decide are those of the recipe's own parts."""
    features = RELEASED_FEATURES if recipe.text is None else recipe.text.hidden_size
    channels = RELEASED_CHANNELS if recipe.vae is None else recipe.vae.latent_channels
    return NextDiTConfig.from_dict(
        {"cap_feat_dim": features, "in_channels": channels, **recipe.transformer}
    )


def load_of(stage: StageConfig, processes: int) -> Load:
    """The fullest forward that a stage allows, with the longest captions."""
    if isinstance(stage, DiffusionConfig):
        tokens = max((size.width // 16) * (size.height // 16) for size in stage.sizes)
        images = max(1, stage.batch_tokens // tokens)
        total, longest = images * processes, MAX_TOKENS // 4
        sharded, reshard, recompute, auxiliary = False, False, False, False
    else:
        tokens = (stage.resolution // 16) ** 2
        sharded, reshard, recompute = stage.sharded, stage.reshard, stage.recompute
        auxiliary, longest = stage.auxiliary_weight > 0, MAX_TOKENS
        each = tokens + longest + ((tokens // POOL**2 + longest) if auxiliary else 0)
        total = stage.batch_images
        images = max(1, min(stage.micro_tokens // each, total // processes))
    return Load(
        name=stage.name,
        images=images,
        image_tokens=tokens,
        text_tokens=longest,
        images_per_step=total,
        steps=stage.steps,
        sharded=sharded and processes > 1,
        reshard=reshard,
        recompute=recompute,
        optimizer=stage.optimizer.name,
        auxiliary=auxiliary,
    )


def memory(config: NextDiTConfig, load: Load, processes: int) -> dict[str, int]:
    """Bytes on each GPU by what they are for; ``total`` at the end."""
    with torch.device("meta"):
        dit = NextDiT(config)
    count = sum(p.numel() for p in dit.parameters())
    block = sum(p.numel() for p in dit.layers[0].parameters())
    mine = -(-count // processes) if load.sharded else count
    tokens = load.image_share + load.text_share
    inside = saved_bytes(config, tokens, modulated=True)
    refiners = config.num_refiner_layers * (
        saved_bytes(config, load.image_share, modulated=True)
        + saved_bytes(config, load.text_share, modulated=False)
    )
    inputs = config.num_layers * tokens * config.hidden_size * BF16
    gathered = 0
    if load.sharded:
        # Without resharding all blocks stay gathered; a block's fp32 gradient on its way beside.
        rest = count - config.num_layers * block
        gathered = BF16 * (rest + 2 * block if load.reshard else count) + FP32 * 2 * block
    parts = {
        "weights, fp32": FP32 * mine,
        "gradients, fp32": FP32 * mine,
        "optimiser": OPTIMIZER_BYTES[load.optimizer] * mine,
        "moving average, fp32": FP32 * mine,
        "gathered weights and gradients": gathered if load.sharded else BF16 * count,
        "refiners' activations": refiners,
        "joint blocks' activations": inputs + inside
        if load.recompute
        else config.num_layers * inside,
        "latents and text features": FP32
        * (3 * load.image_share * config.patch_dim + load.text_share * config.cap_feat_dim),
    }
    return parts | {"total": sum(parts.values())}


def saved_bytes(config: NextDiTConfig, tokens: int, *, modulated: bool) -> int:
    """Bytes that autograd keeps of one block in bf16 with a fused attention kernel."""
    with torch.device("meta"):
        block = Block(config, modulated=modulated).to(torch.bfloat16)
        x = torch.empty(tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        rotary = torch.empty(tokens, config.head_dim // 2)
        time = torch.empty(2, config.modulation_dim, dtype=torch.bfloat16)
        index = torch.empty(tokens, dtype=torch.int64)
    arguments = (time, index) if modulated else ()
    known = [x, rotary, index, *block.parameters()]
    return _kept(lambda: block(x, _Fused.apply, rotary, rotary, *arguments), known)


def _kept(forward: Callable[[], Tensor], known: list[Any]) -> int:
    """Bytes of the storages that autograd keeps of a forward, without those known before."""
    before = {tensor.untyped_storage()._cdata for tensor in known}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in before:
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in storages.values())


class _Fused(torch.autograd.Function):
    """Keeps what a flash kernel keeps: its inputs, its output and a sum per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out


def flops_per_image(config: NextDiTConfig, load: Load) -> float:
    """Of one image's forward and backward, without what is computed twice to save memory.

    Matrix products alone: 2 a weight and token forward, twice that backward; attention likewise.
    """
    d, image, text = config.hidden_size, load.image_tokens, load.text_tokens
    with torch.device("meta"):
        joint, plain = Block(config, modulated=True), Block(config, modulated=False)

    def block(module: nn.Module, tokens: int) -> float:
        weights = sum(
            p.numel()
            for name, p in module.named_parameters()
            if p.ndim == 2 and "modulation" not in name
        )
        return 2.0 * weights * tokens + 4.0 * d * tokens**2

    total = 0.0
    for pixels in (image, image // POOL**2) if load.auxiliary else (image,):
        total += config.num_layers * block(joint, pixels + text)
        total += config.num_refiner_layers * (block(joint, pixels) + block(plain, text))
        total += 2.0 * (2 * config.patch_dim * d * pixels + config.cap_feat_dim * d * text)
    return 3.0 * total


def tables(recipe: Recipe) -> list[Table]:
    """What ``trainer train --plan`` prints: memory by number of GPUs, and time, for each stage."""
    config = shape_of(recipe)
    found = []
    stages: list[StageConfig] = [*recipe.diffusion, *recipe.flow]
    for stage in stages:
        columns = [memory(config, load_of(stage, n), n) for n in PROCESSES]
        load = load_of(stage, 1)
        table = Table(title=f"{recipe.name}, stage {stage.name}: GiB on each GPU")
        table.add_column("GPUs")
        for number in PROCESSES:
            table.add_column(str(number), justify="right")
        for part in columns[0]:
            table.add_row(part, *(f"{column[part] / GIB:.2f}" for column in columns))
        loads = [load_of(stage, n) for n in PROCESSES]
        table.add_row("images in one forward", *(str(each.images) for each in loads))
        table.add_row(
            "forwards a step",
            *(
                str(-(-each.images_per_step // (each.images * n)))
                for each, n in zip(loads, PROCESSES, strict=True)
            ),
        )
        table.caption = _caption(config, load)
        found.append(table)
    return found


def _caption(config: NextDiTConfig, load: Load) -> str:
    """The rest of the plan in words."""
    with torch.device("meta"):
        count = sum(p.numel() for p in NextDiT(config).parameters())
    flops = flops_per_image(config, load)
    images = load.steps * load.images_per_step
    days = ", ".join(
        f"{images * flops / (peak * 1e12 * ASSUMED_MFU) / DAY_S:.3g} {name} days"
        for name, peak in PEAK_TFLOPS.items()
    )
    latents = load.image_tokens * config.patch_dim * 2
    return (
        f"{count:,} weights; {load.steps:,} steps of {load.images_per_step:,} images; "
        f"{flops / 1e12:.3g} TFLOP an image; at an assumed {ASSUMED_MFU:.0%} of the peak: {days}. "
        f"Captions of {load.text_tokens} tokens; the cache takes {latents / 1024:.0f} KiB an image "
        f"and {config.cap_feat_dim * 2 / 1024:.2g} KiB a caption token. Not counted: the CUDA "
        "context, temporaries inside a block, and what the allocator wastes; leave a tenth."
    )
