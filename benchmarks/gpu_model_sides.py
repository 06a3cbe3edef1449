"""The sides of `bench_gpu_model`: one network with random weights, run by diffusers and by us.

One call is one denoising step of one or several pictures of a size: both guidance branches.
diffusers evaluates them one after the other, as its pipeline does, with its pictures as a dense
batch; here all branches are one packed forward.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from model.acceleration import accelerate
from model.attention.registry import VARIABLE as ATTENTION
from model.config import NextDiTConfig
from model.denoise_state import DenoiseState
from model.guidance import Guidance
from model.modulation import ModulationTable
from model.next_dit import NextDiT
from model.packing import upload
from model.pipeline import Pipeline
from model.quantize import quantize_fp8
from model.samplers import make_sampler
from model.stack import StackRunner
from model.teacache import RequestCache, SkipPlan

CAPTION, NEGATIVE = 100, 30  # tokens of the two branches
TIMESTEP = 0.3
SHIFT = 6.0
GUIDED = 0.25  # of the steps run both branches, as the released model's own recipe has it
GRAPH_TOKENS = 4096


@dataclass(frozen=True)
class Case:
    """Pictures of one size that step together."""

    pixels: int
    pictures: int

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.pixels} px x {self.pictures}"

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """Caption and image tokens of every branch of a step."""
        image = (self.pixels // 16) ** 2
        return [(caption, image) for caption in (CAPTION, NEGATIVE) for _ in range(self.pictures)]


@dataclass(frozen=True)
class Ours:
    """One way to run our network; of the Triton kernels those named are on."""

    name: str
    compile: str = "off"
    kernels: tuple[str, ...] = ()
    graphs: bool = False
    fp8: bool = False
    wide: bool = False  # an fp32 residual stream: precision `mixed`
    attention: str = ""

    @property
    def switches(self) -> dict[str, bool]:
        """For every operator whether its kernel is on."""
        return {name: name in self.kernels for name in dispatch.DEFAULTS}


@dataclass(frozen=True)
class Theirs:
    """One way to run diffusers' network."""

    name: str
    compile: bool = False
    cudnn: bool = False


class World:
    """Both networks on a device, with the same weights, and the inputs of a case.

    Args:
        config: of the network.
        device: where it runs.
        dtype: of weights and activations.
        scratch: an empty folder, for handing the weights over.
    """

    def __init__(
        self, config: NextDiTConfig, device: torch.device, dtype: torch.dtype, scratch: Path
    ) -> None:
        from diffusers import Lumina2Transformer2DModel
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.set_verbosity_error()
        self.config, self.device, self.dtype = config, device, dtype
        torch.manual_seed(0)
        arguments = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        with torch.device(device):
            self.reference: Any = Lumina2Transformer2DModel(**arguments)
        self.reference = self.reference.to(dtype).eval().requires_grad_(False)
        self.reference.save_pretrained(scratch)
        self._scratch = scratch
        self._compiled_reference: Any = None
        self._networks: dict[bool, NextDiT] = {}
        self._runners: dict[Ours, tuple[StackRunner, ModulationTable]] = {}

    def network(self, fp8: bool = False) -> NextDiT:
        """Ours, loaded on first use."""
        if fp8 not in self._networks:
            dit = NextDiT.from_pretrained(self._scratch, device=self.device, dtype=self.dtype)
            if fp8:
                quantize_fp8(dit)
            self._networks[fp8] = dit
        return self._networks[fp8]

    @contextlib.contextmanager
    def set_up(self, side: Ours) -> Iterator[tuple[NextDiT, ModulationTable]]:
        """The network as this side wants it; what it compiled and captured is kept."""
        dit = self.network(side.fp8)
        before = os.environ.get(ATTENTION, "")
        os.environ[ATTENTION] = side.attention or before
        dit.residual_dtype = torch.float32 if side.wide else None
        try:
            with dispatch.forced(**side.switches):
                if side not in self._runners:
                    tokens = GRAPH_TOKENS if side.graphs else 0
                    accelerate(dit, compile=side.compile, graph_tokens=tokens)
                    self._runners[side] = dit.run_stack, ModulationTable(dit)
                dit.run_stack, table = self._runners[side]
                yield dit, table
        finally:
            os.environ[ATTENTION] = before

    def fault(self, side: Ours | Theirs) -> str:
        """What a side could not do of what it is named after; empty where all is well."""
        runner: Any = self._runners[side][0] if isinstance(side, Ours) else None
        inner = getattr(runner, "_inner", runner)
        if getattr(runner, "broken", False) or getattr(inner, "broken", False):
            return "fell back to slower code; see the log"
        if isinstance(side, Ours) and side.graphs and not getattr(runner, "num_captures", 0):
            return "no CUDA graph was captured"
        return ""

    def step(self, side: Ours | Theirs, case: Case) -> Callable[[], list[Tensor]]:
        """One denoising step of a case: velocities of cond, then of uncond."""
        inputs = Inputs(self, case)
        if isinstance(side, Theirs):
            return lambda: self._their_step(side, inputs)
        with self.set_up(side) as (dit, _):
            contexts = dit.encode_context(inputs.embeds)
        return lambda: self._our_step(side, inputs, contexts)

    def _our_step(self, side: Ours, inputs: Inputs, contexts: list[Tensor]) -> list[Tensor]:
        with self.set_up(side) as (dit, table):
            times = [TIMESTEP] * len(contexts)
            modulation = table.of(times, [()] * len(times))
            latents = inputs.latents * 2
            packed = dit.embed(latents, torch.tensor(times), contexts, modulation=modulation)
            return dit.head(dit.blocks(packed))

    def _their_step(self, side: Theirs, inputs: Inputs) -> list[Tensor]:
        transformer = self._their_network(side.compile)
        latents = torch.stack(inputs.latents).to(self.dtype)
        times = upload(torch.full((len(latents),), TIMESTEP, dtype=self.dtype), self.device)
        halves = inputs.embeds[: len(latents)], inputs.embeds[len(latents) :]
        velocities: list[Tensor] = []
        with best_attention(side.cudnn):
            for embeds in halves:
                mask = torch.ones(len(embeds), len(embeds[0]), dtype=torch.bool, device=self.device)
                out = transformer(latents, times, torch.stack(embeds), mask, return_dict=False)[0]
                velocities += list(out)
        return velocities

    def _their_network(self, compile: bool) -> Any:
        if not compile:
            return self.reference
        if self._compiled_reference is None:
            # Its blocks share a graph that way, as ours do; the whole would take minutes a size.
            import copy

            twin = copy.copy(self.reference)
            twin._modules = dict(self.reference._modules)
            twin.layers = torch.nn.ModuleList([torch.compile(b) for b in self.reference.layers])
            self._compiled_reference = twin
        return self._compiled_reference

    def their_picture(self, side: Theirs, case: Case, steps: int) -> Callable[[], Any]:
        """All steps of one picture by diffusers' own pipeline, without text encoder and VAE."""
        from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

        inputs = Inputs(self, case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = Lumina2Pipeline(
                transformer=self._their_network(side.compile),
                scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
                vae=None,
                text_encoder=None,
                tokenizer=None,
            )
        pipeline.set_progress_bar_config(disable=True)
        # Its pipeline wants both prompts padded to one length; the mask says what is there.
        cond, uncond = inputs.embeds[0][None], inputs.embeds[-1][None]
        missing = cond.shape[1] - uncond.shape[1]
        mask = torch.ones(cond.shape[:2], dtype=torch.bool, device=self.device)
        return lambda: pipeline(
            prompt_embeds=cond,
            negative_prompt_embeds=torch.nn.functional.pad(uncond, (0, 0, 0, missing)),
            prompt_attention_mask=mask,
            negative_prompt_attention_mask=torch.nn.functional.pad(mask[:, missing:], (0, missing)),
            latents=inputs.latents[0][None].to(self.dtype),
            width=case.pixels,
            height=case.pixels,
            num_inference_steps=steps,
            guidance_scale=4.0,
            cfg_trunc_ratio=GUIDED,
            output_type="latent",
        )

    def our_picture(
        self, side: Ours, case: Case, sampler: str, steps: int, cached: bool
    ) -> Callable[[], DenoiseState]:
        """All steps of one picture by our pipeline, without text encoder and VAE."""
        inputs = Inputs(self, case)
        solver = make_sampler(
            sampler, time_grid="diffusers", num_inference_steps=steps, shift=SHIFT
        )

        def draw() -> DenoiseState:
            with self.set_up(side) as (dit, table):
                nothing: Any = None  # neither text nor pixels are touched
                pipeline = Pipeline(
                    dit=dit, vae=nothing, text_encoder=nothing, generation_config=nothing
                )
                pipeline.modulation = table
                contexts = dit.encode_context([inputs.embeds[0], inputs.embeds[-1]])
                state = DenoiseState(
                    request=nothing,
                    sampler=solver,
                    guidance=Guidance(guidance_scale=4.0, cfg_trunc_ratio=GUIDED),
                    cond=contexts[0],
                    uncond=contexts[1],
                    samples=[solver.start(inputs.latents[0])],
                    tokens_per_image=case.sequences[0][1],
                    cache=RequestCache(SkipPlan(two_of_three(steps))) if cached else None,
                )
                while not state.finished:
                    pipeline.denoise_step([state])
                return state

        return draw


class TrainingStep:
    """AdamW on fp32 weights, arithmetic in bf16 on a GPU; one picture, no checkpointing."""

    @torch.inference_mode(False)
    def __init__(self, config: NextDiTConfig, device: torch.device, case: Case) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self._dit = NextDiT(config)
        self._optimizer = torch.optim.AdamW(self._dit.parameters(), lr=1e-4)
        side = case.pixels // 8
        self._latents = torch.randn(config.in_channels, side, side, device=device)
        self._embeds = torch.randn(CAPTION, config.cap_feat_dim, device=device)
        self._autocast = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self) -> Tensor:
        """Forward, backward, update; returns the loss."""
        with self._autocast:
            (velocity,) = self._dit([self._latents], torch.tensor([TIMESTEP]), [self._embeds])
            loss: Tensor = (velocity.float() - self._latents).square().mean()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


class Inputs:
    """Random latents of every picture; features of every prompt, then of every negative one."""

    def __init__(self, world: World, case: Case) -> None:
        generator = torch.Generator().manual_seed(1)
        side = case.pixels // 8
        shape = world.config.in_channels, side, side

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(world.device)

        self.latents = [draw(*shape) for _ in range(case.pictures)]
        width = world.config.cap_feat_dim
        self.embeds = [draw(tokens, width).to(world.dtype) for tokens, _ in case.sequences]


def two_of_three(steps: int) -> tuple[bool, ...]:
    """A schedule that skips the joint blocks of every third step, but not of the last."""
    return tuple(k % 3 != 2 or k == steps - 1 for k in range(steps))


@contextlib.contextmanager
def best_attention(cudnn: bool) -> Iterator[None]:
    """cuDNN's kernel first, where asked for: the best of a plain install of torch on Hopper."""
    from torch.nn.attention import sdpa_kernel

    from model.attention.dense import CUDNN_FIRST

    with sdpa_kernel(list(CUDNN_FIRST), set_priority=True) if cudnn else contextlib.nullcontext():
        yield
