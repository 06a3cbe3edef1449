"""DenoiseState: one request between its preparation and its picture."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from model.adapters import Adapters
from model.flow import timestep_from_sigma
from model.guidance import Guidance
from model.request import ResolvedRequest
from model.samplers import Sampler, SamplerState
from model.teacache import BranchTurn, RequestCache, Threshold


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
