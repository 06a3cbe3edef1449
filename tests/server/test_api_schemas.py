"""The body of `POST /generate`, the job it becomes, and the model's request say the same."""

import dataclasses
import typing
from typing import Any, Literal

import pytest

from model import request as model_request
from model.generation_config import load_generation_config
from model.request import GenerationRequest, LoraChoice, lora_choices
from model.samplers import SAMPLERS, TIME_GRIDS, make_sampler
from model.templates import PANEL_POSITIONS, Panel
from server.api import schemas
from server.api.admission import evaluations, price
from server.api.schemas import GenerateBody, PanelBody, job_spec, parse_generate
from server.protocol import JobSpec
from server.worker.engine import generation_request
from tests.server.fake_worker import MODEL


def names_of(message: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(message)}


def choices_of(body: Any, field: str) -> set[str]:
    """The names a field of literals allows."""
    annotation = body.model_fields[field].annotation
    found = [annotation, *typing.get_args(annotation)]
    return {n for a in found if typing.get_origin(a) is Literal for n in typing.get_args(a)}


def test_every_field_of_a_request_can_be_asked_for_over_http() -> None:
    wanted = names_of(GenerationRequest)
    assert wanted <= set(GenerateBody.model_fields)
    assert wanted <= names_of(JobSpec)
    elsewhere = {"priority", "deadline_s", "webhook_url"}  # of the job, not of the picture
    assert set(GenerateBody.model_fields) - elsewhere <= names_of(JobSpec)


def test_names_and_bounds_agree_with_the_model() -> None:
    assert choices_of(GenerateBody, "sampler") == set(SAMPLERS)
    assert choices_of(GenerateBody, "time_grid") == set(TIME_GRIDS)
    assert choices_of(GenerateBody, "cfg_renorm") == set(model_request.CFG_RENORMS)
    assert choices_of(GenerateBody, "cache") == {"off", *model_request.CACHE_PRESETS}
    assert choices_of(PanelBody, "position") == set(PANEL_POSITIONS)
    assert PanelBody().model_dump() == dataclasses.asdict(Panel())
    for ours, theirs in (
        ("MAX_TEXT", "MAX_TEXT"), ("MAX_IMAGES", "MAX_IMAGES"), ("MAX_SEED", "MAX_SEED"),
        ("MAX_SIGMAS", "MAX_STEPS"), ("MIN_SIGMA_STEP", "MIN_SIGMA_STEP"),
        ("MAX_PANEL_TEXT", "MAX_PANEL_TEXT"), ("SCHEDULE", "SCHEDULE"), ("MAX_LORAS", "MAX_LORAS"),
        ("MAX_LORA_NAME", "MAX_LORA_NAME"), ("MAX_LORA_SCALE", "MAX_LORA_SCALE"),
    ):  # fmt: skip
        assert getattr(schemas, ours) == getattr(model_request, theirs), ours


def test_a_body_reaches_the_model_as_it_was_sent() -> None:
    body = parse_generate(
        {"prompt": "x", "sampler": "midpoint", "sigmas": [1, 0.5], "negative_template": True,
         "panel": {"content": "edge map"}, "cfg_trunc_t": 0.25,
         "loras": [{"name": "ink", "scale": -1}, {"name": "wool"}]}
    )  # fmt: skip
    spec = JobSpec.from_json(job_spec(body, seed=0, output_format="png").to_json())
    request = generation_request(spec)
    assert request.settings == {
        "sampler": "midpoint", "sigmas": [1.0, 0.5], "negative_template": True,
        "panel": {"position": "lower half", "content": "edge map"}, "cfg_trunc_t": 0.25,
    }  # fmt: skip
    assert request.seed == 0
    assert lora_choices(request) == (LoraChoice("ink", -1.0), LoraChoice("wool", 1.0))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_inference_steps": 7},
        {"sampler": "midpoint"},
        {"sampler": "dpm", "num_inference_steps": 9},
        {"time_grid": "official", "num_inference_steps": 9},
        {"preset": "official"},
        {"preset": "official", "sampler": "dpm"},
        {"preset": "diffusers"},
        {"preset": "own"},
        {"preset": "own", "num_inference_steps": 5},
        {"preset": "official", "sigmas": [1.0, 0.5, 0.1]},
        {"sigmas": [1.0, 0.5], "sampler": "dpm"},
    ],
    ids=str,
)
@pytest.mark.parametrize("sigmas_by_default", [False, True])
def test_the_price_counts_the_evaluations_the_model_will_make(
    fields: dict[str, Any], sigmas_by_default: bool, tmp_path: Any
) -> None:
    defaults = '{"defaults": {"sigmas": [1, 0.7, 0.3, 0.1]}, ' if sigmas_by_default else "{"
    text = defaults + '"presets": {"own": {"sampler": "midpoint", "sigmas": [1, 0.4]}}}'
    (tmp_path / "generation_config.json").write_text(text)
    config = load_generation_config(tmp_path, shift=6.0, trained_size=128)
    presets = {name: dict(preset) for name, preset in config.presets.items()}
    info = dataclasses.replace(MODEL, defaults=dict(config.defaults), presets=presets)
    resolved = config.resolve(GenerationRequest("x", **fields))
    sampler = make_sampler(
        resolved.sampler,
        time_grid=resolved.time_grid,
        num_inference_steps=resolved.num_inference_steps,
        shift=resolved.shift,
        sigmas=resolved.sigmas,
    )
    assert evaluations(parse_generate({"prompt": "x", **fields}), info) == sampler.num_evaluations


def test_a_picture_says_how_it_was_made_unless_the_body_says_otherwise() -> None:
    for value, expected in ((None, True), (True, True), (False, False)):
        given = {} if value is None else {"embed_parameters": value}
        spec = job_spec(parse_generate({"prompt": "x", **given}), seed=0, output_format="png")
        assert JobSpec.from_json(spec.to_json()).embed_parameters is expected


def test_what_every_step_costs_is_not_multiplied_by_pixels() -> None:
    size = {"width": MODEL.default_width, "height": MODEL.default_height}
    info = dataclasses.replace(MODEL, step_cost_ms=100.0, step_fixed_ms=60.0)
    body = parse_generate({"prompt": "x", "num_inference_steps": 10, **size})
    assert price(body, info) == 1000
    four = parse_generate({"prompt": "x", "num_inference_steps": 10, "num_images": 4, **size})
    assert price(four, info) == 10 * (60 + 4 * 40)
    # An offer from before the split prices by pixels alone.
    assert price(four, dataclasses.replace(info, step_fixed_ms=0.0)) == 4000
