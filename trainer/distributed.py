"""Data-parallel processes: who we are, and averaging gradients between us.

Started by ``torchrun``; without it there is one process and every function is a no-op.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """Our place among the processes of a run."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


def init_world() -> World:
    """Join the processes torchrun started; CPU cores are shared evenly between them."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if size == 1:
        return World(device=device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    return World(rank=dist.get_rank(), size=size, device=device)


def close_world() -> None:
    """Leave the group, if we joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait for all processes."""
    if world.size > 1:
        dist.barrier()


def average_gradients(world: World, parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, in one transfer."""
    if world.size == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= world.size
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def sum_over_processes(world: World, tensor: Tensor) -> None:
    """Replace a tensor by its sum over the processes."""
    if world.size > 1:
        dist.all_reduce(tensor)


def broadcast_parameters(world: World, parameters: Iterable[Tensor]) -> None:
    """Give every process the main process's values: ranks must start from equal weights."""
    if world.size > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def average_scalar(world: World, value: float) -> float:
    """Mean of a number over the processes."""
    (mean,) = average_scalars(world, [value])
    return mean


def average_scalars(world: World, values: Sequence[float]) -> list[float]:
    """Means of numbers over the processes, in one transfer."""
    if world.size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    means: list[float] = (tensor / world.size).tolist()
    return means


def gather_names(world: World, names: list[str]) -> list[str]:
    """The names of all processes, in the order of their ranks."""
    if world.size == 1:
        return names
    gathered: list[list[str]] = [[] for _ in range(world.size)]
    dist.all_gather_object(gathered, names)
    return [name for part in gathered for name in part]
