"""Small real stand-ins: a clock, a pipeline that draws without a model, and a way to wait."""

import dataclasses
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from server.protocol import ModelInfo


@dataclass
class FakeClock:
    """Milliseconds that pass only when told."""

    ms: int = 1_700_000_000_000

    def __call__(self) -> int:
        return self.ms

    def advance(self, seconds: float) -> None:
        self.ms += round(seconds * 1000)


@dataclass(frozen=True)
class FakeResolved:
    prompt: str
    width: int
    height: int
    num_images: int
    num_inference_steps: int
    seed: int
    negative_prompt: str | None = None


@dataclass
class FakeState:
    request: FakeResolved
    step_index: int = 0
    steps_computed: int = 0
    steps_cfg: int = 0
    nfe: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return self.request.num_inference_steps

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt.split())

    @property
    def cache_decisions(self) -> dict[str, str]:
        return {}

    @property
    def predicted(self) -> list[int]:
        return [self.step_index] * self.request.num_images

    @property
    def held_bytes(self) -> int:
        return 0

    @property
    def num_sequences(self) -> int:
        return self.request.num_images

    @property
    def num_tokens(self) -> int:
        if self.step_index == self.num_steps:
            return 0
        return self.request.num_images * self.request.width * self.request.height // 256


class FakePipeline:
    """Counts steps and draws one colour from the seed. Prompts steer it:

    `huge` runs out of memory whoever is beside it; so does any step or decoding of more than
    `memory` tokens, the latter unless it is tiled. `refuse` is a ValueError in prepare; `explode`
    raises in every step it takes part in; `kill` kills its own process with SIGKILL in its second
    step, as a poison job does; `blind` cannot be decoded.
    """

    def __init__(
        self, step_s: float = 0.0, num_steps: int = 4, memory: float = float("inf")
    ) -> None:
        self.step_s = step_s
        self.memory = memory
        self.num_steps = num_steps
        self.batches: list[list[str]] = []

    def prepare(self, request) -> FakeState:
        if request.prompt == "refuse":
            raise ValueError("prompt 'refuse' is not allowed: give another")
        return FakeState(
            FakeResolved(
                prompt=request.prompt,
                width=request.width or 16,
                height=request.height or 16,
                num_images=request.num_images,
                num_inference_steps=request.num_inference_steps or self.num_steps,
                seed=request.seed,
            )
        )

    def denoise_step(self, states) -> None:
        self.batches.append([state.request.prompt for state in states])
        time.sleep(self.step_s)
        self._allocate(sum(state.num_tokens for state in states), states)
        for state in states:
            if state.request.prompt == "explode":
                raise RuntimeError("a bug")
            if state.request.prompt == "kill" and state.step_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        for state in states:
            state.step_index += 1
            state.steps_computed += 1
            state.nfe += 1

    def _allocate(self, tokens: float, states) -> None:
        if tokens > self.memory or any(state.request.prompt == "huge" for state in states):
            raise MemoryError(f"{tokens} tokens")

    def decode(self, states, *, tiled=False) -> list[list[Image.Image]]:
        pixels = sum(s.request.num_images * s.request.width * s.request.height for s in states)
        self._allocate(0 if tiled else pixels / 256, states)
        if any(state.request.prompt == "blind" for state in states):
            raise RuntimeError("no picture")
        return [
            [
                Image.new("RGB", (s.request.width, s.request.height), (s.request.seed + k) % 256)
                for k in range(s.request.num_images)
            ]
            for s in (state for state in states)
        ]


FAKE_INFO = ModelInfo(
    name="fake",
    hash="0" * 64,
    min_size=16,
    max_size=128,
    size_multiple=16,
    default_width=16,
    default_height=16,
    max_steps=100_000,
    default_steps=4,
    max_prompt_tokens=256,
    step_cost_ms=1.0,
)


def fake_model(step_s: float = 0.0, num_steps: int = 4):
    """A LoadedModel around a FakePipeline, without importing torch early."""
    from server.worker.loading import LoadedModel

    return LoadedModel(FakePipeline(step_s, num_steps), dataclasses.replace(FAKE_INFO))


def wait_until(condition, timeout_s: float = 20.0, what: str = "the condition"):
    """Return the first true value of `condition()`; fails loudly after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come true within {timeout_s} s")


def set_clock_ahead(seconds: float) -> None:
    """Let this process's wall clock, not its monotonic one, be wrong from here on."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + round(seconds * 1e9)


def run_fake_worker() -> int:
    """`python -m tests.fakes STEP_S NUM_STEPS [CLOCK_S]`: a worker process with a fake pipeline,
    whose clock is CLOCK_S ahead of the machine's; `flaky://` stores pictures badly.
    """
    import sys

    from server.config import load_settings
    from server.worker.main import run_worker
    from tests.chaos.flaky_store import register

    register()
    step_s, num_steps = float(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        set_clock_ahead(float(sys.argv[3]))
    return run_worker(load_settings(), Path("."), load=lambda *_: fake_model(step_s, num_steps))


if __name__ == "__main__":
    raise SystemExit(run_fake_worker())
