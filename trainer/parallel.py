"""How a transformer is spread over processes and over time: FSDP2 shards, recomputed blocks."""

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from model.next_dit import NextDiT
from trainer.distributed import World


def recompute_blocks(dit: NextDiT) -> None:
    """Keep only the inputs of the joint blocks; the backward computes what is inside again.

    The released training code does the same, for these blocks alone.
    """
    for block in dit.layers:
        # Nothing inside draws random numbers, so their state need not be kept.
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again


def shard(module: nn.Module, world: World, dtype: torch.dtype, *, reshard: bool) -> None:
    """Shard a transformer's fp32 weights over all processes with FSDP2, in place.

    Each joint block is gathered by itself, the rest together. Matrix products are in ``dtype``;
    gradients are reduced in fp32 (lumina-image-2.0 trains likewise, as SHARD_GRAD_OP).

    Args:
        module: with a list of blocks ``layers``; equal on all processes.
        world: the processes.
        dtype: of the gathered weights.
        reshard: give gathered weights up between forward and backward.
    """
    mesh = init_device_mesh(world.device.split(":")[0], (world.size,))
    # Rotary tables and timesteps must arrive in fp32: inputs are not cast.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in module.layers:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
