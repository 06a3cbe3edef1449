"""Batch invariance at length: requests join, pause and leave at any step, and nobody notices."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GenerationRequest
from tests.model.conftest import max_difference

WORDS = ("red", "blue", "the", "circle", "above", "three", "small", "stars", "a", "night")
SIDES = st.sampled_from((16, 32, 48, 64, 96))


@st.composite
def requests(draw):
    """Any request the tiny checkpoint can do in a moment, with at most one truncation rule."""
    truncation = draw(st.sampled_from(({}, {"cfg_trunc_ratio": 0.5}, {"cfg_trunc_t": 0.4})))
    return GenerationRequest(
        " ".join(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40))),
        seed=draw(st.integers(0, 2**31)),
        width=draw(SIDES),
        height=draw(SIDES),
        num_images=draw(st.integers(1, 2)),
        num_inference_steps=draw(st.integers(1, 6)),
        guidance_scale=draw(st.sampled_from((1.0, 2.0, 4.0))),
        shift=draw(st.sampled_from((1.0, 6.0))),
        sampler=draw(st.sampled_from(("euler", "midpoint", "dpm"))),
        cfg_renorm=draw(st.sampled_from(("none", "global", "row"))),
        **truncation,
    )


@pytest.mark.very_slow
@pytest.mark.timeout(1200)
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(crowd=st.lists(requests(), min_size=2, max_size=6), seed=st.integers(0, 2**32))
def test_a_picture_does_not_depend_on_its_company(pipeline, crowd, seed):
    chance = random.Random(seed)
    states = [pipeline.prepare(request) for request in crowd]
    while running := [state for state in states if not state.finished]:
        chance.shuffle(running)
        pipeline.denoise_step(running[: chance.randint(1, len(running))])
    for images, request in zip(pipeline.decode(states), crowd, strict=True):
        (alone,) = pipeline.generate([request])
        for image, expected in zip(images, alone, strict=True):
            assert max_difference(image, expected) <= 1.0
