import numpy as np
import pytest

from trainer.demo.dataset import scene_at
from trainer.demo.grammar import LEVELS, caption
from trainer.demo.prompts import TASKS, eval_prompts


def _plain(text: str) -> str:
    """A caption without the variation of capitals and full stop."""
    return text.lower().rstrip(".")


@pytest.fixture(scope="module")
def prompts():
    return [p for level in ("short", "detailed") for p in eval_prompts(level, per_task=12)]


def test_prompts_are_deterministic_and_distinct(prompts):
    assert eval_prompts("short", per_task=12) == prompts[: 12 * len(TASKS)]
    assert len({prompt.text for prompt in prompts}) == len(prompts)


def test_tasks_take_turns(prompts):
    assert [prompt.task for prompt in prompts[:12]] == [*TASKS, *TASKS]


def test_fewer_prompts_are_the_first_of_more(prompts):
    assert eval_prompts("short", per_task=4) == prompts[: 4 * len(TASKS)]


def test_expectations_fit_their_task(prompts):
    for prompt in prompts:
        groups, relation = prompt.expected.groups, prompt.expected.relation
        total = sum(group.count for group in groups)
        assert (relation is not None) == (prompt.task == "position")
        if prompt.task in ("single_object", "colors"):
            assert total == 1
        elif prompt.task == "counting":
            assert len(groups) == 1
            assert 2 <= total <= 4
        else:
            assert len(groups) == total == 2
        if prompt.task in ("colors", "position", "color_attribution"):
            assert all(group.color is not None for group in groups)


def test_short_prompts_name_what_is_expected(prompts):
    for prompt in prompts:
        for group in prompt.expected.groups:
            assert group.shape in prompt.text.lower()
            assert group.color is None or group.color in prompt.text.lower()


def test_training_captions_never_hold_a_held_out_prompt(prompts):
    held_out = {_plain(prompt.text) for prompt in prompts}
    rng = np.random.default_rng(0)
    for index in range(1500):
        scene = scene_at(0, index)
        for level in LEVELS:
            assert _plain(caption(scene, level, "en", rng)) not in held_out
