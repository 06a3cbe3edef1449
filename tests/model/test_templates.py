"""Templates by name, negatives in both dialects, and prompts that pass untouched."""

import json
import unicodedata

import pytest

from model.request import GenerationRequest
from model.templates import (
    PANEL_POSITIONS,
    TEMPLATE_NAMES,
    TEMPLATES,
    Panel,
    compose_negative,
    compose_prompt,
)
from server.api.schemas import job_spec, parse_generate
from server.protocol import JobSpec
from server.worker.engine import generation_request

ANY_LANGUAGE = {
    "Chinese": "一只红色的猫坐在蓝色正方形上，背景是星空。",
    "Japanese": "赤い丸の上に「青い四角」、ｶﾀｶﾅも。",
    "Russian": "красный круг над синим квадратом, ёж",
    "German": "große Füße, ein weißer Würfel & „Anführung“",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪 ❤️ 🏳️‍🌈",
    "combining": "e\u0301 a\u030a n\u0303 \u1112\u1161\u11ab Z\u0351\u036b",
    "right to left": "قطة حمراء \u202e abc \u202c עברית",
    "spaces": "  two  spaces,\ttab\nnew line\u00a0nbsp\u3000wide \ufeff",
    "compatibility": "\ufb01 \u2460 \u00bd \uf900 \u212b",
}


def test_templates():
    assert compose_prompt("a cat", "empty") == "a cat"
    assert compose_prompt("a cat", "real") == TEMPLATES["real"] + " <Prompt Start> a cat"
    assert compose_prompt("a cat", "Paint.") == "Paint. <Prompt Start> a cat"
    assert set(TEMPLATES) == {"base", "real", "align", "aesthetics", "4grid"}
    assert set(TEMPLATE_NAMES) == {*TEMPLATES, "empty", "panel"}


def test_default_template_is_that_of_diffusers(reference):
    assert TEMPLATES["real"] == reference.system_prompt


def test_dual_panel_template_is_that_of_the_paper():
    assert compose_prompt("a cat", "panel") == (
        "Generate a dual-panel image where the <lower half> displays a <depth map>, while the "
        "<upper half> retains the original image for direct visual comparison. <Prompt Start> a cat"
    )
    text = compose_prompt("a cat", "panel", Panel("left half", "edge map"))
    assert "the <left half> displays a <edge map>, while the <right half> retains" in text


def test_the_other_half_follows():
    for half, other in PANEL_POSITIONS.items():
        assert half != other
        assert PANEL_POSITIONS[other] == half


@pytest.mark.parametrize(
    ("negative", "with_template", "text"),
    [
        ("", False, ""),
        ("", True, ""),
        ("grey", False, "grey"),
        ("grey", True, TEMPLATES["base"] + " <Prompt Start> grey"),
    ],
)
def test_negatives_in_both_dialects(negative, with_template, text):
    assert compose_negative(negative, "base", None, with_template=with_template) == text


def test_a_templated_negative_follows_the_panel_of_its_request():
    panel = Panel("upper half", "sketch")
    negative = compose_negative("grey", "panel", panel, with_template=True)
    assert negative == compose_prompt("grey", "panel", panel)


@pytest.mark.parametrize("prompt", ANY_LANGUAGE.values(), ids=ANY_LANGUAGE)
def test_prompts_pass_untouched_from_the_body_to_the_tokens(pipeline, prompt):
    body = parse_generate(json.loads(json.dumps({"prompt": prompt, "negative_prompt": prompt})))
    spec = JobSpec.from_json(job_spec(body, seed=1, output_format="png").to_json())
    request = generation_request(spec)
    resolved = pipeline.generation_config.resolve(request)
    assert (resolved.prompt, resolved.negative_prompt) == (prompt, prompt)
    assert compose_prompt(resolved.prompt, "real").endswith(" <Prompt Start> " + prompt)
    tokenizer = pipeline.text_encoder.tokenizer
    assert tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True) == prompt


@pytest.mark.parametrize("text", ["é", "Å", "한", "ñandú"])
def test_unicode_forms_are_different_prompts(pipeline, reference, text):
    """Composed and decomposed text are different tokens, here and in diffusers: a prompt must mean
    the same in both, so nothing is normalised."""
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert composed != decomposed
    ours = [pipeline.text_encoder.tokenizer(t)["input_ids"] for t in (composed, decomposed)]
    theirs = [reference.tokenizer(t)["input_ids"] for t in (composed, decomposed)]
    assert ours == theirs
    assert ours[0] != ours[1]
    assert pipeline.prepare(GenerationRequest(decomposed)).request.prompt == decomposed
