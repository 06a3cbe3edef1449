"""Prompt to picture without queue or HTTP: prepare, denoise step by step, decode.

The three stages are public because a server interleaves many requests: every `DenoiseState` is one
request on its way, and `denoise_step` advances any set of them in one packed forward, whatever
their sizes, step counts and guidance.

A *branch* is one sequence of that forward: one image with its prompt (cond), or with the negative
prompt (uncond).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from model.adapters import Adapters
from model.cache_config import CacheConfig
from model.flow import timestep_from_sigma
from model.generation_config import GenerationConfig
from model.guidance import Guidance
from model.lora_registry import LoraRegistry, chosen_adapters
from model.modulation import ModulationTable
from model.next_dit import NextDiT
from model.request import GenerationRequest, ResolvedRequest
from model.samplers import Sampler, SamplerState, make_sampler
from model.teacache import (
    BranchTurn,
    RequestCache,
    TeaCacheState,
    Threshold,
    plan_cache,
    run_blocks,
)
from model.templates import compose_negative, compose_prompt
from model.text_encoder import TextEncoder
from model.vae import VAE, to_pil

BRANCHES = ("cond", "uncond")


@dataclass
class DenoiseState:
    """One request between `prepare` and `decode`.

    Attributes:
        request: with nothing left to decide.
        sampler: its solver; shared by its images.
        guidance: its CFG settings.
        cond: refined context [L, d] of the prompt.
        uncond: refined context [L, d] of the negative prompt; None when no step is guided.
        samples: solver state of every image.
        before: the same before the last step; empty before the first.
        tokens_per_image: image tokens of one image.
        adapters: its LoRAs, on both branches.
        cache: what its branches remember from step to step; None where every step computes.
        warnings: sentences for the user.
        steps_computed: steps so far in which any branch ran the joint blocks.
        steps_cfg: steps so far that were guided.
        nfe: branches that ran the joint blocks so far for each image, cond and uncond; for the
            image with the most, where a threshold decides.
    """

    request: ResolvedRequest
    sampler: Sampler
    guidance: Guidance
    cond: Tensor
    uncond: Tensor | None
    samples: list[SamplerState]
    tokens_per_image: int
    adapters: Adapters = ()
    cache: RequestCache | None = None
    warnings: list[str] = field(default_factory=list)
    before: list[SamplerState] = field(default_factory=list)
    steps_computed: int = 0
    steps_cfg: int = 0
    nfe: int = 0

    @property
    def step_index(self) -> int:
        """Index of the next step, from 0; equals `num_steps` when finished."""
        return self.samples[0].evaluation

    @property
    def num_steps(self) -> int:
        """Steps from noise to data; one is one evaluation, so midpoint has two per interval."""
        return self.sampler.num_evaluations

    @property
    def finished(self) -> bool:
        """Whether only decoding is left."""
        return self.step_index == self.num_steps

    @property
    def latents(self) -> list[Tensor]:
        """Latents [C, H, W] of every image as they stand, float32."""
        return [sample.latents for sample in self.samples]

    @property
    def timestep(self) -> float:
        """What the network receives at the next step (0 = noise, 1 = data)."""
        return timestep_from_sigma(self.sampler.sigma_at(self.step_index))

    @property
    def guided(self) -> bool:
        """Whether the next step runs both branches."""
        interval = self.sampler.interval_of(self.step_index)
        return self.guidance.is_guided(interval, self.sampler.num_intervals, self.timestep)

    def turn(self, image: int, kind: str) -> BranchTurn | None:
        """The cache of one branch before the next step; None where it has none."""
        return None if self.cache is None else self.cache.turn((image, kind), self.step_index)

    @property
    def cache_decisions(self) -> dict[str, str]:
        """What a cache threshold decided, by branch and step: `prepare` can repeat it."""
        if self.cache is None or not isinstance(self.cache.default, Threshold):
            return {}
        return self.cache.decisions

    @property
    def prompt_tokens(self) -> int:
        """Tokens the prompt took, its template and the beginning-of-sequence token included."""
        return len(self.cond)

    @property
    def num_tokens(self) -> int:
        """Text and image tokens its next step adds to the packed forward; 0 when finished."""
        if self.finished:
            return 0
        return len(self.samples) * sum(
            len(context) + self.tokens_per_image for context in self.contexts()
        )

    @property
    def num_sequences(self) -> int:
        """Sequences its next step adds to the packed forward; 0 when finished."""
        return 0 if self.finished else len(self.samples) * len(self.contexts())

    @property
    def held_bytes(self) -> int:
        """Device memory it keeps between steps at the most: latents, contexts, its cache."""
        tensors = [self.cond, *([] if self.uncond is None else [self.uncond])]
        kept = sum(x.nbytes for x in tensors) + 3 * sum(x.nbytes for x in self.latents)
        if self.cache is not None:  # a signal and a residual of every token
            tokens = len(self.samples) * sum(len(x) + self.tokens_per_image for x in tensors)
            kept += 2 * tokens * self.cond.shape[-1] * self.cond.element_size()
        return kept

    @property
    def predicted(self) -> list[Tensor]:
        """Clean latents [C, H, W] of every image as the last step foresaw them, float32.

        Before the first step they are the noise itself.
        """
        if not self.before:
            return self.latents
        return [
            self.sampler.predicted(old, new)
            for old, new in zip(self.before, self.samples, strict=True)
        ]

    def contexts(self) -> list[Tensor]:
        """Contexts of the branches the next step runs: cond, then uncond if it is guided."""
        if not self.guided:
            return [self.cond]
        assert self.uncond is not None
        return [self.cond, self.uncond]


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
