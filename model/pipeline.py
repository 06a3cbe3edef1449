"""Prompt to picture without queue or HTTP: prepare, denoise step by step, decode.

The three stages are public because a server interleaves many requests: every `DenoiseState` is one
request on its way, and `denoise_step` advances any set of them in one packed forward, whatever
their sizes, step counts and guidance.

A *branch* is one sequence of that forward: one image with its prompt (cond), or with the negative
prompt (uncond).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from model.adapters import Adapters
from model.cache_config import CacheConfig
from model.denoise_state import DenoiseState
from model.generation_config import GenerationConfig
from model.guidance import Guidance
from model.lora_registry import LoraRegistry, chosen_adapters
from model.modulation import ModulationTable
from model.next_dit import NextDiT
from model.request import GenerationRequest, ResolvedRequest, nearest
from model.samplers import make_sampler
from model.teacache import (
    BranchTurn,
    TeaCacheState,
    plan_cache,
    run_blocks,
)
from model.templates import TEMPLATE_NAMES, compose_negative, compose_prompt
from model.text_encoder import TextEncoder
from model.vae import VAE, to_pil

__all__ = ["DenoiseState", "Pipeline"]

BRANCHES = ("cond", "uncond")


class Pipeline:
    """Network, text encoder and VAE of one checkpoint, on one device, and LoRAs for requests."""

    def __init__(
        self,
        *,
        dit: NextDiT,
        vae: VAE,
        text_encoder: TextEncoder,
        generation_config: GenerationConfig,
        loras: LoraRegistry | None = None,
        cache_config: CacheConfig | None = None,
    ) -> None:
        self.dit = dit
        self.vae = vae
        self.text_encoder = text_encoder
        self.generation_config = generation_config
        self.loras = loras
        self.cache_config = cache_config
        self.modulation = ModulationTable(dit)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.dit.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; latents between steps stay float32."""
        return self.dit.dtype

    @torch.inference_mode()
    def prepare(
        self, request: GenerationRequest, *, replay: Mapping[str, str] | None = None
    ) -> DenoiseState:
        """Everything that happens once per request: defaults, text, contexts, noise, schedule.

        Args:
            request: what to draw.
            replay: `cache_decisions` of an earlier run, to be made again.

        Raises:
            ValueError: one sentence, when this checkpoint cannot do what is asked.
        """
        resolved = self.generation_config.resolve(request)
        height, width = self._latent_size(resolved)
        sampler = make_sampler(
            resolved.sampler,
            time_grid=resolved.time_grid,
            num_inference_steps=resolved.num_inference_steps,
            shift=resolved.shift,
            sigmas=resolved.sigmas,
        )
        adapters = chosen_adapters(self.loras, resolved.loras or ())
        cache, uncached = plan_cache(resolved, sampler, self.cache_config, replay)
        prompt, negative = _texts(resolved)
        state = DenoiseState(
            request=resolved,
            sampler=sampler,
            guidance=_guidance(resolved),
            cond=self._context(prompt, adapters),
            uncond=None,
            samples=[
                sampler.start(self._noise(resolved.seed + k, height, width))
                for k in range(resolved.num_images)
            ],
            tokens_per_image=height * width // self.dit.config.patch_size**2,
            adapters=adapters,
            cache=cache,
            warnings=[*self._warnings(resolved), *uncached],
        )
        # Both truncation rules only ever switch guidance off: the first step speaks for all.
        if state.guided:
            state.uncond = self._context(negative, adapters)
        return state

    @torch.inference_mode()
    def denoise_step(self, states: Sequence[DenoiseState]) -> None:
        """Advance every state by one step, all branches of all images in one packed forward.

        Branches that their cache skips take part in it, except for the joint blocks.

        If the forward raises, no state has changed and the call can be repeated with fewer.
        """
        assert not any(state.finished for state in states)
        latents: list[Tensor] = []
        timesteps: list[float] = []
        contexts: list[Tensor] = []
        adapters: list[Adapters] = []
        turns: list[BranchTurn | None] = []
        for state in states:
            for kind, context in zip(BRANCHES, state.contexts(), strict=False):
                for image, sample in enumerate(state.samples):
                    latents.append(state.sampler.evaluation_point(sample))
                    timesteps.append(state.timestep)
                    contexts.append(context)
                    adapters.append(state.adapters)
                    turns.append(state.turn(image, kind))
        if not latents:
            return
        packed = self.dit.embed(
            latents,
            torch.tensor(timesteps, dtype=torch.float32),
            contexts,
            adapters,
            self.modulation.of(timesteps, adapters),
        )
        packed, caches = run_blocks(self.dit, packed, turns)
        velocities, kept = iter(self.dit.head(packed)), iter(caches)
        for state in states:
            _advance(state, velocities, kept)

    @torch.inference_mode()
    def decode(
        self, states: Sequence[DenoiseState], *, tiled: bool = False
    ) -> list[list[Image.Image]]:
        """Pictures of the latents as they stand, per state; equal sizes share a VAE call.

        With `tiled` the VAE works tile by tile whatever the size, in less memory.
        """
        latents = [x for state in states for x in state.latents]
        pixels = iter(self.vae.decode(latents, tiled=tiled))
        return [[to_pil(p) for p in islice(pixels, len(state.samples))] for state in states]

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        on_step: Callable[[Sequence[DenoiseState]], None] | None = None,
    ) -> list[list[Image.Image]]:
        """Pictures of every request, all advanced together.

        Args:
            requests: of any mixture of sizes and settings.
            on_step: called with all states after each packed forward, for progress.

        Returns:
            For each request its `num_images` pictures.

        Raises:
            ValueError: one sentence, when this checkpoint cannot do what is asked.
        """
        states = [self.prepare(request) for request in requests]
        while running := [state for state in states if not state.finished]:
            self.denoise_step(running)
            if on_step is not None:
                on_step(states)
        return self.decode(states)

    def _latent_size(self, request: ResolvedRequest) -> tuple[int, int]:
        """Latent rows and columns of a request."""
        multiple = self.vae.downscale * self.dit.config.patch_size
        _, rows, columns = self.dit.config.axes_lens
        for name, pixels, tokens in (
            ("width", request.width, columns),
            ("height", request.height, rows),
        ):
            if pixels % multiple or pixels > tokens * multiple:
                raise ValueError(
                    f"{name} {pixels} is not allowed: give a multiple of {multiple} "
                    f"up to {tokens * multiple}"
                )
        return request.height // self.vae.downscale, request.width // self.vae.downscale

    def _context(self, text: str, adapters: Adapters) -> Tensor:
        # One text at a time, so that its rounding cannot depend on its neighbours.
        return self.dit.encode_context(self.text_encoder.encode([text]), [adapters])[0]

    def _noise(self, seed: int, height: int, width: int) -> Tensor:
        """Start latents [C, H, W], float32, drawn on the CPU: the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, self.dit.config.in_channels, height, width)
        return torch.randn(shape, generator=generator, dtype=torch.float32)[0].to(self.device)

    def _warnings(self, request: ResolvedRequest) -> list[str]:
        warnings = []
        prompt, negative = _texts(request)
        texts = {"prompt": prompt}
        if request.guidance_scale > 1.0:
            texts["negative_prompt"] = negative
        for name, text in texts.items():
            dropped = self.text_encoder.dropped(text)
            if dropped:
                count = self.text_encoder.count_tokens(text) - self.text_encoder.max_tokens
                warnings.append(
                    f"{name} is longer than {self.text_encoder.max_tokens} tokens (template "
                    f"included): the last {count} were dropped, that is {_shortened(dropped)!r}"
                )
        meant = nearest(request.system_prompt, TEMPLATE_NAMES)
        if meant and request.system_prompt not in TEMPLATE_NAMES:
            warnings.append(f"system_prompt {request.system_prompt!r} is taken as free text{meant}")
        if request.cfg_renorm != "global" and request.cfg_renorm_scale != 1.0:
            warnings.append(
                f"cfg_renorm_scale {request.cfg_renorm_scale:g} has no effect with cfg_renorm "
                f"{request.cfg_renorm!r}"
            )
        return warnings


def _texts(request: ResolvedRequest) -> tuple[str, str]:
    """What the encoder reads for the cond and the uncond branch."""
    prompt = compose_prompt(request.prompt, request.system_prompt, request.panel)
    negative = compose_negative(
        request.negative_prompt,
        request.system_prompt,
        request.panel,
        with_template=request.negative_template,
    )
    return prompt, negative


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


def _guidance(request: ResolvedRequest) -> Guidance:
    return Guidance(
        guidance_scale=request.guidance_scale,
        cfg_trunc_ratio=request.cfg_trunc_ratio,
        cfg_trunc_t=request.cfg_trunc_t,
        cfg_renorm=request.cfg_renorm,
        cfg_renorm_scale=request.cfg_renorm_scale,
    )


def _advance(
    state: DenoiseState, velocities: Iterator[Tensor], caches: Iterator[TeaCacheState | None]
) -> None:
    """Take this state's velocities (cond of all images, then uncond) and step its solver."""
    guided, count = state.guided, len(state.samples)
    cond = list(islice(velocities, count))
    if guided:
        uncond = islice(velocities, count)
        cond = [state.guidance.combine(c, u) for c, u in zip(cond, uncond, strict=True)]
    state.before = state.samples
    state.samples = [
        state.sampler.step(sample, velocity)
        for sample, velocity in zip(state.samples, cond, strict=True)
    ]
    branches = [(image, kind) for kind in BRANCHES[: 1 + guided] for image in range(count)]
    kept = dict(zip(branches, islice(caches, len(branches)), strict=True))
    evaluated = [0] * count
    for (image, _), cache in kept.items():
        evaluated[image] += cache is None or cache.computed
    if state.cache is not None:
        state.cache.keep({branch: cache for branch, cache in kept.items() if cache is not None})
    state.steps_computed += max(evaluated) > 0
    state.steps_cfg += guided
    state.nfe += max(evaluated)
